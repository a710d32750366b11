"""What a GPU makes of this package, in ten minutes: ``python benchmarks/gpu/run.py``.

Four parts, each written to the result as soon as it is there:

- exactness: every model in float64 on the device and on the CPU, and in float32;
- molecular dynamics of silicon, 64 to 10 648 atoms, plain, the first model also recorded, and
  compiled and recorded: ms/step, atoms/s, memory;
- batched relaxations of rattled silicon cells: structure-steps per second;
- training on the shipped ethanol frames: molecules per second.

If mace-torch can be imported, its small model (with cuEquivariance, if that is there) is timed
beside ours in the dynamics.  All but the relaxations take random weights.  ``--quick`` makes
everything small, to see whether it runs; it runs on a CPU, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.units import fs

from mlip.calculators import EqCalculator, relax_many
from mlip.data.graph import AtomicGraph
from mlip.models import MODELS, build
from mlip.potential import Potential
from mlip.training.sizes import SIZES

HERE = Path(__file__).parent
PROGRAMS = ("facet", "gaunt", "ponita", "transip")  # models that can be compiled and recorded
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def potential(name: str, device: torch.device, dtype: torch.dtype) -> Potential:
    """Random weights, the same for every device; ``name`` or ``name:size``."""
    kind, _, size = name.partition(":")
    torch.manual_seed(0)
    model = build(kind, **{"cutoff": 5.0, **SIZES[kind][size or "medium"]})
    with torch.no_grad():  # readouts begin at zero
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Potential(model, torch.zeros(119)).to(dtype).to(device).eval()


def exactness(device: torch.device) -> list[dict[str, Any]]:
    """Largest differences from float64 on the CPU: eV/atom and eV/angstrom."""
    rng = np.random.default_rng(0)
    frames = [molecule("CH3CH2OH"), bulk("Si", cubic=True) * 2]
    for atoms in frames:
        atoms.rattle(0.1, rng=rng)
    rows = []
    for name in MODELS:
        row: dict[str, Any] = {"model": name}
        cpu = torch.device("cpu")
        reference = potential(f"{name}:small", cpu, torch.float64)
        graphs = [AtomicGraph.from_atoms(atoms, reference.cutoff) for atoms in frames]
        expected = [reference(graph) for graph in graphs]
        for dtype in (torch.float64, torch.float32):
            other = potential(f"{name}:small", cpu, torch.float64).to(dtype).to(device)
            found = [other(graph.to(device)) for graph in graphs]
            kind = str(dtype)[6:]
            row[f"energy_{kind}"] = max(
                float((a["energy"] - b["energy"].cpu()).abs().max()) / len(atoms)
                for a, b, atoms in zip(expected, found, frames, strict=True)
            )
            row[f"forces_{kind}"] = max(
                float((a["forces"] - b["forces"].cpu()).abs().max())
                for a, b in zip(expected, found, strict=True)
            )
        rows.append(row)
    return rows


def dynamics(
    calculator: Calculator, device: torch.device, cells: int, steps: int
) -> dict[str, float]:
    """Median ms per step of NVE at 300 K, and the peak of memory in MiB."""
    atoms = bulk("Si", cubic=True) * (cells, cells, cells)
    atoms.calc = calculator
    MaxwellBoltzmannDistribution(atoms, temperature_K=600, rng=np.random.default_rng(0))
    run = VelocityVerlet(atoms, 1.0 * fs)
    run.run(5)  # kernels are loaded, the allocator has its blocks
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(steps):
        synchronize(device)
        begin = time.perf_counter()
        run.run(1)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds)
    result = {"atoms": len(atoms), "ms": 1e3 * step, "atoms_per_second": len(atoms) / step}
    if device.type == "cuda":
        result["peak_MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
    return result


def all_sizes(
    calculator: Calculator, device: torch.device, cells: Sequence[int], steps: int
) -> list[dict[str, float]]:
    """``dynamics`` of cubes of so many cells."""
    return [dynamics(calculator, device, n, steps) for n in cells]


def accelerated_sizes(
    model: str, ways: list[str], device: torch.device, cells: Sequence[int], steps: int
) -> list[dict[str, float]]:
    """``all_sizes`` of one of our models."""
    plain = potential(model, device, torch.float32)
    calculator = EqCalculator(plain, device=device, accelerate=ways or None)
    return all_sizes(calculator, device, cells, steps)


def mace(device: torch.device) -> Calculator | None:
    """mace-torch small with random weights, with cuEquivariance where it is installed."""
    if importlib.util.find_spec("mace") is None:
        return None
    from mace.calculators import MACECalculator
    from peers import mace as on_cpu

    calculator = on_cpu("small", ["Si"], "float32")
    fast = device.type == "cuda" and importlib.util.find_spec("cuequivariance_torch") is not None
    return MACECalculator(
        models=calculator.models[0],
        device=device.type,
        default_dtype="float32",
        enable_cueq=fast,
    )


def relaxations(device: torch.device, number: int) -> list[dict[str, float]]:
    """Cells and positions of rattled eight-atom cells with the shipped model."""
    rng = np.random.default_rng(0)
    frames: list[Atoms] = []
    for _ in range(number):
        atoms = bulk("Si", cubic=True)
        strain = rng.normal(0, 0.02, (3, 3))
        atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.rattle(0.1, rng=rng)
        frames.append(atoms)
    rows = []
    calculator = EqCalculator("silicon", device=device)
    for max_atoms in (64, 512, 4096):
        relax_many(frames[:1], calculator, cell=True, max_steps=2)
        begin = time.perf_counter()
        results = relax_many(frames, calculator, cell=True, max_atoms=max_atoms, fmax=0.02)
        seconds = time.perf_counter() - begin
        steps = sum(result.steps for result in results)
        rows.append(
            {
                "max_atoms": max_atoms,
                "structures": number,
                "converged": sum(result.converged for result in results),
                "structure_steps_per_second": steps / seconds,
            }
        )
    return rows


def training(device: torch.device, model: str, batch_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Molecules per second for each batch size."""
    return [
        {"batch_size": n, "molecules_per_second": molecules_per_second(device, model, n)}
        for n in batch_sizes
    ]


