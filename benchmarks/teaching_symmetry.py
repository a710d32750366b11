"""Ways of teaching symmetry, side by side: one backbone, one budget, several seeds.

    MLIP_DATASETS=... python benchmarks/teaching_symmetry.py --systems ethanol --epochs 12

Each column is a training of teaching_symmetry.yaml with the options below and the same number of
steps; its test errors, symmetry error, symmetry share of the squared error and time
go into results/teaching_symmetry.json, one entry for each finished run: a broken-off
call goes on where it stopped, and two may run side by side.  Two columns are there for comparisons
at equal time: augmentation with twice the steps, and direct forces first.
``--table`` puts what is there into docs/training.md.  A column's weight is chosen on validation
structures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pieces import Pieces, insert

HERE = Path(__file__).parent
RESULTS = Pieces(HERE / "results" / "teaching_symmetry.json")
RUNS = Path(os.environ.get("MLIP_RUNS", "runs")) / "teaching_symmetry"
AUGMENTED = ["data.augment=rotations"]
IRREPS = [*AUGMENTED, "model.tokens=irreps"]
COLUMNS: dict[str, list[str]] = {
    "none": [],
    "augmentation": AUGMENTED,
    "augmentation, twice the steps": AUGMENTED,
    "two views": [*AUGMENTED, "data.views=2"],
    "pooled latent": [*AUGMENTED, "symmetry.pooled={weight: 10}"],
    "atomic latents": [*AUGMENTED, "symmetry.latent={weight: 1}"],
    "variance": [*AUGMENTED, "symmetry.variance={energy: 1000, forces: 1000, views: 2}"],
    "dual": [*AUGMENTED, "symmetry.constraint={epsilon: 0.005}"],
    "direct forces first": AUGMENTED,
    # Weights that can be projected are those between irreps: another form of the backbone.
    "irreps, augmentation": IRREPS,
    "irreps, projection": [*IRREPS, "symmetry.projection={groups: {O3: 1e-2}}"],
    "irreps, annealed and projected": [
        *IRREPS,
        "symmetry.projection={groups: {O3: 1e-2}, anneal: 100, project_from: 0.1}",
    ],
}
# Epochs of the training, and of one with direct forces before it, in those of the others.
EPOCHS = {"augmentation, twice the steps": (2, 0), "direct forces first": (0.5, 1)}
FILES = {
    "ethanol": ("rmd17/ethanol_train_01.xyz.gz", "rmd17/ethanol_test_01.xyz.gz"),
    "aspirin": ("rmd17/aspirin_train_01.xyz.gz", "rmd17/aspirin_test_01.xyz.gz"),
    "Si": ("mlearn/Si_train.xyz.gz", "mlearn/Si_test.xyz.gz"),
}


def mlip(*arguments: str, log: Path | None = None) -> None:
    command = [sys.executable, "-m", "mlip", *arguments]
    if log is None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return
    with log.open("w") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)


def measure(model: Path, test: Path) -> dict[str, float]:
    """Test errors (meV/atom, meV/angstrom) and what of them is broken symmetry."""
    from mlip.checkpoint import load
    from mlip.data.dataset import HDF5Dataset
    from mlip.evaluation.evaluate import evaluate
    from mlip.evaluation.symmetry import sampled_symmetry_errors

    potential = load(model).float().eval()
    dataset = HDF5Dataset(test, potential.cutoff)
    errors = evaluate(potential, dataset, batch_size=16).total()
    symmetry = sampled_symmetry_errors(potential, dataset, structures=64, copies=16).errors
    return {
        "energy_mae": 1e3 * errors["energy"]["mae"],
        "forces_mae": 1e3 * errors["forces"]["mae"],
        "symmetry_energy_rms": 1e3 * symmetry["energy"].rms,
        "symmetry_forces_rms": 1e3 * symmetry["forces"].rms,
        "share_energy": symmetry["energy"].share,
        "share_forces": symmetry["forces"].share,
    }


def data_files(system: str) -> list[Path]:
    RUNS.mkdir(parents=True, exist_ok=True)
    files = []
    for source in FILES[system]:
        file = RUNS / Path(source).name.replace(".xyz.gz", ".h5")
        if not file.exists():
            mlip("convert", str(Path(os.environ["MLIP_DATASETS"]) / source), str(file))
        files.append(file)
    return files


def train(run: Path, system: str, column: str, seed: int, epochs: int) -> dict[str, float]:
    files = data_files(system)
    last, first = EPOCHS.get(column, (1, 0))
    stages = [("direct", first, ["model.direct_forces=true"])] if first else []
    begin = [f"init_from={run}/direct/last.safetensors"] if first else []
    seconds = steps = 0
    for name, share, options in [*stages, ("last", last, begin)]:
        folder = run / name
        folder.mkdir(exist_ok=True)
        mlip(
            "train", str(HERE / "teaching_symmetry.yaml"), f"data.train={files[0]}",
            f"run_dir={folder}", f"seed={seed}", "resume=auto", "runtime.num_threads=1",
            "logging.progress=false", "logging.plots=false",
            f"schedule.max_epochs={round(share * epochs)}", *COLUMNS[column], *options,
            log=folder / "output.log",
        )  # fmt: skip
        count, quickest = cost(folder)
        seconds, steps = seconds + count * quickest, steps + count
    return {**measure(folder / "last.safetensors", files[1]), "seconds": seconds, "steps": steps}


def cost(run: Path) -> tuple[int, float]:
    """Number of steps, and seconds of one in the quickest epoch: others may have had company."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rates = [
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(rows)
    ]
    return rows[-1]["step"], min(rates)


def table(rows: list[dict]) -> str:
    """Means over the seeds, with standard deviations."""
    names = ("energy_mae", "forces_mae", "symmetry_forces_rms", "share_forces", "seconds", "step")
    groups: dict[tuple[str, int, str], list[dict]] = {}
    for row in rows:
        row["step"] = 1e3 * row["seconds"] / row["steps"]
        groups.setdefault((row["system"], row["epochs"], row["column"]), []).append(row)
    lines = [
        "| system, epochs | column | seeds | E MAE (meV/atom) | F MAE (meV/Å) "
        "| symmetry error of F (meV/Å, RMS) | symmetry share of F (%) | time (s) | ms/step |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (system, epochs, column), members in groups.items():
        cells = []
        for name in names:
            values = [m[name] * (100 if name == "share_forces" else 1) for m in members]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread if name != 'seconds' else ''}")
        lines.append(f"| {system}, {epochs} | {column} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", choices=FILES, default=["ethanol"])
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--table", action="store_true")
    a = parser.parse_args()
    if a.table:
        order = list(COLUMNS)
        rows = sorted(RESULTS.rows(), key=lambda row: order.index(row["column"]))
        rows.sort(key=lambda row: list(FILES).index(row["system"]))
        insert(HERE.parent / "docs" / "training.md", "teaching_symmetry", table(rows))
        return
    for seed in a.seeds:
        for system in a.systems:
            for column in a.columns:
                key = {"system": system, "epochs": a.epochs, "column": column, "seed": seed}
                name = "-".join(
                    [system, *column.replace(",", "").split(), str(a.epochs), str(seed)]
                )
                run = RUNS / name
                with RESULTS.claimed(run, **key) as free:
                    if free:
                        RESULTS.add({**key, **train(run, system, column, seed, a.epochs)})


if __name__ == "__main__":
    main()
