"""All models of the package in one table: cost, errors after the same time, symmetry.

    MLIP_DATASETS=... python benchmarks/all_models.py --minutes 30
    python benchmarks/all_models.py --table

Made in pieces, each in a process of its own on one thread, one row of results/all_models.json for
each: the cost of a model, and a model trained on a set.  The same command may run once for each
core, and takes what the others leave; a broken-off call goes on where it stopped.

Cost (random weights, float32, the allocator of ``mlip``, time on the processor, medians): energy,
forces and stress of Si 216 and of a molecule of 27 atoms through the calculator, a step of training
on forces with 5 molecules of ethanol and the optimizer of ``mlip train``; peaks of memory above the
loaded model.

Errors: those of the test set in one pass, after --minutes with the configuration that is the same
for all (trainings.yaml); of mlearn silicon the published split, of rMD17 ethanol 950 structures for
training and 50 for validation, of 3BPA 450 of train_300K for training and the other 50 as test.
The rotation error is the root mean square deviation of forces on orbits of random rotations and
reflections from their mean.

``--table`` writes the table into README.md and docs/models.md, between their comments, and there
that of 3BPA, if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from pieces import Pieces, Row, insert
from trainings import HERE, SETS, for_minutes, measure, run_folder, runs, train, untrained

RESULTS = Pieces(HERE / "results" / "all_models.json")
MODELS = ("facet", "gaunt", "mace", "ponita", "escaip", "transip", "environment-local")
COSTS = ("molecule", "Si216", "training")
STEPS = {"molecule": 10, "Si216": 3, "training": 10}


def cost(model: str, what: str) -> Row:
    """Time and memory of a model, in this process."""
    import numpy as np
    import torch
    from ase import Atoms
    from speed_worker import system, timed_steps

    from mlip.allocator import tune_allocator
    from mlip.calculators import EqCalculator

    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    potential = untrained(model, [1, 6, 7, 8, 14])
    if what == "training":
        seconds, peak, atoms = *training_steps(potential), 45
    else:
        structure = system(what)
        structure.calc = EqCalculator(potential, device="cpu")
        few = Atoms("Si", cell=[3, 3, 3], pbc=True) if what == "Si216" else structure[:2]
        few.calc = structure.calc
        few.get_forces()  # libraries are loaded now, too
        rng = np.random.default_rng(0)
        seconds, peak = timed_steps(structure, STEPS[what], rng, time.process_time)
        atoms = len(structure)
    with torch.no_grad():
        direct = potential.model(two_atoms(potential)).forces is not None
    return {
        "ms": round(1e3 * statistics.median(seconds), 2),
        "min_ms": round(1e3 * min(seconds), 2),
        "atoms": atoms,
        "peak_MiB": round(peak, 1),
        "parameters": sum(p.numel() for p in potential.parameters()),
        "exact_symmetry": potential.model.exact_symmetry,
        "conservative": not direct,
    }


def two_atoms(potential):
    """A graph with vectors."""
    from ase import Atoms

    from mlip.data.graph import AtomicGraph

    graph = AtomicGraph.from_atoms(Atoms("CO", [[0, 0, 0], [0, 0.3, 1.2]]), potential.cutoff)
    return graph.replace(vectors=graph.edge_vectors().float())


def training_steps(potential) -> tuple[list[float], float]:
    """Seconds of steps on 5 molecules of ethanol, and the peak of memory."""
    from itertools import repeat

    import torch
    from ase.build import molecule
    from speed_training import own_step
    from speed_worker import timed_repeats

    from mlip.data.graph import AtomicGraph

    graphs = []
    for seed in range(5):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.05, seed=seed)
        graphs.append(AtomicGraph.from_atoms(atoms, potential.cutoff))
    graph = AtomicGraph.collate(graphs)
    graph = graph.replace(energy=torch.ones(5).double(), forces=torch.randn(45, 3).double())
    step = own_step(potential, repeat(graph))
    return timed_repeats(step, STEPS["training"], time.process_time)


def measure_cost(model: str, what: str) -> Row:
    """``cost`` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--cost", model, what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout
    return json.loads(done.splitlines()[-1])


