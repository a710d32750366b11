"""Compute the ethanol reference set: PBE/def2-SVP energies and forces with PySCF.

    pip install pyscf tblite ase
    python compute_ethanol.py --out DIRECTORY      (about 7 s a frame on one core)

Geometries are drawn from Langevin dynamics in GFN2-xTB (tblite) at 300, 600 and 900 K, every 60 fs
after 0.6 ps of equilibration, four trajectories each (started from trans, from both gauche
conformers and from trans once more), and from displacements along the normal modes of trans and
gauche.  The last trajectory of each temperature and every fifth normal mode are the test set.
Every finished frame is appended to a file and skipped by a later run.

Settings: restricted Kohn-Sham PBE, def2-SVP, density fitting with its default auxiliary basis, grid
level 3 with grid response in the gradient, energy converged to 1e-9 hartree; isolated atoms:
unrestricted, with the spin of the ground state.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from pyscf import dft, gto
from tblite.ase import TBLite

TEMPERATURES = (300, 600, 900)
DIHEDRALS = (180.0, 60.0, -60.0, 180.0)  # C-C-O-H of the four trajectories
FRAMES = 25  # of each trajectory
SPINS = {"H": 1, "C": 2, "O": 2}  # unpaired electrons of the free atoms


def solve(atoms: Atoms, spin: int = 0) -> tuple[float, np.ndarray | None]:
    """Energy in eV and, for molecules, forces in eV/angstrom."""
    mol = gto.M(
        atom=[(a.symbol, a.position) for a in atoms], basis="def2-svp", spin=spin, verbose=0
    )
    method = (dft.UKS if spin else dft.RKS)(mol, xc="pbe").density_fit()
    method.grids.level = 3
    method.conv_tol = 1e-9
    energy = method.kernel()
    if not method.converged:
        raise RuntimeError("the self-consistent field did not converge")
    if len(atoms) == 1:
        return energy * units.Hartree, None
    gradient = method.nuc_grad_method()
    gradient.grid_response = True
    return energy * units.Hartree, -gradient.kernel() * units.Hartree / units.Bohr


def geometries(cache: Path) -> list[Atoms]:
    """All frames in a fixed order, with config_type and split in ``info``."""
    if cache.exists():
        return read(cache, ":")
    frames = []
    for temperature in TEMPERATURES:
        for seed, dihedral in enumerate(DIHEDRALS):
            atoms = conformer(dihedral)
            rng = np.random.default_rng(1000 * temperature + seed)
            MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
            dynamics = Langevin(
                atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng
            )
            dynamics.run(1200)
            for _ in range(FRAMES):
                dynamics.run(120)
                split = "test" if seed == len(DIHEDRALS) - 1 else "train"
                frames.append(tagged(atoms, f"md_{temperature}K", split))
    for dihedral in DIHEDRALS[:2]:
        frames += normal_modes(conformer(dihedral))
    write(cache, frames)
    return frames


def conformer(dihedral: float) -> Atoms:
    """Ethanol relaxed in GFN2-xTB near the given C-C-O-H angle."""
    atoms = molecule("CH3CH2OH")
    c1, c2, o = (
        int(np.flatnonzero(atoms.numbers == 6)[0]),
        int(np.flatnonzero(atoms.numbers == 6)[1]),
        int(np.flatnonzero(atoms.numbers == 8)[0]),
    )
    if atoms.get_distance(c1, o) < atoms.get_distance(c2, o):
        c1, c2 = c2, c1
    hydrogens = [k for k in range(len(atoms)) if atoms.numbers[k] == 1]
    h = min(hydrogens, key=lambda k: atoms.get_distance(k, o))
    atoms.set_dihedral(c1, c2, o, h, dihedral, indices=[h])
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    BFGS(atoms, logfile=None).run(fmax=0.01, steps=200)
    return atoms


def normal_modes(atoms: Atoms) -> list[Atoms]:
    """Two displacements along each vibration, of 0.1 and 0.2 angstrom for the fastest atom."""
    vibrations = Vibrations(atoms, name="vibrations_scratch")
    vibrations.clean()
    vibrations.run()
    frames = []
    for k in range(6, 3 * len(atoms)):
        mode = vibrations.get_mode(k)
        mode = mode / np.linalg.norm(mode, axis=1).max()
        amplitude = (0.1, -0.2) if k % 2 else (-0.1, 0.2)
        for a in amplitude:
            frame = atoms.copy()
            frame.positions += a * mode
            frames.append(tagged(frame, "normal_mode", "test" if k % 5 == 0 else "train"))
    vibrations.clean()
    return frames


def tagged(atoms: Atoms, config_type: str, split: str) -> Atoms:
    frame = Atoms(atoms.numbers, atoms.positions)
    frame.info.update(config_type=config_type, split=split)
    return frame


def key(atoms: Atoms) -> bytes:
    """What tells one frame from another, before and after it was written to a file."""
    return (np.round(atoms.positions, 5) + 0.0).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=384, help="stop at so many labelled frames")
    arguments = parser.parse_args()
    out, limit = arguments.out, arguments.limit
    out.mkdir(parents=True, exist_ok=True)
    done = out / "ethanol_labelled.xyz"
    frames = geometries(out / "ethanol_geometries.xyz")
    # A fixed shuffle, so that what is finished at any time is a fair part of the set.
    order = np.random.default_rng(0).permutation(len(frames))
    finished = {key(a) for a in read(done, ":")} if done.exists() else set()
    for k in order:
        frame = frames[k]
        kind = frame.info["config_type"]
        if key(frame) in finished or len(finished) >= limit:
            continue
        try:
            energy, forces = solve(frame)
        except RuntimeError as error:
            print(k, kind, error, flush=True)
            continue
        frame.info["REF_energy"] = energy
        frame.arrays["REF_forces"] = forces
        write(done, frame, append=True)
        finished.add(key(frame))
        print(k, kind, energy, flush=True)
    atoms_in_box = []
    for symbol, spin in SPINS.items():
        atom = Atoms(symbol, info={"config_type": "IsolatedAtom"})
        atom.info["REF_energy"] = solve(atom, spin)[0]
        atoms_in_box.append(atom)
    labelled = read(done, ":")
    for split in ("train", "test"):
        chosen = [a for a in labelled if a.info.get("split") == split]
        for atoms in chosen:
            del atoms.info["split"]
        write(out / f"ethanol_{split}.xyz", (atoms_in_box if split == "train" else []) + chosen)


if __name__ == "__main__":
    main()
