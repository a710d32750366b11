"""The symmetric contraction against its definition, term by term."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from mlip.nn.rotations import wigner_matrices
from mlip.nn.symmetric_contraction import (
    SymmetricContraction,
    connected_parts,
    coupled_products,
    signed_clebsch_gordan,
    symmetric_couplings,
)

F64 = dict(dtype=torch.float64)


def definition(plan: SymmetricContraction, A: Tensor, element: Tensor) -> Tensor:
    """sum_nu sum_k W U A ... A, one order after the other."""
    out = []
    for L, weight in enumerate(plan.weights):
        start, total = 0, torch.zeros(2 * L + 1, *A.shape[1:], **F64)
        for order in range(1, plan.correlation + 1):
            U = symmetric_couplings(plan.lmax, L, order, reduced=plan.reduced)
            W = weight[element, start : start + len(U)]  # (N, K, C)
            start += len(U)
            letters = "abd"[:order]
            factors = ",".join(f"{x}nc" for x in letters)
            total = total + torch.einsum(f"kw{letters},nkc,{factors}->wnc", U, W, *[A] * order)
        assert start == weight.shape[1]
        out.append(total)
    return torch.cat(out)


def make(correlation: int, lmax_out: int, reduced: bool = False) -> SymmetricContraction:
    torch.manual_seed(0)
    return SymmetricContraction(2, lmax_out, correlation, 3, 4, reduced=reduced).double()


ELEMENTS, SIZES = torch.tensor([0, 2, 3]), [2, 1, 3]  # element 1 does not occur
CASES = [(1, 1, False), (2, 2, False), (3, 0, True), (3, 1, False), (3, 2, True)]


@pytest.mark.parametrize(("correlation", "lmax_out", "reduced"), CASES)
def test_it_is_the_sum_of_all_products(correlation: int, lmax_out: int, reduced: bool) -> None:
    plan = make(correlation, lmax_out, reduced)
    A = torch.randn(9, 6, 3, **F64)
    element = ELEMENTS.repeat_interleave(torch.tensor(SIZES))
    torch.testing.assert_close(
        plan(A, ELEMENTS, SIZES), definition(plan, A, element), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("correlation", [1, 2, 3])
def test_first_and_second_derivatives(correlation: int) -> None:
    """Against finite differences: derivatives of the energy, and of forces by weights."""
    plan = make(correlation, 1)
    A = torch.randn(9, 6, 3, **F64, requires_grad=True)

    def value(A: Tensor, *weights: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, given in zip(plan.weights, weights, strict=True):
                mine.copy_(given)
        made = dict(plan.named_parameters())
        named = dict(zip(made, weights, strict=True))
        return torch.func.functional_call(plan, named, (A, ELEMENTS, SIZES)).sum(1)

    weights = [w.detach().clone().requires_grad_() for w in plan.weights]
    assert torch.autograd.gradcheck(value, (A, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (A, *weights), fast_mode=True)


def test_forces_do_not_compute_gradients_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(3, 1)
    A = torch.randn(9, 6, 3, **F64, requires_grad=True)
    called = []
    monkeypatch.setattr(SymmetricContraction, "back_to_coefficients", lambda *_: called.append(1))
    torch.autograd.grad(plan(A, ELEMENTS, SIZES).sum(), A, create_graph=True)
    assert not called


@pytest.mark.parametrize("order", [2, 3])
def test_couplings_are_equivariant_and_symmetric(order: int) -> None:
    R = torch.from_numpy(Rotation.random(random_state=1).as_matrix())[None]
    D = [d[0] for d in wigner_matrices(-R, 2)]  # improper: parity counts
    D = [D[l] * (1 if torch.det(D[l]) * (-1) ** l > 0 else -1) for l in range(3)]
    full = torch.block_diag(*D)
    for L in range(3):
        U = symmetric_couplings(2, L, order, reduced=False)
        turned = U
        for _ in range(order):
            turned = torch.tensordot(turned, full, ([2], [1]))  # each goes to the end in turn
        turned = torch.einsum("wv,kv...->kw...", D[L], turned)
        torch.testing.assert_close(turned, U, rtol=0, atol=1e-12)
        for way in permutations(range(order)):
            torch.testing.assert_close(U.permute(0, 1, *(2 + k for k in way)), U)


def test_reduced_couplings_span_the_same_functions() -> None:
    for L in range(3):
        every = symmetric_couplings(3, L, 3, reduced=False).flatten(1)
        basis = symmetric_couplings(3, L, 3, reduced=True).flatten(1)
        assert len(basis) == torch.linalg.matrix_rank(every) < len(every)
        both = torch.cat([every, basis])
        assert torch.linalg.matrix_rank(both) == len(basis)
        gram = basis @ basis.T / (2 * L + 1)
        torch.testing.assert_close(gram, torch.eye(len(basis), **F64), rtol=0, atol=1e-12)


def test_numbers_of_paths_are_the_published_ones() -> None:
    """mace-torch has, for harmonics up to degree 3, 23 products of three to a scalar."""
    assert [len(symmetric_couplings(3, 0, order, reduced=False)) for order in (1, 2, 3)] == [
        1,
        4,
        23,
    ]
    assert [len(symmetric_couplings(3, 1, order, reduced=False)) for order in (1, 2)] == [1, 6]


def test_the_sign_of_odd_couplings_is_our_own() -> None:
    """The first coefficient that is not zero is positive for l1 <= l2 <= l3, and the sign of a
    permutation is that of the antisymmetric tensor."""
    epsilon = signed_clebsch_gordan(1, 1, 1) * math.sqrt(6)
    assert epsilon[0, 1, 2].item() == pytest.approx(1)
    for l1, l2, l3 in [(1, 2, 2), (2, 2, 3), (1, 3, 3), (2, 3, 4)]:
        C = signed_clebsch_gordan(l1, l2, l3)
        flat = C.flatten()
        assert flat[flat.abs() > 1e-9][0] > 0
        swapped = signed_clebsch_gordan(l2, l1, l3).transpose(0, 1)
        torch.testing.assert_close(swapped, -C, rtol=0, atol=1e-14)


def test_connected_parts() -> None:
    pattern = torch.zeros(5, 6, dtype=torch.bool)
    pattern[[0, 0, 3, 1, 1], [0, 2, 2, 4, 5]] = True
    assert connected_parts(pattern) == [([0, 3], [0, 2]), ([1], [4, 5])]


def test_products_fall_into_classes_of_mirror_symmetry() -> None:
    """Eight, by the signs under x -> -x, y -> -y, z -> -z: what makes it cheap."""
    assert len(make(3, 1).parts) == 8
    assert len(coupled_products(2, 1)) == 3


def test_wrong_order_is_refused() -> None:
    with pytest.raises(ValueError, match="1, 2 or 3"):
        SymmetricContraction(2, 0, 4, 1, 1)
