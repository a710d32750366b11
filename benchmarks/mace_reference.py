"""Our MACE beside mace-torch: the same weights, energies and forces; speed; errors of training.

    MLIP_DATASETS=/path/to/datasets MACE=/path/to/mace/venv python benchmarks/mace_reference.py
    ... python benchmarks/mace_reference.py --train 10 --seeds 3

Random weights of mace-torch's ScaleShiftMACE are copied into ours: energies and forces of both are
compared in float64 on structures of several kinds, and so are ten steps of training with the same
batches.  Then steps of inference and training are timed, the two packages in turn in one run.  With
``--train MINUTES`` both are trained, from the same weights, on the same batches, for the number of
steps that the slower one makes in that time, and errors are written for each seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.io import read, write
from mace_weights import to_mlip
from numpy.random import default_rng
from speed import cpu_name

HERE = Path(__file__).parent
SIDES = ("mlip", "mace")
BASE: dict[str, Any] = dict(
    cutoff=5.0,
    channels=64,
    lmax=1,
    num_layers=2,
    correlation=3,
    max_ell=3,
    num_basis=8,
    envelope_power=5,
    radial_hidden=[64, 64, 64],
    readout_hidden=16,
    isolated="learned",
    avg_num_neighbors=20.0,
    scale=1.0,
)
AGREE: dict[str, dict[str, Any]] = {
    "64x0e+64x1o": {},
    "16x0e": dict(channels=16, lmax=0),
    "16x0e+16x1o+16x2e": dict(channels=16, lmax=2),
    "16x0e+16x1o, correlation 2, three layers": dict(channels=16, correlation=2, num_layers=3),
    "16x0e+16x1o, max_ell 2, other radial functions": dict(
        channels=16, max_ell=2, num_basis=6, envelope_power=6, radial_hidden=[32, 24], cutoff=4.3
    ),
}
SPEED: dict[str, dict[str, Any]] = {
    "small 128x0e": dict(channels=128, lmax=0),
    "medium 128x0e+128x1o": dict(channels=128, lmax=1),
    "64x0e+64x1o": {},
}


class Worker:
    """One package in a process of its own."""

    def __init__(self, side: str, threads: int, environment: dict[str, str]) -> None:
        mace = str(Path(os.environ["MACE"]) / "bin" / "python")
        self.process = subprocess.Popen(
            [
                mace if side == "mace" else sys.executable,
                *("-W", "ignore", str(HERE / "mace_worker.py"), side, str(threads)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, do: str, **options: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("RESULT "):
            if not line:
                raise RuntimeError(f"'{do}': the process ended")
        return json.loads(line.removeprefix("RESULT "))


def structures() -> list[Atoms]:
    """A molecule, a radical of two fragments, crystals of any cell, a slab, one atom and none."""
    made = [
        molecule("CH3CH2OH"),
        molecule("C6H6") + Atoms("N", [[0, 0, 2.9]]),
        fcc111("Cu", (2, 2, 2), vacuum=6.0),
        bulk("NaCl", "rocksalt", a=5.5, cubic=True),
        bulk("Si", cubic=True) * (2, 1, 1),
        bulk("Cu"),
        Atoms("O"),
    ]
    made[3].set_cell(made[3].cell[:] @ [[1, 0.12, 0], [0, 1, 0.2], [0.1, 0, 1]], scale_atoms=True)
    rng = default_rng(0)
    for atoms in made:
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        atoms.info["REF_energy"] = 0.0
        atoms.arrays["REF_forces"] = np.zeros((len(atoms), 3))
    return made


def same_weights(workers: dict[str, Worker], folder: str, h: dict[str, Any], **options: Any) -> Any:
    """Build mace-torch's model and ours with its weights; numbers of parameters."""
    weights = f"{folder}/weights.npz"
    return {
        "mace": workers["mace"]("build", hyperparameters=h, save=weights, **options),
        "mlip": workers["mlip"]("build", hyperparameters={**h, "weights": weights}, **options),
    }


