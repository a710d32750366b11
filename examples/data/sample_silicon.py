"""Draw the silicon geometries that ``compute_silicon.py`` labels: 256 cells of 7 to 16 atoms.

Hot frames come from Langevin dynamics in the Stillinger-Weber potential (matscipy), 0.2 ps apart;
at 2200 K the cell has been melted at 4500 K first and is liquid-like.  Test frames of the dynamics
come from trajectories of their own.

    python sample_silicon.py --out DIRECTORY        (needs ase and matscipy)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from matscipy.calculators.manybody import Manybody
from matscipy.calculators.manybody.explicit_forms.stillinger_weber import (
    Stillinger_Weber_PRB_31_5262_Si,
    StillingerWeber,
)

A0 = 5.47


def diamond(a: float = A0) -> Atoms:
    return bulk("Si", "diamond", a=a, cubic=True)


def tagged(atoms: Atoms, config_type: str, test: bool) -> Atoms:
    frame = Atoms(atoms.numbers, cell=atoms.cell[:], positions=atoms.positions, pbc=True)
    frame.info.update(config_type=config_type, split="test" if test else "train")
    return frame


def strained(atoms: Atoms, rng: np.random.Generator, size: float) -> Atoms:
    eps = rng.uniform(-size, size, (3, 3))
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + (eps + eps.T) / 2), scale_atoms=True)
    return atoms


def rattled(atoms: Atoms, rng: np.random.Generator, size: float) -> Atoms:
    atoms = atoms.copy()
    atoms.positions += rng.normal(0, size, atoms.positions.shape)
    return atoms


def hot(start: Atoms, temperature: float, seed: int, count: int) -> list[Atoms]:
    rng = np.random.default_rng([int(temperature), seed, len(start)])
    atoms = strained(start, rng, 0.03)
    atoms.calc = Manybody(**StillingerWeber(Stillinger_Weber_PRB_31_5262_Si))
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature, rng=rng, force_temp=False)
    dynamics = Langevin(
        atoms, 1.0 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng
    )
    if temperature > 1700:  # melt first
        dynamics.set_temperature(temperature_K=4500)
        dynamics.run(1000)
        dynamics.set_temperature(temperature_K=temperature)
    dynamics.run(1000)
    frames = []
    for _ in range(count):
        dynamics.run(200)
        frames.append(tagged(strained(atoms, rng, 0.01), f"hot_{int(temperature)}K", seed == 2))
    return frames


def sample() -> list[Atoms]:
    rng = np.random.default_rng(20)
    frames = []
    for k, s in enumerate(np.linspace(0.92, 1.12, 20)):
        frames.append(tagged(diamond(A0 * s ** (1 / 3)), "volume", k % 5 == 2))
    for k in range(40):
        frames.append(
            tagged(rattled(strained(diamond(), rng, 0.06), rng, 0.02), "strained", k % 5 == 0)
        )
    for k in range(40):
        frames.append(tagged(rattled(diamond(), rng, 0.03 + 0.0068 * k), "rattled", k % 5 == 0))
    large = diamond() * (2, 1, 1)
    for temperature in (300, 900, 1500, 2200):
        for seed, count in ((0, 10), (1, 9), (2, 6)):
            frames += hot(diamond(), temperature, seed, count)
        for seed, count in ((0, 2), (2, 1)):
            frames += hot(large, temperature, seed, count)
    for k in range(24):
        atoms = diamond() if k % 3 else large.copy()
        del atoms[int(rng.integers(len(atoms)))]
        atoms = rattled(strained(atoms, rng, 0.02), rng, rng.uniform(0.03, 0.2))
        frames.append(tagged(atoms, "vacancy", k % 5 == 0))
    phases = {
        "beta_tin": Atoms(
            "Si4",
            cell=[4.82, 4.82, 2.66],
            scaled_positions=[[0, 0, 0], [0.5, 0, 0.25], [0.5, 0.5, 0.5], [0, 0.5, 0.75]],
        )
        * (1, 1, 2),
        "sc": bulk("Si", "sc", a=2.53) * (2, 2, 2),
        "fcc": bulk("Si", "fcc", a=3.87, cubic=True) * (2, 1, 1),
        "bcc": bulk("Si", "bcc", a=3.09, cubic=True) * (2, 2, 1),
    }
    for name, atoms in phases.items():
        for k in range(5):
            frame = atoms.copy()
            frame.set_cell(frame.cell[:] * (1 + 0.02 * (k - 2)), scale_atoms=True)
            frames.append(tagged(rattled(frame, rng, 0.02 * k), name, k == 3))
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write(out / "silicon_geometries.xyz", sample())


if __name__ == "__main__":
    main()
