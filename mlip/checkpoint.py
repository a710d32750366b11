"""Save and load a Potential: one safetensors file, tensors and JSON metadata, nothing that can run.

The file is readable with safetensors and json alone.  Its metadata say: format number, model name
and hyperparameters, elements, cutoff, units, level of theory, training summary, errors, versions.
One checksum covers metadata and tensors (``mlip.tensorfile``).  Names are looked up in ``MODELS``;
no class or module is ever named in a file.
"""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from safetensors.torch import save as serialize
from torch import Tensor
from torch.overrides import TorchFunctionMode

import mlip
from mlip.modelcard import describe
from mlip.models import MODELS, build, name_of
from mlip.nn.cohesion import Cohesion
from mlip.nn.zbl import ZBL
from mlip.potential import Potential
from mlip.tensorfile import CheckpointError, RawTensor, digest, read_raw, write_bytes
from mlip.wrappers import unwrapped, wrap

__all__ = [
    "CheckpointError",
    "describe",
    "load",
    "read_metadata",
    "read_tensors",
    "save",
    "write_tensors",
]

FORMAT = 2


def _with_plain_radial_functions(metadata: dict[str, Any]) -> dict[str, Any]:
    """Files of format 1 may lack options whose defaults are others now."""
    name, own = metadata.get("model"), metadata.get("hyperparameters")
    if not isinstance(name, str) or name not in MODELS or not isinstance(own, dict):
        return metadata  # no model of ours; who wants to build it says so
    old = {"stretch": 0.0, "quartic": True} if name == "facet" else {"stretch": 0.0}
    known = MODELS[name][1].model_fields
    missing = {key: x for key, x in old.items() if key in known and key not in own}
    return {**metadata, "hyperparameters": {**own, **missing}}


