"""Time of a Hessian: its rows in batches and one by one, and by differences of forces.

    python benchmarks/hessians.py facet:small facet:medium

A molecule of 27 atoms and silicon, random weights, one thread.  Time is the processor's, so that
other programs on the machine count less; the smallest of runs in turns for ten seconds.  The error
is that against rows one by one, relative to the largest entry.  A broken-off call goes on where it
stopped.
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
SECONDS = 10.0  # after which no further round is begun


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
    if a.out.is_file() and (before := json.loads(a.out.read_text()))["cpu"] == cpu_name():
        rows = before["rows"]
    known = [(row["model"], row["dtype"], row["atoms"]) for row in rows]
    for model in a.models:
        for dtype in (torch.float32, torch.float64):
            calculator = EqCalculator(random_potential(model, dtype), device="cpu")
            for name in ("si8", "molecule", "si64"):
                atoms = system(name)
                key = (model, str(dtype)[6:], len(atoms))
                if key in known:
                    continue
                row: dict = dict(zip(("model", "dtype", "atoms"), key, strict=True))
                found = {}
                seconds: dict[str, list[float]] = {way: [] for way in WAYS}
                begin = time.process_time()
                while time.process_time() - begin < SECONDS:
                    for way, (method, module.COPIES) in WAYS.items():
                        start = time.process_time()
                        found[way] = calculator.get_hessian(atoms, method=method)
                        seconds[way].append(time.process_time() - start)
                row |= {f"{way}_cpu_seconds": round(min(x), 3) for way, x in seconds.items()}
                right = found["one_by_one"]
                for way in ("batches", "finite"):
                    row[f"{way}_error"] = float(abs(found[way] - right).max() / abs(right).max())
                rows.append(row)
                print(row, flush=True)
                result = {"cpu": cpu_name(), "threads": 1, "rows": rows}
                a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
