"""A file of tensors and JSON metadata under one checksum; read here without torch.

The container is safetensors.  Its metadata has two strings: ``mlip``, a JSON object, and
``sha256``, the digest of that string and of every tensor's name, dtype, shape and bytes.  So no
byte that can change a result, a weight as little as a cutoff or a unit, can change unnoticed.
Nothing in such a file can run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, deserialize

MAX_HEADER_BYTES = 32 * 2**20  # names, shapes and metadata; what is larger is not ours
MAX_FILE_BYTES = 32 * 2**30


class CheckpointError(ValueError):
    """A model file that cannot be used; the text names the file and says why."""


class RawTensor(NamedTuple):
    """A tensor as it lies in the file."""

    dtype: str  # safetensors' name: "F64", "F32", "I64", ...
    shape: tuple[int, ...]
    data: bytes | memoryview


def digest(text: str, tensors: Iterable[tuple[str, RawTensor]]) -> str:
    """sha256 over the metadata's text and all tensors in the order of their names."""
    total = hashlib.sha256(f"{len(text.encode())}|{text}|".encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{len(name)}|{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        total.update(tensor.data)
    return total.hexdigest()


def read_raw(path: str | Path) -> tuple[dict[str, RawTensor], dict[str, Any]]:
    """Tensors and metadata of a file; the checksum is verified before anything of it is used.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CheckpointError
        It is damaged, altered, or not one of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path}: {size} bytes; no file of this package is that large")
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: damaged or not a safetensors file{_guess(path, start)}")
        header = file.read(length)
        strings = _strings(path, header)
        try:
            blob = start + header + file.read()
            tensors = {
                name: RawTensor(entry["dtype"], tuple(entry["shape"]), entry["data"])
                for name, entry in deserialize(blob)
            }
        except (SafetensorError, MemoryError) as error:
            raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None
    text, expected = strings.get("mlip"), strings.get("sha256")
    if not isinstance(text, str) or not isinstance(expected, str):
        raise CheckpointError(
            f"{path}: a safetensors file, but not one of this package (no 'mlip' metadata)"
        )
    try:
        actual = digest(text, tensors.items())
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is not JSON ({_brief(error)})") from None
    if actual != expected:
        raise CheckpointError(
            f"{path}: does not match its checksum; the file was altered or damaged"
        )
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its metadata is not a JSON object")
    return tensors, metadata


def _strings(path: Path, header: bytes) -> dict[str, Any]:
    """The metadata strings of a safetensors header."""
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file ({_brief(error)})"
        ) from None
    strings = content.get("__metadata__") if isinstance(content, dict) else None
    return strings if isinstance(strings, dict) else {}


def _guess(path: Path, start: bytes) -> str:
    if path.suffix == ".pt2":
        return (
            " (a compiled program: code, and no model; give the model's file, this as its program)"
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            " (a pickle, as torch.save writes it: such files can run code and are not read; of a "
            "model of mace-torch 'mlip import-mace' makes one of ours)"
        )
    if start.startswith(b"\x89HDF"):
        return " (an HDF5 file: a data set, not a model)"
    return ""


def _brief(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace a file at once: written beside it under another name, flushed to disk, renamed.

    Whatever happens, the file is the old one or the new one, never half of it.
    """
    path = Path(os.path.realpath(path))  # through a link, so that the link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{path}: not written ({error.strerror}); the file is as it was"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems do not sync folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
