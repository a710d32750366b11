"""Schema "mlip-1" of data files, and the inspection of a file before anything of it is believed.

HDF5 can point elsewhere (links, external and virtual storage) and can promise any size; a data file
does neither. What passes is a set of columns that lie, at known offsets, inside the file itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

SCHEMA = "mlip-1"
UNITS = "eV, angstrom, eV/angstrom, eV/angstrom^3"
ATTRIBUTES = ("schema", "units", "source", "level_of_theory", "created_by")
MAX_TEXT = 256  # bytes of a config_type or group
MAX_ATTRIBUTE = 32768  # bytes


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    per_atom: bool
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # the first one is written
    optional: bool = False


_F = ("<f8", "<f4")
COLUMNS: Mapping[str, Column] = {
    "atomic_numbers": Column(True, (), ("|u1",)),
    "positions": Column(True, (3,), _F),
    "cell": Column(False, (3, 3), _F),
    "pbc": Column(False, (3,), ("|b1", "|u1", "|i1")),
    "energy": Column(False, (), _F, optional=True),
    "forces": Column(True, (3,), _F, optional=True),
    "stress": Column(False, (3, 3), _F, optional=True),
    "charge": Column(False, (), _F, optional=True),
    "spin": Column(False, (), _F, optional=True),
    "field": Column(False, (3,), _F, optional=True),
    "weight": Column(False, (), _F, optional=True),
}
TEXT_COLUMNS = ("config_type", "group")


@dataclass(frozen=True)
class Layout:
    """Where the columns of a file are."""

    attributes: dict[str, str]
    offsets: dict[str, int]
    dtypes: dict[str, tuple[np.dtype, tuple[int, ...]]]
    num_structures: int
    num_atoms: int
    identity: tuple[int, int]


def inspect(path: Path) -> Layout:
    """Find the columns without reading them, and refuse whatever is not plain data of this
    schema."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    status = path.stat()
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _layout(path, file, status)
    except ValueError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, MemoryError, OverflowError) as error:
        if not h5py.is_hdf5(path):
            raise OSError(
                f"{path}: not an HDF5 file; make one of labelled structures with 'mlip convert'"
            ) from None
        raise OSError(
            f"{path}: not a readable HDF5 file (damaged or cut short?): {error}"
        ) from None


def _layout(path: Path, file: h5py.File, status: os.stat_result) -> Layout:
    attributes = _attributes(file)
    if attributes.get("schema") != SCHEMA:
        found = attributes.get("schema")
        raise ValueError(
            f"{path}: not a data file of schema '{SCHEMA}' "
            f"({'no schema' if found is None else f'schema {found[:40]!r}'})"
            "; make one with 'mlip convert'"
        )
    if len(file) > 64:
        raise ValueError(f"{path}: {len(file)} entries at the top; a '{SCHEMA}' file has a dozen")
    data: dict[str, h5py.Dataset] = {}
    for raw in file.id:
        name = raw.decode("utf-8", "replace")
        if file.id.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            raise ValueError(
                f"{path}: '{name}' is a link to elsewhere, which data files may not have"
            )
        if name == "ptr" or name in COLUMNS or name in TEXT_COLUMNS:
            if h5py.h5o.get_info(file.id, raw).type != h5py.h5o.TYPE_DATASET:
                raise ValueError(f"{path}: '{name}' is not a column of numbers")
            data[name] = file[name]
    missing = [
        name
        for name in ("ptr", *COLUMNS)
        if name not in data and not (name in COLUMNS and COLUMNS[name].optional)
    ]
    if missing:
        raise ValueError(f"{path}: column {', '.join(map(repr, missing))} is missing")

    offsets: dict[str, int] = {}
    dtypes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    num_structures = _length(path, "ptr", data["ptr"]) - 1
    num_atoms = _length(path, "positions", data["positions"])
    if num_structures < 1:
        raise ValueError(f"{path}: has no structures")
    for name, dataset in data.items():
        column = COLUMNS.get(name)
        rows = num_atoms if column and column.per_atom else num_structures + (name == "ptr")
        shape = column.shape if column else ()
        dtype = dataset.dtype
        if name == "ptr":
            allowed = dtype.str == "<i8"
        elif column is None:
            allowed = dtype.kind == "S" and 0 < dtype.itemsize <= MAX_TEXT
        else:
            allowed = dtype.str in column.dtypes
        if not allowed:
            raise ValueError(
                f"{path}: column '{name}' has type {dtype}, which '{SCHEMA}' does not have there"
            )
        if dataset.shape != (rows, *shape):
            raise ValueError(
                f"{path}: column '{name}' has shape {dataset.shape}, expected {(rows, *shape)}"
            )
        offsets[name] = _offset(path, name, dataset, status.st_size)
        dtypes[name] = (dtype, shape)
    return Layout(
        attributes, offsets, dtypes, num_structures, num_atoms, (status.st_size, status.st_mtime_ns)
    )


def _length(path: Path, name: str, dataset: h5py.Dataset) -> int:
    if not dataset.shape:
        raise ValueError(f"{path}: column '{name}' is a single number")
    return int(dataset.shape[0])


def _offset(path: Path, name: str, dataset: h5py.Dataset, file_size: int) -> int:
    """Byte offset of a column, after making sure that it lies in this file from end to end."""
    properties = dataset.id.get_create_plist()
    if properties.get_external_count():
        raise ValueError(
            f"{path}: column '{name}' is stored in another file, which data files may not do"
        )
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_nfilters():
        raise ValueError(
            f"{path}: column '{name}' is chunked, compressed or virtual; columns must be "
            f"contiguous "
            "(rewrite it with 'h5repack -l CONTI -f NONE')"
        )
    offset = dataset.id.get_offset()
    size = dataset.dtype.itemsize * int(np.prod([int(n) for n in dataset.shape], dtype=object))
    if offset is None or offset + size > file_size:
        raise OSError(
            f"{path}: column '{name}' needs {size} bytes that the file does not have; it is cut "
            f"short"
        )
    return int(offset)


def _attributes(file: h5py.File) -> dict[str, str]:
    """Text attributes of the file, whatever else it carries."""
    found: dict[str, str] = {}
    if len(file.attrs) > 64:
        return found
    for name in file.attrs:
        attribute = file.attrs.get_id(name)
        kind = attribute.get_type()
        if attribute.shape != () or kind.get_class() != h5py.h5t.STRING:
            continue
        if kind.is_variable_str() and name not in ATTRIBUTES:
            continue
        if attribute.get_storage_size() > MAX_ATTRIBUTE:
            continue
        value = file.attrs[name]
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        found[name] = text[:MAX_ATTRIBUTE]
    return found
