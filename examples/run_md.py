"""Silicon at 600 K, then without a thermostat: python examples/run_md.py [MODEL] [STEPS]."""

import sys

from ase.build import bulk

from mlip.calculators import EqCalculator, run_md

model = sys.argv[1] if len(sys.argv) > 1 else "silicon"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
calculator = EqCalculator(model, dtype="float64")

hot = run_md(
    bulk("Si", cubic=True) * (2, 2, 2), calculator, temperature=600, steps=steps, timestep=1.0
)
print(f"Langevin: {hot.atoms.get_temperature():.0f} K after {hot.steps} fs")

# The momenta are kept; without a thermostat the energy has to be.
before = hot.atoms.copy()
before.calc = calculator
free = run_md(before, calculator, ensemble="nve", steps=steps, timestep=1.0)
drift = free.atoms.get_total_energy() - before.get_total_energy()
per_atom = 1e3 * abs(drift) / len(before) / (steps * 1e-3)
print(f"NVE: the energy changed by {per_atom:.4f} meV/atom/ps")
