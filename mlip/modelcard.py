"""What a model file says of itself, as text for people; without torch or the model's code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlip.pretrained import find
from mlip.tensorfile import read_raw

# Key in the metadata and the words for it, in the order of printing.
FIELDS = {
    "model": "model",
    "parameters": "parameters",
    "dtype": "dtype",
    "elements": "elements",
    "cutoff": "cutoff (angstrom)",
    "repulsion": "repulsion",
    "units": "units",
    "level_of_theory": "level of theory",
    "training": "training",
    "errors": "errors",
    "hyperparameters": "hyperparameters",
    "versions": "versions",
    "format": "format",
    "licence": "licence",
    "citation": "citation",
}
MAX_TEXT = 2000  # characters of one value; a file is not to be trusted with a terminal
MAX_LINES = 400
MAX_WIDTH = 100  # of a table


def describe(model: str | Path) -> str:
    """Model, elements, cutoff, level of theory, training, errors, versions, licence, citation.

    Parameters
    ----------
    model : a model file, or the name of a model that comes with the package

    Raises
    ------
    FileNotFoundError, CheckpointError
        As ``mlip.checkpoint.load``: what is shown has passed the checksum.
    """
    path = find(model)
    tensors, metadata = read_raw(path)
    size = sum(len(tensor.data) for tensor in tensors.values())
    kind = metadata.pop("kind", "of unknown kind")
    lines = [
        f"{path.name}: {_text(kind)}, {len(tensors)} tensors, {size / 1e6:.2f} MB, checksum right"
    ]
    if kind == "potential":
        if "wrappers" in metadata:  # said of those that have any
            metadata["model"] = _wrapped(metadata.get("model"), metadata.pop("wrappers"))
        for key, words in FIELDS.items():
            lines += _entry(words, metadata.pop(key, "not stated"), indent=2)
    for key in sorted(metadata):
        lines += _entry(_text(key), metadata[key], indent=2)
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"  ... {len(lines) - MAX_LINES} more lines"]
    return "\n".join(lines)


def _wrapped(model: Any, wrappers: Any) -> str:
    """``facet in rotation_averaging (rotations octahedral, mirrors False)``."""
    text = _text(model)
    for entry in wrappers if isinstance(wrappers, list) else [wrappers]:
        options = dict(entry) if isinstance(entry, dict) else {"name": entry}
        name = _text(options.pop("name", "unknown"))
        words = ", ".join(f"{_text(key)} {_value(x)}" for key, x in options.items())
        text += f" in {name}" + (f" ({words})" if words else "")
    return text


def _entry(words: str, value: Any, indent: int) -> Iterator[str]:
    space = " " * indent
    if isinstance(value, dict) and value and indent < 8:
        rows = list(value.values())
        if all(
            isinstance(row, dict) and row and _flat(row) and row.keys() == rows[0].keys()
            for row in rows
        ):
            yield f"{space}{words}"
            yield from _table(value, indent + 2)
        elif (
            _flat(value)
            and len(line := ", ".join(f"{k} {_value(v)}" for k, v in value.items())) < 90
        ):
            yield f"{space}{words:<20} {_text(line)}"
        else:
            yield f"{space}{words}"
            for key, item in value.items():
                yield from _entry(_text(key), item, indent + 2)
    else:
        yield f"{space}{words:<{22 - indent}} {_value(value)}"


def _flat(row: dict[str, Any]) -> bool:
    return not any(isinstance(item, dict | list) for item in row.values())


def _table(rows: dict[str, dict[str, Any]], indent: int) -> Iterator[str]:
    columns = list(next(iter(rows.values())))
    cells = [["", *(_text(column) for column in columns)]]
    cells += [[_text(name), *(_value(row[c]) for c in columns)] for name, row in rows.items()]
    if _width(cells) > MAX_WIDTH - indent:  # then it is better turned
        cells = [list(column) for column in zip(*cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield " " * indent + "  ".join([row[0].ljust(widths[0]), *rest])


def _width(cells: list[list[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*cells, strict=True))


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return _text(" ".join(_value(item) for item in value))
    return _text(value if isinstance(value, str | int) else json.dumps(value))


def _text(value: Any) -> str:
    """One line of printable characters: control sequences in a file must not reach the terminal."""
    text = str(value)
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + " ..."
    return "".join(c if c.isprintable() else " " for c in text)
