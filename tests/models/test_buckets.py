"""Models whose edges are laid out in buckets give what one padded layout gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from torch.testing import assert_close

from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.nn import buckets
from mlip.potential import Potential
from tests.conftest import rattled, without_zeros

CUTOFF = 3.5
SMALL: dict[str, dict[str, Any]] = {
    "facet": {"channels": 4, "lmax": 2, "hidden": 4, "message_channels": (3, 2)},
    "gaunt": {"channels": 4, "lmax": 2, "hidden": 4, "message_channels": (3, 2)},
}
FRAMES = [
    rattled(fcc111("Cu", (2, 2, 2), vacuum=6.0)),
    Atoms("H"),  # no neighbours at all
    rattled(molecule("CH3CH2OH")),
    rattled(bulk("NaCl", "rocksalt", a=5.5, cubic=True)),
]


def potential(name: str, **options: Any) -> Potential:
    torch.manual_seed(0)
    model = build(name, cutoff=CUTOFF, avg_num_neighbors=10.0, **SMALL[name], **options)
    without_zeros(model, 0.3)
    return Potential(model, torch.zeros(119)).double()


@pytest.mark.parametrize("options", [{}, {"field": (0.1, 0.2, 0.3)}], ids=["", "field"])
@pytest.mark.parametrize("name", SMALL)
def test_buckets_change_nothing(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = potential(name, **options).train()  # so that gradients of forces are compared, too
    graph = AtomicGraph.collate([AtomicGraph.from_atoms(atoms, CUTOFF) for atoms in FRAMES])
    monkeypatch.setattr(buckets, "MAX_PADDING", 0.0)
    results = []
    for saving, expected in ((10**9, 1), (1, buckets.MAX_BUCKETS)):
        monkeypatch.setattr(buckets, "MIN_SAVING", saving)
        parts = buckets.bucket_by_degree(graph.edge_index[1], len(graph.positions)).parts
        assert len(parts) == expected
        out = model(graph, stress=True)
        loss = out["forces"].square().sum() + out["energy"].square().sum()
        slopes = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True,
                                     allow_unused=True)  # fmt: skip
        values = [out[key] for key in ("node_energy", "forces", "stress", "features")]
        results.append([*values, *slopes])
    for a, b in zip(*results, strict=True):
        assert_close(b, a, atol=1e-11, rtol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", SMALL)
def test_atoms_without_any_neighbour(name: str) -> None:
    graph = AtomicGraph.from_atoms(Atoms("HO", positions=[[0, 0, 0], [0, 0, 9.0]]), CUTOFF)
    alone = potential(name).eval()(graph)
    assert alone["forces"].abs().max() == 0 and alone["node_energy"].isfinite().all()
