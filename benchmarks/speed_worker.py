"""One package of ``speed.py``: reads the name of a system, answers with seconds per step."""

from __future__ import annotations

import json
import sys
import time

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


def mlip_calculator(path: str, symbols: set[str]) -> Calculator:
    from mlip.calculators.eq_calculator import EqCalculator
    from mlip.models import build
    from mlip.potential import Potential

    model = path or Potential(build("facet", cutoff=5.0), torch.zeros(119))
    return EqCalculator(model, device="cpu", dtype="float32")


def mace_calculator(symbols: set[str]) -> Calculator:
    """mace-torch "small": 128x0e, two layers, l <= 3, correlation 3, cutoff 5 angstrom."""
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
        hidden_irreps=o3.Irreps("128x0e"),
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


def main() -> None:
    package, threads, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    calculators: dict[str, Calculator] = {}
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        name = line.strip()
        atoms = system(name)
        if name not in calculators:
            symbols = set(atoms.get_chemical_symbols())
            if package == "facet":
                calculators[name] = mlip_calculator(path, symbols)
            else:
                calculators[name] = mace_calculator(symbols)
        atoms.calc = calculators[name]
        seconds = []
        start = atoms.positions.copy()
        for step in range(STEPS[name] + 1):
            atoms.positions = start + rng.normal(0, 0.02, start.shape)
            begin = time.perf_counter()
            atoms.get_potential_energy()
            atoms.get_forces()
            if atoms.pbc.all():
                atoms.get_stress()
            if step:  # the first warms up
                seconds.append(time.perf_counter() - begin)
        print("RESULT " + json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
