"""Time and memory of one evaluation against the number of atoms, whole and in pieces.

    python benchmarks/scaling.py facet:small

Silicon of 512 to 10 648 atoms, float32, energy, forces and stress through the calculator.  Time is
the processor's, so that other programs on the machine count less: that of a step, the median of
nine after eight, each with all positions changed by 0.02 angstrom; and that of the very first
step, which also finds neighbours and asks the system for its memory.  Memory is the peak of the
process above the loaded model.  The exponents are slopes of the logarithms.  The last row has a
limit of half of the memory that the largest system takes; lists of edges alone are a third.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acceleration import random_potential
from ase import Atoms
from ase.build import bulk
from speed import cpu_name

from mlip.allocator import tune_allocator
from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.memory import PeakMemory
from mlip.potential import Potential

UNCOUNTED, COUNTED = 7, 9  # steps after the first


def silicon(cells: tuple[int, int, int]) -> Atoms:
    atoms = bulk("Si", cubic=True) * cells
    atoms.rattle(0.05, seed=0)
    return atoms


def evaluate(potential: Potential, atoms: Atoms, max_memory: float | None = None) -> dict[str, Any]:
    calculator = EqCalculator(potential, device="cpu", max_memory=max_memory)
    memory = PeakMemory(calculator.device)
    rng, energy, seconds = np.random.default_rng(0), None, []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(1 + UNCOUNTED + COUNTED):
            begin = time.process_time()
            calculator.calculate(atoms)
            seconds.append(time.process_time() - begin)
            energy = calculator.results["energy"] if energy is None else energy
            atoms.positions += rng.normal(0, 0.02 / np.sqrt(3), atoms.positions.shape)
    return {
        "atoms": len(atoms),
        "cpu_seconds": round(statistics.median(seconds[-COUNTED:]), 4),
        "first_cpu_seconds": round(seconds[0], 3),
        "peak_MiB": round(memory.read(), 1),
        "energy": energy,
        "told": [str(message.message) for message in told],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="facet:small")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json"
    )
    a = parser.parse_args()
    torch.set_num_threads(1)  # threads would not survive the fork
    tune_allocator()
    potential = random_potential(a.model, torch.float32)
    evaluate(potential, silicon((1, 1, 1)))  # warms up
    # A process for each: what one has taken it keeps, and would take nothing more.
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = []
        for n in (4, 5, 8, 11):
            rows.append(pool.apply(evaluate, (potential, silicon((n, n, n)))))
            print(rows[-1], flush=True)
        limit = rows[-1]["peak_MiB"] * 2**20 / 2
        pieces = pool.apply(evaluate, (potential, silicon((n, n, n)), limit))
    pieces["limit_MiB"] = round(limit / 2**20, 1)
    pieces["energy_minus_whole_per_atom"] = (pieces["energy"] - rows[-1]["energy"]) / pieces[
        "atoms"
    ]
    print(pieces)
    x = np.log([row["atoms"] for row in rows])
    exponents = {
        key: round(float(np.polyfit(x, np.log([row[key] for row in rows]), 1)[0]), 3)
        for key in ("cpu_seconds", "first_cpu_seconds", "peak_MiB")
    }
    result = {
        "cpu": cpu_name(),
        "threads": 1,
        "model": a.model,
        "sizes": rows,
        "exponents": exponents,
        "in_pieces": pieces,
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(exponents)


if __name__ == "__main__":
    main()
