"""Our MACE beside mace-torch: the same weights, energies and forces; speed; errors of training.

    MLIP_DATASETS=/path/to/datasets MACE=/path/to/mace/venv python benchmarks/mace_reference.py
    ... python benchmarks/mace_reference.py --train 800 --seeds 3
    python benchmarks/mace_reference.py --table

Random weights of mace-torch's ScaleShiftMACE are copied into ours: energies and forces of both are
compared in float64 on structures of several kinds, and so are ten steps of training with the same
batches.  Then steps of inference and training are timed, the two packages in turn in one run.

With ``--train STEPS`` both are trained for so many steps, from the same weights, on the same
batches, with the loss, optimizer and average of weights of ``mace_run_train`` in its constant
phase.  A set, a seed and a side are one piece; the same command may run once for each core, and
takes what the others leave.  The side ``mlip`` has its own default energy of isolated atoms;
``mlip, learned`` has the published one, with which it is mace-torch's model to rounding, and the
two differ by arithmetic alone.

Each piece is a row of results/mace_reference.json or results/mace_training.json, and a row that is
there is not made again.  ``--table`` writes docs/models.md.
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
from numpy.random import default_rng
from pieces import Pieces, insert
from speed import cpu_name

from mlip.mace_import import to_mlip

HERE = Path(__file__).parent
RESULTS = Pieces(HERE / "results" / "mace_reference.json")
TRAINED = Pieces(HERE / "results" / "mace_training.json")
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


def agreement(workers: dict[str, Worker], folder: str) -> None:
    """Largest differences of energies and forces, and of ten losses of training."""
    frames = structures()
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    write(f"{folder}/kinds.xyz", frames)
    for number, (name, changes) in enumerate(AGREE.items()):
        if RESULTS.rows(part="agreement", model=name):
            continue
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
        row = {
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
        RESULTS.add({"part": "agreement", "model": name, **row})


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


def load(datasets: Path, folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Training and validation structures of 3BPA and of silicon, with reference energies by least
    squares."""
    sets = {}
    if "3BPA" in names:
        bpa = read(datasets / "3bpa" / "train_300K.xyz.gz", ":")
        order = default_rng(1).permutation(len(bpa))
        sets["3BPA"] = [[bpa[k] for k in part] for part in (order[:450], order[450:])]
    if "Si" in names:
        sets["Si"] = [
            read(datasets / "mlearn" / f"Si_{part}.xyz.gz", ":") for part in ("train", "test")
        ]
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


def speed(workers: dict[str, Worker], data: dict[str, Any], folder: str, a: Any) -> None:
    """Energy with forces of one structure, and a step of training on five, in turn, float32."""
    for model, name in product(SPEED, a.sets):
        key = {"part": "speed", "model": model, "set": name, "threads": a.threads}
        if RESULTS.rows(**key):
            continue
        h = {**BASE, **SPEED[model], **data[name]["hyperparameters"]}
        same_weights(workers, folder, h, seed=0, dtype="float32")
        for worker in workers.values():
            worker("read", name="train", file=f"{folder}/{name}_train.xyz")
            worker("start", lr=0.01, energy=1.0, forces=1000.0)
        inference: dict[str, list[float]] = {side: [] for side in SIDES}
        training: dict[str, list[float]] = {side: [] for side in SIDES}
        numbers = list(range(5))
        for warm in range(a.rounds + 1):
            for side, worker in workers.items():
                seconds = worker("time_inference", name="train", number=0, repeats=3)
                steps = worker("steps", name="train", batches=[numbers])["seconds"]
                if warm:
                    inference[side] += seconds
                    training[side] += steps
        row = {"inference": median_ratio(inference), "training": median_ratio(training)}
        RESULTS.add({**key, "cpu": cpu_name(), **row})


def train(data: dict[str, Any], folder: str, environment: dict[str, str], a: Any) -> None:
    """Errors on the held-out structures after the same steps, of each set, seed and side."""
    for name, seed, side in product(a.sets, range(a.seeds), a.sides):
        key = {"set": name, "seed": seed, "side": side, "steps": a.train}
        with TRAINED.claimed(
            Path(tempfile.gettempdir()) / f"mace-{name}-{seed}-{side}", **key
        ) as ours:
            if not ours:
                continue
            # The first weights are those of mace-torch on either side.
            workers = {s: Worker(s, a.threads, environment) for s in SIDES}
            isolated = "learned" if side == "mlip, learned" else "zero"
            h = {**BASE, **data[name]["hyperparameters"], "isolated": isolated}
            same_weights(workers, folder, h, seed=seed, dtype="float32")
            worker = workers[side.partition(",")[0]]
            for part in ("train", "valid"):
                worker("read", name=part, file=f"{folder}/{name}_{part}.xyz")
            worker("start", lr=0.01, energy=1.0, forces=1000.0)
            rng = default_rng(seed)
            batches: list[list[int]] = []
            while len(batches) < a.train:
                order = rng.permutation(data[name]["train"])
                batches += [order[k : k + 5].tolist() for k in range(0, len(order) - 4, 5)]
            seconds = worker("steps", name="train", batches=batches[: a.train])["seconds"]
            errors = {k: round(x, 3) for k, x in worker("errors", name="valid").items()}
            for each in workers.values():
                each.process.terminate()
            TRAINED.add(
                {**key, **errors, "ms_per_step": round(1e3 * statistics.median(seconds), 1)}
            )


