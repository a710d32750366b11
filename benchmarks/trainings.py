"""Models of this package trained on reference data: one model and one set at a time, one thread.

A model is a name of ``MODELS``, ``name:size`` (medium by default), or one of ``VARIANTS``: the
same options make the training and the untrained model whose cost is measured.  Runs are in the
folder named by MLIP_RUNS and continue where they were stopped; data are in that named by
MLIP_DATASETS.  The model judged is the last one, at the end of the schedule.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlip.potential import Potential

HERE = Path(__file__).parent
CONFIG = HERE / "trainings.yaml"
RMD17 = ("ethanol", "toluene", "aspirin", "uracil", "benzene")
# What a set changes in the configuration.
SETS: dict[str, list[str]] = {
    **{molecule: [] for molecule in RMD17},
    "3BPA": ["data.valid_fraction=0.02"],
    "Si": ["data.batch_size=2", "data.valid_batch_size=4", "loss.stress=50"],
}
LEARNED = ["data.augment=rotations"]
VARIANTS: dict[str, list[str]] = {
    "ponita-12": ["model.orientations=12", "model.lmax=2", "model.fiber_lmax=1"],
    "ponita-12-lmax3": ["model.orientations=12"],
    "ponita-0": ["model.orientations=0"],
    "ponita-12-gelu": ["model.orientations=12", "model.pointwise=gelu", *LEARNED],
    "ponita-20-gelu": ["model.orientations=20", "model.pointwise=gelu", *LEARNED],
    "ponita-32-gelu": ["model.orientations=32", "model.pointwise=gelu", *LEARNED],
    "ponita_published": LEARNED,
    "mace-64": ["model.channels=64", "model.lmax=1"],  # of benchmarks/threebpa.sh
    "transip": LEARNED,
    "escaip-vectors": ["model.angular=vectors", *LEARNED],
    "environment": LEARNED,
    "environment-local": ["wrapper=frame_averaging"],
}


def options(model: str) -> list[str]:
    """Command-line options of a model or variant."""
    name, _, size = model.partition(":")
    base = name.partition("-")[0]
    return [f"model.name={base}", f"model.size={size or 'medium'}", *VARIANTS.get(name, [])]


def untrained(model: str, elements: Sequence[int]) -> Potential:
    """Potential of these elements with random weights, float32."""
    import torch

    from mlip.models import build
    from mlip.potential import Potential
    from mlip.training.config import hyperparameters, load_training
    from mlip.wrappers import wrap

    config = load_training(CONFIG, options(model))
    own = hyperparameters(config, avg_num_neighbors=20.0)
    if own.get("elements", ()) is None:
        own["elements"] = tuple(elements)
    network = build(config.model.name, **own)
    if config.wrapper is not None:
        network = wrap(network, **config.wrapper.model_dump())
    e0 = torch.full((119,), torch.nan)
    e0[list(elements)] = 0.0
    return Potential(network, e0).float().eval()


def runs() -> Path:
    """Folder of data files and runs."""
    return Path(os.environ.get("MLIP_RUNS", "runs")) / "trainings"


def run_folder(model: str, dataset: str, length: str) -> Path:
    """Where a run is."""
    return runs() / f"{dataset}-{model.replace(':', '-')}-{length}"


def data_files(dataset: str) -> dict[str, Path]:
    """Training and test set, converted; of 3BPA 50 of the 500 structures are held out."""
    runs().mkdir(parents=True, exist_ok=True)
    files = {split: runs() / f"{dataset}_{split}.h5" for split in ("train", "test")}
    if all(file.exists() for file in files.values()):
        return files
    folder = Path(os.environ["MLIP_DATASETS"])
    sources = {split: folder / "rmd17" / f"{dataset}_{split}_01.xyz.gz" for split in files}
    if dataset == "Si":
        sources = {split: folder / "mlearn" / f"Si_{split}.xyz.gz" for split in files}
    if dataset == "3BPA":
        script = HERE / "threebpa_split.py"
        subprocess.run([sys.executable, script, folder / "3bpa", runs()], check=True)
        sources = {"train": runs() / "train.xyz", "test": runs() / "valid.xyz"}
    for split, file in files.items():
        if not file.exists():
            mlip("convert", str(sources[split]), str(file), log=runs() / f"{dataset}_{split}.log")
    return files


def mlip(*arguments: str, log: Path) -> None:
    """A command of the package on one thread; SIGTERM and Ctrl-C end it, too, with its state
    saved."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "mlip", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        raise SystemExit(f"mlip {arguments[0]} ended with code {code}; see {log}")


def train(run: Path, model: str, dataset: str, length: Sequence[str]) -> dict[str, float]:
    """Train, or continue; ``length`` are options of the schedule and others.  Steps and what a step
    took."""
    mlip(
        "train", str(CONFIG), f"data.train={data_files(dataset)['train']}", f"run_dir={run}",
        "resume=auto", "runtime.num_threads=1", "logging.progress=false", "logging.plots=false",
        *SETS[dataset], *options(model), *length, log=run / "output.log",
    )  # fmt: skip
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return {"steps": last["step"], "seconds_per_step": round(last["seconds"] / last["step"], 4)}


def for_minutes(minutes: float) -> list[str]:
    """Options of a training for a time."""
    return [f"schedule.max_time={60 * minutes}s", "schedule.max_epochs=null"]


def measure(run: Path, dataset: str) -> dict[str, float]:
    """Errors of one pass over the test set, and the rotation error: meV for energies of whole
    structures (``energy_mae_per_atom``: for an atom), meV/angstrom."""
    from mlip.checkpoint import load
    from mlip.data.dataset import HDF5Dataset
    from mlip.evaluation.evaluate import evaluate
    from mlip.evaluation.symmetry import sampled_symmetry_errors

    potential = load(run / "last.safetensors", device="cpu").float().eval()
    test = HDF5Dataset(data_files(dataset)["test"], potential.cutoff)
    atoms = len(test[0].atomic_numbers)  # the same in all structures of a set of molecules
    errors = evaluate(potential, test, batch_size=8).total()
    symmetry = sampled_symmetry_errors(potential, test, structures=64, copies=8).errors
    found = {
        "energy_mae_per_atom": 1e3 * errors["energy"]["mae"],
        "energy_mae": 1e3 * atoms * errors["energy"]["mae"],
        "forces_mae": 1e3 * errors["forces"]["mae"],
        "forces_rmse": 1e3 * errors["forces"]["rmse"],
        "rotation_energy_rms": 1e3 * atoms * symmetry["energy"].rms,
        "rotation_forces_rms": 1e3 * symmetry["forces"].rms,
        "rotation_over_error": symmetry["forces"].rms / errors["forces"]["rmse"],
    }
    if dataset == "Si":  # of different sizes
        del found["energy_mae"], found["rotation_energy_rms"]
    rounded = {key: float(f"{value:.5g}") for key, value in found.items()}
    return {**rounded, "parameters": sum(p.numel() for p in potential.parameters())}
