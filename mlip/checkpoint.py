"""Save and load a Potential: one safetensors file, tensors and JSON metadata, nothing that can run.

The file is readable with safetensors alone.  Its metadata has one key ``mlip``, a JSON object: format number,
model name and hyperparameters, elements, units, level of theory, training summary, versions and the sha256 of all
tensors.  Names are looked up in ``MODELS``; no class or module is ever named in a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import mlip
from mlip.models import MODELS, build, name_of
from mlip.nn.zbl import ZBL
from mlip.potential import Potential

FORMAT = 1
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}  # format n -> metadata of format n + 1
UNITS = {"energy": "eV", "length": "angstrom", "forces": "eV/angstrom", "stress": "eV/angstrom^3"}
MINIMUM_TORCH = (2, 10)  # older ones have known holes in reading files


class CheckpointError(ValueError):
    """A model file that cannot be used; the text names the file and says why."""


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata to a temporary name beside ``path``, then rename: the file is old or new, never half."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({**metadata, "sha256": checksum(tensors)}, sort_keys=True, allow_nan=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"mlip": text})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file written by ``write_tensors``; the checksum is verified."""
    path = Path(path)
    _check_torch()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("mlip")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None
    if header is None:
        raise CheckpointError(f"{path}: a safetensors file, but not one of this package (no 'mlip' metadata)")
    try:
        metadata = json.loads(header)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its metadata is not a JSON object")
    if metadata.get("sha256") != checksum(tensors):
        raise CheckpointError(f"{path}: the tensors do not match their checksum; the file was altered or damaged")
    return tensors, metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a model file says of itself, brought to the present format."""
    return _upgraded(read_tensors(path)[1], Path(path))


def save(potential: Potential, path: str | Path, **extra: Any) -> None:
    """Write a potential to one safetensors file.

    ``extra`` and ``potential.metadata`` go into the metadata: level_of_theory, training, errors, licence, citation.
    """
    import e3nn

    metadata = {
        **potential.metadata,
        **extra,
        "kind": "potential",
        "format": FORMAT,
        "model": name_of(potential.model),
        "hyperparameters": potential.model.config.model_dump(mode="json"),
        "repulsion": "zbl" if potential.repulsion is not None else None,
        "elements": [chemical_symbols[z] for z in potential.elements],
        "cutoff": potential.cutoff,
        "dtype": str(potential.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in potential.parameters()),
        "units": UNITS,
        "versions": {
            "mlip": mlip.__version__,
            "torch": torch.__version__,
            "e3nn": e3nn.__version__,
            "python": platform.python_version(),
        },
    }
    write_tensors(path, potential.state_dict(), metadata)


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Potential:
    """Read a potential, in evaluation mode.

    Parameters
    ----------
    path : file written by ``save``
    device : where to put it
    dtype : torch.float32 or torch.float64; the one it was saved in if None

    Raises
    ------
    FileNotFoundError, CheckpointError
        With the name of the file and what is wrong with it.
    """
    path = Path(path)
    tensors, raw = read_tensors(path)
    metadata = _upgraded(raw, path)
    if metadata.get("kind") != "potential":
        raise CheckpointError(f"{path}: holds a {metadata.get('kind')}, not a potential")
    name = metadata.get("model")
    if name not in MODELS:
        raise CheckpointError(f"{path}: unknown model {name!r}; this version has {', '.join(MODELS)}")
    try:
        # Shapes come first on the meta device: hyperparameters that ask for more memory than the file holds
        # are refused before anything is allocated.
        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in build(name, **metadata["hyperparameters"]).state_dict().items()}
        stored = {k.removeprefix("model."): tuple(v.shape) for k, v in tensors.items() if k.startswith("model.")}
        if shapes != stored:
            raise CheckpointError(f"{path}: its tensors do not fit the hyperparameters in its metadata")
        model = build(name, **metadata["hyperparameters"])
        repulsion = ZBL() if metadata.get("repulsion") == "zbl" else None
        potential = Potential(model, tensors["e0"], float(tensors["scale"]), repulsion, metadata)
        potential.to(getattr(torch, {"float32": "float32", "float64": "float64"}[metadata["dtype"]]))
        potential.load_state_dict(tensors)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot rebuild the model ({type(error).__name__}: {error})") from None
    return potential.to(device=device, dtype=dtype).eval()


def _upgraded(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    number = metadata.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise CheckpointError(f"{path}: no valid format number")
    if number > FORMAT:
        raise CheckpointError(
            f"{path}: written in format {number}, this version reads up to {FORMAT}; "
            f"please upgrade: pip install -U eqmlip"
        )
    while number < FORMAT:
        metadata = UPGRADES[number](metadata)
        number += 1
    return metadata


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        warnings.warn(
            f"torch {torch.__version__} has known holes in reading files; upgrade to {'.'.join(map(str, MINIMUM_TORCH))}",
            stacklevel=3,
        )
