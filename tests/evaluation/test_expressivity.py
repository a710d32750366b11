"""Pairs of environments with equal few-body correlations, and which models tell them apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.evaluation.expressivity import (
    EnvironmentPair,
    correlations,
    environment_pairs,
    tell_apart,
    with_random_weights,
)
from mlip.models import build
from mlip.nn.spherical import SphericalHarmonics, clebsch_gordan
from mlip.potential import Potential
from mlip.training.sizes import SIZES
from mlip.wrappers import wrap

PAIRS = environment_pairs()
# Bodies that one layer of a model correlates at a centre; two layers of each tell all pairs apart.
ORDER = {"facet": 4, "facet quartic": 5, "escaip": 5, "gaunt": 4, "mace": 4, "ponita": 3}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.bodies} bodies")
def test_the_correlations_of_a_pair_agree_up_to_its_order(pair: EnvironmentPair) -> None:
    for bodies in range(2, pair.bodies + 1):
        for seed in range(3):
            a, b = (correlations(x, bodies, seed) for x in (pair.first, pair.second))
            assert np.abs(a - b).max() < 1e-13
    a, b = (correlations(x, pair.bodies + 1) for x in (pair.first, pair.second))
    assert np.abs(a - b).max() > 0.1


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.bodies} bodies")
def test_no_rotation_or_reflection_maps_one_onto_the_other(pair: EnvironmentPair) -> None:
    """For no numbering of the neighbours are the Gram matrices the same."""
    A, B = (x @ x.T for x in (pair.first, pair.second))
    orders = (np.array(order) for order in itertools.permutations(range(len(A))))
    assert min(np.abs(A - B[np.ix_(order, order)]).max() for order in orders) > 0.1


def test_correlations_do_not_see_pose_and_numbering() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3))
    moved = x[[3, 1, 4, 0, 2]] @ -Rotation.random(random_state=1).as_matrix().T
    for bodies in (2, 3, 4, 5):
        assert np.abs(correlations(x, bodies) - correlations(moved, bodies)).max() < 1e-13


class Spectrum(torch.nn.Module):
    """Energies from densities on the sphere: of 2 bodies (sums), 3 (power spectrum), 4 (their
    products); a model of known order to test the test."""

    exact_symmetry = True

    def __init__(self, bodies: int) -> None:
        super().__init__()
        self.bodies, self.receptive_field = bodies, 5.0
        self.config = type("Config", (), {"cutoff": 5.0})()
        self.harmonics = SphericalHarmonics(4)
        self.exponent = torch.nn.Parameter(torch.tensor([0.4, 0.9, 1.7]))

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        r = graph.vectors.norm(dim=1, keepdim=True)
        Y = self.harmonics(graph.vectors / r)  # (E, LM)
        f = torch.exp(-self.exponent * r)  # (E, 3)
        A = f.new_zeros(len(graph.atomic_numbers), 25, 3)
        A = A.index_add(0, graph.edge_index[1], Y[:, :, None] * f[:, None])
        if self.bodies == 2:
            return NodeOutput(A[:, 0].sum(1))
        power = torch.stack([A[:, l * l : (l + 1) ** 2].square().sum(1) for l in range(5)], 1)
        if self.bodies == 3:
            return NodeOutput((power * torch.linspace(0.3, 1, 5)[:, None]).sum((1, 2)))
        # Of the products of three densities one suffices, degrees 1, 2 and 1.
        product = torch.einsum("nac,nbc,ndc->nabd", A[:, 1:4], A[:, 4:9], A[:, 1:4])
        return NodeOutput((product * clebsch_gordan(1, 2, 1)).sum((1, 2, 3)))


@pytest.mark.parametrize("bodies", [2, 3, 4])
def test_a_descriptor_of_few_bodies_cannot_tell(bodies: int) -> None:
    potential = Potential(Spectrum(bodies), torch.zeros(119)).double().eval()
    for told in tell_apart(potential):
        if told.bodies >= bodies:
            assert told.center < 1e-12
        elif told.bodies == bodies - 1:
            assert told.center > 1e-4


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_tells_apart_what_its_order_promises(name: str, depth: int) -> None:
    torch.manual_seed(0)
    kind, _, option = name.partition(" ")
    small = SIZES[kind]["small"]
    narrow = {"channels": 16} if "channels" in small else {}
    options = {**small, **narrow, "num_layers": depth, **({option: True} if option else {})}
    model = build(kind, cutoff=5.0, **options)
    assert model.exact_symmetry
    for told in tell_apart(with_random_weights(model)):
        assert told.whole > 1e-11  # random weights may make many bodies weak; rounding is 1e-15
        if depth == 1 and told.bodies >= ORDER[name]:
            assert told.center < 1e-13
        else:
            assert told.center > 1e-11


def test_a_network_in_local_frames_sees_all_bodies_at_once() -> None:
    torch.manual_seed(0)
    model = build("environment", cutoff=5.0, hidden=16, edge_hidden=8, num_heads=2, num_basis=5)
    for told in tell_apart(with_random_weights(wrap(model, "frame_averaging"))):
        assert told.center > 1e-6
