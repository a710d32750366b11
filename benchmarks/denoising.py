"""Does pre-training by denoising help?  Ethanol with few labels, with and without it.

    python benchmarks/denoising.py --steps 400 --seeds 2

The structures of examples/data/ethanol_train.h5, their labels unused, are the unlabelled set; 20 or
80 of them keep their labels.  Small Facet, as many steps with labels for all; "longer" gets the
steps of the pre-training as well.  Errors on ethanol_test.h5, in meV/atom and meV/angstrom, go into
results/denoising.json, one entry for each finished run, so that a broken-off call goes on where it
stopped.  Steps are counted, not minutes: the machine has no part in the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from mlip import checkpoint
from mlip.data.hdf5 import HDF5File, HDF5Writer
from mlip.evaluation.evaluate import evaluate_file
from mlip.training.config import parse_training
from mlip.training.run import train

HERE = Path(__file__).parent
DATA = HERE.parent / "examples" / "data"
RESULTS = HERE / "results" / "denoising.json"
BATCH = 5
NUM_VALID = 30
LABELS = (20, 80)
NOISE: dict[str, Any] = {"0.05 A": 0.05, "0.1 A": 0.1}


def part(source: Path, target: Path, frames: list[int]) -> Path:
    file = HDF5File(source)
    with HDF5Writer(target) as writer:
        for k in frames:
            s = file.read(k)
            writer.append(
                s.atomic_numbers,
                s.positions,
                s.cell[0],
                s.pbc[0],
                energy=None if s.energy is None else float(s.energy[0]),
                forces=s.forces,
            )
    return target


def run(folder: Path, data: Path, valid: Path, steps: int, seed: int, **options: Any) -> Path:
    epochs = max(1, round(steps / (len(HDF5File(data)) / BATCH)))
    return train(
        parse_training(
            {
                "run_dir": str(folder),
                "seed": seed,
                "data": {"train": str(data), "valid": str(valid), "batch_size": BATCH},
                "model": {"name": "facet", "size": "small"},
                "schedule": {"max_epochs": epochs, "valid_every": max(1, epochs // 5)},
                "runtime": {"num_threads": 1},
                "logging": {"plots": False},
                **options,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    steps, seeds = (vars(parser.parse_args())[name] for name in ("steps", "seeds"))
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    source, test = DATA / "ethanol_train.h5", DATA / "ethanol_test.h5"
    number = len(HDF5File(source))
    several = [k for k in range(number) if len(HDF5File(source).read(k).positions) > 1]
    held = several[:: len(several) // NUM_VALID][:NUM_VALID]
    rest = [k for k in several if k not in held]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        valid = part(source, folder / "valid.h5", held)
        unlabelled = part(source, folder / "unlabelled.h5", rest)
        for seed in range(seeds):
            starts: dict[str, tuple[int, dict[str, Any]]] = {
                "none": (steps, {}),
                "none, longer": (2 * steps, {}),
            }
            for label in NOISE:
                first = folder / f"{label}-{seed}" / "best.safetensors"
                starts[label] = (steps, {"init_from": str(first)})
            for labels in LABELS:
                few = part(
                    source,
                    folder / f"{labels}-{seed}.h5",
                    rest[seed :: len(rest) // labels][:labels],
                )
                for start, (count, options) in starts.items():
                    key = {"labels": labels, "start": start, "seed": seed, "steps": steps}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    if start in NOISE and not Path(options["init_from"]).is_file():
                        noise = {"sigma": NOISE[start], "temperature": 600.0}
                        run(
                            folder / f"{start}-{seed}",
                            unlabelled,
                            valid,
                            steps,
                            seed,
                            denoising=noise,
                        )
                    best = run(
                        folder / f"{start}-{labels}-{seed}-tuned",
                        few,
                        valid,
                        count,
                        seed,
                        **options,
                    )
                    total = evaluate_file(checkpoint.load(best), test, plots=False).total
                    row = {**key}
                    for q in ("energy", "forces"):
                        row |= {f"{q}_{kind}": 1000 * total[q][kind] for kind in ("mae", "rmse")}
                    rows.append(row)
                    print(row, flush=True)
                    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| labelled | pre-training | E MAE | F MAE | of each seed |",
        "|---:|---|---:|---:|---|",
    ]
    for labels in LABELS:
        for start in ("none", "none, longer", *NOISE):
            found = [r for r in rows if r["labels"] == labels and r["start"] == start]
            if found:
                e, f = (statistics.mean(r[f"{q}_mae"] for r in found) for q in ("energy", "forces"))
                each = ", ".join(f"{r['forces_mae']:.0f}" for r in found)
                lines.append(f"| {labels} | {start} | {e:.1f} | {f:.0f} | {each} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
