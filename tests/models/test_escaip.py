"""What EScAIP promises beyond the contract of all models: buckets, fused attention, angles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.nn import buckets
from mlip.nn.neighborhoods import reversed_edges
from mlip.potential import Potential
from tests.conftest import rattled, without_zeros

SMALL: dict[str, Any] = dict(
    cutoff=4.0, hidden=12, node_hidden=16, num_heads=2, angular_channels=(3, 2, 1), num_basis=5
)


def make(seed: int = 0, **hyperparameters: Any) -> Potential:
    torch.manual_seed(seed)
    model = build("escaip", **{**SMALL, **hyperparameters})
    without_zeros(model, 0.1)
    return Potential(model, torch.zeros(119), scale=2.0).double().eval()


def graph(*structures: Atoms) -> AtomicGraph:
    return AtomicGraph.collate([AtomicGraph.from_atoms(a, 4.0) for a in structures])


def close(a: Any, b: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=tolerance, equal_nan=True
    )


ETHANOL, SALT = rattled(molecule("CH3CH2OH")), rattled(bulk("NaCl", "rocksalt", a=5.5, cubic=True))
SLAB, WATER = rattled(fcc111("Cu", (2, 2, 2), vacuum=6.0)), rattled(molecule("H2O"))


@pytest.mark.parametrize("option", [{}, {"graph": "soft_knn", "max_neighbors": 5}])
def test_buckets_change_nothing(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    potential, g = make(**option), graph(SLAB, WATER, ETHANOL, SALT)
    results = []
    for saving, expected in ((10**9, 1), (1, buckets.MAX_BUCKETS)):
        monkeypatch.setattr(buckets, "MIN_SAVING", saving)
        monkeypatch.setattr(buckets, "MAX_PADDING", 0.0)
        assert len(buckets.bucket_by_degree(g.edge_index[1], len(g.positions)).parts) == expected
        results.append(potential(g, stress=True))
    for key in ("node_energy", "forces", "stress", "features"):
        close(results[1][key], results[0][key], 1e-11)


def test_training_and_inference_give_the_same_numbers() -> None:
    """Plain attention there, the fused kernel here."""
    potential, g = make(), graph(ETHANOL, SALT)
    fused = potential(g, stress=True)
    plain = potential.train()(g, stress=True)
    for key in ("energy", "forces", "stress"):
        close(plain[key].detach(), fused[key], 1e-11)


def test_reversed_edges() -> None:
    tiny = Atoms("Cu", positions=[[7.0, -3.0, 11.0]], cell=[2.2, 2.3, 2.4], pbc=True)
    for g in (graph(SALT, ETHANOL, tiny), graph(Atoms("C"))):
        j, i = g.edge_index
        back = reversed_edges(g)
        assert torch.equal(j[back], i) and torch.equal(i[back], j)
        close(g.edge_vectors()[back], -g.edge_vectors(), 1e-13)
    g = graph(ETHANOL)
    lonely = g.replace(edge_index=g.edge_index[:, 1:], cell_shifts=g.cell_shifts[1:])
    assert (reversed_edges(lonely) == len(lonely.cell_shifts)).sum() == 1
    far = g.replace(cell_shifts=g.cell_shifts + 10**7)
    with pytest.raises(ValueError, match="wrap the atoms"):
        reversed_edges(far)


def test_angles_matter() -> None:
    """Two trimers with the same distances from the centre, beyond each other's reach."""
    energies = []
    for angle in (1.8, 2.4):
        ends = [[2.6, 0, 0], [2.6 * np.cos(angle), 2.6 * np.sin(angle), 0]]
        trimer = Atoms("OHH", positions=[[0, 0, 0], *ends])
        assert trimer.get_distance(1, 2) > 4.0
        energies.append(make()(graph(trimer))["energy"].item())
    assert abs(energies[0] - energies[1]) > 1e-6


def test_soft_choice_ends_with_the_nearest() -> None:
    """In a dense crystal only about ``max_neighbors`` have weight; none beyond the cutoff has."""
    g = graph(rattled(bulk("Cu", cubic=True)))
    g = g.replace(vectors=g.edge_vectors())
    (all_of_them,) = make().model.neighborhoods(g)[1]
    (chosen,) = make(graph="soft_knn", max_neighbors=4).model.neighborhoods(g)[1]
    count = (chosen.fade[:, 1:] > 0).sum(dim=1)
    assert (count <= 8).all() and (count < (all_of_them.fade[:, 1:] > 0).sum(dim=1)).all()
    assert (chosen.fade[:, 0] == 1).all()
