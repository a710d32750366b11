"""Relax an element's crystal, fit its equation of state, compare with all-electron PBE values.

MLIP_DATASETS=... python benchmarks/equilibrium.py MODEL ELEMENT --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.optimize import BFGS
from ase.units import GPa

from mlip.calculators.eq_calculator import EqCalculator

PHASE = {"Si": "Diamond", "Cu": "FCC", "Li": "BCC", "Mo": "BCC"}
# All-electron PBE, conventional lattice constant (angstrom) and bulk modulus (GPa).
REFERENCE = {"Si": (5.470, 88.5), "Cu": (3.629, 141.0), "Li": (3.435, 13.9), "Mo": (3.161, 259.0)}
ATOMS_PER_CUBE = {"Diamond": 8, "FCC": 4, "BCC": 2}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("element", choices=PHASE)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    element = arguments.element
    per_cube = ATOMS_PER_CUBE[PHASE[element]]
    V0, B0 = REFERENCE[element][0] ** 3 / per_cube, REFERENCE[element][1]
    atoms = read(Path(os.environ["MLIP_DATASETS"]) / "crystals_cif" / f"{element}.cif")
    if (
        element == "Li"
    ):  # the CIF of lithium is its low-temperature phase; the equation of state is of BCC
        from ase.build import bulk

        atoms = bulk("Li", "bcc", a=3.5)
    atoms.calc = EqCalculator(arguments.model, dtype="float64")
    optimizer = BFGS(FrechetCellFilter(atoms), logfile=None)
    converged = optimizer.run(fmax=1e-4, steps=500)
    volume = atoms.get_volume() / len(atoms)
    volumes, energies = [], []
    for scale in np.linspace(0.94, 1.06, 7):  # the range that the reference is fitted on
        frame = atoms.copy()
        frame.set_cell(atoms.cell[:] * scale ** (1 / 3), scale_atoms=True)
        frame.calc = atoms.calc
        volumes.append(frame.get_volume() / len(frame))
        energies.append(frame.get_potential_energy() / len(frame))
    _, _, B = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    a = (volume * per_cube) ** (1 / 3)
    a_ref = (V0 * per_cube) ** (1 / 3)
    result = {
        "element": element,
        "converged": bool(converged),
        "steps": optimizer.nsteps,
        "a": a,
        "a_reference": a_ref,
        "a_error_percent": 100 * (a / a_ref - 1),
        "B_GPa": B / GPa,
        "B_reference_GPa": B0,
        "B_error_percent": 100 * (B / GPa / B0 - 1),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
