"""One side of ``mace_reference.py``: builds, evaluates, times and trains mace-torch or our model.

    python mace_worker.py mace|mlip THREADS

Reads one JSON object with the key ``do`` from each line, answers with one line.  Structures come as
files that ASE reads with energies and forces, arrays go as npz.  With ``mace`` it runs in a virtual
environment that has mace-torch and not this package.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.io import read

Batch = Any
GROUPS = ("embedding", "interactions_decay", "interactions", "products", "readouts")


class Mace:
    """ScaleShiftMACE with the defaults of ``mace_run_train`` where nothing is said."""

    def build(self, h: dict[str, Any], seed: int, dtype: str) -> None:
        from e3nn import o3
        from mace.modules import ScaleShiftMACE, interaction_classes

        torch.set_default_dtype(getattr(torch, dtype))
        torch.manual_seed(seed)
        block = interaction_classes["RealAgnosticResidualInteractionBlock"]
        irreps = "+".join(f"{h['channels']}x{l}{'eo'[l % 2]}" for l in range(h["lmax"] + 1))
        self.model = ScaleShiftMACE(
            r_max=h["cutoff"],
            num_bessel=h["num_basis"],
            num_polynomial_cutoff=h["envelope_power"],
            max_ell=h["max_ell"],
            interaction_cls=block,
            interaction_cls_first=block,
            num_interactions=h["num_layers"],
            num_elements=len(h["elements"]),
            hidden_irreps=o3.Irreps(irreps),
            MLP_irreps=o3.Irreps(f"{h['readout_hidden']}x0e"),
            atomic_energies=np.array(h["e0"]),
            avg_num_neighbors=h["avg_num_neighbors"],
            atomic_numbers=h["elements"],
            correlation=h["correlation"],
            gate=torch.nn.functional.silu,
            atomic_inter_scale=h["scale"],
            atomic_inter_shift=0.0,
            radial_MLP=list(h["radial_hidden"]),
            use_reduced_cg=False,
        )
        self.cutoff, self.elements = h["cutoff"], h["elements"]

    def save(self, path: str) -> None:
        np.savez(path, **{k: v.numpy() for k, v in self.model.state_dict().items()})

    def graph(self, atoms: Atoms) -> Any:
        from mace.data import AtomicData, Configuration
        from mace.tools import AtomicNumberTable

        config = Configuration(
            atomic_numbers=atoms.numbers,
            positions=atoms.positions,
            properties={"energy": energy_of(atoms), "forces": forces_of(atoms)},
            property_weights={"energy": 1.0, "forces": 1.0},
            cell=np.array(atoms.cell),
            pbc=tuple(atoms.pbc),
        )
        return AtomicData.from_config(config, AtomicNumberTable(self.elements), self.cutoff)

    def batch(self, graphs: list[Any]) -> Batch:
        from mace.tools.torch_geometric import Batch

        return Batch.from_data_list(graphs)

    def __call__(self, batch: Batch, training: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(batch.to_dict(), training=training)
        return out["energy"], out["forces"]

    def labels(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return batch.energy, batch.forces, batch.ptr.diff()

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """As ``mace_run_train`` groups them for weight decay."""
        m = self.model
        inner = dict(m.interactions.named_parameters())
        decay = [n for n in inner if "linear.weight" in n or "skip_tp_full.weight" in n]
        return {
            "embedding": list(m.node_embedding.parameters()),
            "interactions_decay": [inner[n] for n in decay],
            "interactions": [p for n, p in inner.items() if n not in decay],
            "products": list(m.products.parameters()),
            "readouts": list(m.readouts.parameters()),
        }


class Mlip:
    """This package's model, with weights of the other one."""

    def build(self, h: dict[str, Any], seed: int, dtype: str) -> None:
        from mlip.mace_import import to_mlip
        from mlip.models import build
        from mlip.potential import Potential

        torch.manual_seed(seed)
        own = {k: v for k, v in h.items() if k not in ("e0", "scale", "weights")}
        e0 = torch.full((119,), torch.nan, dtype=torch.float64)
        e0[h["elements"]] = torch.tensor(h["e0"], dtype=torch.float64)
        model = build("mace", **own)
        self.model = Potential(model, e0, h["scale"]).to(getattr(torch, dtype))
        if h.get("weights"):
            weights = to_mlip(dict(np.load(h["weights"])), h)
            model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
        self.cutoff = h["cutoff"]

    def graph(self, atoms: Atoms) -> Any:
        from mlip.data.graph import AtomicGraph

        return AtomicGraph.from_arrays(
            atoms.numbers,
            atoms.positions,
            np.array(atoms.cell),
            atoms.pbc,
            self.cutoff,
            energy=torch.tensor([energy_of(atoms)], dtype=torch.float64),
            forces=torch.from_numpy(forces_of(atoms)),
        )

    def batch(self, graphs: list[Any]) -> Batch:
        from mlip.data.graph import AtomicGraph

        return AtomicGraph.collate(graphs)

    def __call__(self, batch: Batch, training: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model.train(training)(batch)
        return out["energy"], out["forces"]

    def labels(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return batch.energy, batch.forces, batch.ptr.diff()

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        m = self.model.model
        inner = dict(m.layers.named_parameters())
        products = [n for n in inner if ".contraction." in n or ".update." in n]
        decay = [n for n in inner if ".mix." in n]
        return {
            "embedding": [m.embed],
            "interactions_decay": [inner[n] for n in decay],
            "interactions": [p for n, p in inner.items() if n not in {*products, *decay}],
            "products": [inner[n] for n in products],
            "readouts": list(m.readouts.parameters()),
        }


def energy_of(atoms: Atoms) -> float:
    return float(atoms.info.get("REF_energy", 0.0))


def forces_of(atoms: Atoms) -> np.ndarray:
    return atoms.arrays.get("REF_forces", np.zeros((len(atoms), 3)))


class Training:
    """A step of ``mace_run_train``: weighted squares, Adam with AMSGrad, clipping, EMA."""

    def __init__(self, side: Any, lr: float, energy: float, forces: float) -> None:
        self.side, self.energy, self.forces = side, energy, forces
        groups = side.groups()
        assert {id(p) for g in groups.values() for p in g} == {
            id(p) for p in side.model.parameters() if p.requires_grad or p.numel()
        }
        self.optimizer = torch.optim.Adam(
            [
                {
                    "params": groups[name],
                    "weight_decay": 5e-7 if name in ("interactions_decay", "products") else 0.0,
                }
                for name in GROUPS
            ],
            lr=lr,
            amsgrad=True,
        )
        self.parameters = [p for name in GROUPS for p in groups[name] if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    def step(self, batch: Batch) -> float:
        E, F, n = self.side.labels(batch)
        self.optimizer.zero_grad(set_to_none=True)
        e, f = self.side(batch, training=True)
        loss = self.energy * ((E - e) / n).square().mean() + self.forces * (F - f).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.optimizer.step()
        self.steps += 1
        decay = min(0.99, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for mean, p in zip(self.average, self.parameters, strict=True):
                mean.lerp_(p, 1 - decay)
        return loss.item()

    def errors(self, batches: list[Batch]) -> dict[str, float]:
        """Root mean square errors of the averaged weights: meV/atom, meV/angstrom."""
        with torch.no_grad():
            kept = [p.clone() for p in self.parameters]
            for p, mean in zip(self.parameters, self.average, strict=True):
                p.copy_(mean)
        energy, forces = [], []
        for batch in batches:
            E, F, n = self.side.labels(batch)
            e, f = self.side(batch)
            energy.append(((E - e.detach()) / n).double())
            forces.append((F - f.detach()).double().flatten())
        with torch.no_grad():
            for p, value in zip(self.parameters, kept, strict=True):
                p.copy_(value)
        root = [1e3 * torch.cat(x).square().mean().sqrt().item() for x in (energy, forces)]
        return {"energy_rmse_meV_per_atom": root[0], "force_rmse_meV_per_A": root[1]}


def batches(side: Any, graphs: list[Any], size: int) -> list[Batch]:
    return [side.batch(graphs[k : k + size]) for k in range(0, len(graphs), size)]


def main() -> None:
    side = {"mace": Mace, "mlip": Mlip}[sys.argv[1]]()
    threads = int(sys.argv[2])
    torch.set_num_threads(threads)
    # On a busy machine the time that a single thread computes says more than the time that passes.
    clock = time.process_time if threads == 1 else time.perf_counter
    graphs: dict[str, list[Any]] = {}
    training: Training
    for line in sys.stdin:
        c = json.loads(line)
        answer: Any = None
        if c["do"] == "build":
            side.build(c["hyperparameters"], c["seed"], c["dtype"])
            graphs.clear()
            if "save" in c:
                side.save(c["save"])
            answer = sum(p.numel() for p in side.model.parameters())
        elif c["do"] == "read":
            graphs[c["name"]] = [side.graph(a) for a in read(c["file"], ":")]
        elif c["do"] == "evaluate":
            out = [side(side.batch([g])) for g in graphs[c["name"]]]
            np.savez(
                c["save"],
                energy=torch.cat([e.detach() for e, _ in out]).numpy(),
                forces=torch.cat([f.detach() for _, f in out]).numpy(),
            )
        elif c["do"] == "time_inference":
            batch, answer = side.batch([graphs[c["name"]][c["number"]]]), []
            for repeat in range(c["repeats"] + 1):
                begin = clock()
                side(batch)
                if repeat:
                    answer.append(clock() - begin)
        elif c["do"] == "start":
            training = Training(side, c["lr"], c["energy"], c["forces"])
        elif c["do"] == "steps":
            answer = {"seconds": [], "losses": []}
            for numbers in c["batches"]:
                batch = side.batch([graphs[c["name"]][k] for k in numbers])
                begin = clock()
                answer["losses"].append(training.step(batch))
                answer["seconds"].append(clock() - begin)
        elif c["do"] == "errors":
            answer = training.errors(batches(side, graphs[c["name"]], 10))
        print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
