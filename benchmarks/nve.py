"""Energy drift of 10 ps NVE: ``python nve.py MODEL STRUCTURE --dtype float64 --out F``.

The drift is the slope of a straight line through the total energy, meV/atom/ps, after 0.5 ps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase.build import bulk
from ase.io import read
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.units import fs

from mlip.calculators.eq_calculator import EqCalculator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("structure", help="file, or symbol of an element with a cubic crystal")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=300.0)
    parser.add_argument("--timestep", type=float, default=1.0, help="fs")
    parser.add_argument("--picoseconds", type=float, default=10.0)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    atoms = read(a.structure) if Path(a.structure).exists() else bulk(a.structure, cubic=True)
    if atoms.pbc.all():
        atoms = atoms.repeat(a.repeat)
    atoms.calc = EqCalculator(a.model, dtype=a.dtype)
    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * a.temperature, rng=rng)
    Stationary(atoms)
    times, energies, temperatures = [], [], []
    dynamics = VelocityVerlet(atoms, a.timestep * fs)

    def record() -> None:
        times.append(dynamics.nsteps * a.timestep / 1000)
        energies.append(atoms.get_total_energy() / len(atoms) * 1000)
        temperatures.append(atoms.get_temperature())

    dynamics.attach(record, interval=5)
    dynamics.run(round(a.picoseconds * 1000 / a.timestep))
    t, E = np.array(times), np.array(energies)
    late = t > 0.5
    result = {
        "model": Path(a.model).name,
        "atoms": len(atoms),
        "dtype": a.dtype,
        "picoseconds": a.picoseconds,
        "timestep_fs": a.timestep,
        "mean_temperature_K": float(np.mean(temperatures)),
        "drift_meV_per_atom_per_ps": float(np.polyfit(t[late], E[late], 1)[0]),
        "fluctuation_meV_per_atom": float(E[late].std()),
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