def agreement(workers: dict[str, Worker], folder: str) -> dict[str, Any]:
    """Largest differences of energies and forces, and of ten losses of training."""
    frames = structures()
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    write(f"{folder}/kinds.xyz", frames)
    table = {}
    for number, (name, changes) in enumerate(AGREE.items()):
        # Few neighbours: densities of order one, so that products of three count.
        h = {**BASE, **changes, "elements": elements, "scale": 1.7, "avg_num_neighbors": 3.0}
        h["e0"] = [float(z) / 7 for z in elements]
        sizes = same_weights(workers, folder, h, seed=number, dtype="float64")
        out, losses = {}, {}
        for side, worker in workers.items():
            worker("read", name="kinds", file=f"{folder}/kinds.xyz")
            worker("evaluate", name="kinds", save=f"{folder}/{side}.npz")
            out[side] = dict(np.load(f"{folder}/{side}.npz"))
            worker("start", lr=0.01, energy=1.0, forces=10.0)
            losses[side] = worker("steps", name="kinds", batches=[[0, 3], [4, 2, 5]] * 5)["losses"]
        a, b = np.array(losses["mlip"]), np.array(losses["mace"])
        table[name] = {
            "parameters": sizes,
            "largest_energy_eV": float(np.abs(out["mace"]["energy"]).max()),
            "energy_difference_eV": float(
                np.abs(out["mlip"]["energy"] - out["mace"]["energy"]).max()
            ),
            "largest_force_eV_per_A": float(np.abs(out["mace"]["forces"]).max()),
            "force_difference_eV_per_A": float(
                np.abs(out["mlip"]["forces"] - out["mace"]["forces"]).max()
            ),
            "first_and_last_loss": [float(b[0]), float(b[-1])],
            "relative_difference_of_10_losses": float(np.abs(a / b - 1).max()),
        }
        print(name, json.dumps(table[name]), flush=True)
    return table


def fixture(workers: dict[str, Worker], folder: str, out: Path) -> None:
    """A tiny model of mace-torch with energies and forces, as a file for the tests."""
    frames = [atoms for atoms in structures() if set(atoms.numbers) <= {1, 6, 8, 11, 17}]
    h = {**BASE, "channels": 2, "radial_hidden": [4, 4], "readout_hidden": 3, "cutoff": 4.0}
    h |= {"elements": [1, 6, 8, 11, 17], "e0": [0.0] * 5, "avg_num_neighbors": 3.0}
    write(f"{folder}/fixture.xyz", frames)
    workers["mace"]("build", hyperparameters=h, save=f"{folder}/w.npz", seed=0, dtype="float64")
    workers["mace"]("read", name="fixture", file=f"{folder}/fixture.xyz")
    workers["mace"]("evaluate", name="fixture", save=f"{folder}/e.npz")
    arrays = to_mlip(dict(np.load(f"{folder}/w.npz")), h)
    for k, atoms in enumerate(read(f"{folder}/fixture.xyz", ":")):
        for key in ("numbers", "positions", "pbc"):
            arrays[f"{key}/{k}"] = atoms.arrays[key] if key in atoms.arrays else atoms.pbc
        arrays[f"cell/{k}"] = np.array(atoms.cell)
    own = {key: h[key] for key in h if key not in ("e0", "scale")}
    arrays["hyperparameters"] = np.array(json.dumps(own))
    np.savez_compressed(out, **arrays, **dict(np.load(f"{folder}/e.npz")))


def load(datasets: Path, folder: str) -> dict[str, dict[str, Any]]:
    """Training and validation structures of 3BPA and of silicon, with reference energies by least
    squares."""
    bpa = read(datasets / "3bpa" / "train_300K.xyz.gz", ":")
    order = default_rng(1).permutation(len(bpa))
    silicon = [read(datasets / "mlearn" / f"Si_{part}.xyz.gz", ":") for part in ("train", "test")]
    sets = {
        "3BPA": ([bpa[k] for k in order[:450]], [bpa[k] for k in order[450:]]),
        "Si": (silicon[0], silicon[1]),
    }
    result = {}
    for name, (train, valid) in sets.items():
        elements = sorted({int(z) for atoms in train for z in atoms.numbers})
        counts = np.array([[(a.numbers == z).sum() for z in elements] for a in train], float)
        energies = np.array([a.info["REF_energy"] for a in train])
        e0 = np.linalg.lstsq(counts, energies, rcond=1e-8)[0]
        forces = np.concatenate([a.arrays["REF_forces"] for a in train])
        for part, frames in (("train", train), ("valid", valid)):
            for atoms in frames:
                atoms.calc = None
            write(f"{folder}/{name}_{part}.xyz", frames)
        result[name] = {
            "train": len(train),
            "hyperparameters": {
                "elements": elements,
                "e0": e0.tolist(),
                "scale": float(np.sqrt((forces**2).mean())),
            },
        }
    return result


def median_ratio(seconds: dict[str, list[float]]) -> dict[str, Any]:
    a, b = (np.array(seconds[side]) for side in SIDES)
    return {
        "mlip_ms": round(1e3 * statistics.median(a), 2),
        "mace_torch_ms": round(1e3 * statistics.median(b), 2),
        "mlip_min_ms": round(1e3 * min(a), 2),
        "mace_torch_min_ms": round(1e3 * min(b), 2),
        "times_faster": round(statistics.median(b) / statistics.median(a), 2),
        "times_faster_of_minima": round(min(b) / min(a), 2),
    }


