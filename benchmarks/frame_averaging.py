"""Averages over frames around models without symmetry: exactness, jumps, cost, training.

    python benchmarks/frame_averaging.py            # the first three, some minutes
    python benchmarks/frame_averaging.py --train    # one backbone, the same steps, all kinds

Exactness: change of energy per atom and of forces under 3 rotations and 3 reflections, float64,
random weights.  Jumps: the energy along paths through degeneracies is bisected to where it changes
most, down to 1e-11 of the path, and what is left is the jump.  Cost: energy and forces, and one
step of training, beside the bare model, interleaved.  Results: results/frame_averaging.json and
frame_averaging.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.nn.rotations import random_rotations
from mlip.potential import Potential
from mlip.wrappers import wrap

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "frame_averaging.json"
CUTOFF = 5.0
KINDS = ("bare", "local", "stochastic", "pca", "group24", "group60")
BACKBONES: dict[str, dict[str, Any]] = {
    "environment": {"hidden": 64, "edge_hidden": 32},
    "transip": {"hidden": 96, "num_layers": 3, "num_heads": 4, "latent": (12, 2)},
    "escaip": {"hidden": 48, "node_hidden": 64, "angular": "vectors"},
}


def shaken(atoms: Atoms) -> Atoms:
    atoms.positions += np.random.default_rng(0).normal(0, 0.08, atoms.positions.shape)
    return atoms


SYSTEMS: dict[str, Callable[[], Atoms]] = {
    "ethanol": lambda: shaken(molecule("CH3CH2OH")),
    "CO2": lambda: molecule("CO2"),
    "Si 8": lambda: shaken(bulk("Si", cubic=True)),
    "Cu 4, perfect": lambda: bulk("Cu", cubic=True),
}


def make(name: str, kind: str, dtype: torch.dtype = torch.float64) -> Potential:
    """Random weights, with a readout that is not zero."""
    torch.manual_seed(0)
    model = build(name, cutoff=CUTOFF, **BACKBONES[name])
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.3)
    if kind != "bare":
        more = {"allow_nonsmooth": True} if kind == "pca" else {}
        mirrors = not kind.startswith("group")  # as many copies as the name says
        model = wrap(model, "frame_averaging", kind=kind, mirrors=mirrors, **more)
    return Potential(model, torch.zeros(119)).to(dtype).eval()


def graph(atoms: Atoms) -> AtomicGraph:
    return AtomicGraph.from_atoms(atoms, CUTOFF)


def exactness() -> list[dict[str, Any]]:
    rows = []
    turns = random_rotations(3, torch.Generator().manual_seed(0)).matrices
    for name in BACKBONES:
        for kind in KINDS:
            if kind == "stochastic":  # evaluated, it is local
                continue
            potential = make(name, kind)
            for system, make_atoms in SYSTEMS.items():
                g = graph(make_atoms())
                if kind == "pca" and g.pbc.any():
                    continue
                out = potential(g)
                energy = forces = 0.0
                for R in (*turns, *(-turns)):
                    turned = potential(g.rotated(R))
                    change = (turned["energy"] - out["energy"]).abs().item()
                    energy = max(energy, change / len(g.positions))
                    difference = (turned["forces"] @ R - out["forces"]).abs().max().item()
                    forces = max(forces, difference)
                row = {"backbone": name, "kind": kind, "system": system}
                row |= {"energy": energy, "forces": forces}
                row["largest_force"] = out["forces"].abs().max().item()
                rows.append(row)
                print(row, flush=True)
    return rows


def bent(t: float) -> Atoms:
    """CO2 through the straight line."""
    return Atoms("OCO", [[1.16, 0, 0], [0, 0, 0], [-1.16, 0.5 * t, 0.1 * t]])


def stretched(t: float) -> Atoms:
    """A symmetric top along a distortion in which two principal axes exchange their places."""
    x, y = math.sqrt(3) / 2, 1 / 2
    atoms = Atoms("H3N", positions=[[0, 1, 0], [x, -y, 0], [-x, -y, 0], [0, 0, 0.4]])
    atoms.positions *= [1 + 0.1 * t, 1 - 0.1 * t, 1]
    return atoms


def leaving(t: float) -> Atoms:
    """One hydrogen of methane pulled out, through all inner cutoffs."""
    atoms = molecule("CH4")
    atoms.positions[1] *= 3 + 2 * t
    return atoms


def off_site(t: float) -> Atoms:
    """An atom of fcc copper through its cubic site."""
    atoms = bulk("Cu", cubic=True)
    atoms.positions[0] += np.array([0.2, 0.1, 0.05]) * t
    return atoms


PATHS = {"bent CO2": bent, "stretched NH3": stretched, "CH4 -> CH3": leaving, "Cu site": off_site}


def energies(potential: Potential, path: Callable[[float], Atoms], t: np.ndarray) -> np.ndarray:
    parts = np.array_split(t, max(1, len(t) // 40))
    batches = [AtomicGraph.collate([graph(path(x)) for x in part]) for part in parts]
    return np.concatenate([potential(b)["energy"].numpy() for b in batches])


def jump(potential: Potential, path: Callable[[float], Atoms], E: np.ndarray) -> float:
    """What remains of the roughest place of a path when the step goes to zero, eV."""
    t = np.linspace(-1, 1, len(E))
    worst = 0.0
    rough = int(np.argmax(np.abs(np.diff(E, 2))))
    # Paths begin at -1 and pass a degeneracy at 0, if not elsewhere, too.
    for low, high in ((t[rough], t[rough + 2]), (-1e-3, 1.1e-3)):
        while high - low > 1e-11:
            points = np.linspace(low, high, 5)
            change = np.diff(energies(potential, path, points))
            k = int(np.abs(change - np.median(change)).argmax())
            low, high = points[k], points[k + 1]
        worst = max(worst, abs(float(change[k])))
    return worst


def jumps() -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    rows, curves = [], {}
    for name in ("environment", "transip"):
        for label, path in PATHS.items():
            lines = {}
            for kind in ("bare", "local", "pca", "group24"):
                potential = make(name, kind)
                if kind == "pca" and path(0.0).pbc.any():
                    continue
                E = energies(potential, path, np.linspace(-1, 1, 101))
                lines[kind] = E
                if kind == "bare":  # drawn, and no average
                    continue
                row = {"backbone": name, "path": label, "kind": kind}
                row |= {"jump": jump(potential, path, E), "range": float(np.ptp(E))}
                rows.append(row)
                print(row, flush=True)
            # What the draws of a stochastic frame leave open, near the middle of the path.
            potential = make(name, "stochastic").train()
            torch.manual_seed(0)
            many = AtomicGraph.collate([graph(path(0.1))] * 100)
            spread = float(potential(many)["energy"].detach().std())
            row = {"backbone": name, "path": label, "kind": "stochastic", "spread": spread}
            rows.append(row)
            print(row, flush=True)
            curves[label] = lines
    return rows, curves


def draw(curves: dict[str, dict[str, np.ndarray]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), sharex=True)
    for axis, (label, lines) in zip(axes, curves.items(), strict=True):
        for kind, E in lines.items():
            axis.plot(np.linspace(-1, 1, len(E)), 1e3 * (E - E[0]), label=kind, lw=1.2)
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("path", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("energy - first (meV)", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


def evaluate(potential: Potential, g: AtomicGraph) -> None:
    potential.eval()
    potential(g)


def train_step(potential: Potential, g: AtomicGraph) -> None:
    potential.train()
    out = potential(g)
    loss = out["forces"].square().sum() + out["energy"].square().sum()
    torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)


def cost(repeats: int) -> None:
    """Rows that are there stay, so that a broken-off call goes on where it stopped."""
    batches = {
        "ethanol x 5": AtomicGraph.collate([graph(SYSTEMS["ethanol"]())] * 5),
        "Si 64": graph(shaken(bulk("Si", cubic=True) * (2, 2, 2))),
        "Cu 4, perfect": graph(SYSTEMS["Cu 4, perfect"]()),
    }
    for name in BACKBONES:
        for system, g in batches.items():
            if name != "environment" and system != "ethanol x 5":
                continue
            kinds = [k for k in KINDS if k != "pca" or not g.pbc.any()]
            potentials = {k: make(name, k, torch.float32) for k in kinds}
            seen = g.replace(vectors=g.edge_vectors().float())
            views = len(potentials["local"].model.views(seen).atom) / len(g.positions)
            for what, action in (("evaluation", evaluate), ("training", train_step)):
                key = {"backbone": name, "system": system, "what": what}
                if any(key.items() <= row.items() for row in read().get("cost", [])):
                    continue
                times: dict[str, list[float]] = {k: [] for k in kinds}
                for _ in range(repeats + 1):  # the first one warms up
                    for kind, potential in potentials.items():
                        start = time.perf_counter()
                        action(potential, g)
                        times[kind].append(time.perf_counter() - start)
                # Interleaved, so that the load of the machine hits all of them alike.
                middle = {k: statistics.median(t[1:]) for k, t in times.items()}
                factors = {k: middle[k] / middle["bare"] for k in kinds if k != "bare"}
                row = {**key, "views": views, "ms_bare": 1e3 * middle["bare"], "factor": factors}
                print(row, flush=True)
                write("cost", [*read().get("cost", []), row])


COLUMNS = {
    "bare": [],
    "augmentation": ["data.augment=rotations"],
    "local": ["wrapper={name: frame_averaging}"],
    "stochastic": ["wrapper={name: frame_averaging, kind: stochastic}"],
    "pca": ["wrapper={name: frame_averaging, kind: pca, allow_nonsmooth: true}"],
    "group24": ["wrapper={name: frame_averaging, kind: group24, mirrors: false}"],
}


def train(epochs: int, columns: list[str]) -> list[dict[str, Any]]:
    """The ethanol data of the repository, one switch in the configuration."""
    data = HERE.parent / "examples" / "data"
    rows = []
    for column in columns:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.yaml"
            config.write_text("model: {name: environment, size: small, cutoff: 5.0}\n")
            command = [sys.executable, "-W", "ignore", "-m", "mlip", "train", str(config)]
            command += [f"data.train={data / 'ethanol_train.h5'}", f"run_dir={folder}/run"]
            command += [f"data.test={data / 'ethanol_test.h5'}", "runtime.num_threads=1"]
            command += ["logging.plots=false", f"schedule.max_epochs={epochs}", *COLUMNS[column]]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            log = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
            from mlip.checkpoint import read_metadata

            errors = read_metadata(Path(folder) / "run" / "best.safetensors")["errors"]
            row = {"column": column, "epochs": epochs, "seconds": json.loads(log[-1])["seconds"]}
            rows.append({**row, **errors["ethanol_test"]})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["exactness", "jumps", "cost"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # of principal axes, which are meant to fail here
    if a.train:
        old = [r for r in read().get("training", []) if r["column"] not in a.columns]
        write("training", old + train(a.epochs, a.columns))
        return
    if "exactness" in a.parts:
        write("exactness", exactness())
    if "jumps" in a.parts:
        rows, curves = jumps()
        write("jumps", rows)
        draw(curves)
    if "cost" in a.parts:
        cost(a.repeats)


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(part: str, rows: list[dict[str, Any]]) -> None:
    RESULTS.write_text(json.dumps({**read(), part: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