def table(rows: list[Row], minutes: float) -> str:
    """Models by their error on ethanol; what is missing is empty, and columns of nothing else are
    left out."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    heads = [
        "model", "parameters", "Si 216, ms/atom", "molecule, ms/atom", "training, molecules/s",
        "memory: Si 216 / training, MiB", f"Si, {minutes:g} min: E (meV/atom)", "Si: F (meV/Å)",
        f"ethanol, {minutes:g} min: E (meV)", "ethanol: F (meV/Å)",
        "rotation error of F, ethanol (meV/Å)", "symmetry", "conservative",
    ]  # fmt: skip
    found = []
    for model in models:
        costs = {what: one(rows, model=model, cost=what) for what in COSTS}
        si, ethanol = (one(rows, model=model, set=s, minutes=minutes) for s in ("Si", "ethanol"))
        some = next((row for row in costs.values() if row), {})
        cells = [
            f"`{model}`",
            spaced(some["parameters"]) if some else "",
            *(number(costs[w], "ms", 1 / costs[w].get("atoms", 1)) for w in ("Si216", "molecule")),
            f"{5e3 / costs['training']['ms']:.3g}" if costs["training"] else "",
            " / ".join(number(costs[w], "peak_MiB") for w in ("Si216", "training")).strip(" /"),
            *(number(si, key) for key in ("energy_mae_per_atom", "forces_mae")),
            *(number(ethanol, key) for key in ("energy_mae", "forces_mae", "rotation_forces_rms")),
            {True: "exact", False: "learned", None: ""}[some.get("exact_symmetry")],
            {True: "yes", False: "no", None: ""}[some.get("conservative")],
        ]
        found.append((ethanol.get("forces_mae", 1e9), cells))
    lines = [heads, *(cells for _, cells in sorted(found))]
    kept = [k for k in range(len(heads)) if any(cells[k] for cells in lines[1:])]
    lines.insert(1, ["---" if k in (0, 11, 12) else "---:" for k in range(len(heads))])
    return "\n".join(f"| {' | '.join(cells[k] for k in kept)} |" for cells in lines)


def table_of_3bpa(rows: list[Row]) -> str:
    """Errors, speed and memory of the trainings on 3BPA."""
    lines = [
        "| model | parameters | minutes | steps | steps/s | E (meV/atom) | F MAE (meV/Å) "
        "| F RMSE (meV/Å) | memory of a step on 5 ethanol, MiB | of Si 216, MiB |",
        "|---|" + "---:|" * 9,
    ]
    found = [row for row in rows if row.get("set") == "3BPA"]
    for r in sorted(found, key=lambda r: (r["minutes"], r["forces_mae"])):
        step, large = (one(rows, model=r["model"], cost=what) for what in ("training", "Si216"))
        lines.append(
            f"| `{r['model']}` | {spaced(r['parameters'])} | {r['minutes']:g} | {r['steps']} "
            f"| {1 / r['seconds_per_step']:.2g} | {number(r, 'energy_mae_per_atom')} "
            f"| {number(r, 'forces_mae')} | {number(r, 'forces_rmse')} "
            f"| {number(step, 'peak_MiB')} | {number(large, 'peak_MiB')} |"
        )
    return "\n".join(lines) if found else ""


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def one(rows: list[Row], **key: object) -> Row:
    return next((row for row in rows if key.items() <= row.items()), {})


def number(row: Row, key: str, scale: float = 1.0) -> str:
    return f"{scale * row[key]:.3g}" if key in row else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, help="or name:size, or a variant")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=["Si", "ethanol"])
    parser.add_argument("--minutes", type=float, default=30, help="of each training")
    parser.add_argument("--no-cost", action="store_true", help="trainings only")
    parser.add_argument("--table", action="store_true", help="write the table into the docs")
    parser.add_argument("--cost", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.cost:  # the process of one measurement
        print(json.dumps(cost(*a.cost)))
        return
    if a.table:
        text = table(RESULTS.rows(), a.minutes)
        for page in (HERE.parent / "README.md", HERE.parent / "docs" / "models.md"):
            insert(page, "all models", text)
        print(text)
        if more := table_of_3bpa(RESULTS.rows()):
            insert(page, "3BPA", more)
            print(more)
        return
    for model in () if a.no_cost else a.models:
        for what in COSTS:
            key: Row = {"model": model, "cost": what}
            with RESULTS.claimed(runs() / f"cost-{model.replace(':', '-')}-{what}", **key) as ours:
                if ours:
                    RESULTS.add({**key, **measure_cost(model, what)})
    for dataset in a.sets:
        for model in a.models:
            key = {"model": model, "set": dataset, "minutes": a.minutes}
            run = run_folder(model, dataset, f"{a.minutes:g}m")
            with RESULTS.claimed(run, **key) as ours:
                if ours:
                    speed = train(run, model, dataset, for_minutes(a.minutes))
                    RESULTS.add({**key, **speed, **measure(run, dataset)})


if __name__ == "__main__":
    main()
