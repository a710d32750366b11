"""What a step of ``relax_many`` costs around the model: 32 crystals of 8 atoms.

    python benchmarks/relax_overhead.py

Cubic silicon, strained and rattled at random, in one batch, float32, one thread.  With a small
Facet of random weights, whose energies are made too small for anything to move far, 40 steps are
timed and what the model takes is subtracted: with and without the cell.  With the shipped model
cells are relaxed to the end.  Both with one step for all and with an optimizer of ASE for each
structure.  Times are the processor's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acceleration import random_potential
from ase import Atoms
from ase.build import bulk

from mlip.allocator import tune_allocator
from mlip.calculators import EqCalculator, relax_many
from mlip.calculators.batched_relaxation import BatchedRelaxation
from mlip.calculators.chunks import BoundedPotential

STEPS, CRYSTALS = 40, 32


def crystals(number: int) -> list[Atoms]:
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(number):
        atoms = bulk("Si", cubic=True)
        strain = rng.normal(0, 0.02, (3, 3))
        atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        frames.append(atoms)
    return frames


@contextmanager
def one_optimizer_each() -> Iterator[None]:
    """Structures are moved one by one."""
    original = BatchedRelaxation.takes
    BatchedRelaxation.takes = lambda *_: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        BatchedRelaxation.takes = original  # type: ignore[method-assign]


class ModelTime:
    """Counts the processor time of evaluations."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.original = BoundedPotential.__call__

    def __enter__(self) -> ModelTime:
        def timed(bounded: BoundedPotential, *args: Any, **options: Any) -> Any:
            begin = time.process_time()
            try:
                return self.original(bounded, *args, **options)
            finally:
                self.seconds += time.process_time() - begin

        BoundedPotential.__call__ = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        BoundedPotential.__call__ = self.original  # type: ignore[method-assign]


def around_the_model(calculator: EqCalculator, cell: bool) -> dict[str, float]:
    """Milliseconds for each step of the batch."""
    frames = crystals(CRYSTALS)
    relax_many(frames, calculator, cell=cell, max_steps=3)  # warms up
    begin = time.process_time()
    relax_many(frames, calculator, cell=cell, max_steps=0)
    ends = time.process_time() - begin  # first lists, results and space groups
    with ModelTime() as model:
        begin = time.process_time()
        results = relax_many(frames, calculator, cell=cell, max_steps=STEPS, fmax=1e-9)
        seconds = time.process_time() - begin
    assert all(result.steps == STEPS for result in results), [r.status for r in results]
    model_ms = 1e3 * model.seconds / (STEPS + 1)
    step_ms = 1e3 * (seconds - ends) / STEPS
    return {"step_ms": step_ms, "model_ms": model_ms, "around_ms": step_ms - model_ms}


def to_the_end() -> dict[str, float]:
    frames = crystals(4 * CRYSTALS)
    calculator = EqCalculator("silicon", device="cpu", dtype="float32")
    relax_many(frames[:CRYSTALS], calculator, cell=True, max_steps=3)  # warms up
    begin = time.process_time()
    results = relax_many(frames, calculator, cell=True, fmax=0.01)
    seconds = time.process_time() - begin
    energies = [result.energy for result in results]
    return {
        "crystals": len(frames),
        "converged": sum(result.converged for result in results),
        "steps": sum(result.steps for result in results),
        "cpu_seconds": seconds,
        "structure_steps_per_second": sum(result.steps for result in results) / seconds,
        "mean_energy_eV": float(np.mean(energies)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    out = Path(__file__).parent / "results" / "relax_overhead.json"
    parser.add_argument("--out", type=Path, default=out)
    a = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocator()
    potential = random_potential("facet:small", torch.float32)
    potential.scale.fill_(1e-3)
    calculator = EqCalculator(potential, device="cpu")
    result: dict[str, Any] = {"crystals": CRYSTALS, "atoms": 8 * CRYSTALS}
    for name, way in (("batched", nullcontext), ("one_optimizer_each", one_optimizer_each)):
        with way():
            result[name] = {
                "positions": around_the_model(calculator, cell=False),
                "cell": around_the_model(calculator, cell=True),
                "silicon": to_the_end(),
            }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
