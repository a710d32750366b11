"""What accelerations gain: the plain and the accelerated potential, turn by turn.

    python benchmarks/acceleration.py mace:small mace:medium --ways splines
    python benchmarks/acceleration.py facet:small --ways compile
    python benchmarks/acceleration.py facet:small --ways program

Energy, forces and stress in one thread; processor time, medians over rounds, with the time to load
(conversion, compilation, check), after how many steps that has paid for itself, and the error
against the plain model in float64 beside that of the plain model in the same precision.  A program
file is written first; that is told apart from loading.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from speed import cpu_name
from speed_worker import system

from mlip.allocator import tune_allocator
from mlip.backends import accelerated
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential
from mlip.programfile import ProgramFile, write_program
from mlip.training.sizes import SIZES

ELEMENTS = (1, 6, 7, 8, 14)


def processor_seconds() -> float:
    """Of this process, and of the compilers that it has started and awaited."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def random_potential(name: str, dtype: torch.dtype) -> Potential:
    """A preset with random weights, none of them zero."""
    kind, _, size = name.partition(":")
    hyperparameters = {"cutoff": 5.0, **SIZES[kind][size or "medium"]}
    if kind == "mace":
        hyperparameters["elements"] = ELEMENTS
    torch.manual_seed(0)
    model = build(kind, **hyperparameters)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    e0 = torch.full((119,), torch.nan)
    e0[list(ELEMENTS)] = 0.0
    return Potential(model, e0).to(dtype).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["mace:small"])
    parser.add_argument("--ways", nargs="+", default=["splines"])
    parser.add_argument("--systems", nargs="+", default=["molecule", "Si216"])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "acceleration.json"
    )
    a = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocator()
    result = json.loads(a.out.read_text()) if a.out.exists() else {}
    for name in a.models:
        plain = random_potential(name, getattr(torch, a.dtype))
        row: dict[str, object] = {"cpu": cpu_name()}
        with TemporaryDirectory() as folder:
            ways = a.ways
            if ways == ["program"]:
                path = Path(folder) / "model.pt2"
                begin = processor_seconds()
                write_program(plain, path)
                row["write_seconds"] = round(processor_seconds() - begin, 2)
                row["megabytes"] = round(path.stat().st_size / 1e6, 2)
                ways = ProgramFile(path)
            begin = processor_seconds()
            fast = accelerated(plain, ways)
            load = processor_seconds() - begin
        exact = copy.deepcopy(plain).double()
        row["load_seconds"] = round(load, 2)
        for label in a.systems:
            atoms = system(label)
            atoms.rattle(0.05, seed=0)
            graph = AtomicGraph.from_atoms(atoms, 5.0)
            stress = label != "molecule"
            times: list[list[float]] = [[], []]
            for _ in range(a.rounds + 2):
                for k, potential in enumerate((plain, fast)):
                    begin = processor_seconds()
                    for _ in range(3):
                        potential(graph, stress=stress)
                    times[k].append((processor_seconds() - begin) / 3)
            before, after = (1e3 * statistics.median(t[2:]) for t in times)
            right, *outputs = (p(graph, stress=stress)["forces"] for p in (exact, plain, fast))
            errors = [float((f - right).abs().max() / right.abs().max()) for f in outputs]
            row[label] = {
                "plain_ms": round(before, 2),
                "fast_ms": round(after, 2),
                "times_faster": round(before / after, 3),
                "steps_to_pay": round(1e3 * load / (before - after)) if before > after else None,
                "relative_force_error": {"plain": errors[0], "fast": errors[1]},
            }
        key = f"{name} {a.dtype} {'+'.join(a.ways)}"
        result[key] = row
        print(key, json.dumps(row), flush=True)
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