def speed(workers: dict[str, Worker], data: dict[str, Any], folder: str, rounds: int) -> Any:
    """Energy with forces of one structure, and a step of training on five, in turn, float32."""
    table: dict[str, Any] = {}
    for model, name in product(SPEED, data):
        h = {**BASE, **SPEED[model], **data[name]["hyperparameters"]}
        same_weights(workers, folder, h, seed=0, dtype="float32")
        for worker in workers.values():
            worker("read", name="train", file=f"{folder}/{name}_train.xyz")
            worker("start", lr=0.01, energy=1.0, forces=1000.0)
        inference: dict[str, list[float]] = {side: [] for side in SIDES}
        training: dict[str, list[float]] = {side: [] for side in SIDES}
        numbers = list(range(5))
        for warm in range(rounds + 1):
            for side, worker in workers.items():
                seconds = worker("time_inference", name="train", number=0, repeats=3)
                steps = worker("steps", name="train", batches=[numbers])["seconds"]
                if warm:
                    inference[side] += seconds
                    training[side] += steps
        table[f"{name}, {model}"] = {
            "energy and forces of one structure": median_ratio(inference),
            "training step, batch 5": median_ratio(training),
        }
        print(f"{name}, {model}", json.dumps(table[f"{name}, {model}"]), flush=True)
    return table


def train(workers: dict[str, Worker], data: dict[str, Any], folder: str, a: Any) -> Any:
    """Errors after the same number of steps, for each seed; our model also with its own default
    energy of isolated atoms."""
    table: dict[str, Any] = {}
    for name in a.sets:
        steps, rows = None, []
        for seed in range(a.seeds):
            h = {**BASE, **data[name]["hyperparameters"], "isolated": a.isolated}
            same_weights(workers, folder, h, seed=seed, dtype="float32")
            rng = default_rng(seed)
            for worker in workers.values():
                for part in ("train", "valid"):
                    worker("read", name=part, file=f"{folder}/{name}_{part}.xyz")
                worker("start", lr=0.01, energy=1.0, forces=1000.0)
            if steps is None:
                pilot = {
                    s: w("steps", name="train", batches=[list(range(5))] * 5)
                    for s, w in workers.items()
                }
                slow = max(statistics.median(p["seconds"][1:]) for p in pilot.values())
                steps = max(int(60 * a.train / slow / a.seeds / 2 / len(a.sets)), 1)
                same_weights(workers, folder, h, seed=seed, dtype="float32")
                for worker in workers.values():
                    for part in ("train", "valid"):
                        worker("read", name=part, file=f"{folder}/{name}_{part}.xyz")
                    worker("start", lr=0.01, energy=1.0, forces=1000.0)
            batches: list[list[int]] = []
            while len(batches) < steps:
                order = rng.permutation(data[name]["train"])
                batches += [order[k : k + 5].tolist() for k in range(0, len(order) - 4, 5)]
            row: dict[str, Any] = {"seed": seed, "steps": steps}
            for side, worker in workers.items():
                seconds = worker("steps", name="train", batches=batches[:steps])["seconds"]
                row[side] = {
                    **{key: round(x, 3) for key, x in worker("errors", name="valid").items()},
                    "steps_per_s": round(len(seconds) / sum(seconds), 2),
                }
            rows.append(row)
            print(name, json.dumps(row), flush=True)
        table[name] = rows
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--train", type=float, metavar="MINUTES", help="in all, instead of the rest"
    )
    parser.add_argument("--fixture", type=Path, help="write the file of the tests, nothing else")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=["3BPA", "Si"], default=["3BPA", "Si"])
    parser.add_argument("--isolated", choices=["zero", "learned"], default="zero")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["agreement", "speed"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(a.threads),
        PYTHONPATH=str(HERE.parent),
        TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1",
        MALLOC_MMAP_THRESHOLD_="1073741824",
        MALLOC_TRIM_THRESHOLD_="2147483647",
        MALLOC_TOP_PAD_="67108864",
    )
    workers = {side: Worker(side, a.threads, environment) for side in SIDES}
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": a.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        if a.fixture:
            return fixture(workers, folder, a.fixture)
        data = load(Path(os.environ["MLIP_DATASETS"]), folder)
        if a.train:
            result["training"] = train(workers, data, folder, a)
        else:
            if a.only != "speed":
                result["agreement"] = agreement(workers, folder)
            if a.only != "agreement":
                result["speed"] = speed(workers, data, folder, a.rounds)
    for worker in workers.values():
        worker.process.terminate()
    name = "mace_training" if a.train else "mace_reference"
    out = a.out or HERE / "results" / f"{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
