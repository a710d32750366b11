"""Loss terms: values by hand, and missing labels without any influence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mlip.data.graph import AtomicGraph
from mlip.potential import Potential
from mlip.training.config import LossConfig
from mlip.training.loss import Objective, penalty

NAN = math.nan


def labelled(
    atoms: Atoms, energy: float = NAN, force: float = NAN, stress: float = NAN
) -> AtomicGraph:
    graph = AtomicGraph.from_atoms(atoms, 4.0)
    graph.energy = torch.tensor([energy], dtype=torch.float64)
    graph.forces = torch.full((len(atoms), 3), force, dtype=torch.float64)
    graph.stress = torch.full((1, 3, 3), stress, dtype=torch.float64)
    return graph


def mixed() -> list[AtomicGraph]:
    """A crystal, molecules and a lone atom, each lacking other labels."""
    copper = bulk("Cu", cubic=True)
    copper.rattle(0.05, seed=0)
    return [
        labelled(copper, energy=1.0, force=0.1, stress=0.01),
        labelled(copper, force=0.2),
        labelled(molecule("H2O"), energy=-3.0),
        labelled(molecule("CH3OH"), force=-0.1, stress=0.3),  # a stress without a cell is no label
        labelled(Atoms("H"), energy=2.0),
    ]


@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
@pytest.mark.parametrize("l2", [False, True])
def test_missing_labels_leave_finite_gradients(kind: str, l2: bool, potential: Potential) -> None:
    potential.train()
    batch = AtomicGraph.collate(mixed())
    objective = Objective.from_config(LossConfig(kind=kind, l2=l2))
    loss = objective(potential, batch, potential(batch, stress=True))
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert max(float(g.abs().max()) for g in gradients) > 0


def test_terms_are_means_over_what_is_labelled() -> None:
    graphs = mixed()
    batch = AtomicGraph.collate(graphs)
    out = {
        "energy": torch.zeros(5, dtype=torch.float64),
        "forces": torch.zeros(len(batch.positions), 3, dtype=torch.float64),
        "stress": torch.where(batch.volume.isnan(), NAN, 0.0)[:, None, None].expand(5, 3, 3),
    }
    terms = Objective.from_config(LossConfig(kind="mse")).terms
    values = {name: float(term(None, batch, out)) for name, term in terms.items()}
    energy = [1 / 4, -3 / 3, 2 / 1]  # per atom
    assert values["energy"] == pytest.approx(np.mean(np.square(energy)))
    forces = [0.1] * 12 + [0.2] * 12 + [-0.1] * 18
    assert values["forces"] == pytest.approx(np.mean(np.square(forces)))
    assert values["stress"] == pytest.approx(1e-4)
    length = Objective.from_config(LossConfig(kind="mae", l2=True)).terms["forces"]
    norms = np.sqrt(3) * np.array([0.1] * 4 + [0.2] * 4 + [0.1] * 6)
    assert float(length(None, batch, out)) == pytest.approx(norms.mean())
    weighted = batch.replace(weight=torch.tensor([2.0, 1, 1, 1, 1], dtype=torch.float64))
    assert float(terms["stress"](None, weighted, out)) == pytest.approx(2e-4)


def test_a_batch_without_labels_costs_nothing(toy: Potential) -> None:
    toy.train()
    batch = AtomicGraph.collate([labelled(molecule("H2O"))])
    loss = Objective.from_config(LossConfig())(toy, batch, toy(batch, stress=True))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in toy.parameters())


def test_penalties() -> None:
    x = torch.tensor([-3.0, 0.0, 0.005, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.allclose(penalty("mse")(x), x**2)
    assert torch.allclose(penalty("mae")(x), x.abs())
    huber = penalty("huber", 0.01)(x)
    assert torch.allclose(huber, torch.nn.functional.huber_loss(x, 0 * x, "none", 0.01) / 0.01)
    (slope,) = torch.autograd.grad(huber.sum(), x)
    assert torch.allclose(slope, torch.tensor([-1.0, 0, 0.5, 1], dtype=torch.float64))


def test_energies_may_have_a_bend_of_their_own(toy: Potential) -> None:
    batch = AtomicGraph.collate([labelled(molecule("H2O"))])
    batch.energy = toy(batch)["energy"] + 3 * 0.005  # 5 meV/atom off
    toy.train()
    out = toy(batch)
    only = {"energy": 1.0, "forces": 0.0, "stress": 0.0}
    wide = Objective.from_config(LossConfig(**only))(toy, batch, out)
    narrow = Objective.from_config(LossConfig(**only, energy_delta=0.001))(toy, batch, out)
    assert float(wide.detach()) == pytest.approx(0.005**2 / 0.02)
    assert float(narrow.detach()) == pytest.approx(0.005 - 0.0005)


def test_the_second_stage_has_its_weights() -> None:
    config = LossConfig.model_validate(
        {"energy": 1, "forces": 10, "stress": 0, "stage_two": {"start": 0.5, "energy": 100}}
    )
    objective = Objective.from_config(config)
    assert objective.at(0.49) == {"energy": 1, "forces": 10, "stress": 0}
    assert objective.at(0.5) == {"energy": 100, "forces": 10, "stress": 0}
    assert not objective.needs_stress
    assert not Objective.from_config(LossConfig(), has_stress=False).needs_stress
