"""Check the silicon settings: finite differences, cutoff, k-points, the equation of state.

python check_silicon.py --out DIRECTORY        (after ``sample_silicon.py``; about 15 minutes)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.eos import EquationOfState
from ase.io import read
from compute_silicon import CUTOFF, calculator
from gpaw import PW

GPA = units.GPa


def solve(atoms: Atoms, derivatives: bool = True, **changes) -> dict:
    atoms = atoms.copy()
    atoms.calc = calculator()
    if changes:
        atoms.calc.set(**changes)
    found = {"energy": float(atoms.get_potential_energy(force_consistent=True))}
    if derivatives:
        found["forces"] = atoms.get_forces()
        found["stress"] = atoms.get_stress(voigt=False)
    return found


def force_difference(atoms: Atoms, step: float = 0.005) -> dict:
    """Largest force component of the frame against a central difference of the energy."""
    forces = solve(atoms)["forces"]
    k, axis = np.unravel_index(np.abs(forces).argmax(), forces.shape)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[k, axis] += sign * step
        energies.append(solve(moved, derivatives=False)["energy"])
    difference = -(energies[0] - energies[1]) / (2 * step)
    return {
        "atom": int(k),
        "axis": int(axis),
        "force": float(forces[k, axis]),
        "difference": difference,
    }


def stress_difference(atoms: Atoms, step: float = 0.01, **changes) -> dict:
    """Stress components xx and xy against differences (fourth order) of the energy, same cutoff."""
    stress = solve(atoms, **changes)["stress"]
    found = {}
    for name, (i, j) in {"xx": (0, 0), "xy": (0, 1)}.items():
        slope = 0.0
        for factor, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
            strain = np.zeros((3, 3))
            strain[i, j] += factor * step / 2
            strain[j, i] += factor * step / 2
            moved = atoms.copy()
            moved.set_cell(atoms.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
            slope += weight * solve(moved, derivatives=False, **changes)["energy"] / (12 * step)
        found[name] = {
            "stress": float(stress[i, j]),
            "difference": slope / atoms.get_volume(),
        }
    return found


def cutoff_slope(atoms: Atoms, step: float = 20.0) -> dict:
    """dE/dEcut per atom: 2/3 Ecut times it, over the volume of an atom, is the Pulay stress."""
    low, high = (
        solve(atoms, derivatives=False, mode=PW(CUTOFF + s))["energy"] for s in (-step, step)
    )
    slope = (high - low) / (2 * step) / len(atoms)
    pulay = 2 / 3 * CUTOFF * slope
    volume = atoms.get_volume() / len(atoms)
    return {"dE_dEcut": slope, "pulay_eV_per_atom": pulay, "pulay_GPa": pulay / volume / GPA}


def equation_of_state(**changes) -> dict:
    volumes, energies, pressures = [], [], []
    for a in np.linspace(5.36, 5.60, 9):
        atoms = bulk("Si", "diamond", a=a, cubic=True)
        found = solve(atoms, **changes)
        volumes.append(atoms.get_volume())
        energies.append(found["energy"])
        pressures.append(-np.trace(found["stress"]) / 3)
    v0, e0, b0 = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    zero = np.roots(np.polyfit(volumes, pressures, 3))  # where the computed stress vanishes
    zero = min(zero[np.abs(zero.imag) < 1e-9].real, key=lambda v: abs(v - v0))
    return {
        "a0": v0 ** (1 / 3),
        "B0_GPa": b0 / GPA,
        "energy_per_atom": e0 / 8,
        "a_of_zero_stress": zero ** (1 / 3),
        "volumes": volumes,
        "energies": energies,
        "pressures_GPa": [p / GPA for p in pressures],
    }


def convergence(atoms: Atoms, **changes) -> dict:
    usual, better = solve(atoms), solve(atoms, **changes)
    return {
        "energy_per_atom": (better["energy"] - usual["energy"]) / len(atoms),
        "force_rms": float(np.sqrt(np.mean((better["forces"] - usual["forces"]) ** 2))),
        "force_scale": float(np.sqrt(np.mean(usual["forces"] ** 2))),
        "stress_GPa": ((better["stress"] - usual["stress"]) / GPA).round(4).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    frames = read(out / "silicon_geometries.xyz", ":")

    def pick(config_type: str, k: int, size: int = 8) -> Atoms:
        found = [a for a in frames if a.info["config_type"] == config_type and len(a) == size]
        return Atoms(found[k].numbers, cell=found[k].cell, positions=found[k].positions, pbc=True)

    rattled, strained, liquid = pick("rattled", 20), pick("strained", 3), pick("hot_2200K", 2)
    fine = {"size": (4, 4, 4), "gamma": False}
    tasks = {
        "cutoff_slope_rattled": lambda: cutoff_slope(rattled),
        "cutoff_slope_liquid": lambda: cutoff_slope(liquid),
        "force_rattled": lambda: force_difference(rattled),
        "stress_strained": lambda: stress_difference(strained),
        "eos": equation_of_state,
        "kpoints_444_rattled": lambda: convergence(rattled, kpts=fine),
        "cutoff_500_strained": lambda: convergence(strained, mode=PW(500.0)),
    }
    meshes = [
        ("volume", 0, 8, (4, 4, 4)),
        ("hot_300K", 2, 8, (4, 4, 4)),
        ("hot_1500K", 5, 8, (4, 4, 4)),
        ("vacancy", 11, 7, (4, 4, 4)),
        ("hot_2200K", 18, 8, (4, 4, 4)),
        ("hot_2200K", 18, 8, (5, 5, 5)),
        ("hot_2200K", 10, 8, (4, 4, 4)),
        ("beta_tin", 2, 8, (4, 4, 3)),
        ("beta_tin", 2, 8, (5, 5, 4)),
        ("beta_tin", 0, 8, (3, 3, 3)),
    ]
    for kind, k, size, mesh in meshes:
        atoms, points = pick(kind, k, size), {"size": mesh, "gamma": False}
        tasks[f"{kind}_{k}_{mesh}"] = lambda a=atoms, p=points: convergence(a, kpts=p)
    done = out / "checks_silicon.json"
    found = json.loads(done.read_text()) if done.exists() else {}
    for name, task in tasks.items():
        if name not in found:
            found[name] = task()
            print(name, json.dumps(found[name]), flush=True)
            done.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
