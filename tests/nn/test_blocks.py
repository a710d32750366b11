"""Laws of the leaf blocks: harmonics, quadrature, radial functions, neighbourhoods, repulsion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from e3nn import o3

from mlip.data.graph import AtomicGraph
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.radial import bessel, polynomial_envelope
from mlip.nn.sphere_grid import SphereGrid
from mlip.nn.spherical import SphericalHarmonics, degree_of_component
from mlip.nn.zbl import ZBL

F64 = torch.float64


def directions(n: int, seed: int = 0) -> torch.Tensor:
    v = torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("lmax", range(7))
def test_harmonics_agree_with_e3nn(lmax: int) -> None:
    r = directions(50)
    ours = SphericalHarmonics(lmax).double()(r)
    theirs = o3.spherical_harmonics(list(range(lmax + 1)), r, False, normalization="component")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    squares = torch.zeros(50, lmax + 1, dtype=F64).index_add(1, degree_of_component(lmax), ours**2)
    torch.testing.assert_close(
        squares, (2 * torch.arange(lmax + 1.0, dtype=F64) + 1).expand(50, -1)
    )


@pytest.mark.parametrize("lmax", range(5))
def test_derivatives_of_harmonics(lmax: int) -> None:
    r = 1.3 * directions(3).requires_grad_()  # of any length
    harmonics = SphericalHarmonics(lmax).double()
    assert torch.autograd.gradcheck(harmonics, (r,))
    assert torch.autograd.gradgradcheck(harmonics, (r,))


@pytest.mark.parametrize(("lmax", "degree"), [(1, 2), (2, 4), (3, 6), (3, 9), (4, 12)])
def test_grid_is_orthonormal_up_to_its_degree(lmax: int, degree: int) -> None:
    grid = SphereGrid(lmax, degree).double()
    unit = grid.from_grid() @ grid.to_grid()
    torch.testing.assert_close(unit, torch.eye((lmax + 1) ** 2, dtype=F64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("stretch", [0.0, 2.0])
def test_bessel_functions_are_orthonormal_and_finite_at_zero(stretch: float) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(60)
    x = torch.from_numpy((nodes + 1) / 2)
    B = bessel(x, 8, stretch)
    overlap = (B * (torch.from_numpy(weights) / 2 * x**2)[:, None]).T @ B
    torch.testing.assert_close(overlap, torch.eye(8, dtype=F64), rtol=0, atol=1e-10)
    at_zero = bessel(torch.zeros(1, dtype=F64), 3, stretch)[0]
    slopes = math.sqrt(2) * math.pi * torch.arange(1.0, 4.0, dtype=F64)
    torch.testing.assert_close(at_zero, (1 + stretch) ** 1.5 * slopes)


def test_envelope_vanishes_with_two_derivatives() -> None:
    x = torch.tensor([1.0 - 1e-6, 1.0, 1.5], dtype=F64, requires_grad=True)
    f = polynomial_envelope(x)
    (first,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert f.abs().max() < 1e-14 and first.abs().max() < 1e-8 and second.abs().max() < 1e-3
    assert polynomial_envelope(torch.zeros(1)) == 1


def test_neighborhoods_hold_every_edge_once() -> None:
    i = torch.tensor([0, 0, 2, 2, 2])
    j = torch.tensor([2, 1, 0, 1, 2])
    vectors = torch.arange(15, dtype=F64).view(5, 3)
    hood = gather_neighborhoods(vectors, torch.stack([j, i]), 4, cutoff=9.0)
    assert hood.vectors.shape == (4, 3, 3)
    torch.testing.assert_close(hood.vectors[2], vectors[2:])
    torch.testing.assert_close(hood.vectors[0, :2], vectors[:2])
    assert (hood.vectors[[1, 3]].norm(dim=-1) == 9.0).all() and hood.vectors[0, 2].norm() == 9.0
    assert hood.neighbors.view(4, 3)[2].tolist() == [0, 1, 2]
    empty = gather_neighborhoods(vectors[:0], torch.zeros(2, 0, dtype=torch.int64), 2, cutoff=3.0)
    assert empty.vectors.shape == (2, 1, 3)


def test_nuclear_repulsion() -> None:
    """The published value of two carbon atoms at 0.5 angstrom, and nothing beyond the bond."""
    zbl = ZBL()

    def energy(r: float) -> float:
        graph = AtomicGraph.from_atoms(Atoms("C2", positions=[[0, 0, 0], [0, 0, r]]), 3.0)
        return float(zbl(graph.replace(vectors=graph.edge_vectors())).sum())

    a = 0.8854 * 0.529177 / (2 * 6**0.23)
    x = 0.2 / a
    phi = sum(
        c * math.exp(-d * x)
        for c, d in ((0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162))
    )
    unfaded = 14.39964 * 36 / 0.2 * phi
    assert abs(energy(0.2) / unfaded - float(polynomial_envelope(torch.tensor(0.2 / 1.52)))) < 1e-4
    values = [energy(r) for r in np.arange(0.2, 1.52, 0.02)]
    assert all(np.diff(values) < 0)
    assert energy(1.53) == 0
