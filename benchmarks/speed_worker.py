"""One package of ``speed.py``: reads what to do, one JSON object a line, answers with one line.

    python speed_worker.py MODEL THREADS float32|float64

``{"system": NAME}``: steps through the calculator; ``{"training": SET, "batch": N}``: steps of
training.  The answer has seconds of each step, the peak of memory above the loaded model, the
seconds in neighbours and in the model, or why there is nothing.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from peers import CRYSTALS_ONLY, DISTRIBUTIONS, PEERS, watched

ELEMENTS = (1, 6, 7, 8, 14)  # that models of this package are made for
MOST = 20  # steps in a turn


def system(name: str) -> Atoms:
    if name == "molecule":  # 27 atoms, C, H, N, O, about the neighbours of 3BPA
        atoms = molecule("C6H6") + molecule("CH3CH2NH2") + molecule("H2O") + molecule("CO")
        for k, start in enumerate((12, 22, 25)):
            atoms.positions[start:] += [1.1, 0.6 * (-1) ** k, 2.6]
        return atoms
    n = round((int(name[2:]) / 8) ** (1 / 3))
    return bulk("Si", cubic=True) * (n, n, n)


def own_calculator(name: str, dtype: str) -> Calculator:
    """A model file, or a model of this package with random weights: ``name``, ``name:size`` or a
    variant of ``trainings.py``, each with ``+compile`` or ``+splines`` at the end."""
    from trainings import untrained

    from mlip.calculators.eq_calculator import EqCalculator

    name, *ways = name.split("+")
    if Path(name).is_file():
        return EqCalculator(name, device="cpu", dtype=dtype, accelerate=ways or None)
    potential = untrained(name, ELEMENTS).to(getattr(torch, dtype))
    return EqCalculator(potential, device="cpu", accelerate=ways or None)


def watched_of_ours() -> list[tuple[Any, str, str]]:
    from mlip.calculators.chunks import BoundedPotential
    from mlip.calculators.neighbor_cache import NeighborCache

    return [(NeighborCache, "edges", "neighbors"), (BoundedPotential, "__call__", "model")]


class Parts(Counter[str]):
    """Seconds spent in some functions."""

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count what the attribute ``name`` of a class or module takes as ``part``."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self[part] += time.perf_counter() - begin

        setattr(owner, name, timed)


def resident(field: str) -> float:
    """MiB of the process: VmRSS now, or VmHWM, the peak since ``forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """What was freed goes back to the system first: the next peak is not made of it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def timed_repeats(
    step: Callable[[], Any],
    number: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    limit: float = math.inf,
    parts: Parts | None = None,
) -> tuple[list[float], float]:
    """Seconds of each step, and the peak of memory in MiB.

    The first step warms up and is not counted; ``number`` follow, or fewer, one at least, if all
    have taken ``limit`` seconds.
    """
    seconds: list[float] = []
    forget_peak()
    before, start = resident("VmRSS"), clock()
    while True:
        begin = clock()
        step()
        seconds.append(clock() - begin)
        if len(seconds) == 1 and parts is not None:
            parts.clear()
        if len(seconds) > 1 and (len(seconds) > number or clock() - start > limit):
            return seconds[1:], resident("VmHWM") - before


def timed_steps(
    atoms: Atoms, number: int, rng: np.random.Generator, *arguments: Any, **options: Any
) -> tuple[list[float], float]:
    """``timed_repeats`` of energy, forces and stress, positions moving."""
    start = atoms.positions.copy()

    def step() -> None:
        atoms.positions = start + rng.normal(0, 0.02, start.shape)
        atoms.get_potential_energy()
        atoms.get_forces()
        if atoms.pbc.all():
            atoms.get_stress()

    return timed_repeats(step, number, *arguments, **options)


def num_parameters(calculator: Calculator) -> int:
    """Of the networks that a calculator holds."""
    values = [v for x in vars(calculator).values() for v in (x if isinstance(x, list) else [x])]
    return sum(p.numel() for v in values if isinstance(v, torch.nn.Module) for p in v.parameters())


def versions(peer: str) -> str:
    """Of the package and of what its speed depends on."""
    own = ("eqmlip", "e3nn", "matscipy", "torch-geometric")
    found = []
    for name in (*DISTRIBUTIONS.get(peer, own), "torch", "ase", "numpy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


class Package:
    """A model, made for each set of elements once."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, dtype
        self.peer, _, self.size = name.partition("-")
        self.is_peer = self.peer in PEERS
        self.parts = Parts()
        for function in watched(self.peer) if self.is_peer else watched_of_ours():
            self.parts.watch(*function)
        self.calculators: dict[str, Calculator] = {}
        self.trainings: dict[str, Callable[[], None]] = {}
        self.rng = np.random.default_rng(0)

    def steps(self, name: str, limit: float) -> dict[str, Any]:
        """A turn of steps through the calculator."""
        atoms = system(name)
        if self.peer in CRYSTALS_ONLY and not atoms.pbc.all():
            raise ValueError(f"{self.peer} takes crystals only")
        symbols = sorted(set(atoms.get_chemical_symbols()))
        key = " ".join(symbols) if self.is_peer else "all"
        if key not in self.calculators:
            self.calculators[key] = (
                PEERS[self.peer](self.size, symbols, self.dtype)
                if self.is_peer
                else own_calculator(self.name, self.dtype)
            )
        atoms.calc = self.calculators[key]
        one = bulk("Si") if atoms.pbc.all() else atoms[:2]
        one.calc = atoms.calc
        one.get_forces()  # libraries and kernels are loaded now, too
        seconds, peak = timed_steps(atoms, MOST, self.rng, limit=limit, parts=self.parts)
        return {
            "seconds": seconds,
            "peak_MiB": peak,
            "atoms": len(atoms),
            "parts": dict(self.parts),
            "parameters": num_parameters(atoms.calc),
        }

    def training(self, name: str, batch: int, limit: float) -> dict[str, Any]:
        """A turn of steps of training."""
        from speed_training import training_step

        key = f"{name} {batch}"
        if key not in self.trainings:
            self.trainings.clear()  # one at a time
            self.trainings[key] = training_step(self.peer, self.size, self.name, name, batch)
        seconds, peak = timed_repeats(self.trainings[key], MOST, limit=limit)
        return {"seconds": seconds, "peak_MiB": peak}

    def answer(self, task: dict[str, Any]) -> dict[str, Any]:
        """What a task gives, with the processors that it had; or why there is nothing."""
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            if "system" in task:
                answer = self.steps(task["system"], task["limit"])
            else:
                answer = self.training(task["training"], task["batch"], task["limit"])
        except Exception as error:  # the others go on
            text = str(error) if isinstance(error, ValueError) else repr(error)
            return {"left_out": text[:200]}
        elapsed = time.perf_counter() - begin
        return {**answer, "processors": (time.process_time() - cpu) / elapsed}


def main() -> None:
    name, threads, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    package = Package(name, dtype)
    print("RESULT " + json.dumps({"versions": versions(package.peer)}), flush=True)
    for line in sys.stdin:
        print("RESULT " + json.dumps(package.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
