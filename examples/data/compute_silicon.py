"""Label silicon geometries with GPAW: PBE, plane waves and PAW; energy, forces and stress.

    python sample_silicon.py  --out DIRECTORY
    python compute_silicon.py --out DIRECTORY                 (about 15 s a frame on one core)
    python compute_silicon.py --out DIRECTORY --collect       (writes silicon_{train,test}.xyz)

Every finished frame is appended to a file and skipped by a later run; with ``--part k/n`` n runs
share the work.  A frame that does not converge is left out.

Settings: GPAW's PBE PAW set-up of silicon, plane waves to 300 eV, a Monkhorst-Pack mesh of 2.3
points per inverse angstrom that avoids Gamma (3 x 3 x 3 for the cubic cell of 8 atoms), Fermi-Dirac
occupations of 0.1 eV, density converged to 1e-5 electrons and energy to 1e-5 eV per electron.  The
energy is the free energy E - T S, the one whose derivatives forces and stress are.  The isolated
atom: spin-polarised, in an orthorhombic box of about 9 angstrom, Gamma point.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write
from gpaw import GPAW, PW, FermiDirac, KohnShamConvergenceError, Mixer

CUTOFF = 300.0  # eV
KPOINT_DENSITY = 2.3  # points per inverse angstrom
SMEARING = 0.1  # eV


def calculator() -> GPAW:
    return GPAW(
        mode=PW(CUTOFF),
        xc="PBE",
        kpts={"density": KPOINT_DENSITY, "gamma": False},
        occupations=FermiDirac(SMEARING),
        mixer=Mixer(0.4, 8, 1.0),
        eigensolver={"name": "dav", "niter": 2},
        convergence={"density": 1e-5, "energy": 1e-5},
        maxiter=150,
        txt=None,
    )


def label(atoms: Atoms) -> None:
    atoms.calc = calculator()
    energy = atoms.get_potential_energy(force_consistent=True)
    forces = atoms.get_forces()
    stress = atoms.get_stress(voigt=False)
    atoms.calc = None
    atoms.info["REF_energy"] = float(energy)
    atoms.info["REF_stress"] = stress.reshape(9)
    atoms.arrays["REF_forces"] = forces


def isolated_atom() -> Atoms:
    box = Atoms("Si", positions=[[4.0, 4.5, 4.75]], cell=[8.0, 9.0, 9.5], pbc=True)
    box.set_initial_magnetic_moments([2.0])
    box.calc = GPAW(
        mode=PW(CUTOFF),
        xc="PBE",
        hund=True,
        occupations=FermiDirac(0.0, fixmagmom=True),
        symmetry={"point_group": False},
        txt=None,
        maxiter=300,
    )
    atom = Atoms("Si", info={"config_type": "IsolatedAtom"})
    atom.info["REF_energy"] = float(box.get_potential_energy(force_consistent=True))
    return atom


def key(atoms: Atoms) -> bytes:
    """What tells one frame from another, before and after it was written to a file."""
    return (np.round(atoms.positions, 5) + 0.0).tobytes()


def labelled(out: Path) -> dict[bytes, Atoms]:
    files = sorted(out.glob("silicon_labelled_*.xyz"))
    return {key(atoms): atoms for path in files for atoms in read(path, ":")}


def run(out: Path, name: str, part: int, parts: int) -> None:
    frames = read(out / f"{name}_geometries.xyz", ":")
    done = out / f"silicon_labelled_{name}_{part}_of_{parts}.xyz"
    finished = labelled(out)
    if part == 0 and not (out / "silicon_atom.xyz").exists():
        write(out / "silicon_atom.xyz", isolated_atom())
    # A fixed shuffle, so that what is finished at any time is a fair part of the set.
    for k in np.random.default_rng(0).permutation(len(frames))[part::parts]:
        atoms = frames[k]
        kind = atoms.info["config_type"]
        if key(atoms) in finished:
            continue
        try:
            label(atoms)
        except KohnShamConvergenceError:
            print(k, kind, "did not converge", flush=True)
            continue
        write(done, atoms, append=True)
        print(k, len(atoms), kind, atoms.info["REF_energy"] / len(atoms), flush=True)


def collect(out: Path) -> None:
    frames = labelled(out).values()
    atom = read(out / "silicon_atom.xyz")
    for split in ("train", "test"):
        chosen = [a for a in frames if a.info.get("split") == split]
        for atoms in chosen:
            del atoms.info["split"]
            atoms.info["REF_stress"] = np.ravel(atoms.info["REF_stress"])
        write(out / f"silicon_{split}.xyz", ([atom] if split == "train" else []) + chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--geometries", default="silicon", help="label OUT/THIS_geometries.xyz")
    parser.add_argument("--part", default="0/1", help="k/n: every n-th frame from the k-th")
    parser.add_argument("--collect", action="store_true", help="write the files of the two splits")
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.out)
    else:
        part, parts = (int(x) for x in arguments.part.split("/"))
        run(arguments.out, arguments.geometries, part, parts)


if __name__ == "__main__":
    main()
