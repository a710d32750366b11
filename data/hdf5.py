"""The data file: schema "mlip-1", flat concatenated columns in HDF5.

M structures, A atoms in all; structure k owns the atoms ptr[k] : ptr[k + 1].

    /ptr (M+1,) i8, /atomic_numbers (A,) u1, /positions (A, 3) f8, /cell (M, 3, 3) f8,
    /pbc (M, 3) bool
    optional: /energy (M,), /forces (A, 3), /stress (M, 3, 3), /charge (M,), /spin (M,),
    /field (M, 3), /weight (M,) floats; /config_type (M,), /group (M,) text of fixed length
    attributes: schema, units, source, level_of_theory, created_by

Units are eV and angstrom, stress with ASE's sign; a missing label is NaN.  Columns are contiguous
and uncompressed, so a structure is a few ``pread`` calls at known offsets.  HDF5 itself is used
only to write the file and to find the offsets: nothing of the library is held open, and the plain
file descriptor is reopened in every process that needs it.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import h5py
import numpy as np

from mlip.data.hdf5_layout import (
    COLUMNS,
    MAX_ATTRIBUTE,
    MAX_TEXT,
    SCHEMA,
    TEXT_COLUMNS,
    UNITS,
    inspect,
)

COPY_BYTES = 1 << 24
_TARGETS = {"<f4": np.float64}  # what a stored type becomes in memory


@dataclass(frozen=True)
class Structures:
    """Consecutive structures as concatenated arrays; ``ptr`` (k+1,) starts at 0.  Absent columns
    are None."""

    ptr: np.ndarray
    atomic_numbers: np.ndarray  # (A,) uint8
    positions: np.ndarray  # (A, 3) float64, angstrom
    cell: np.ndarray  # (k, 3, 3) float64, angstrom
    pbc: np.ndarray  # (k, 3) bool
    energy: np.ndarray | None = None  # (k,) eV
    forces: np.ndarray | None = None  # (A, 3) eV/angstrom
    stress: np.ndarray | None = None  # (k, 3, 3) eV/angstrom^3
    charge: np.ndarray | None = None  # (k,) e
    spin: np.ndarray | None = None  # (k,) multiplicity
    field: np.ndarray | None = None  # (k, 3) V/angstrom
    weight: np.ndarray | None = None  # (k,)

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, k: int) -> Structures:
        """Structure ``k`` alone."""
        a, b = int(self.ptr[k]), int(self.ptr[k + 1])
        part: dict[str, Any] = {"ptr": np.array([0, b - a])}
        for name, column in COLUMNS.items():
            values = getattr(self, name)
            if values is not None:
                part[name] = values[a:b] if column.per_atom else values[k : k + 1]
        return Structures(**part)


class HDF5Writer:
    """Write structures one by one; the file appears, whole and synced, only when the ``with`` block
    ends well.

    Until then the columns lie in unnamed temporary files next to the target, which vanish with the
    process.

    Parameters
    ----------
    path : file to write
    attributes : text stored with the data, for example ``source`` and ``level_of_theory``
    overwrite : replace an existing file
    """

    def __init__(
        self,
        path: str | Path,
        attributes: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.attributes = dict(attributes or {})
        if self.path.exists() and not overwrite:
            raise FileExistsError(
                f"{self.path} exists; choose another name or allow to overwrite it"
            )
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path.parent} is not a folder; create it first")
        self._spool: dict[str, BinaryIO] = {
            name: tempfile.TemporaryFile(dir=self.path.parent) for name in ("ptr", *COLUMNS)
        }
        self._seen: set[str] = set()
        self._texts: dict[str, dict[str, int]] = {name: {"": 0} for name in TEXT_COLUMNS}
        self._codes: dict[str, list[int]] = {name: [] for name in TEXT_COLUMNS}
        self._write("ptr", np.zeros(1, dtype="<i8"))
        self.num_structures = 0
        self.num_atoms = 0

    def append(
        self,
        atomic_numbers: np.ndarray,
        positions: np.ndarray,
        cell: np.ndarray,
        pbc: np.ndarray,
        *,
        energy: float | None = None,
        forces: np.ndarray | None = None,
        stress: np.ndarray | None = None,
        charge: float | None = None,
        spin: float | None = None,
        field: np.ndarray | None = None,
        weight: float | None = None,
        config_type: str = "",
        group: str = "",
    ) -> None:
        """Add a structure; None is a missing label.

        Raises
        ------
        ValueError
            For wrong shapes, atomic numbers outside 1..118 and non-finite geometry.
        """
        numbers = np.asarray(atomic_numbers)
        n = len(numbers)
        if n == 0:
            raise ValueError("the structure has no atoms")
        if numbers.min() < 1 or numbers.max() > 118:
            raise ValueError(
                f"atomic number {numbers.min() if numbers.min() < 1 else numbers.max()} is no "
                f"element"
            )
        given = {
            "atomic_numbers": numbers,
            "positions": positions,
            "cell": cell,
            "pbc": pbc,
            "energy": energy,
            "forces": forces,
            "stress": stress,
            "charge": charge,
            "spin": spin,
            "field": field,
            "weight": 1.0 if weight is None else weight,
        }
        rows: dict[str, np.ndarray] = {}
        for name, column in COLUMNS.items():
            shape = (n, *column.shape) if column.per_atom else column.shape
            value = given[name]
            row = np.full(shape, np.nan) if value is None else np.asarray(value)
            if row.shape != shape:
                raise ValueError(f"{name} has shape {row.shape}, expected {shape}")
            if name in ("positions", "cell") and not np.isfinite(row).all():
                raise ValueError(f"{name} has a non-finite entry")
            rows[name] = row.astype(column.dtypes[0])
            if not column.optional or (
                not np.isnan(rows[name]).all() and not (name == "weight" and weight in (None, 1))
            ):
                self._seen.add(name)
        texts = {"config_type": config_type, "group": group}
        for name, text in texts.items():
            if len(text.encode()) > MAX_TEXT or "\0" in text:
                raise ValueError(
                    f"{name} {text[:40]!r}... is longer than {MAX_TEXT} bytes or not plain text"
                )
        for name, row in rows.items():
            self._write(name, row)
        for name, text in texts.items():
            self._codes[name].append(self._texts[name].setdefault(text, len(self._texts[name])))
        self.num_structures += 1
        self.num_atoms += n
        self._write("ptr", np.array([self.num_atoms], dtype="<i8"))

    def _write(self, name: str, array: np.ndarray) -> None:
        self._spool[name].write(array.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            for spool in self._spool.values():
                spool.close()

    def _publish(self) -> None:
        if self.num_structures == 0:
            raise ValueError(f"{self.path}: no structure to write")
        handle, name = tempfile.mkstemp(
            prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent
        )
        os.close(handle)
        try:
            # Format 1.10 has checksums in its metadata: a damaged file is an error, not a crash of
            # the library. Aligned columns: numpy and the page cache both prefer them.
            with h5py.File(
                name, "w", libver=("v110", "v110"), alignment_threshold=64, alignment_interval=64
            ) as file:
                self._fill(file)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(
                name, 0o666 & ~umask
            )  # mkstemp makes private files; a data set is meant to be shared
            _sync(name)
            os.replace(name, self.path)
            _sync(self.path.parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _fill(self, file: h5py.File) -> None:
        from mlip import __version__

        attributes = {
            "source": "",
            "level_of_theory": "",
            **self.attributes,
            "schema": SCHEMA,
            "units": UNITS,
            "created_by": f"mlip {__version__}",
        }
        for key, value in attributes.items():
            raw = value.encode()[: MAX_ATTRIBUTE - 1]
            # Fixed length: text of variable length lives on a heap without checksums.
            file.attrs.create(key, raw, dtype=h5py.string_dtype("utf-8", max(1, len(raw))))
        _copy(self._spool["ptr"], file, "ptr", (self.num_structures + 1,), np.dtype("<i8"))
        for name, column in COLUMNS.items():
            if name in self._seen:
                rows = self.num_atoms if column.per_atom else self.num_structures
                _copy(
                    self._spool[name], file, name, (rows, *column.shape), np.dtype(column.dtypes[0])
                )
        for name in TEXT_COLUMNS:
            if len(self._texts[name]) > 1:
                values = np.array([text.encode() for text in self._texts[name]])
                file.create_dataset(name, data=values[np.array(self._codes[name])])


def _copy(
    spool: BinaryIO, file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    data = file.create_dataset(name, shape=shape, dtype=dtype)
    spool.seek(0)
    width = dtype.itemsize * int(np.prod(shape[1:]))
    step = max(1, COPY_BYTES // width)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = np.frombuffer(spool.read((stop - start) * width), dtype=dtype)
        data[start:stop] = block.reshape(stop - start, *shape[1:])


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HDF5File:
    """Read a data file by structure or by block.

    The file is checked when it is opened: schema, lengths, types, and that every column lies inside
    the file itself. Only a file descriptor is kept; copies sent to other processes, by fork or by
    pickling, open their own.

    Parameters
    ----------
    path : the file

    Raises
    ------
    OSError
        If the file cannot be read, is cut short, or changes while it is in use.
    ValueError
        If it is HDF5 but not of schema "mlip-1", or refers to anything outside itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._pid = -1
        layout = inspect(self.path)
        self.attributes: dict[str, str] = layout.attributes
        self._offsets = layout.offsets
        self._dtypes = layout.dtypes
        self._identity = layout.identity
        self._plan = [
            (
                name,
                COLUMNS[name].per_atom,
                layout.offsets[name],
                dtype.itemsize * math.prod(shape),
                shape,
                dtype,
                bool if name == "pbc" and dtype.kind != "b" else _TARGETS.get(dtype.str),
            )
            for name, (dtype, shape) in layout.dtypes.items()
            if name in COLUMNS
        ]
        self.num_structures = layout.num_structures
        self.num_atoms = layout.num_atoms
        self._check_ptr()

    def __len__(self) -> int:
        return self.num_structures

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns in the file."""
        return tuple(self._offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_pid": -1}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; the next read opens it again."""
        descriptor = self.__dict__.get("_descriptor")
        if descriptor is not None and self._pid == os.getpid():
            with contextlib.suppress(OSError, TypeError):  # TypeError: interpreter shutdown
                os.close(descriptor)
        self.__dict__["_descriptor"] = None

    def read(self, index: int) -> Structures:
        """Structure ``index`` alone."""
        return self.read_block(index, index + 1)

    def read_block(self, start: int, stop: int) -> Structures:
        """Structures ``start : stop``."""
        if not 0 <= start < stop <= self.num_structures:
            raise IndexError(
                f"{self.path}: no structures {start}:{stop}, the file has {self.num_structures}"
            )
        ptr = self._rows("ptr", start, stop + 1)
        a, b = int(ptr[0]), int(ptr[-1])
        if not 0 <= a < b <= self.num_atoms:
            raise OSError(f"{self.path}: changed while in use; open it again")
        values: dict[str, np.ndarray] = {"ptr": ptr - a}
        descriptor = self._open()
        # Written out rather than by _rows: with some eight columns, calls are what a read costs.
        for name, per_atom, offset, width, shape, dtype, target in self._plan:
            first, last = (a, b) if per_atom else (start, stop)
            rows = np.empty((last - first, *shape), dtype)
            size = (last - first) * width
            if os.preadv(descriptor, [rows.data], offset + first * width) != size:
                rows = self._rows(
                    name, first, last
                )  # more than the kernel gives at once, or cut short
            values[name] = rows if target is None else rows.astype(target)
        return Structures(**values)

    def column(self, name: str) -> np.ndarray | None:
        """One whole column, or None if the file has none; text columns as an array of str."""
        if name in TEXT_COLUMNS:
            if name not in self._offsets:
                return None
            raw = self._rows(name, 0, self.num_structures)
            texts, codes = np.unique(raw, return_inverse=True)
            return np.array([text.decode("utf-8", "replace") for text in texts], dtype=np.str_)[
                codes
            ]
        if name not in self._offsets:
            return None
        length = self.num_structures + 1 if name == "ptr" else self.num_structures
        if name in COLUMNS and COLUMNS[name].per_atom:
            length = self.num_atoms
        return self._rows(name, 0, length)

    def blocks(self, size: int = 4096) -> Iterator[tuple[int, Structures]]:
        """Walk through the file: (index of the first structure, block)."""
        for start in range(0, self.num_structures, size):
            yield start, self.read_block(start, min(start + size, self.num_structures))

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        dtype, shape = self._dtypes[name]
        rows = np.empty((stop - start, *shape), dtype=dtype)
        size = rows.nbytes
        offset = self._offsets[name] + start * (size // max(1, stop - start))
        done = os.preadv(self._open(), [rows.data], offset) if size else 0
        while done < size:  # the kernel gives at most 2 GB at once
            rest = rows.reshape(-1).view(np.uint8)[done : done + (1 << 30)]
            got = os.preadv(self._open(), [rest.data], offset + done)
            if got == 0:
                raise OSError(f"{self.path}: cut short while in use ('{name}' ends early)")
            done += got
        return rows

    def _open(self) -> int:
        if self._descriptor is None or self._pid != os.getpid():
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != self._identity:
                os.close(descriptor)
                raise OSError(f"{self.path}: changed since it was opened; open it again")
            self._descriptor, self._pid = descriptor, os.getpid()
        return self._descriptor

    def _check_ptr(self) -> None:
        last = 0
        step = 1 << 20
        for start in range(0, self.num_structures + 1, step):
            ptr = self._rows("ptr", start, min(start + step, self.num_structures + 1))
            steps = np.diff(ptr, prepend=last)
            if start == 0:
                steps = steps[1:]
                if ptr[0] != 0:
                    raise ValueError(f"{self.path}: 'ptr' does not start at 0")
            if (steps <= 0).any():
                where = start + int(np.flatnonzero(steps <= 0)[0])
                raise ValueError(
                    f"{self.path}: 'ptr' does not increase at structure {where}; the file is "
                    f"damaged"
                )
            last = int(ptr[-1])
        if last != self.num_atoms:
            raise ValueError(
                f"{self.path}: 'ptr' ends at {last} but there are {self.num_atoms} atoms"
            )


def metadata(path: str | Path) -> dict[str, Any]:
    """What a data file says of itself, with the numbers of structures and atoms."""
    file = HDF5File(path)
    return {
        **file.attributes,
        "num_structures": len(file),
        "num_atoms": file.num_atoms,
        "columns": file.columns,
    }
