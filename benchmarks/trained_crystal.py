"""What only a trained model can show: relaxation in both precisions, elastic constants, dimers.

    python benchmarks/trained_crystal.py MODEL SYMBOL --out FILE

Relaxation: a rattled cubic supercell, float32 to 1e-3 eV/angstrom and float64 to 1e-5.  Elastic
constants of the cubic crystal by strains of 0.5 %, once from energies and once from stresses.
Dimer: 0.3 angstrom to the cutoff in steps of 0.01; tortuosity is the length of the way in energy
over the shortest one, flips are changes of sign of the force beyond 0.01 eV/angstrom.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.units import GPa

from mlip.calculators.eq_calculator import EqCalculator


def relaxation(model: str, symbol: str) -> dict[str, float]:
    """Steps, and differences of the float32 minimum to that of float64."""
    ends = {}
    for dtype, fmax in (("float32", 1e-3), ("float64", 1e-5)):
        atoms = bulk(symbol, cubic=True) * 2
        atoms.rattle(0.05, seed=0)
        atoms.calc = EqCalculator(model, dtype=dtype)
        run = BFGS(FrechetCellFilter(atoms), logfile=None)
        converged = run.run(fmax=fmax, steps=500)
        scaled = atoms.get_scaled_positions(wrap=False)
        scaled -= scaled.mean(axis=0)  # nothing holds the crystal in place
        ends[dtype] = (run.nsteps if converged else -1, atoms.get_potential_energy(), scaled, atoms)
    difference = (ends["float32"][2] - ends["float64"][2]) @ ends["float64"][3].cell[:]
    return {
        "steps_float32": ends["float32"][0],
        "steps_float64": ends["float64"][0],
        "energy_difference_meV_per_atom": 1e3
        * abs(ends["float32"][1] - ends["float64"][1])
        / len(ends["float64"][3]),
        "position_difference_A": float(np.abs(difference).max()),
    }


def elastic(model: str, symbol: str, size: float = 0.005) -> dict[str, float]:
    """C11, C12, C44 in GPa from energies and from stresses, with the ions relaxed."""
    crystal = bulk(symbol, cubic=True)
    crystal.calc = EqCalculator(model, dtype="float64")
    BFGS(FrechetCellFilter(crystal), logfile=None).run(fmax=1e-5, steps=500)

    def strained(strain: np.ndarray) -> Atoms:
        atoms = crystal.copy()
        atoms.set_cell(atoms.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
        atoms.calc = crystal.calc
        BFGS(atoms, logfile=None).run(fmax=1e-6, steps=200)
        return atoms

    V = crystal.get_volume()

    def curvature(strain: np.ndarray) -> float:
        e = [strained(s * size * strain).get_potential_energy() for s in (-1, 0, 1)]
        return (e[0] - 2 * e[1] + e[2]) / size**2 / V / GPa

    def slope(strain: np.ndarray) -> np.ndarray:
        up, down = (strained(s * size * strain).get_stress() for s in (1, -1))
        return (up - down) / (2 * size) / GPa

    x, y = np.diag([1.0, 0, 0]), np.diag([0, 1.0, 0])
    shear = np.array([[0, 0, 0], [0, 0, 0.5], [0, 0.5, 0]])
    along = slope(x)
    C11 = curvature(x)
    return {
        "C11_energy": C11,
        "C11_stress": along[0],
        "C12_energy": curvature(x + y) / 2 - C11,
        "C12_stress": along[1],
        "C12_other_axis_stress": along[2],
        "C44_energy": curvature(shear),
        "C44_stress": slope(shear)[3],
    }


def dimer(model: str, symbol: str) -> dict[str, float]:
    """Shape of the curve of two atoms."""
    calc = EqCalculator(model, dtype="float64")
    r = np.arange(0.3, calc.potentials[0].cutoff, 0.01)
    frames = [Atoms([symbol] * 2, positions=[[0, 0, 0], [0, 0, d]]) for d in r]
    E = np.array([calc.get_potential_energy(atoms) for atoms in frames])
    F = np.array([calc.get_forces(atoms)[1, 2] for atoms in frames])
    inner = r < 1.4 * covalent_radii[atomic_numbers[symbol]]
    signs = np.sign(F[np.abs(F) > 0.01])
    way = np.abs(np.diff(E)).sum()
    return {
        "rises_inside": float((np.diff(E[inner]) < 0).all()),
        "tortuosity": way / (E[0] - E.min() + abs(E[-1] - E.min())),
        "flips": int((np.diff(signs) != 0).sum()),
        "largest_step_outside_eV": float(np.abs(np.diff(E[~inner])).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("symbol")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    result = {
        "relaxation": relaxation(a.model, a.symbol),
        "elastic_GPa": elastic(a.model, a.symbol),
        "dimer": dimer(a.model, a.symbol),
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