def agreement_table() -> str:
    lines = [
        "| model | parameters | largest energy (eV) | difference | largest force (eV/Å) "
        "| difference | relative difference of 10 losses |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['parameters']['mlip']} | {r['largest_energy_eV']:.0f} "
        f"| {r['energy_difference_eV']:.0e} | {r['largest_force_eV_per_A']:.1f} "
        f"| {r['force_difference_eV_per_A']:.0e} | {r['relative_difference_of_10_losses']:.0e} |"
        for r in RESULTS.rows(part="agreement")
    ]
    return "\n".join(lines)


def speed_table() -> str:
    lines = [
        "| | energy + forces, ms: ours | mace-torch | ratio | step of training, ms: ours "
        "| mace-torch | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in RESULTS.rows(part="speed"):
        cells = [
            f"{r[what]['mlip_ms']:.0f} | {r[what]['mace_torch_ms']:.0f} "
            f"| {r[what]['times_faster']:.1f}"
            for what in ("inference", "training")
        ]
        lines.append(f"| {r['set']}, {r['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table() -> str:
    """Means over seeds, and their spread; equal within noise if they differ by less than it."""
    rows = TRAINED.rows()
    lines = [
        "| set | steps | side | seeds | E RMSE (meV/atom) | F RMSE (meV/Å) | ms/step |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    keys = sorted({(r["set"], r["steps"], r["side"]) for r in rows})
    for name, steps, side in keys:
        found = [r for r in rows if (r["set"], r["steps"], r["side"]) == (name, steps, side)]
        cells = []
        for q in ("energy_rmse_meV_per_atom", "force_rmse_meV_per_A"):
            values = [r[q] for r in found]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}")
        ms = statistics.median(r["ms_per_step"] for r in found)
        own = {"mace": "mace-torch", "mlip": "ours", "mlip, learned": "ours, `isolated: learned`"}
        lines.append(
            f"| {name} | {steps} | {own[side]} | {len(found)} | {' | '.join(cells)} | {ms:.0f} |"
        )
    return "\n".join(lines)


def write_tables() -> None:
    """Into docs/models.md, those that have rows."""
    page = HERE.parent / "docs" / "models.md"
    made = {"agreement": agreement_table(), "speed": speed_table(), "training": training_table()}
    for name, text in made.items():
        if text.count("\n") > 1:
            insert(page, f"mace {name}", text)
            print(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train", type=int, metavar="STEPS", help="instead of the rest")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=["3BPA", "Si"], default=["3BPA", "Si"])
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=["mace", "mlip", "mlip, learned"],
        default=["mace", "mlip"],
        help="of trainings",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["agreement", "speed"])
    parser.add_argument("--rounds", type=int, default=5, help="of timings")
    parser.add_argument("--fixture", type=Path, help="write the file of the tests, nothing else")
    parser.add_argument("--table", action="store_true", help="write the tables into the docs")
    a = parser.parse_args()
    if a.table:
        write_tables()
        return
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(a.threads),
        PYTHONPATH=str(HERE.parent),
        TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1",
        MALLOC_MMAP_THRESHOLD_="1073741824",
        MALLOC_TRIM_THRESHOLD_="2147483647",
        MALLOC_TOP_PAD_="67108864",
    )
    with tempfile.TemporaryDirectory() as folder:
        if a.train:
            train(load(Path(os.environ["MLIP_DATASETS"]), folder, a.sets), folder, environment, a)
            return
        workers = {side: Worker(side, a.threads, environment) for side in SIDES}
        if a.fixture:
            fixture(workers, folder, a.fixture)
        else:
            if a.only != "speed":
                agreement(workers, folder)
            if a.only != "agreement":
                data = load(Path(os.environ["MLIP_DATASETS"]), folder, a.sets)
                speed(workers, data, folder, a)
        for worker in workers.values():
            worker.process.terminate()


if __name__ == "__main__":
    main()
