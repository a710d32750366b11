"""Phonons of silicon, all displacements in batches: python examples/phonons.py [MODEL].

Needs phonopy (pip install phonopy).
"""

import sys

import numpy as np
from ase import Atoms
from ase.build import bulk
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from mlip.calculators import EqCalculator, relax

calculator = EqCalculator(sys.argv[1] if len(sys.argv) > 1 else "silicon", dtype="float64")
(crystal,) = relax(bulk("Si"), calculator, cell=True, fmax=1e-4)
atoms = crystal.atoms

cell = PhonopyAtoms(atoms.symbols, cell=atoms.cell, scaled_positions=atoms.get_scaled_positions())
phonons = Phonopy(cell, 4 * np.eye(3, dtype=int))
phonons.generate_displacements(distance=0.02)
frames = [
    Atoms(s.symbols, s.positions, cell=s.cell, pbc=True)
    for s in phonons.supercells_with_displacements
]
phonons.forces = [results["forces"] for results in calculator.evaluate(frames)]
phonons.produce_force_constants()
phonons.symmetrize_force_constants()
for name, point in atoms.cell.bandpath("GXL").special_points.items():
    if name in "GXL":
        phonons.run_qpoints([point])
        print(name, np.round(phonons.qpoints.frequencies[0], 2), "THz")
