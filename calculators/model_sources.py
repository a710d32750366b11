"""From what a user calls a model (object, file, pattern, name) to the calculator's potentials."""

from __future__ import annotations

import copy
import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlip.backends import BackendError, accelerated, check, probe_structures, requested
from mlip.checkpoint import load
from mlip.potential import Potential
from mlip.pretrained import find, names
from mlip.programfile import ProgramFile

ROUNDED = 1e-4  # of the largest value, more than float32 takes from a sound model
ModelSource = Potential | str | os.PathLike[str] | Sequence[Any]


def find_models(name: str | os.PathLike[str]) -> list[Path]:
    """Files meant by a path, a pattern (``run-*/model.safetensors``) or a shipped name."""
    text = os.path.expanduser(os.fspath(name))
    if os.path.isdir(text):
        raise IsADirectoryError(f"{text}: is a folder; give the model file in it (*.safetensors)")
    if glob.has_magic(text) and not os.path.exists(text):
        files = sorted(Path(file) for file in glob.glob(text, recursive=True))
        if not files:
            raise FileNotFoundError(f"no file matches '{text}'")
        return files
    return [find(text)]


def own_potentials(
    model: ModelSource, device: torch.device, dtype: torch.dtype | None
) -> list[Potential]:
    """Potentials in evaluation mode, shared with nobody; ``dtype`` None keeps their own."""
    if isinstance(model, Potential):
        # A copy: what the caller does to his potential afterwards (training, .to) stays his affair.
        own = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        return [in_dtype(own, dtype, "the model")]
    if isinstance(model, str | os.PathLike):
        paths = find_models(model)
        found = [
            in_dtype(load(path, device=device).requires_grad_(False), dtype, str(path))
            for path in paths
        ]
        for path, one in zip(paths, found, strict=True):
            if one.reservation is not None:
                warnings.warn(f"{path} was {one.reservation}", stacklevel=4)
        return found
    if isinstance(model, Sequence) and model:
        return [one for member in model for one in own_potentials(member, device, dtype)]
    if isinstance(model, torch.nn.Module):
        raise ValueError(
            f"{type(model).__name__} is an energy model without reference energies; "
            f"pass Potential(model, e0)"
        )
    raise ValueError(
        f"model = {model!r}: give a model file, the name of a shipped model "
        f"({', '.join(names()) or 'none'}), a Potential, or a list of these"
    )


def in_dtype(potential: Potential, dtype: torch.dtype | None, name: str) -> Potential:
    """The potential in this dtype; with a warning if a lower precision than its own costs more
    than usual."""
    if dtype != torch.float32 or potential.dtype == dtype:
        return potential.to(dtype=dtype)
    lower = copy.deepcopy(potential).to(dtype=dtype)
    if getattr(potential.model, "graph_inputs", ()) or not potential.elements:
        return lower  # there are no probes with charges or fields
    try:
        check(potential, lower, "float32", probe_structures(potential), ROUNDED)
    except BackendError as problem:
        warnings.warn(f"{name} was saved in float64; {problem}: use dtype='float64'", stacklevel=5)
    return lower


def quickened(
    potentials: Sequence[Potential],
    accelerate: str | Sequence[str] | None,
    program: str | os.PathLike[str] | None,
) -> list[Potential]:
    """The potentials with what a user asked for to make them faster."""
    if program is None:
        return [requested(one, accelerate) for one in potentials]
    if accelerate is not None:
        raise ValueError("give 'accelerate' or 'program': a program file is the whole model")
    if len(potentials) != 1:
        raise ValueError(f"'program' is the file of one model, here are {len(potentials)}")
    return [accelerated(potentials[0], ProgramFile(program))]


def parse_device(device: str | torch.device | None) -> torch.device:
    """'auto', '' and None mean the GPU if there is one."""
    if device is None or device in ("auto", ""):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device = {device!r}: {first}; give 'auto', 'cpu' or 'cuda'") from None
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}, but torch sees no GPU; give device='cpu' or 'auto'")
    if parsed.type == "cuda" and (parsed.index or 0) >= (number := torch.cuda.device_count()):
        raise ValueError(f"device = {device!r}, but torch sees {number}: cuda:0 to :{number - 1}")
    return parsed


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """None and '' keep the dtype of the model."""
    if dtype is None or dtype == "":
        return None
    known = {"float32": torch.float32, "float64": torch.float64}
    try:
        return known[str(dtype).removeprefix("torch.")]
    except KeyError:
        raise ValueError(
            f"dtype = {dtype!r}; give 'float32', 'float64' or '' (the model's)"
        ) from None
