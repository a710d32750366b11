"""Checks of the ethanol settings: forces against finite differences, density fitting, grid, basis.

python check_ethanol.py --out DIRECTORY      (after compute_ethanol.py; about three minutes)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase import units
from ase.io import read
from compute_ethanol import solve
from pyscf import dft, gto

STEP = 0.002  # angstrom
SEED = 3


def variant(atoms, basis: str = "def2-svp", level: int = 3, fitted: bool = True):
    """Energy in eV and forces in eV/angstrom with other settings than those of the set."""
    mol = gto.M(atom=[(a.symbol, a.position) for a in atoms], basis=basis, verbose=0)
    method = dft.RKS(mol, xc="pbe")
    if fitted:
        method = method.density_fit()
    method.grids.level = level
    method.conv_tol = 1e-9
    energy = method.kernel() * units.Hartree
    gradient = method.nuc_grad_method()
    gradient.grid_response = True
    return energy, -gradient.kernel() * units.Hartree / units.Bohr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    frames = [a for a in read(out / "ethanol_test.xyz", ":") if a.info["config_type"] == "md_900K"]
    atoms, other = frames[0], frames[-1]
    energy, forces = atoms.info["REF_energy"], atoms.arrays["REF_forces"]
    found = {"differences": [], "variants": {}}
    rng = np.random.default_rng(SEED)
    for flat in rng.choice(forces.size, 4, replace=False):
        k, axis = divmod(int(flat), 3)
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[k, axis] += sign * STEP
            energies.append(solve(moved)[0])
        difference = -(energies[0] - energies[1]) / (2 * STEP)
        found["differences"].append([atoms.symbols[k], axis, forces[k, axis], difference])
    settings = {
        "no density fitting": {"fitted": False},
        "grid level 5": {"level": 5},
        "def2-tzvp": {"basis": "def2-tzvp"},
    }
    for name, changes in settings.items():
        new_energy, new_forces = variant(atoms, **changes)
        # Absolute energies differ between bases; what matters is the difference of two frames.
        gap = new_energy - variant(other, **changes)[0] - (energy - other.info["REF_energy"])
        rms = float(np.sqrt(np.mean((new_forces - forces) ** 2)))
        found["variants"][name] = {
            "energy_shift_eV": new_energy - energy,
            "gap_change_eV": gap,
            "force_rms": rms,
        }
    found["force_scale"] = float(np.sqrt(np.mean(forces**2)))
    print(json.dumps(found, indent=1))
    (out / "checks_ethanol.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