# Format n -> metadata of format n + 1.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _with_plain_radial_functions}
UNITS = {"energy": "eV", "length": "angstrom", "forces": "eV/angstrom", "stress": "eV/angstrom^3"}
MAX_WRAPPERS = 4
MINIMUM_TORCH = (2, 10)  # older ones have known holes in reading files
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and metadata under one checksum; ``path`` is the old file or the new one.

    Raises
    ------
    ValueError
        The metadata is not JSON, or a tensor has a dtype that the format lacks.
    OSError
        Not written; the file that was there is untouched.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"{path}: tensor '{name}' is {tensor.dtype}; the format holds {', '.join(DTYPES)}"
            )
    try:
        text = json.dumps(metadata, sort_keys=True, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata cannot be written as JSON: {error}") from None
    blob = serialize(plain, metadata={"mlip": text, "sha256": checksum(text, plain)})
    # safetensors writes its metadata in random order; sorted, equal contents give equal files.
    length = int.from_bytes(blob[:8], "little")
    header = json.dumps(json.loads(blob[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    write_bytes(path, len(header).to_bytes(8, "little") + header + blob[8 + length :])


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a text and of every tensor's name, dtype, shape and bytes, as files bear it."""
    raw = {}
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        data = t.reshape(-1).view(torch.uint8).numpy().data
        raw[name] = RawTensor(_NAMES[t.dtype], tuple(t.shape), data)
    return digest(text, raw.items())


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of ``write_tensors``, as written; the checksum is verified."""
    _check_torch()
    raw, metadata = read_raw(path)
    tensors = {}
    for name, (dtype, shape, data) in raw.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor '{name}' has the unknown dtype {dtype!r}")
        flat = (
            torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]) if len(data) else torch.empty(0)
        )
        tensors[name] = flat.to(DTYPES[dtype]).reshape(shape)
    return tensors, metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a model file says of itself, brought to the present format."""
    return _upgraded(read_raw(path)[1], Path(path))


def save(potential: Potential, path: str | Path, **extra: Any) -> None:
    """Write a potential to one safetensors file.

    Parameters
    ----------
    potential : Potential
    path : file name, by custom ``NAME.safetensors``
    extra : what is said besides: ``level_of_theory``, ``training``, ``errors``, ``licence``,
    ``citation``;
        added to ``potential.metadata``, JSON values only, numbers that are not finite become null
    """
    import e3nn

    model, wrappers = unwrapped(potential.model)
    metadata = {
        **{key: x for key, x in _finite(potential.metadata).items() if key != "wrappers"},
        **_finite(extra),
        "kind": "potential",
        "format": FORMAT,
        "model": name_of(model),
        "hyperparameters": model.config.model_dump(mode="json"),
        **({"wrappers": wrappers} if wrappers else {}),
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
    if potential.repulsion is not None and type(potential.repulsion) is not ZBL:
        raise ValueError(
            f"{path}: a {type(potential.repulsion).__name__} cannot be saved, only ZBL repulsion"
        )
    if potential.cohesion is not None and type(potential.cohesion) is not Cohesion:
        raise ValueError(f"{path}: a {type(potential.cohesion).__name__} cannot be saved")
    write_tensors(path, potential.state_dict(), metadata)


def load(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Potential:
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
    tensors, metadata = read_tensors(path)
    if metadata.get("kind", "potential") != "potential":  # formats are counted for each kind
        raise CheckpointError(f"{path}: holds a {str(metadata['kind'])[:40]}, not a potential")
    metadata = _upgraded(metadata, path)
    if "kind" not in metadata:
        raise CheckpointError(f"{path}: lacks the entry kind")
    try:
        potential = _rebuilt(metadata, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError, RecursionError) as error:
        reason = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        what = "lacks the entry " if isinstance(error, KeyError) else ""
        raise CheckpointError(f"{path}: cannot rebuild the model: {what}{reason[:500]}") from None
    return potential.to(device=device, dtype=dtype).eval()


def _rebuilt(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Potential:
    """The potential that the metadata describe, with the tensors; refuses what does not fit."""
    name = metadata["model"]
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"unknown model {str(name)[:40]!r}; this version has {', '.join(MODELS)}")
    if metadata["units"] != UNITS:
        raise ValueError(f"units {str(metadata['units'])[:200]} instead of {UNITS}")
    if metadata["dtype"] not in ("float32", "float64"):
        raise ValueError(f"dtype {str(metadata['dtype'])[:40]!r} is neither float32 nor float64")
    if metadata["repulsion"] not in (None, "zbl"):
        raise ValueError(f"unknown repulsion {str(metadata['repulsion'])[:40]!r}")
    hyperparameters = metadata["hyperparameters"]
    if not isinstance(hyperparameters, dict):
        raise TypeError("its hyperparameters are not a table")
    json.dumps(hyperparameters, allow_nan=False)  # ValueError: no cutoff is infinite
    stored = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    # Building draws random weights: neither the caller's random state nor the memory may suffer
    # from it.
    with (
        torch.random.fork_rng(devices=[]),
        _Budget(sum(tensor.numel() for tensor in stored.values())),
    ):
        model = build(name, **hyperparameters)
        for entry in _wrappers(metadata):
            model = wrap(model, **entry)
    repulsion = ZBL() if metadata["repulsion"] == "zbl" else None
    cohesion = Cohesion(tensors["cohesion.energies"]) if "cohesion.energies" in tensors else None
    e0, scale = tensors["e0"], tensors["scale"]
    if e0.dtype != torch.float64 or scale.dtype != torch.float64 or scale.dim() != 0:
        raise ValueError("e0 and scale have to be float64, scale a single number")
    if not math.isfinite(scale) or bool(e0.isinf().any()):
        raise ValueError("e0 or scale is not finite")
    if cohesion is not None and not bool(cohesion.energies[~e0.isnan()].isfinite().all()):
        raise ValueError("the energy of cohesion of a known element is not finite")
    potential = Potential(model, e0, float(scale), repulsion, cohesion, metadata).to(
        getattr(torch, metadata["dtype"])
    )
    _check_fit(potential.state_dict(), tensors)
    potential.load_state_dict(tensors)
    symbols = [chemical_symbols[z] for z in potential.elements]
    if metadata["elements"] != symbols or metadata["cutoff"] != potential.cutoff:
        raise ValueError("elements or cutoff in its metadata are not those of the model")
    return potential


def _wrappers(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries ``{"name": ..., option: value}``, innermost first; files without wrappers have
    none."""
    entries = metadata.get("wrappers", [])
    if not isinstance(entries, list) or len(entries) > MAX_WRAPPERS:
        raise ValueError(f"its wrappers are not a list of at most {MAX_WRAPPERS}")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError("a wrapper in it has no name")
        if "model" in entry:
            raise ValueError("a wrapper in it names a model")
    return entries


def _check_fit(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    missing, unknown = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
    if missing or unknown:
        raise ValueError(f"tensors missing: {_some(missing)}; tensors unknown: {_some(unknown)}")
    for name, tensor in stored.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(
                f"tensor '{name[:80]}' is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the hyperparameters ask for {want.dtype} {tuple(want.shape)}"
            )


def _some(names: list[str]) -> str:
    return (
        ", ".join(name[:80] for name in names[:3]) + (", ..." if len(names) > 3 else "") or "none"
    )


class _Budget(TorchFunctionMode):
    """Refuses, before it is allocated, what is out of proportion to the file.

    Hyperparameters in a file are mere claims.  A model's tensors are those in the file plus tables
    (harmonics, grids), for which there is an allowance.
    """

    ALLOWANCE = 20_000_000  # elements

    def __init__(self, stored: int) -> None:
        super().__init__()
        self.left = 4 * stored + self.ALLOWANCE
        self.sized = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self.sized and args:
            shape = args[0] if isinstance(args[0], Iterable) else args
            self.left -= math.prod(n for n in shape if isinstance(n, int))
        elif func is torch.arange and args:
            self.left -= int(max(abs(a) for a in args if isinstance(a, int | float)))
        elif func is torch.eye and args:
            self.left -= int(args[0]) ** 2
        if self.left < 0:
            raise ValueError("the hyperparameters ask for far more than the tensors in the file")
        return func(*args, **(kwargs or {}))


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
        try:
            metadata = UPGRADES[number](metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot upgrade from format {number}: {error}") from None
        number += 1
    return {**metadata, "format": number}


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    value = _plain(value) if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return _finite(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as JSON can write them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        need = ".".join(map(str, MINIMUM_TORCH))
        warnings.warn(
            f"torch {torch.__version__} has known holes in reading files; upgrade to {need}",
            stacklevel=3,
        )
