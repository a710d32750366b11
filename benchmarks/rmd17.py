"""Models side by side on rMD17 for the same time: errors, and how far from exact symmetry.

    MLIP_DATASETS=... python benchmarks/rmd17.py ponita facet mace escaip --minutes 60

A model is a name of this package, or name:size (medium by default), or one of the variants below.
Each trains on one thread, one after the other; models whose rotations are learned see rotated
structures.  Test errors are those of one pass over the 1000 test structures, with no average over
rotations: energies in meV for the whole molecule, as published, forces in meV/angstrom.  The
rotation error is the root mean square deviation of forces (energies) on orbits of random
rotations and reflections from their mean; it is also given relative to the root mean square error
of forces.  Entries go into results/rmd17.json as runs finish, so that a broken-off call goes on
where it stopped; ``--table`` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rmd17.json"
MOLECULES = ("ethanol", "toluene", "aspirin", "uracil", "benzene")
LEARNED = ["data.augment=rotations"]
VARIANTS: dict[str, list[str]] = {
    "ponita-12": ["model.orientations=12", "model.lmax=2", "model.fiber_lmax=1"],
    "ponita-12-lmax3": ["model.orientations=12"],
    "ponita-0": ["model.orientations=0"],
    "ponita-12-gelu": ["model.orientations=12", "model.pointwise=gelu", *LEARNED],
    "ponita-20-gelu": ["model.orientations=20", "model.pointwise=gelu", *LEARNED],
    "ponita-32-gelu": ["model.orientations=32", "model.pointwise=gelu", *LEARNED],
    "transip": LEARNED,
    "ponita_published": LEARNED,
}


def options(model: str) -> list[str]:
    """Command-line options of a model or variant."""
    name, _, size = model.partition(":")
    base = name.partition("-")[0]
    return [f"model.name={base}", f"model.size={size or 'medium'}", *VARIANTS.get(name, [])]


def mlip(*arguments: str, log: Path) -> None:
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", "mlip", *arguments], check=True, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def measure(model: Path, dataset_file: Path) -> dict[str, float]:
    """Errors of one pass, and the rotation error."""
    from mlip.checkpoint import load
    from mlip.data.dataset import HDF5Dataset
    from mlip.evaluation.evaluate import evaluate
    from mlip.evaluation.symmetry import sampled_symmetry_errors

    potential = load(model).float().eval()
    dataset = HDF5Dataset(dataset_file, potential.cutoff)
    atoms = len(dataset[0].atomic_numbers)
    errors = evaluate(potential, dataset, batch_size=16).total()
    symmetry = sampled_symmetry_errors(potential, dataset, structures=64, copies=8).errors
    return {
        "energy_mae": 1e3 * atoms * errors["energy"]["mae"],
        "forces_mae": 1e3 * errors["forces"]["mae"],
        "forces_rmse": 1e3 * errors["forces"]["rmse"],
        "rotation_energy_rms": 1e3 * atoms * symmetry["energy"].rms,
        "rotation_forces_rms": 1e3 * symmetry["forces"].rms,
        "rotation_over_error": symmetry["forces"].rms / errors["forces"]["rmse"],
        "parameters": sum(p.numel() for p in potential.parameters()),
    }


def train(model: str, molecule: str, a: argparse.Namespace) -> dict[str, float]:
    runs = Path(os.environ.get("MLIP_RUNS", "runs")) / "rmd17"
    runs.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in ("train", "test"):
        files[split] = runs / f"{molecule}_{split}.h5"
        if not files[split].exists():
            source = Path(os.environ["MLIP_DATASETS"]) / "rmd17" / f"{molecule}_{split}_01.xyz.gz"
            mlip("convert", str(source), str(files[split]), log=runs / "convert.log")
    length = f"{a.epochs}-epochs" if a.epochs else f"{a.minutes:g}m"
    run = runs / f"{molecule}-{model.replace(':', '-')}-{length}"
    budget = (
        [f"schedule.max_epochs={a.epochs}"]
        if a.epochs
        else [f"schedule.max_time={60 * a.minutes}s", "schedule.max_epochs=null"]
    )
    mlip(
        "train", str(HERE / "rmd17.yaml"), f"data.train={files['train']}", f"run_dir={run}",
        "resume=auto", "runtime.num_threads=1", "logging.progress=false", "logging.plots=false",
        *budget, *options(model), *a.set, log=run.with_suffix(".log"),
    )  # fmt: skip
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    if a.validation:
        errors = {"forces_mae": 1e3 * last["valid_forces_mae"]}
        errors["forces_rmse"] = 1e3 * last["valid_forces_rmse"]
        errors["rotation_forces_rms"] = 1e3 * last["valid_symmetry_forces_rms"]
    else:
        errors = measure(run / "best.safetensors", files["test"])
    return {**errors, "steps": last["step"], "seconds_per_step": last["seconds"] / last["step"]}


def load() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def table(rows: list[dict]) -> str:
    lines = [
        "| molecule | minutes | model | parameters | steps | E MAE (meV) | F MAE (meV/Å) "
        "| rotation error of F (meV/Å, RMS) | of the RMSE of F |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    timed = [r for r in rows if r["minutes"] is not None]
    for r in sorted(timed, key=lambda r: (r["molecule"], r["minutes"], r["forces_mae"])):
        lines.append(
            f"| {r['molecule']} | {r['minutes']:g} | `{r['model']}` | {r['parameters']} "
            f"| {r['steps']} | {r['energy_mae']:.3g} | {r['forces_mae']:.3g} "
            f"| {r['rotation_forces_rms']:.2g} | {100 * r['rotation_over_error']:.2g} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["ponita", "facet", "mace", "escaip"])
    parser.add_argument("--molecules", nargs="+", choices=MOLECULES, default=MOLECULES[:3])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--epochs", type=int, help="the same number of steps instead of time")
    parser.add_argument("--set", nargs="+", default=[], help="options of the training, a.b=c")
    parser.add_argument(
        "--validation", action="store_true", help="print validation errors only, record nothing"
    )
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    a = parser.parse_args()
    if a.table:
        print(table(load()))
        return
    for molecule in a.molecules:
        for model in a.models:
            key = {"molecule": molecule, "model": model, "minutes": a.minutes}
            if a.epochs:
                key |= {"minutes": None, "epochs": a.epochs}
            if a.validation:
                print(key, train(model, molecule, a), flush=True)
                continue
            if any(key.items() <= row.items() for row in load()):
                continue
            result = train(model, molecule, a)
            # Read again: another process may have added to it meanwhile.
            RESULTS.write_text(json.dumps([*load(), {**key, **result}], indent=1) + "\n")
            print(key, result, flush=True)


if __name__ == "__main__":
    main()
