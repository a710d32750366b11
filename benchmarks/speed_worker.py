"""One package of ``speed.py``: reads the name of a system, answers with seconds per step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator

STEPS = {"molecule": 10, "Si8": 10, "Si64": 5, "Si216": 3}


def system(name: str) -> Atoms:
    if name == "molecule":  # 27 atoms, C, H, N, O, about the neighbours of 3BPA
        atoms = molecule("C6H6") + molecule("CH3CH2NH2") + molecule("H2O") + molecule("CO")
        for k, start in enumerate((12, 22, 25)):
            atoms.positions[start:] += [1.1, 0.6 * (-1) ** k, 2.6]
        return atoms
    n = round((int(name[2:]) / 8) ** (1 / 3))
    return bulk("Si", cubic=True) * (n, n, n)


def mlip_calculator(name: str) -> Calculator:
    """A model file, or a model of this package with random weights: ``name`` or ``name:size``."""
    from mlip.calculators.eq_calculator import EqCalculator
    from mlip.models import build
    from mlip.potential import Potential
    from mlip.training.config import SIZES

    if Path(name).is_file():
        return EqCalculator(name, device="cpu", dtype="float32")
    kind, _, size = name.partition(":")
    model = build(kind, **{"cutoff": 5.0, **SIZES[kind][size or "medium"]})
    return EqCalculator(Potential(model, torch.zeros(119)), device="cpu", dtype="float32")


def mace_calculator(size: str, symbols: set[str]) -> Calculator:
    """mace-torch: two layers, l <= 3, correlation 3, cutoff 5 angstrom."""
    from ase.data import atomic_numbers
    from e3nn import o3
    from mace.calculators import MACECalculator
    from mace.modules import ScaleShiftMACE, interaction_classes

    block = interaction_classes["RealAgnosticResidualInteractionBlock"]
    numbers = sorted(atomic_numbers[s] for s in symbols)
    model = ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(numbers),
        hidden_irreps=o3.Irreps({"small": "128x0e", "medium": "128x0e+128x1o"}[size]),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(numbers)),
        avg_num_neighbors=20,
        atomic_numbers=numbers,
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        radial_MLP=[64, 64, 64],
    )
    return MACECalculator(models=model, device="cpu", default_dtype="float32")


def resident(field: str) -> float:
    """MiB of the process: VmRSS now, or VmHWM, the peak since ``forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    package, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    calculators: dict[str, Calculator] = {}
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        name = line.strip()
        atoms = system(name)
        if name not in calculators:
            if package.startswith("mace-"):
                symbols = set(atoms.get_chemical_symbols())
                calculators[name] = mace_calculator(package.removeprefix("mace-"), symbols)
            else:
                calculators[name] = mlip_calculator(package)
            one = Atoms("Si", cell=[3, 3, 3], pbc=True) if name != "molecule" else atoms[:2]
            one.calc = calculators[name]
            one.get_forces()  # libraries and kernels are loaded now, too
        atoms.calc = calculators[name]
        seconds = []
        start = atoms.positions.copy()
        forget_peak()
        before = resident("VmRSS")
        for step in range(STEPS[name] + 1):
            atoms.positions = start + rng.normal(0, 0.02, start.shape)
            begin = time.perf_counter()
            atoms.get_potential_energy()
            atoms.get_forces()
            if atoms.pbc.all():
                atoms.get_stress()
            if step:  # the first warms up
                seconds.append(time.perf_counter() - begin)
        answer = {"seconds": seconds, "peak_MiB": resident("VmHWM") - before}
        print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
