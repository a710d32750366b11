"""Force errors against the time of training: ours and mace-torch, from the same structures.

    MLIP_DATASETS=... MACE=... python benchmarks/learning_curves.py
    python benchmarks/learning_curves.py --table

Each side has one thread and the allocator of ``mlip train``, and learns energies and forces; the
same command may run once for each core, and takes what the others leave.  3BPA: 450 structures of
train_300K, judged by the 50 others.  Si: mlearn's training set, judged by a tenth that is left out.

mace-torch 0.3.16 is run by ``mace_run_train`` with the settings of its documentation: 128x0e
(small), batches of 5 (2 of crystals), learning rate 0.01, AMSGrad, average of weights 0.99, forces
1000 and energies 1.  Ours have the defaults of ``mlip train``, with the schedule of --minutes, and
once more of a tenth of that: the question is how soon the error is reached that mace-torch has at
the end.  Time is that on the wall, validation included, from the first step on.

A row of results/learning_curves.json for each run, with its curve [minutes, RMSE in meV/angstrom];
``--table`` writes docs/speed.md and the plot there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pieces import Pieces, Row, insert, lock
from speed import environment
from trainings import HERE, SETS, for_minutes, mlip, runs

RESULTS = Pieces(HERE / "results" / "learning_curves.json")
DOCS = HERE.parent / "docs"
MACE = "mace-torch small"
# For few structures with short distances (docs/training.md): the repulsion of nuclei, lower rates.
LONG = ["model.repulsion=zbl", "optimizer.muon_lr=0.0015", "optimizer.lr=0.001"]
SIDES = (MACE, "facet", "facet:small", "facet+long", "facet:small+long")
HELD_OUT = 0.1  # of the training set of silicon
BATCH = {"3BPA": 5, "Si": 2}
LINE = re.compile(r"^(\S+ \S+) INFO: (?:Initial|Epoch (\d+)):.*RMSE_F=\s*([\d.]+) meV", re.M)
Curve = list[tuple[float, float]]


def structures(dataset: str) -> Path:
    """Folder with ``train`` and ``valid`` as .xyz, which mace-torch reads, and as .h5."""
    folder = runs() / f"curves-{dataset}"
    if (folder / "valid.h5").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(os.environ["MLIP_DATASETS"])
    if dataset == "3BPA":
        script = HERE / "threebpa_split.py"
        subprocess.run([sys.executable, script, source / "3bpa", folder], check=True)
    else:
        import numpy as np
        from ase.io import read, write

        frames = read(source / "mlearn" / f"{dataset}_train.xyz.gz", ":")
        order = np.random.default_rng(1).permutation(len(frames))
        cut = round(HELD_OUT * len(frames))
        for name, part in (("valid", order[:cut]), ("train", order[cut:])):
            write(folder / f"{name}.xyz", [frames[k] for k in part])
    for name in ("train", "valid"):
        log = folder / f"{name}.log"
        mlip("convert", str(folder / f"{name}.xyz"), str(folder / f"{name}.h5"), log=log)
    return folder


def train_mace(data: Path, run: Path, dataset: str, minutes: float) -> Curve:
    """The curve of ``mace_run_train``, which is stopped when its time is over."""
    e0 = "IsolatedAtom" if dataset == "3BPA" else "average"
    options = {
        "name": "mace", "train_file": data / "train.xyz", "valid_file": data / "valid.xyz",
        "E0s": e0, "energy_key": "REF_energy", "forces_key": "REF_forces", "model": "MACE",
        "hidden_irreps": "128x0e", "r_max": 5.0, "batch_size": BATCH[dataset],
        "valid_batch_size": 2 * BATCH[dataset], "max_num_epochs": 2000, "lr": 0.01,
        "ema_decay": 0.99, "energy_weight": 1, "forces_weight": 1000, "default_dtype": "float32",
        "device": "cpu", "seed": 1, "eval_interval": 1, "work_dir": run,
    }  # fmt: skip
    command = [str(Path(os.environ["MACE"]) / "bin" / "mace_run_train"), "--ema", "--amsgrad"]
    command += [part for key, x in options.items() for part in (f"--{key}", str(x))]
    log = run / "output.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(1), cwd=run)
        try:
            process.wait(60 * (minutes + 2))  # what comes before the first step is not counted
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()
    found = LINE.findall(log.read_text())
    if len(found) < 2:
        raise SystemExit(f"mace_run_train has made no epoch; see {log}")
    times = [datetime.fromisoformat(when).timestamp() for when, _, _ in found]
    curve = [((t - times[0]) / 60, float(x)) for t, (_, _, x) in zip(times, found, strict=True)]
    return [(t, x) for t, x in curve[1:] if t <= minutes]


def train_ours(data: Path, run: Path, model: str, dataset: str, minutes: float) -> Curve:
    """The curve of ``mlip train``."""
    model, _, long = model.partition("+")
    name, _, size = model.partition(":")
    mlip(
        "train", str(HERE / "trainings.yaml"), f"data.train={data / 'train.h5'}",
        f"data.valid={data / 'valid.h5'}", f"run_dir={run}", "resume=auto", "runtime.num_threads=1",
        "logging.progress=false", "logging.plots=false", f"model.name={name}",
        f"model.size={size or 'medium'}", *SETS[dataset], *for_minutes(minutes),
        *(LONG if long else []),
        "loss.stress=0", log=run / "output.log",
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(r["seconds"] / 60, 1e3 * r["valid_forces_rmse"]) for r in rows]


def first_below(curve: Sequence[Sequence[float]], error: float) -> float | None:
    """Minutes after which the error was not above this one for the first time."""
    return next((t for t, x in curve if x <= error), None)


def table(rows: list[Row]) -> str:
    """Errors at the end, and when ours were at that of mace-torch."""
    lines = [
        "| set | model | minutes | epochs | F RMSE at the end (meV/Å) | lowest "
        "| minutes to what mace-torch has at the end |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for dataset in dict.fromkeys(r["set"] for r in rows):
        mine = [r for r in rows if r["set"] == dataset]
        peers = [r for r in mine if r["side"] == MACE]
        goal = max(peers, key=lambda r: r["minutes"])["curve"][-1][1] if peers else None
        for r in sorted(mine, key=lambda r: (r["side"] != MACE, r["side"], -r["minutes"])):
            reached = None if goal is None or r["side"] == MACE else first_below(r["curve"], goal)
            name = r["side"] if r["side"] == MACE else f"`{r['side']}`"
            lowest = min(x for _, x in r["curve"])
            lines.append(
                f"| {dataset} | {name} | {r['minutes']:g} | {len(r['curve'])} "
                f"| {r['curve'][-1][1]:.3g} | {lowest:.3g} "
                f"| {'' if reached is None else f'{reached:.1f}'} |"
            )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(r["set"] for r in rows))
    fig, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 4), squeeze=False)
    colors = dict(zip(SIDES, ("#d55e00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7"), strict=True))
    for ax, dataset in zip(axes[0], sets, strict=True):
        mine = sorted((r for r in rows if r["set"] == dataset), key=lambda r: -r["minutes"])
        longest = {side: max(r["minutes"] for r in mine if r["side"] == side) for side in colors
                   if any(r["side"] == side for r in mine)}  # fmt: skip
        for r in mine:
            whole = r["minutes"] == longest[r["side"]]
            label = r["side"] if whole else f"{r['side']}, schedule of {r['minutes']:g} min"
            style = "-" if whole else ":"
            ax.plot(*zip(*r["curve"], strict=True), style, color=colors[r["side"]], label=label)
        ax.set(xscale="log", yscale="log", title=dataset)
        ax.set(xlabel="minutes of training, one thread", ylabel="force RMSE (meV/Å)")
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sides", nargs="*", default=SIDES)
    parser.add_argument("--sets", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument(
        "--minutes", type=float, nargs="+", default=[60, 6], help="the peer has the first only"
    )
    parser.add_argument("--table", action="store_true", help="write table and plot into the docs")
    a = parser.parse_args()
    if a.table:
        text = table(RESULTS.rows())
        plot(RESULTS.rows(), DOCS / "images" / "learning_curves.png")
        insert(DOCS / "speed.md", "learning curves", text)
        print(text)
        return
    for dataset in a.sets:
        for side in a.sides:
            for minutes in a.minutes[:1] if side == MACE else a.minutes:
                key: Row = {"set": dataset, "side": side, "minutes": minutes}
                name = side.replace(":", "-").replace(" ", "-")
                run = runs() / f"curve-{dataset}-{name}-{minutes:g}m"
                with RESULTS.claimed(run, **key) as ours:
                    if not ours:
                        continue
                    with lock(runs()):
                        data = structures(dataset)
                    if side == MACE:
                        curve = train_mace(data, run, dataset, minutes)
                    else:
                        curve = train_ours(data, run, side, dataset, minutes)
                    rounded = [[round(t, 2), round(x, 2)] for t, x in curve]
                    RESULTS.add({**key, "curve": rounded})


if __name__ == "__main__":
    main()
