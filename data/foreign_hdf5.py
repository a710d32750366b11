"""HDF5 of other programs: MACE's layout, and groups of arrays per formula as in the ANI data sets.

    MACE    /config_batch_i/config_j/{atomic_numbers, positions, cell, pbc, weight, config_type,
            properties/...}, where a missing value is the text "None"
    ANI     any group with {species, coordinates (M, N, 3), energies (M,), forces (M, N, 3)}

Numbers are handed on as they stand; units are the caller's options.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms

MAX_BYTES = 1 << 30  # of one array
MAX_DEPTH = 8


def read_foreign(path: Path) -> Iterator[Atoms]:
    """Structures of a foreign HDF5 file.

    Raises
    ------
    ValueError
        If its layout is not known, or if it refers to anything outside itself.
    """
    found = False
    with h5py.File(path, "r", locking=False) as file:
        for group in _groups(path, file, 0):
            names = set(group)
            if {"atomic_numbers", "positions"} <= names:
                found = True
                yield _mace(path, group)
            elif {"species", "coordinates"} <= names:
                found = True
                yield from _ani(path, group)
    if not found:
        raise ValueError(
            f"{path}: HDF5 of unknown layout; known are 'mlip-1', MACE's and groups of species, "
            f"coordinates, energies"
        )


def _groups(path: Path, group: h5py.Group, depth: int) -> Iterator[h5py.Group]:
    yield group
    if depth == MAX_DEPTH:
        return
    for name in sorted(group, key=_natural):
        if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise ValueError(
                f"{path}: '{group.name}/{name}' is a link to elsewhere; it is not followed"
            )
        if name != "properties" and group.get(name, getclass=True) is h5py.Group:
            yield from _groups(path, group[name], depth + 1)


def _natural(name: str) -> tuple[str, int]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or -1)


def _array(path: Path, group: h5py.Group, name: str) -> Any:
    """Content of a data set, after the checks that keep hostile files harmless; None where MACE
    wrote "None"."""
    data = group[name]
    plist = data.id.get_create_plist()
    if plist.get_external_count() or data.is_virtual:
        raise ValueError(f"{path}: '{data.name}' is stored in another file, which is not read")
    size = int(np.prod([int(n) for n in data.shape], dtype=object)) * data.dtype.itemsize
    if size > min(MAX_BYTES, 1100 * max(data.id.get_storage_size(), 64)):
        raise ValueError(f"{path}: '{data.name}' claims {size} bytes, which the file cannot hold")
    value = data[()]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return None if isinstance(value, str) and value == "None" else value


def _mace(path: Path, group: h5py.Group) -> Atoms:
    cell, pbc = (_array(path, group, key) if key in group else None for key in ("cell", "pbc"))
    atoms = Atoms(
        _array(path, group, "atomic_numbers"),
        _array(path, group, "positions"),
        cell=np.zeros((3, 3)) if cell is None else cell,
        pbc=False if pbc is None else pbc,
    )
    holder = group["properties"] if "properties" in group else group
    weights = group["property_weights"] if "property_weights" in group else {}
    for name in ("energy", "forces", "stress", "virials", "total_charge", "total_spin"):
        value = _array(path, holder, name) if name in holder else None
        # MACE writes zeros for what it lacks, and marks that by a weight of zero.
        weight = _array(path, weights, name) if name in weights else 1.0
        if value is None or weight is None or np.all(np.asarray(weight, dtype=float) == 0):
            continue
        if name == "forces":
            atoms.arrays["REF_forces"] = np.asarray(value)
        else:
            atoms.info[f"REF_{name}" if not name.startswith("total") else name] = np.squeeze(value)
    for key, name in (("weight", "config_weight"), ("config_type", "config_type")):
        if key in group and (value := _array(path, group, key)) is not None:
            atoms.info[name] = value
    return atoms


def _ani(path: Path, group: h5py.Group) -> Iterator[Atoms]:
    species = _array(path, group, "species")
    if species.dtype.kind in "SO":
        species = [s.decode() if isinstance(s, bytes) else str(s) for s in species]
    columns = {
        name: _array(path, group, name)
        for name in ("coordinates", "energies", "forces")
        if name in group
    }
    for k, positions in enumerate(columns["coordinates"]):
        atoms = Atoms(species, positions)
        if "energies" in columns:
            atoms.info["REF_energy"] = float(columns["energies"][k])
        if "forces" in columns:
            atoms.arrays["REF_forces"] = columns["forces"][k]
        atoms.info["config_type"] = group.name.strip("/").rsplit("/", 1)[-1]
        yield atoms
