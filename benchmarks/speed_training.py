"""A step of training for ``speed.py``: forces, loss, backward through the forces, optimizer.

Each package with the optimizer of its own trainer where that is a few lines: ours as in ``mlip
train`` (Muon with AdamW, clipping, average of the weights), mace-torch as in ``mace_run_train``
(Adam, clipping, average); NequIP, SevenNet, TensorNet and CHGNet with their model in training mode,
squared errors of energy and forces, and Adam, in place of the frameworks that drive them.
Reading, neighbour lists and collation are done before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from ase import Atoms
from ase.io import read
from mace_worker import Mace, Mlip, Training, energy_of, forces_of
from torch import Tensor

BATCHES = 3  # that are shown in turn
SETS = {
    "3BPA": ("3bpa/train_300K.xyz.gz", 27),
    "Si": ("mlearn/Si_train.xyz.gz", 64),
}
Labels = tuple[Tensor, Tensor, Tensor]  # energies (G,), forces (N, 3), atoms of each (G,)


def structures(name: str, number: int) -> list[Atoms]:
    """Of one size, drawn at random, the same ones in every package."""
    file, size = SETS[name]
    frames = [f for f in read(Path(os.environ["MLIP_DATASETS"]) / file, ":") if len(f) == size]
    order = np.random.default_rng(0).permutation(len(frames))
    return [frames[k] for k in order[:number]]


def training_step(peer: str, size: str, model: str, name: str, batch: int) -> Callable[[], None]:
    """What makes one step with the next batch of ``batch`` structures; float32."""
    frames = structures(name, BATCHES * batch)
    symbols = sorted({s for atoms in frames for s in atoms.get_chemical_symbols()})
    groups = [frames[k : k + batch] for k in range(0, len(frames), batch)]
    if peer == "mace":
        return mace(size, symbols, groups)
    if peer in PEERS:
        if peer in peers.CRYSTALS_ONLY and not frames[0].pbc.all():
            raise ValueError(f"{peer} takes crystals only")
        return plain(PEERS[peer](size, symbols), groups)
    return own(model, groups)


def own(model: str, groups: list[list[Atoms]]) -> Callable[[], None]:
    """A model of this package."""
    from trainings import untrained

    model, _, way = model.partition("+")
    if way not in ("", "compile") or Path(model).is_file():
        raise ValueError("models as they are trained only")
    numbers = sorted({int(z) for frames in groups for atoms in frames for z in atoms.numbers})
    side = Mlip()
    side.model = untrained(model, numbers)
    side.cutoff = side.model.cutoff
    batches = [side.batch([side.graph(atoms) for atoms in frames]) for frames in groups]
    return own_step(side.model, cycle(batches), compiled=way == "compile")


def own_step(
    potential: Any, batches: Iterator[Any], *, compiled: bool = False
) -> Callable[[], None]:
    """As ``mlip train`` with its defaults, on energies and forces; or with ``runtime.compile``."""
    from mlip.training.compiled_steps import compiled_steps
    from mlip.training.config import LossConfig, OptimizerConfig
    from mlip.training.loss import Objective
    from mlip.training.optimizer import AveragedWeights, make_optimizers

    config = OptimizerConfig()
    objective = Objective.from_config(LossConfig(), has_stress=False)
    optimizers = make_optimizers(potential.train(), config)
    parameters = list(potential.parameters())
    average = AveragedWeights(parameters, config.ema_decay or 0.999)

    stepped = compiled_steps(potential, next(batches)) if compiled else potential

    def step() -> None:
        graph = next(batches)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        objective(potential, graph, stepped(graph)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad or torch.inf)
        for optimizer in optimizers:
            optimizer.step()
        average.update()

    return step


def mace(size: str, symbols: list[str], groups: list[list[Atoms]]) -> Callable[[], None]:
    """As ``mace_run_train``."""
    side = Mace()
    side.model = peers.mace_model(size, symbols, "float32")
    side.cutoff = peers.CUTOFF
    side.elements = sorted({int(z) for atoms in groups[0] for z in atoms.numbers})
    batches = cycle([side.batch([side.graph(atoms) for atoms in frames]) for frames in groups])
    training = Training(side, lr=1e-3, energy=1.0, forces=100.0)
    return lambda: training.step(next(batches)) and None


class Nequip:
    def __init__(self, size: str, symbols: list[str]) -> None:
        self.model = peers.nequip_model(size, symbols, "float32").train()
        self.transforms = peers.nequip_transforms(symbols)

    def batch(self, frames: list[Atoms]) -> Any:
        from nequip.data import AtomicDataDict, from_ase

        graphs = []
        for atoms in frames:
            data = from_ase(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
            for transform in self.transforms:
                data = transform(data)
            graphs.append(data)
        return AtomicDataDict.batched_from_list(graphs)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        out = self.model(batch)
        return out["total_energy"].flatten(), out["forces"]


class Sevenn:
    """SevenNet-0."""

    def __init__(self, size: str, symbols: list[str]) -> None:
        from sevenn.util import load_checkpoint

        checkpoint = load_checkpoint("7net-0")
        self.model = checkpoint.build_model().train()
        self.model.set_is_batch_data(True)
        self.cutoff = checkpoint.config["cutoff"]

    def batch(self, frames: list[Atoms]) -> Any:
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph
        from torch_geometric.data import Batch

        graphs = []
        for atoms in frames:
            data = unlabeled_atoms_to_graph(atoms, self.cutoff)
            data["data_info"] = {}
            graphs.append(AtomGraphData.from_numpy_dict(data))
        return Batch.from_data_list(graphs)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        out = self.model(batch.clone())
        return out["inferred_total_energy"], out["inferred_force"]


class Matgl:
    """TensorNet."""

    def __init__(self, size: str, symbols: list[str]) -> None:
        from matgl.ext.ase import Atoms2Graph

        self.model = peers.matgl_model(size, symbols, "float32").train()
        self.convert = Atoms2Graph(tuple(symbols), peers.CUTOFF)

    def batch(self, frames: list[Atoms]) -> Any:
        from torch_geometric.data import Batch

        graphs, lattices, _ = zip(*(self.convert.get_graph(a) for a in frames), strict=True)
        return Batch.from_data_list(graphs), torch.stack(lattices).reshape(-1, 3, 3)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        energy, forces, *_ = self.model(*batch)
        return energy, forces


class Chgnet:
    def __init__(self, size: str, symbols: list[str]) -> None:
        from chgnet.model.model import CHGNet

        self.model = CHGNet.load(verbose=False, use_device="cpu").train()

    def batch(self, frames: list[Atoms]) -> Any:
        from pymatgen.io.ase import AseAtomsAdaptor

        return [self.model.graph_converter(AseAtomsAdaptor.get_structure(a)) for a in frames]

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        out = self.model(batch, task="ef")
        return out["e"].flatten(), torch.cat(out["f"])


PEERS = {"nequip": Nequip, "sevenn": Sevenn, "matgl": Matgl, "chgnet": Chgnet}


def labels(frames: list[Atoms]) -> Labels:
    return (
        torch.tensor([energy_of(atoms) for atoms in frames], dtype=torch.float32),
        torch.cat([torch.from_numpy(forces_of(atoms)) for atoms in frames]).float(),
        torch.tensor([len(atoms) for atoms in frames]),
    )


def plain(side: Any, groups: list[list[Atoms]]) -> Callable[[], None]:
    """Squared errors and Adam."""
    batches = cycle([(side.batch(frames), labels(frames)) for frames in groups])
    parameters = [p for p in side.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> None:
        batch, (E, F, n) = next(batches)
        optimizer.zero_grad(set_to_none=True)
        e, f = side(batch)
        if f.shape != F.shape or not f.requires_grad:
            raise RuntimeError(f"forces {tuple(f.shape)} that cannot be trained on")
        loss = ((E - e) / n).square().mean() + 100 * (F - f).square().mean()
        loss.backward()
        optimizer.step()

    return step
