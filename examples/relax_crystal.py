"""Relax silicon and its cell, then its bulk modulus: python examples/relax_crystal.py [MODEL]."""

import sys

import numpy as np
from ase.build import bulk
from ase.eos import EquationOfState
from ase.units import GPa

from mlip.calculators import EqCalculator, relax

calculator = EqCalculator(sys.argv[1] if len(sys.argv) > 1 else "silicon", dtype="float64")
(result,) = relax(bulk("Si", a=5.55, cubic=True), calculator, cell=True, fmax=1e-3)
a = np.cbrt(result.atoms.get_volume())
print(f"{result.status} in {result.steps} steps: a = {a:.4f} angstrom, E = {result.energy:.4f} eV")

volumes, energies = [], []
for factor in np.linspace(0.98, 1.02, 7):
    atoms = bulk("Si", a=a * factor, cubic=True)
    atoms.calc = calculator
    volumes.append(atoms.get_volume())
    energies.append(atoms.get_potential_energy())
_, _, bulk_modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
print(f"bulk modulus {bulk_modulus / GPa:.1f} GPa")
