"""What a model computes, compiled ahead of time into a file that is loaded in about a second.

    write_program(potential, "silicon.pt2")
    fast = accelerated(potential, ProgramFile("silicon.pt2"))

The program is that of ``mlip.compiled``, made by torch.export and AOTInductor; using it takes no
compiler.  The model file stays the data: second derivatives, reference energies and the check come
from it.

A program file is machine code.  Whoever loads one runs it: load only those that you made or trust.
Its stamp says what it depends on (weights, dtype, torch, processor), and it is refused where one of
these differs; that protects from mistakes, not from a program that lies.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mlip.backends import BACKENDS, BackendError, Compile, accelerated, automatic
from mlip.checkpoint import checksum
from mlip.compiled import Compiled, Program, exported
from mlip.models import name_of
from mlip.potential import Potential
from mlip.tensorfile import write_bytes

FORMAT = 1
STAMP = "extra/mlip.json"  # in the archive, below its only folder
# What has to be equal, in the order of asking, and the words for it.
FACTS = {
    "format": "format",
    "system": "system",
    "device": "device",
    "torch": "version of torch",
    "processor": "kind of processor",
    "model": "model",
    "dtype": "dtype",
    "weights": "checksum of weights",
}
# Of the processor's features those that a compiler makes use of by itself.
USED = re.compile(r"s?sse|avx|amx|fma|f16c|bmi|abm|movbe|popcnt|gfni|asimd|sve|bf16|i8mm|atomics")


class ProgramFile:
    """A program file as a way to compute the model that it was made from.

    Parameters
    ----------
    path : file of ``write_program``
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.name = self.path.name

    def obstacle(self, device: torch.device) -> str | None:
        """The file is not there."""
        return None if self.path.is_file() else f"there is no file {self.path}"

    def convert(self, model: Any, elements: Sequence[int]) -> Compiled:
        """The model with this program; BackendError if it is another model's."""
        require_fit(self.path, model)
        return Compiled(model, partial(open_program, self.path))


def write_program(potential: Potential, path: str | os.PathLike[str]) -> None:
    """Compile a potential's model into a program file, about a minute.

    Parameters
    ----------
    potential : in evaluation mode, on the processor, in the dtype in which it will be used
    path : ``NAME.pt2``; the old file or the new one, whatever happens

    Raises
    ------
    BackendError
        No C++ compiler, a model that cannot be compiled, a failure of the compiler, or a program
        that gives other numbers than the plain model.
    FileNotFoundError, ValueError
        For a path that cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: a program file is named NAME.pt2")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    compiler, device = Compile(), potential.e0.device
    if device.type != "cpu":
        raise BackendError(f"program files are for processors, and the potential is on {device}")
    if (obstacle := compiler.obstacle(device)) is not None:
        raise BackendError(f"'{compiler.name}': {obstacle}")
    model = potential.model
    fast = model
    for name in (*automatic(potential), compiler.name):
        fast = BACKENDS[name].convert(fast, potential.elements)
    with TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself
                torch._inductor.aoti_compile_and_package(
                    exported(fast.model),
                    package_path=str(made),
                    inductor_configs={"cpp.dynamic_threads": True},  # as many as there are then
                )
        except Exception as problem:  # compilers raise whatever they like
            first = (str(problem).splitlines() or [""])[0]
            raise BackendError(f"compiling failed: {type(problem).__name__}: {first}") from problem
        with zipfile.ZipFile(made, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/{STAMP}", json.dumps(stamp(model), indent=1))
        accelerated(potential, ProgramFile(made))
        write_bytes(path, made.read_bytes())


def stamp(model: Any) -> dict[str, Any]:
    """What the program of a model depends on, here and now."""
    weight = next(model.parameters())
    hyperparameters = json.dumps(model.config.model_dump(mode="json"), sort_keys=True)
    return {
        "format": FORMAT,
        "system": f"{sys.platform} {platform.machine()}",
        "device": weight.device.type,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "instructions": instructions(),
        "model": name_of(model),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "weights": checksum(hyperparameters, model.state_dict()),
    }


def instructions() -> list[str]:
    """Extensions of this processor's instruction set; none where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted({word for word in found[1].split() if USED.match(word)}) if found else []


def read_stamp(path: Path) -> dict[str, Any]:
    """The stamp of a program file, of which nothing is run; BackendError if it is none."""
    file = BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(f"/{STAMP}"))
            damaged = archive.testzip()
            content = json.loads(archive.read(name))
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, RuntimeError):
        content = damaged = None  # RuntimeError: an altered archive seems encrypted, or of a kind
    if damaged is not None:
        raise BackendError(f"{path}: damaged")
    if not isinstance(content, dict):
        raise BackendError(f"{path}: not a program file, as `mlip compile` writes it")
    return content


def require_fit(path: Path, model: Any) -> None:
    """BackendError if the program of a file is not that of this model on this machine."""
    its, here = read_stamp(path), stamp(model)
    again = f"make it anew: mlip compile MODEL --out {path.name} --dtype {here['dtype']}"
    for key, words in FACTS.items():
        if its.get(key) != here[key]:
            raise BackendError(
                f"{path}: its {words} is {_short(its.get(key))}, here it is {_short(here[key])}; "
                f"{again}"
            )
    missing = sorted(set(its.get("instructions", ())) - set(here["instructions"]))
    if missing:
        raise BackendError(
            f"{path}: made for a processor with {', '.join(missing)}, which this one lacks; {again}"
        )


def _short(fact: Any) -> str:
    text = str(fact)
    return text if len(text) < 40 else f"{text[:12]}..."


def open_program(path: Path, model: Any) -> Program:
    """The program of a file, which has to be that of this model.  Runs what the file holds."""
    require_fit(path, model)
    # torch._inductor.aoti_load_package would ask a compiler what the stamp says of the processor.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def program(Z: Tensor, v: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energy, features, g = loader.boxed_run([Z, v, neighbors])
        return energy, features, g

    return program
