"""What a step must cost on this machine, and how far each model is from it.

    python benchmarks/budget.py facet:small facet:small+compile facet gaunt escaip --threads 1
    python benchmarks/budget.py --table

For energy, forces and stress of Si 216 in float32 it counts, of the model as calculators run it,
the operations of matrix products and the bytes that all operations read and write, and measures the
machine: products of 512 x 512 matrices, and a pass over an array that stays in cache and over one
that does not.  The floor is

    products / rate  +  compulsory bytes / bandwidth of memory,

compulsory: edges in, forces out, features of neighbours gathered in each layer.  That is what a
program would need that fuses all but the products.  Times, those of the machine as well, are the
median of the fastest of many blocks of runs: two virtual processors may be parts of one core for
some seconds, and then are slower than one alone.  ``--table`` writes what is recorded, for each
number of threads and processor, into docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from ase.build import bulk
from pieces import insert
from speed import cpu_name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from trainings import HERE, untrained

from mlip.allocator import tune_allocator
from mlip.backends import accelerated, requested
from mlip.data.graph import AtomicGraph

RESULTS = HERE / "results" / "budget.json"
BLOCK = 9  # runs
KINDS = {
    "products": ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear"),
    "gathers and sums": (
        "index_select",
        "index_add",
        "index",
        "gather",
        "scatter_add",
        "index_put",
    ),
}
VIEWS = ("view", "expand", "permute", "transpose", "t", "slice", "split", "unsqueeze",
         "squeeze",
         "select", "detach", "alias", "_unsafe_view", "as_strided", "unbind", "lift_fresh",
         "split_with_sizes", "_reshape_alias")  # fmt: skip


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, and their number, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            kind = next((k for k, names in KINDS.items() if name in names), "element by element")
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes[kind] += sum(x.numel() * x.element_size() for x in tensors)
            self.calls[kind] += 1
        return out


def seconds(run: Callable[[], Any], least: float = 2.0) -> float:
    """The median of the fastest block of runs."""
    run()
    blocks: list[list[float]] = []
    while len(blocks) < 5 or sum(map(sum, blocks)) < least:
        blocks.append([])
        for _ in range(BLOCK):
            begin = time.perf_counter()
            run()
            blocks[-1].append(time.perf_counter() - begin)
    return min(map(statistics.median, blocks))


def machine() -> dict[str, float]:
    a, b, c = (torch.randn(512, 512) for _ in range(3))
    rates = {"Gflop/s": 2e-9 * 512**3 / seconds(lambda: torch.mm(a, b, out=c))}
    for name, n in (("cache GB/s", 1 << 16), ("memory GB/s", 1 << 26)):
        x, y = torch.randn(n), torch.empty(n)
        rates[name] = 1e-9 * 8 * n / seconds(lambda x=x, y=y: torch.mul(x, 2.0, out=y))
    return rates


def sent(config: Any) -> int:
    """Numbers that a neighbour sends, over all layers."""
    layers = config.num_rounds if hasattr(config, "num_rounds") else config.num_layers
    channels = getattr(config, "message_channels", None)
    if isinstance(channels, tuple):  # of each degree
        return layers * sum((2 * l + 1) * S for l, S in enumerate(channels))
    if channels is not None:  # at each orientation
        return layers * channels * max(config.orientations, 1)
    if hasattr(config, "max_ell"):  # MACE, whose first layer has scalars only
        return config.channels * (1 + (layers - 1) * (config.lmax + 1) ** 2)
    return layers * config.hidden


def parts(potential: Any, graph: AtomicGraph) -> dict[str, float]:
    """Shares of the model's parts in the products of matrices of the energy (the gradient's are
    alike); of layers all together."""
    graph = graph.replace(vectors=graph.edge_vectors().to(potential.dtype))
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        potential.model(graph)
    counts = {k: sum(v.values()) for k, v in flops.get_flop_counts().items()}
    root = type(potential.model).__name__
    shares: Counter[str] = Counter()
    for module, count in counts.items():
        *path, last = module.split(".")
        if path == [root] and not any(k.startswith(f"{module}.0") for k in counts):
            shares[last] += count  # a part of its own
        elif len(path) == 3 and path[0] == root and path[2].isdigit():
            shares[last] += count  # a part of a layer
    return {k: n / counts["Global"] for k, n in shares.most_common() if n}


def measured(name: str, graph: AtomicGraph, rates: dict[str, float]) -> dict[str, Any]:
    """Budget and time of a model, ``+compile`` for its program."""
    plain, _, way = name.partition("+")
    model = untrained(plain, [14])
    potential = requested(model, None)  # as calculators have it
    N, E = len(graph.atomic_numbers), graph.edge_index.shape[1]
    with FlopCounterMode(display=False) as flops:
        potential(graph, stress=True)
    with Traffic() as traffic:
        potential(graph, stress=True)
    # Vectors and their gradient in float64, once; features of neighbours once in each layer
    # and direction, as wide as what a neighbour sends.
    compulsory = 2 * 24 * E + 2 * 4 * sent(potential.model.config) * E
    floor = flops.get_total_flops() / rates["Gflop/s"] + compulsory / rates["memory GB/s"]
    fast = accelerated(model, way) if way else potential
    time = seconds(lambda: fast(graph, stress=True), 10.0)
    return {
        "Mflop_per_atom": flops.get_total_flops() / N / 1e6,
        "parts": parts(model, graph),
        "kB_per_atom": {k: v / N / 1e3 for k, v in traffic.bytes.items()},
        "operations": dict(traffic.calls),
        "floor_ms": floor * 1e-6,
        "measured_ms": time * 1e3,
        "times_the_floor": time * 1e9 / floor,
    }


def table(threads: str, found: dict[str, Any]) -> str:
    """Budgets and times of the models."""
    rates = found["machine"]
    lines = [
        f"Threads: {threads}. {rates['Gflop/s']:.0f} Gflop/s, {rates['cache GB/s']:.0f} GB/s in "
        f"cache, {rates['memory GB/s']:.0f} GB/s to memory.\n",
        "| model | Mflop/atom | by parts of the model | kB/atom: products, element by element, "
        "gathers | operations | floor (ms) | time (ms) | times the floor |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["Si216"].items():
        counted = "|||||"
        if "+" not in name:  # a program's are not counted
            kB = ", ".join(
                f"{row['kB_per_atom'][k]:.0f}"
                for k in ("products", "element by element", "gathers and sums")
            )
            shares = ", ".join(f"{k} {x:.0%}" for k, x in row["parts"].items() if x > 0.02)
            operations = sum(row["operations"].values())
            counted = f"| {row['Mflop_per_atom']:.3g} | {shares} | {kB} | {operations} |"
        lines.append(
            f"| `{name}` {counted} {row['floor_ms']:.3g} | {row['measured_ms']:.3g} "
            f"| {row['times_the_floor']:.3g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["facet:small", "facet"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="write docs/speed.md")
    a = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if a.table:
        text = "\n\n".join(table(threads, found[threads]) for threads in sorted(found))
        print(text)
        insert(HERE.parent / "docs" / "speed.md", "budget", text)
        return
    torch.set_num_threads(a.threads)
    tune_allocator()
    rates = machine()
    print(json.dumps(rates))
    atoms = bulk("Si", cubic=True) * (3, 3, 3)
    atoms.rattle(0.05, seed=0)
    graph = AtomicGraph.from_atoms(atoms, 5.0)
    key = f"{a.threads}, {cpu_name()}"
    rows = found.get(key, {}).get("Si216", {})
    for name in a.models:
        rows[name] = measured(name, graph, rates)
        print(name, json.dumps(rows[name]), flush=True)
    found[key] = {"machine": rates, "Si216": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
