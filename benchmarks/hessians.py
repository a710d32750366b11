"""Time of a Hessian: its rows in batches and one by one, and by differences of forces.

    python benchmarks/hessians.py facet:small facet:medium

A molecule of 27 atoms and silicon, random weights, one thread.  Time is the processor's, so that
other programs on the machine count less; the smaller of two runs.  The error is that against rows
one by one, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from acceleration import random_potential
from speed import cpu_name
from speed_worker import system

from mlip.allocator import tune_allocator
from mlip.calculators import EqCalculator
from mlip.calculators import hessian as module

WAYS = {"one_by_one": ("autograd", 1), "batches": ("auto", module.COPIES), "finite": ("finite", 1)}
RUNS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["facet:small", "facet:medium"])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "hessians.json"
    )
    a = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocator()
    rows = []
    for model in a.models:
        for dtype in (torch.float32, torch.float64):
            calculator = EqCalculator(random_potential(model, dtype), device="cpu")
            for name in ("si8", "molecule", "si64"):
                atoms = system(name)
                row: dict = {"model": model, "dtype": str(dtype)[6:], "atoms": len(atoms)}
                found = {}
                for way, (method, module.COPIES) in WAYS.items():
                    seconds = []
                    for _ in range(RUNS):
                        begin = time.process_time()
                        found[way] = calculator.get_hessian(atoms, method=method)
                        seconds.append(time.process_time() - begin)
                    row[f"{way}_cpu_seconds"] = round(min(seconds), 3)
                right = found["one_by_one"]
                for way in ("batches", "finite"):
                    row[f"{way}_error"] = float(abs(found[way] - right).max() / abs(right).max())
                rows.append(row)
                print(row, flush=True)
                result = {"cpu": cpu_name(), "threads": 1, "rows": rows}
                a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
