"""Products on the sphere: against e3nn, against the Fourier form, and by their own laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e3nn import o3
from scipy.spatial.transform import Rotation

from mlip.nn import rotations, sphere_grid
from mlip.nn.aligned_convolution import AlignedConvolution, bond_frames, turn
from mlip.nn.gaunt_product import BracketProduct, GauntPolynomial, GauntProduct
from mlip.nn.gaunt_reference import DenseProduct, FourierProduct, from_e3nn, to_e3nn
from mlip.nn.rotations import wigner_matrices
from mlip.nn.sphere_grid import fewest_nodes, gauss_legendre_nodes
from mlip.nn.spherical import SphericalHarmonics, clebsch_gordan

F64 = torch.float64
LMAXES = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (1, 3, 2), (3, 2, 5), (0, 2, 2), (1, 1, 4), (4, 4, 4)]
LMAXES += [(6, 6, 6)]


@pytest.fixture(autouse=True)
def double() -> object:
    """e3nn rounds its constants to the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def features(*lmaxes: int, shape: tuple[int, ...] = (4, 3), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((l + 1) ** 2, *shape, generator=generator) for l in lmaxes]


def turned(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Features of natural parity under a rotation or reflection."""
    D = wigner_matrices(R[None], int(len(x) ** 0.5) - 1)
    blocks = [torch.einsum("ab,bnc->anc", d[0], x[l * l : (l + 1) ** 2]) for l, d in enumerate(D)]
    return torch.cat(blocks)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("lmaxes", LMAXES)
def test_product_is_that_of_e3nn_and_of_the_fourier_form(lmaxes: tuple[int, int, int]) -> None:
    U, V = features(*lmaxes[:2])
    P = GauntProduct(lmaxes[:2], lmaxes[2]).double()(U, V)
    same(P, DenseProduct(*lmaxes, channels=3)(U, V))
    same(P, FourierProduct(*lmaxes).double()(U, V))


@pytest.mark.parametrize("degree", range(25))
def test_nodes_are_exact_to_their_degree(degree: int) -> None:
    points, weights = (torch.from_numpy(x) for x in fewest_nodes(degree))
    assert len(weights) <= len(gauss_legendre_nodes(degree)[1])
    same(points.norm(dim=1), torch.ones(len(points)), 1e-14)
    Y, other = (SphericalHarmonics(l).double()(points) for l in (degree // 2, (degree + 1) // 2))
    overlap = (Y * weights[:, None]).T @ other
    same(overlap, torch.eye(*overlap.shape), 1e-12)


def test_product_without_the_rules_of_a_new_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(degree: int) -> None:
        raise ImportError

    U, V = features(3, 3)
    lebedev = GauntProduct((3, 3), 3).double()
    monkeypatch.setattr(sphere_grid, "lebedev_nodes", missing)
    gauss = GauntProduct((3, 3), 3).double()
    assert (len(lebedev.to_grid()), len(gauss.to_grid())) == (38, 50)
    same(gauss(U, V), lebedev(U, V), 1e-12)


def test_products_of_many_factors() -> None:
    """A product of three without truncation is the product of two products."""
    U, V, W = features(2, 1, 3)
    pair = GauntProduct((2, 1), 3).double()(U, V)
    triple = GauntProduct((3, 3), 2).double()(pair, W)
    same(GauntProduct((2, 1, 3), 2).double()(U, V, W), triple)
    fourth = GauntProduct((6, 2), 1).double()(GauntProduct((3, 3), 6).double()(pair, W), U)
    same(GauntProduct((2, 1, 3, 2), 1).double()(U, V, W, U), fourth)


def test_polynomial_is_a_sum_of_products() -> None:
    U, V, W = features(2, 2, 1)
    plan = [(1, [(0, 1)]), (2, [(0, 1, 2), (0, 0, 0)])]
    first, second = GauntPolynomial((2, 2, 1), plan).double()(U, V, W)
    same(first, GauntProduct((2, 2), 1).double()(U, V))
    cube = GauntProduct((2, 2, 2), 2).double()(U, U, U)
    same(second, GauntProduct((2, 2, 1), 2).double()(U, V, W) + cube)


@pytest.mark.parametrize("columns", [(0, 3), (1, 1), (200, 64)])
def test_chunks_do_not_matter(columns: tuple[int, int]) -> None:
    U, V = features(3, 3, shape=columns)
    product = GauntProduct((3, 3), 3).double()
    grid = [torch.tensordot(product.to_grid(), x, 1) for x in (U, V)]
    same(product(U, V), torch.tensordot(product.from_grid(), grid[0] * grid[1], 1), 1e-11)


def test_derivatives_to_second_order() -> None:
    polynomial = GauntPolynomial((2, 1, 1), [(1, [(0, 1)]), (2, [(0, 1, 2), (1, 1)])]).double()
    bracket = BracketProduct((2, 1), 2).double()
    for operation, lmaxes in ((polynomial, (2, 1, 1)), (bracket, (2, 1))):
        inputs = [x.requires_grad_() for x in features(*lmaxes, shape=(1, 2))]
        assert torch.autograd.gradcheck(operation, inputs)
        assert torch.autograd.gradgradcheck(operation, inputs)


def test_derivative_by_one_factor_alone() -> None:
    U, V = features(2, 2)
    product = GauntProduct((2, 2), 2).double()
    (gradient,) = torch.autograd.grad(product(U, V.requires_grad_()).square().sum(), V)
    same(gradient, 2 * product(U, product(U, V).detach()).detach())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["product", "bracket"])
def test_equivariance(kind: str, sign: int) -> None:
    """The bracket of features of natural parity is of the other parity: an axial vector keeps its
    sign under inversion."""
    R = sign * torch.from_numpy(Rotation.random(random_state=1).as_matrix())
    U, V = features(3, 2)
    operation = (BracketProduct if kind == "bracket" else GauntProduct)((3, 2), 4).double()
    expected = turned(operation(U, V), R) * (sign if kind == "bracket" else 1)
    same(operation(turned(U, R), turned(V, R)), expected)


def test_bracket_of_vectors_is_the_cross_product() -> None:
    U, V = features(1, 1)
    U[0] = V[0] = 5.0  # functions that are constant have no gradient
    bracket = BracketProduct((1, 1), 1).double()(U, V)
    same(bracket[1:], 3**0.5 * torch.linalg.cross(U[1:], V[1:], dim=0))
    same(bracket[0], torch.zeros(4, 3))


def test_bracket_has_exactly_the_paths_that_the_product_lacks() -> None:
    """All triples of odd sum that a triangle allows, each a multiple of CG; none of even sum."""
    bracket, product = (kind((4, 4), 4).double() for kind in (BracketProduct, GauntProduct))
    for a in range(5):
        for b in range(5):
            U, V = (x * 0 for x in features(4, 4, shape=(1, 1)))
            generator = torch.Generator().manual_seed(a + 7 * b)
            U[a * a : (a + 1) ** 2] = torch.randn(2 * a + 1, 1, 1, generator=generator)
            V[b * b : (b + 1) ** 2] = torch.randn(2 * b + 1, 1, 1, generator=generator)
            for operation, odd in ((bracket, 1), (product, 0)):
                result = operation(U, V)[:, 0, 0]
                for c in range(5):
                    part = result[c * c : (c + 1) ** 2]
                    if abs(a - b) <= c <= a + b and (a + b + c) % 2 == odd:
                        CG = clebsch_gordan(a, b, c)
                        u, v = U[a * a : (a + 1) ** 2, 0, 0], V[b * b : (b + 1) ** 2, 0, 0]
                        coupled = torch.einsum("ijk,i,j->k", CG, u, v)
                        ratio = part @ coupled / (coupled @ coupled)
                        assert abs(ratio) > 0.1
                        same(part, ratio * coupled)
                    else:
                        same(part, torch.zeros_like(part), 1e-12)


def test_jacobi_identity() -> None:
    """{u, {v, w}} + {v, {w, u}} + {w, {u, v}} = 0, where no bracket is truncated."""
    functions = features(1, 2, 2)
    inner, outer = 3, 4
    total = torch.zeros((outer + 1) ** 2, 4, 3)
    for k in range(3):
        u, v, w = (functions[(k + n) % 3] for n in range(3))
        l = [int(len(x) ** 0.5) - 1 for x in (u, v, w)]
        pair = BracketProduct((l[1], l[2]), inner).double()(v, w)
        total += BracketProduct((l[0], inner), outer).double()(u, pair)
    same(total, torch.zeros_like(total))


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[9, 4\] components instead of \[9, 9\]"):
        GauntProduct((2, 2), 2).double()(*features(2, 1))


def directions() -> torch.Tensor:
    r = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    r[:6] = torch.tensor(
        [[0, 1, 0], [0, -1, 0], [1, 0, 0], [0, 0, -1], [1, 1e-9, 0], [1, -1e-9, 0]]
    )
    return r / r.norm(dim=1, keepdim=True)


def test_frames_turn_bonds_to_the_pole() -> None:
    r = directions().requires_grad_()
    frames = bond_frames(r, 4)
    Y = turn(SphericalHarmonics(4).double()(r)[..., None], frames, 4)[..., 0]
    pole = SphericalHarmonics(4).double()(torch.tensor([0.0, 1.0, 0.0]))
    same(Y, pole.expand_as(Y), 1e-13)
    for D in frames:
        same(D @ D.mT, torch.eye(D.shape[1]).expand_as(D), 1e-13)
    (gradient,) = torch.autograd.grad(sum(D.square().sum() for D in frames), r)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("lmaxes", [(2, 2, 2), (1, 3, 2), (3, 2, 4), (0, 2, 2), (4, 4, 4)])
def test_aligned_convolution_is_that_of_e3nn(lmaxes: tuple[int, int, int]) -> None:
    """``uvu`` with harmonics, numbers and gradients with respect to the bond."""
    channels, top = 3, max(lmaxes)
    generator = torch.Generator().manual_seed(0)
    aligned = AlignedConvolution(*lmaxes).double()
    irreps = [
        o3.Irreps([(n, (l, (-1) ** l)) for l in range(lmax + 1)])
        for n, lmax in zip((channels, 1, channels), lmaxes, strict=True)
    ]
    theirs = o3.TensorProduct(
        *irreps,
        [(*path, "uvu", True) for path in aligned.paths],
        irrep_normalization="none",
        path_normalization="none",
        internal_weights=False,
        shared_weights=False,
    )
    r = directions().requires_grad_()
    h = torch.randn(len(r), (lmaxes[0] + 1) ** 2, channels, generator=generator)
    w = torch.randn(len(r), len(aligned.paths), channels, generator=generator)
    unit = r / r.norm(dim=1, keepdim=True)
    a = aligned(h, w, bond_frames(unit, top))
    Y = SphericalHarmonics(lmaxes[1]).double()(unit)
    b = from_e3nn(theirs(to_e3nn(h.transpose(0, 1)), Y, w.flatten(1)), channels).transpose(0, 1)
    same(a, b)
    cotangent = torch.randn(a.shape, generator=generator)
    gradients = [
        torch.autograd.grad((x * cotangent).sum(), r, retain_graph=True)[0] for x in (a, b)
    ]
    same(*gradients)


def test_lebedev_nodes_are_those_of_the_rotations() -> None:
    points, weights = rotations.lebedev_nodes(9)
    assert points.shape == (38, 3) and np.isclose(weights.sum(), 1, atol=1e-14)
    with pytest.raises(ValueError, match="no Lebedev rule of degree 8"):
        rotations.lebedev_nodes(8)
