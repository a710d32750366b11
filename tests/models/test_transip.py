"""What TransIP promises beyond the contract of all models."""

from __future__ import annotations

import pytest
import torch
from ase.build import molecule

from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential
from tests.conftest import rattled, without_zeros

SMALL = dict(hidden=20, num_layers=1, num_heads=2, head_width=4, edge_functions=6, latent=(2, 1))


def test_all_atoms_of_a_molecule_see_each_other() -> None:
    """With one layer, a cutoff beyond the molecule and no graph that passes anything on."""
    torch.manual_seed(0)
    model = build("transip", cutoff=8.0, **SMALL)
    without_zeros(model, 0.1)
    potential = Potential(model, torch.zeros(119)).double().eval()
    graph = AtomicGraph.from_atoms(rattled(molecule("CH3CH2OH")), 8.0)
    assert graph.edge_index.shape[1] == 9 * 8
    moved = []
    for k in range(9):
        positions = graph.positions.clone()
        positions[k] += 0.1
        moved.append(potential(graph.replace(positions=positions))["node_energy"])
    change = (torch.stack(moved) - potential(graph)["node_energy"]).abs()
    assert change.min() > 1e-9


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ({"head_width": 5}, "head_width=5 is odd"),
        ({"latent": (4, 2)}, "no room for latent"),
        ({"latent": (0, 1), "direct_forces": True}, "direct forces are combinations"),
    ],
)
def test_hyperparameters_that_do_not_fit(option: dict[str, object], answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        build("transip", **{**SMALL, **option})
