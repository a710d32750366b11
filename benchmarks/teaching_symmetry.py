"""Ways of teaching symmetry, side by side: one backbone, one budget, several seeds.

    MLIP_DATASETS=... python benchmarks/teaching_symmetry.py --systems ethanol --epochs 20

Each column is a training of teaching_symmetry.yaml with the options below and the same number of
steps; its test errors, symmetry error, symmetry share of the squared error and time
go into results/teaching_symmetry.json, one entry for each finished run: a broken-off
call goes on where it stopped, and two may run side by side.  ``--minutes`` gives every column the
same time instead.
``--table`` prints what is there.  A column's weight is chosen on validation structures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pieces import Pieces

HERE = Path(__file__).parent
RESULTS = Pieces(HERE / "results" / "teaching_symmetry.json")
RUNS = Path(os.environ.get("MLIP_RUNS", "runs")) / "teaching_symmetry"
AUGMENTED = ["data.augment=rotations"]
COLUMNS: dict[str, list[str]] = {
    "none": [],
    "augmentation": AUGMENTED,
    "two views": [*AUGMENTED, "data.views=2"],
    "pooled latent": [*AUGMENTED, "symmetry.pooled={weight: 10}"],
    "atomic latents": [*AUGMENTED, "symmetry.latent={weight: 1}"],
    "variance": [*AUGMENTED, "symmetry.variance={energy: 100, forces: 100, views: 2}"],
    "dual": [*AUGMENTED, "symmetry.constraint={epsilon: 0.005}"],
    # Weights that can be projected are those between irreps: another form of the backbone.
    "irreps, augmentation": [*AUGMENTED, "model.tokens=irreps"],
    "irreps, projection": [
        *AUGMENTED,
        "model.tokens=irreps",
        "symmetry.projection={groups: {O3: 1e-2}}",
    ],
    "irreps, annealed and projected": [
        *AUGMENTED,
        "model.tokens=irreps",
        "symmetry.projection={groups: {O3: 1e-2}, anneal: 100, project_from: 0.5}",
    ],
}
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


def train(run: Path, system: str, column: str, seed: int, a: argparse.Namespace) -> dict:
    files = data_files(system)
    budget = (
        [f"schedule.max_time={a.minutes}m", "schedule.max_epochs=null"]
        if a.minutes
        else [f"schedule.max_epochs={a.epochs}"]
    )
    mlip(
        "train", str(HERE / "teaching_symmetry.yaml"), f"data.train={files[0]}", f"run_dir={run}",
        f"seed={seed}", "resume=auto", "runtime.num_threads=1", "logging.progress=false",
        "logging.plots=false", *budget, *COLUMNS[column], log=run / "output.log",
    )  # fmt: skip
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    time = {"seconds": last["seconds"], "steps": last["step"]}
    return {**measure(run / "last.safetensors", files[1]), **time}


def table(rows: list[dict]) -> str:
    names = ("energy_mae", "forces_mae", "symmetry_forces_rms", "share_forces", "seconds", "steps")
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["system"], row["budget"], row["column"]), []).append(row)
    lines = [
        "| system | budget | column | seeds | E MAE (meV/atom) | F MAE (meV/A) "
        "| symmetry error of F (meV/A, RMS) | symmetry share of F | time (s) | steps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (system, budget, column), members in groups.items():
        cells = []
        for name in names:
            values = [m[name] for m in members]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}")
        lines.append(f"| {system} | {budget} | {column} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", choices=FILES, default=["ethanol"])
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--table", action="store_true")
    a = parser.parse_args()
    if a.table:
        print(table(RESULTS.rows()))
        return
    budget = f"{a.minutes:g} min" if a.minutes else f"{a.epochs} epochs"
    for seed in a.seeds:
        for system in a.systems:
            for column in a.columns:
                key = {"system": system, "budget": budget, "column": column, "seed": seed}
                name = "-".join([system, *column.replace(",", "").split(), budget, str(seed)])
                run = RUNS / name.replace(" ", "-")
                with RESULTS.claimed(run, **key) as free:
                    if free:
                        RESULTS.add({**key, **train(run, system, column, seed, a)})


if __name__ == "__main__":
    main()
