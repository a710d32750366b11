"""The gradient of Facet that is written out is that of the model, to rounding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from mlip import facet_gradient
from mlip.backends import BackendError, accelerated
from mlip.calculators import EqCalculator
from mlip.data.graph import AtomicGraph
from mlip.facet_gradient import AnalyticFacet
from mlip.models import build
from mlip.nn.cohesion import Cohesion
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.radial import BesselWithSlope, bessel, polynomial_envelope
from mlip.nn.zbl import ZBL
from mlip.potential import Potential
from tests.conftest import rattled, without_zeros

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(channels=8, lmax=2, num_basis=5, hidden=6, message_channels=(6, 4)),
    "medium": dict(channels=8, lmax=3, num_basis=4, hidden=6, message_channels=(5, 3, 2)),
    "deep": dict(channels=6, lmax=1, num_layers=3, hidden=6, message_channels=(4,), stretch=0.0),
    "one layer": dict(channels=6, lmax=2, num_layers=1, hidden=6, message_channels=(4, 3, 2)),
}


def potential_of(name: str, elements: tuple[int, ...]) -> Potential:
    torch.manual_seed(0)
    model = build("facet", cutoff=4.0, **SIZES[name])
    without_zeros(model, 0.3)
    e0 = torch.full((119,), torch.nan)
    e0[list(elements)] = 0.0
    return Potential(model, e0).double().eval()


def structures() -> list[Atoms]:
    pair_and_single = Atoms("CH2", positions=[[0, 0, 0], [1.1, 0, 0], [50, 0, 0]])
    many = rattled(bulk("NaCl", "rocksalt", a=5.6) * (3, 3, 2), 0.2)
    return [
        rattled(molecule("CH3CH2OH"), 0.1),
        rattled(bulk("Cu", "fcc", a=3.6), 0.0),
        rattled(fcc111("Cu", (2, 2, 3), vacuum=6.0), 0.1),
        many,
        pair_and_single,
        Atoms("H"),
    ]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("piece", [facet_gradient.PIECE, 40])
def test_it_is_the_gradient_of_the_model(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facet_gradient, "PIECE", piece)
    for elements in ((1, 6, 8, 11, 17, 29), tuple(range(1, 119))):
        plain = potential_of(name, elements)
        fast = plain.with_model(AnalyticFacet(plain.model, plain.elements))
        graphs = [AtomicGraph.from_atoms(atoms, plain.cutoff) for atoms in structures()]
        for graph in [*graphs, AtomicGraph.collate(graphs)]:
            right, found = plain(graph, stress=True), fast(graph, stress=True)
            for key, value in right.items():
                scale = max(1.0, float(value.nan_to_num().abs().max()))
                torch.testing.assert_close(
                    found[key], value, atol=1e-12 * scale, rtol=0, equal_nan=True
                )


def test_priors_are_added() -> None:
    one = potential_of("small", (1, 6, 8))
    cohesion = Cohesion(torch.full((119,), -3.0))
    plain = Potential(one.model, one.e0, 2.0, ZBL().double(), cohesion).eval()
    fast = plain.with_model(AnalyticFacet(plain.model, plain.elements))
    atoms = rattled(molecule("CH3CH2OH"), 0.1)
    atoms.positions *= 0.7
    atoms.set_cell(6 * np.eye(3))
    atoms.pbc = True
    graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
    right, found = plain(graph, stress=True), fast(graph, stress=True)
    for key, value in right.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[key], value, atol=1e-12 * scale, rtol=0)


def test_a_program_gives_no_number_for_an_element_that_it_was_not_made_for() -> None:
    plain = potential_of("small", (1, 6))
    graph = AtomicGraph.from_atoms(molecule("CH3OH"), plain.cutoff)
    hood = gather_neighborhoods(graph.edge_vectors(), graph.edge_index, 6, plain.cutoff)
    neighbors = hood.neighbors.view(hood.vectors.shape[:2])
    energies = [
        AnalyticFacet(plain.model, elements).program()(
            graph.atomic_numbers, hood.vectors, neighbors
        )[0]
        for elements in ((1, 6), (1, 6, 8))
    ]
    assert energies[0].isnan().any() and energies[1].isfinite().all()


def test_weights_of_many_sets_of_elements() -> None:
    plain = potential_of("small", tuple(range(1, 100)))
    fast = plain.with_model(AnalyticFacet(plain.model, plain.elements))
    for z in [*range(1, 40), *range(1, 40)]:
        atoms = molecule("CH3OH")
        atoms.numbers[:2] = z, z + 1
        graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
        torch.testing.assert_close(
            fast(graph)["forces"], plain(graph)["forces"], atol=1e-12, rtol=0
        )
    assert len(fast.model._gradients) == facet_gradient.KEPT


def test_second_derivatives_are_those_of_the_model() -> None:
    plain = potential_of("small", (1, 6, 8))
    atoms = rattled(molecule("CH3OH"), 0.1)
    hessians = [
        EqCalculator(plain, accelerate=way).get_hessian(atoms, method="autograd")
        for way in ("plain", "analytic")
    ]
    np.testing.assert_allclose(hessians[1], hessians[0], atol=1e-11)


def test_it_follows_the_weights_and_can_be_copied_and_pickled() -> None:
    plain = potential_of("small", (14,))
    fast = accelerated(plain, "analytic")
    graph = AtomicGraph.from_atoms(rattled(bulk("Si"), 0.1), plain.cutoff)
    right = plain(graph)["forces"]
    for other in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(other(graph)["forces"], right, atol=1e-12, rtol=0)
    single = copy.deepcopy(fast).float()
    assert single(graph)["features"].dtype == torch.float32
    torch.testing.assert_close(single.double()(graph)["forces"], right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"quartic": True}, {"grid": "mlp"}, {"field": (0, 0, 1.0)}])
def test_other_variants_are_refused(options: dict[str, Any]) -> None:
    model = build("facet", **SIZES["small"], **options)
    potential = Potential(model, torch.zeros(119)).eval()
    with pytest.raises(BackendError, match="grid: poly, without quartic and field"):
        accelerated(potential, "analytic")


@pytest.mark.parametrize("stretch", [0.0, 2.0])
def test_radial_functions_and_slopes(stretch: float) -> None:
    x = torch.linspace(0.05, 1.2, 60, dtype=torch.float64).requires_grad_()
    right = bessel(x, 6, stretch) * polynomial_envelope(x)[:, None]
    found, slope = BesselWithSlope(x, 6, stretch)(x.detach())
    torch.testing.assert_close(found.T, right.detach(), atol=1e-13, rtol=0)
    for n in range(6):
        (g,) = torch.autograd.grad(right[:, n].sum(), x, retain_graph=True)
        torch.testing.assert_close(slope[n], g, atol=1e-11, rtol=0)
