"""Cell relaxation of 100 rattled crystals: in batches, one by one, and with another package in ASE.

    MLIP_DATASETS=... PEERS=... python benchmarks/relax_many.py MODELS --peer mace-small

MODELS: a folder with Si/best.safetensors, and the same for Cu, Li and Mo (``mlearn.sh`` makes
them).  25 supercells of each element's CIF, of 8 to 16 atoms, are strained and rattled at random.
Throughput is in structure-steps per second; the peer has random weights and takes a few steps with
some of the structures.  Minima of batches and of one by one are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.io import read, write
from speed import cpu_name, environment, python_of

from mlip.allocator import tune_allocator
from mlip.calculators import EqCalculator, relax, relax_many

HERE = Path(__file__).parent
REPEAT = {"Si": (2, 2, 1), "Cu": (2, 1, 2), "Li": (2, 2, 2), "Mo": (2, 2, 2)}


def crystals(number: int) -> list[Atoms]:
    """``number`` of each element."""
    rng = np.random.default_rng(0)
    frames = []
    for element, repeat in REPEAT.items():
        atoms = read(Path(os.environ["MLIP_DATASETS"]) / "crystals_cif" / f"{element}.cif")
        if element == "Li":  # the CIF is the low-temperature phase
            atoms = bulk("Li", "bcc", a=3.5, cubic=True)
        atoms = make_supercell(atoms, np.diag(repeat))
        for _ in range(number):
            frame = atoms.copy()
            strain = rng.normal(0, 0.02, (3, 3))
            frame.set_cell(frame.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
            frame.positions += rng.normal(0, 0.1, frame.positions.shape)
            frames.append(frame)
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("--number", type=int, default=25, help="crystals of each element")
    parser.add_argument("--fmax", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", default="mace-small")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "relax_many.json")
    a = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(a.threads)
    frames = crystals(a.number)
    by_element = {e: [f for f in frames if f.symbols[0] == e] for e in REPEAT}
    result: dict = {"cpu": cpu_name(), "crystals": len(frames), "threads": a.threads}
    found: dict[str, list] = {}
    for name, function in (("one_by_one", relax), ("batches", relax_many)):
        found[name], seconds = [], 0.0
        for element, members in by_element.items():
            calculator = EqCalculator(a.models / element / "best.safetensors", dtype="float32")
            function(members[:1], calculator, max_steps=1)  # warms up
            begin = time.perf_counter()
            found[name] += function(members, calculator, cell=True, fmax=a.fmax)
            seconds += time.perf_counter() - begin
        steps = sum(r.steps for r in found[name])
        result[name] = {
            "seconds": seconds,
            "converged": sum(r.converged for r in found[name]),
            "structure_steps_per_second": steps / seconds,
        }
        print(name, result[name], flush=True)
    difference = [
        abs(x.energy - y.energy) / len(x.atoms)
        for x, y in zip(found["one_by_one"], found["batches"], strict=True)
    ]
    result["largest_energy_difference_meV_per_atom"] = 1e3 * max(difference)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "some.xyz"
        write(file, [frame for members in by_element.values() for frame in members[:2]])
        command = [python_of(a.peer), "-W", "ignore", str(HERE / "relax_worker.py")]
        answer = subprocess.run(
            [*command, a.peer, str(file), "5", str(a.threads)],
            capture_output=True, text=True, check=True, env=environment(a.threads),
        )  # fmt: skip
    line = next(x for x in answer.stdout.splitlines() if x.startswith("RESULT "))
    result[a.peer] = json.loads(line.removeprefix("RESULT "))
    for name in ("one_by_one", "batches"):
        result[name][f"times_{a.peer}"] = (
            result[name]["structure_steps_per_second"]
            / result[a.peer]["structure_steps_per_second"]
        )
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