def molecules_per_second(device: torch.device, model: str, batch_size: int) -> float:
    """Of the third epoch of a training, with loading and all."""
    kind, _, size = model.partition(":")
    data = ROOT / "examples" / "data" / "ethanol_train.h5"
    with tempfile.TemporaryDirectory() as run:
        subprocess.run(
            [
                sys.executable, "-m", "mlip", "train", str(HERE / "training.yaml"),
                f"data.train={data}", f"data.batch_size={batch_size}", f"run_dir={run}",
                f"model.name={kind}", f"model.size={size}", f"runtime.device={device.type}",
            ],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        lines = (Path(run) / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = rows[-1]["step"] - rows[-2]["step"]
    seconds = rows[-1]["seconds"] - rows[-2]["seconds"]
    return steps * batch_size / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["facet:small", "facet:medium", "escaip"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    a = parser.parse_args()
    device = torch.device(a.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    result: dict[str, Any] = {"hardware": hardware, "torch": torch.__version__}

    def part(name: str, make: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        try:
            result[name] = make()
        except Exception as error:  # the other parts are still of interest
            result[name] = f"failed: {type(error).__name__}: {error}"
        synchronize(device)
        print(f"{name} ({time.perf_counter() - begin:.0f} s)")
        rows = result[name] if isinstance(result[name], list) else [result[name]]
        for row in rows:
            cells = row.items() if isinstance(row, dict) else [("", row)]
            text = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in cells)
            print("   ", "  ".join(text), flush=True)
        a.out.write_text(json.dumps(result, indent=1) + "\n")

    part("exactness", lambda: exactness(device))
    sizes, steps = ((1, 2), 2) if a.quick else ((2, 3, 4, 5, 8, 11), 20)
    for model in a.models:
        ways: list[list[str]] = [[]]
        if device.type == "cuda" and model == a.models[0] and model.startswith(PROGRAMS):
            ways += [["cudagraph"], ["compile", "cudagraph"]]
        for way in ways:
            name = " + ".join([f"dynamics {model}", *way])
            part(name, partial(accelerated_sizes, model, way, device, sizes, steps))
    peer = mace(device)
    if peer is not None:
        few = [n for n in sizes if n <= 8]
        part("dynamics mace-torch small", partial(all_sizes, peer, device, few, steps))
    part("relaxations", lambda: relaxations(device, 4 if a.quick else 512))
    for model in ("facet:small", "facet:medium"):
        batches = (5,) if a.quick else (5, 32, 128)
        part(f"training {model}", partial(training, device, model, batches))


if __name__ == "__main__":
    main()
