"""From the files that people have to the data file, and back.

Everything ``ase.io`` reads, one structure at a time; a report says which label was read from which
key for how many structures.  The output appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.geometry import complete_cell
from ase.io.extxyz import key_val_str_to_dict, read_xyz
from ase.io.formats import UnknownFileTypeError, filetype, open_with_compression

from mlip.data.dataset import ISOLATED
from mlip.data.export import require_writable, write_ase
from mlip.data.foreign_hdf5 import read_foreign
from mlip.data.hdf5 import HDF5File, HDF5Writer
from mlip.data.labels import LABELS, RAW, Frame, LabelOptions, LabelReader
from mlip.data.neighbors import OVERLAP, neighbor_list

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

HDF5_SUFFIXES = (".h5", ".hdf5")
LARGE_FORCE = 100.0  # eV/angstrom RMS; data beyond it are in another unit, or broken
_OURS = "_mlip_data_file"  # marks structures of a data file, whose keys and units are known
MAX_ATOMS = 10_000_000  # of one structure; a larger count is a damaged file
LONELY = 10.0  # angstrom between the images of a single atom; bonds are shorter


@dataclass
class ConversionReport:
    """What was read from where."""

    output: Path
    files: list[Path]
    num_structures: int = 0
    num_atoms: int = 0
    num_isolated: int = 0
    sources: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # label, key, place
    lacking: Counter[tuple[str, str]] = field(default_factory=Counter)  # label, file
    ignored: Counter[str] = field(default_factory=Counter)
    config_types: Counter[str] = field(default_factory=Counter)
    rms_force: float = float("nan")  # eV/angstrom
    warnings: list[str] = field(default_factory=list)


def convert(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    allow_unfinished: bool = False,
    allow_unlabelled: bool = False,
    level_of_theory: str = "",
    options: LabelOptions | None = None,
    **label_options: Any,
) -> ConversionReport:
    """Convert labelled structures: to a data file (``.h5``), or to any format that ASE writes.

    Parameters
    ----------
    inputs : files or patterns such as ``runs/*/OUTCAR``; whatever ``ase.io`` reads, also gzipped,
        and data files
    output : ``.h5`` for a data file; otherwise ASE's format of that name, labels as ``REF_energy``,
        ``REF_forces`` and ``REF_stress`` (nine numbers, row by row) in extended XYZ
    overwrite : replace an existing output
    allow_unfinished : accept VASP outputs that were cut short, without their last frame
    allow_unlabelled : accept structures without any label, as denoising needs none
    level_of_theory : text stored with the data
    options, label_options : fields of ``LabelOptions``: keys, units and conventions of the labels

    Raises
    ------
    ValueError
        For frames that cannot be used (named by file and number), unknown units, and when nothing
        is labelled.
    OSError
        For files that are not there, and for an output that is.
    """
    options = dataclasses.replace(options or LabelOptions(), **label_options)
    reader = LabelReader(options)
    output = Path(output)
    files = _expand([inputs] if isinstance(inputs, str | Path) else inputs)
    if output.exists():
        if any(output.samefile(path) for path in files):
            raise ValueError(
                f"{output} is both input and output; choose another name for the output"
            )
        if not overwrite:
            raise FileExistsError(
                f"{output} exists; choose another name or pass overwrite (--overwrite)"
            )
    if output.suffix not in HDF5_SUFFIXES:
        require_writable(output)
    report = ConversionReport(output, files)
    frames = _checked(files, reader, report, allow_unfinished)
    if output.suffix in HDF5_SUFFIXES:
        attributes = {
            "source": ", ".join(path.name for path in files),
            "level_of_theory": level_of_theory,
        }
        if not level_of_theory:
            attributes["level_of_theory"] = _common_level_of_theory(files)
        with HDF5Writer(output, attributes, overwrite=overwrite) as writer:
            for frame in frames:
                writer.append(
                    frame.atoms.numbers,
                    frame.atoms.positions,
                    np.asarray(frame.atoms.cell),
                    frame.atoms.pbc,
                    energy=frame.energy,
                    forces=frame.forces,
                    stress=frame.stress,
                    charge=frame.charge,
                    spin=frame.spin,
                    field=frame.field,
                    weight=frame.weight,
                    config_type=frame.config_type,
                    group=frame.group,
                )
            _finish(report, options, allow_unlabelled)
    else:
        write_ase(output, frames, lambda: _finish(report, options, allow_unlabelled))
    for text in report.warnings:
        logger.warning(text)
    return report


def format_report(report: ConversionReport) -> Table:
    """Table for the terminal: one line per label and key, then what lacks which label."""
    from rich.table import Table

    isolated = f" ({report.num_isolated} isolated atoms)" if report.num_isolated else ""
    title = (
        f"{report.output.name}: {report.num_structures} structures{isolated}, {report.num_atoms} "
        f"atoms "
        f"from {len(report.files)} file{'s' * (len(report.files) != 1)}"
    )
    table = Table(title=title, title_justify="left", min_width=len(title))
    for name in ("label", "key", "read from", "structures"):
        table.add_column(name, justify="right" if name == "structures" else "left")
    for label in LABELS:
        for (which, key, place), count in sorted(report.sources.items()):
            if which == label:
                table.add_row(label, key, place, str(count))
        for (which, file), count in sorted(report.lacking.items()):
            if which == label:
                table.add_row(label, "[yellow]none[/yellow]", file, str(count))
    for name, count in sorted(report.ignored.items()):
        table.add_row("[dim]not read[/dim]", name, "", str(count))
    return table


def _expand(patterns: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        text = os.path.expanduser(str(pattern))
        found = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        if not found:
            raise FileNotFoundError(f"{pattern}: no such file")
        for name in found:
            if os.path.isdir(name):
                raise IsADirectoryError(
                    f"{name} is a folder; name the files in it, for example {name}/*.xyz"
                )
            if Path(name) not in files:
                files.append(Path(name))
    if not files:
        raise ValueError("no input file given")
    return files


def _checked(
    files: Sequence[Path], reader: LabelReader, report: ConversionReport, allow_unfinished: bool
) -> Iterator[Frame]:
    """Frames of all files, each one usable; fills the report on the way."""
    force_sum, force_count, asymmetric = 0.0, 0, 0
    for path in files:
        in_file = 0
        plain = LabelReader(
            LabelOptions()
        )  # data files have our keys and units, whatever the options say
        for number, atoms in _read(path, allow_unfinished):
            is_data_file = _OURS in atoms.info
            try:
                _check_geometry(atoms)
                frame = (plain if is_data_file else reader).read(atoms)
                _check_geometry(frame.atoms, overlap=True)
            except ValueError as error:
                raise ValueError(f"{path}: frame {number}: {error}") from None
            if is_data_file and "group" in atoms.info:
                frame.group = atoms.info["group"]
            in_file += 1
            alone = len(atoms) == 1 and (frame.config_type == ISOLATED or _lonely(frame.atoms))
            if alone and not frame.config_type:
                frame.config_type = ISOLATED
            report.num_structures += 1
            report.num_atoms += len(atoms)
            report.num_isolated += alone
            report.config_types[frame.config_type] += 1
            report.ignored.update(frame.ignored)
            for label in LABELS:
                if getattr(frame, label) is None:
                    report.lacking[label, path.name] += 1
                else:
                    report.sources[label, *frame.sources[label]] += 1
            if frame.forces is not None:
                force_sum += float((frame.forces**2).sum())
                force_count += frame.forces.size
            asymmetric += frame.asymmetry > 0.01
            yield frame
        if in_file == 0:
            raise ValueError(f"{path}: holds no structures")
    if force_count:
        report.rms_force = float(np.sqrt(force_sum / force_count))
        if report.rms_force > LARGE_FORCE:
            report.warnings.append(
                f"the RMS force is {report.rms_force:.4g} eV/angstrom, more than "
                f"{LARGE_FORCE:.0f}: "
                "the unit is probably another one; see --energy-unit, --length-unit and "
                "--forces-unit"
            )
    if asymmetric:
        report.warnings.append(
            f"{asymmetric} stress tensors are not symmetric within 1 %; their symmetric part is "
            f"taken"
        )


def _lonely(atoms: Atoms) -> bool:
    """Whether the images of a single atom are too far away to be its neighbours."""
    if not atoms.pbc.any():
        return True
    heights = 1.0 / np.linalg.norm(np.linalg.inv(complete_cell(atoms.cell)), axis=0)
    return bool((heights[atoms.pbc] >= LONELY).all())


def _check_geometry(atoms: Atoms, overlap: bool = False) -> None:
    numbers = atoms.numbers
    if len(numbers) == 0:
        raise ValueError("the structure has no atoms")
    if numbers.min() < 1 or numbers.max() > 118:
        k = int(np.flatnonzero((numbers < 1) | (numbers > 118))[0])
        raise ValueError(f"atom {k} ({atoms.symbols[k]}) is no element")
    # With the cutoff at the distance of overlap this finds bad positions, flat cells and coinciding
    # atoms.
    if overlap:
        neighbor_list(atoms.positions, np.asarray(atoms.cell), atoms.pbc, OVERLAP)
    elif not np.isfinite(atoms.positions).all():
        raise ValueError(
            f"atom {int(np.argwhere(~np.isfinite(atoms.positions))[0, 0])} has a non-finite "
            f"position"
        )


def _finish(report: ConversionReport, options: LabelOptions, allow_unlabelled: bool) -> None:
    """Called when all frames were read and before the output appears."""
    for label in LABELS:
        key = getattr(options, f"{label}_key")
        # Data files among the inputs bring their own keys, so ask for this very key.
        if key is not None and not any(
            label == which and key == used for which, used, _ in report.sources
        ):
            raise ValueError(
                f"no structure has {label} under the key {key!r}; found are {_found(report)}"
            )
    if options.virial_key is not None and not any(
        used == options.virial_key for _, used, _ in report.sources
    ):
        raise ValueError(
            f"no structure has a virial under {options.virial_key!r}; found are {_found(report)}"
        )
    if not report.sources and not allow_unlabelled:
        raise ValueError(
            f"no label was found in {report.num_structures} structures of "
            f"{', '.join(map(str, report.files[:5]))}; "
            f"found are {_found(report)}; name the keys (--energy-key, --forces-key, --stress-key, "
            f"--virial-key), or pass allow_unlabelled (--unlabelled) if there are none"
        )


def _found(report: ConversionReport) -> str:
    names = [f"{key} ({place})" for _, key, place in report.sources] + list(report.ignored)
    return ", ".join(sorted(set(names))) or "no keys that look like labels"


def _common_level_of_theory(files: Sequence[Path]) -> str:
    found = set()
    for path in files:
        if path.suffix not in HDF5_SUFFIXES:
            return ""
        with contextlib.suppress(ValueError):
            found.add(HDF5File(path).attributes.get("level_of_theory", ""))
    return found.pop() if len(found) == 1 else ""


def _read(path: Path, allow_unfinished: bool) -> Iterator[tuple[int, Atoms]]:
    """(number, structure) of one file; whatever a parser throws becomes a ValueError with file and
    frame."""
    number = 0
    try:
        for atoms in _frames(path, allow_unfinished):
            yield number, atoms
            number += 1
    except FileNotFoundError:
        raise
    except GeneratorExit:
        raise
    except UnknownFileTypeError:
        raise ValueError(f"{path}: not a format that ASE knows") from None
    except (
        Exception
    ) as error:  # parsers raise anything: IndexError, StopIteration, AssertionError, zlib.error ...
        text = str(error)
        if text.startswith(f"{path}:"):
            raise
        if isinstance(error, KeyError):
            text = f"unknown element or column {text}"
        elif not isinstance(error, ValueError | OSError | EOFError):
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise ValueError(f"{path}: frame {number}: cannot be read: {text}") from error


def _frames(path: Path, allow_unfinished: bool) -> Iterator[Atoms]:
    if path.suffix in HDF5_SUFFIXES:
        yield from _data_file(path)
        return
    kind = filetype(str(path))
    if kind in ("extxyz", "xyz"):
        yield from _extended_xyz(path)
        return
    if kind in ("vasp-out", "vasp-xml") and not allow_unfinished:
        mark = b"General timing and accounting" if kind == "vasp-out" else b"</modeling>"
        if mark not in _tail(path):
            raise ValueError(
                f"{path}: VASP did not finish or the file is cut short; check it, and pass "
                f"allow_unfinished "
                "(--allow-unfinished) to take the complete frames"
            )
    if kind in ("db", "json"):
        yield from _database(path)
        return
    yield from ase.io.iread(str(path), index=":", do_not_split_by_at_sign=True)


def _database(path: Path) -> Iterator[Atoms]:
    """Rows of an ASE database, with what it keeps as key-value pairs and data put into ``info``."""
    with ase.db.connect(path) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info.update({**row.data, **row.key_value_pairs})
            yield atoms


def _tail(path: Path, size: int = 20000) -> bytes:
    with open_with_compression(str(path), "rb") as file:
        last = b""
        while block := file.read(1 << 20):
            last = (last + block)[-size:]
    return last


def _extended_xyz(path: Path) -> Iterator[Atoms]:
    """Frames of an XYZ file, cut out here so that each error has its frame's number and compressed
    files are read once."""
    with open_with_compression(str(path), "r") as file:
        line = file.readline()
        while line:
            if not line.strip():  # blank lines at the end, or between frames
                line = file.readline()
                continue
            try:
                num_atoms = int(line.split()[0])
            except ValueError:
                raise ValueError(
                    f"expected the number of atoms, found {line.strip()[:60]!r}"
                ) from None
            if not 0 <= num_atoms <= MAX_ATOMS:
                raise ValueError(f"impossible number of atoms {num_atoms}")
            lines = [line, *(file.readline() for _ in range(num_atoms + 1))]
            if not lines[-1].strip() and num_atoms:
                raise ValueError(f"cut short: {num_atoms} atoms announced, the file ends before")
            line = file.readline()
            while line.startswith("VEC"):
                lines.append(line)
                line = file.readline()
            parse = io.StringIO("".join(lines))
            yield from read_xyz(parse, index=slice(None), properties_parser=_parse_comment)


def _parse_comment(text: str) -> dict[str, Any]:
    """ASE's reading of the comment line, but ``stress`` and ``virial`` as they stand in the file.

    ASE insists on nine numbers for these two and turns them into Voigt's order.
    """
    text = re.sub(r"(^|\s)(stress|virial)=", rf"\1{RAW}\2=", text)
    info: dict[str, Any] = key_val_str_to_dict(text)
    return info


def _data_file(path: Path) -> Iterator[Atoms]:
    try:
        file = HDF5File(path)
    except ValueError as error:
        if "no schema" not in str(error):
            raise
        yield from read_foreign(path)
        return
    types, groups = file.column("config_type"), file.column("group")
    for start, block in file.blocks():
        for k in range(len(block)):
            s = block[k]
            atoms = Atoms(s.atomic_numbers, s.positions, cell=s.cell[0], pbc=s.pbc[0])
            for name, array in (("energy", s.energy), ("charge", s.charge), ("spin", s.spin)):
                if array is not None and not np.isnan(array[0]):
                    atoms.info["REF_energy" if name == "energy" else name] = float(array[0])
            if s.field is not None and not np.isnan(s.field).any():
                atoms.info["field"] = s.field[0]
            if s.weight is not None and s.weight[0] != 1:
                atoms.info["config_weight"] = float(s.weight[0])
            if s.stress is not None and not np.isnan(s.stress).all():
                atoms.info["REF_stress"] = s.stress[0].ravel()
            if s.forces is not None and not np.isnan(s.forces).all():
                atoms.arrays["REF_forces"] = s.forces
            if types is not None and types[start + k]:
                atoms.info["config_type"] = str(types[start + k])
            if groups is not None and groups[start + k]:
                atoms.info["group"] = str(groups[start + k])
            atoms.info[_OURS] = True
            yield atoms
