"""Labelled structures in any format that ASE writes; the file appears whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import ase.db
import ase.io
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.formats import UnknownFileTypeError, filetype, get_ioformat
from ase.stress import full_3x3_to_voigt_6_stress

from mlip.data.labels import Frame


def require_writable(path: Path) -> None:
    """Raise before any work is done unless ASE writes a format of this ending in this folder."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; create it first")
    try:
        kind = get_ioformat(filetype(str(path), read=False))
    except UnknownFileTypeError:
        kind = None
    if kind is None or not (kind.can_write or kind.name in ("db", "json")):
        raise ValueError(
            f"{path}: no format that can be written has this ending; take .xyz, .traj or "
            f".db (.h5 for a data file)"
        )


def write_ase(output: Path, frames: Iterable[Frame], finish: Callable[[], None]) -> None:
    """Write to a temporary file of the same suffix, call ``finish``, then rename."""
    kind = filetype(str(output), read=False)
    suffix = "".join(output.suffixes[-2:]) or output.name
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=suffix, dir=output.parent)
    os.close(handle)
    try:
        if kind in ("extxyz", "xyz"):
            opener = gzip.open if output.suffix == ".gz" else open
            with opener(name, "wt", encoding="utf-8") as file:
                for frame in frames:
                    ase.io.write(
                        file, _to_atoms(frame, False), format="extxyz", write_results=False
                    )
        else:
            os.unlink(name)  # databases are appended to, so there must be none
            images = (_to_atoms(frame, True) for frame in frames)
            if kind in ("db", "json"):
                with ase.db.connect(name, type=kind) as database:
                    for atoms in images:
                        database.write(atoms, data=atoms.info)
            else:
                ase.io.write(name, list(images), format=kind)
        finish()
        os.chmod(name, 0o644)
        os.replace(name, output)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _to_atoms(frame: Frame, reserved_keys: bool) -> Atoms:
    """ASE structure with its labels under REF keys, or in a calculator for formats that keep
    nothing else."""
    atoms = frame.atoms
    stress = None if frame.stress is None else full_3x3_to_voigt_6_stress(frame.stress)
    if reserved_keys:
        given = {"energy": frame.energy, "forces": frame.forces, "stress": stress}
        atoms.calc = SinglePointCalculator(
            atoms, **{k: v for k, v in given.items() if v is not None}
        )
    else:
        if frame.energy is not None:
            atoms.info["REF_energy"] = frame.energy
        if frame.stress is not None:
            atoms.info["REF_stress"] = frame.stress.ravel()
        if frame.forces is not None:
            atoms.arrays["REF_forces"] = frame.forces
    for key, value in (
        ("charge", frame.charge),
        ("spin", frame.spin),
        ("field", frame.field),
        ("config_weight", frame.weight if frame.weight != 1 else None),
        ("config_type", frame.config_type or None),
        ("group", frame.group or None),
    ):
        if value is not None:
            atoms.info[key] = value
    return atoms
