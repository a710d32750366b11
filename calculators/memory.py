"""Memory: what is free, what a process has taken at most, what an evaluation takes."""

from __future__ import annotations

import ctypes
import math
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory:
    """Largest use of memory since it was made, above what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device) / 2**20
            return
        give_back()  # or the next peak would be made of what was freed before
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        except OSError:
            pass
        self.start = _of_process("VmRSS")

    def read(self) -> float:
        """MiB; NaN where the machine does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.start
        return max(_of_process("VmHWM") - self.start, 0.0)


def give_back() -> None:
    """Freed memory goes back to the system, where the C library can do that (glibc can)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def available_memory(device: torch.device) -> float:
    """Bytes that are free; NaN where the machine does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable") * 1024


def parse_memory(text: str | float) -> float:
    """Bytes meant by a number or by a text such as ``"8GB"`` or ``"512 MiB"``."""
    found = re.fullmatch(r"\s*([0-9.e+]+)\s*([kMGT]?i?)B?\s*", str(text))
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not (math.isfinite(value) and value > 0):
        raise ValueError(f"memory = {text!r}: give a number of bytes, or one with a unit: '8GB'")
    prefix = found[2]
    base = 1024 if prefix.endswith("i") else 1000
    return value * base ** " kMGT".index(prefix[:1] or " ")


class LiveBytes(TorchDispatchMode):
    """Largest number of bytes of all tensors that were made under it and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _of_process(field: str) -> float:
    return _kibibytes(Path("/proc/self/status"), field) / 1024


def _kibibytes(file: Path, field: str) -> float:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return float("nan")
    found = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return float(next(found, "nan"))
