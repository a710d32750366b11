"""Gaunt tensor products: irreps multiplied as functions on the sphere.

Coefficients x[lm] of degrees up to L are a function x(n) = sum_lm x_lm Y_lm(n).  The product of
functions, projected to degree L', is a sum over Clebsch-Gordan paths

    P_l3m3 = sum  g(l1, l2, l3) CG(l1 m1, l2 m2, l3 m3) U_l1m1 V_l2m2,       l1 + l2 + l3 even

with fixed weights g, the ratio of Gaunt's integral of three harmonics to the Clebsch-Gordan
coefficient.  On a quadrature grid it is a synthesis of each factor, a pointwise product and one
analysis: O(L^4) for each channel, of few matrix products, instead of O(L^5) to O(L^6) over paths.
(The synthesis can be split into a Legendre and a Fourier stage, O(L^3): that needs fewer
operations, and up to L = 6 more time, for its products of matrices are small.)

A product of functions is commutative, so paths with l1 + l2 + l3 odd, as the cross product of two
vectors, are absent.  They are all in the Poisson bracket of functions on the sphere,

    {u, v}(n) = n . (grad u x grad v)

bilinear, antisymmetric, equivariant, of the opposite parity: of two vectors the cross product.

S. Luo, T. Chen, A. S. Krishnapriyan, "Enabling efficient equivariant operations in the Fourier
basis via Gaunt tensor products" (arXiv:2401.10216); on a grid Y. Xie, A. Daigavane, M. Kotak,
T. Smidt, "The price of freedom" (arXiv:2506.13523).  The published form in a Fourier basis, and
e3nn's, are in ``mlip.nn.gaunt_reference``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.sphere_grid import fewest_nodes
from mlip.nn.spherical import SphericalHarmonics

CHUNK_BYTES = 1 << 18  # of grid values: a few such buffers stay in a core's cache

Operation = Callable[[list[Tensor]], Tensor]  # values at points of the factors of a term -> of it
Term = tuple[int, ...]  # which functions are multiplied
Plan = tuple[
    tuple[int, dict[Term, int]], ...
]  # of each output: components, terms and their factors


def pointwise_product(values: list[Tensor]) -> Tensor:
    """u v ... at each point."""
    return reduce(torch.mul, values)


def pointwise_bracket(values: list[Tensor]) -> Tensor:
    """{u, v} = d1 u d2 v - d2 u d1 v, slopes (2 P, columns) along two tangents -> (P, columns)."""
    (u1, u2), (v1, v2) = (x.chunk(2) for x in values)
    return torch.addcmul(u1 * v2, u2, v1, value=-1)


class _SphereOperation(nn.Module):
    """Terms of functions on the sphere, summed at the points of a grid and projected."""

    operation: Operation

    def __init__(
        self,
        lmax_in: Sequence[int],
        outputs: Sequence[tuple[int, Sequence[Term]]],
        degree: int | None,
    ) -> None:
        super().__init__()
        self.sizes = [(l + 1) ** 2 for l in lmax_in]
        if any(len(term) < 2 for _, terms in outputs for term in terms):
            raise ValueError("a term needs two factors or more; one alone needs no grid")
        self.plan: Plan = tuple(((l + 1) ** 2, Counter(terms)) for l, terms in outputs)
        if degree is None:
            degree = max(
                l + sum(lmax_in[k] for k in term) for l, terms in outputs for term in terms
            )
        points, weights = (torch.from_numpy(x) for x in fewest_nodes(degree))
        Y = SphericalHarmonics(max([*lmax_in, *(l for l, _ in outputs)])).double()(points)
        self.to_grid = Constant(self.matrix(points, Y))
        self.from_grid = Constant((Y * weights[:, None]).T.contiguous())  # (LM, P)

    @staticmethod
    def matrix(points: Tensor, Y: Tensor) -> Tensor:
        """From coefficients to what is multiplied at the points: (P, LM)."""
        return Y

    def results(self, functions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(LM_k, N, C) coefficients of each function -> (LM, N, C) of each output."""
        given = [len(x) for x in functions]
        if given != self.sizes:
            raise ValueError(f"the functions have {given} components instead of {self.sizes}")
        matrices = self.to_grid(), self.from_grid()
        operation = type(self).operation
        found: tuple[Tensor, ...] = _OnGrid.apply(operation, self.plan, *matrices, *functions)
        return found


class GauntPolynomial(_SphereOperation):
    """Sums of products of functions on the sphere, each projected to a degree.

    Parameters
    ----------
    lmax_in : largest degree of each function
    outputs : for each result its largest degree and its terms, tuples of the functions' numbers;
        ``[(1, [(0, 1)]), (2, [(0, 1, 2), (0, 0, 0)])]`` is U V to degree 1 and U V W + U^3 to 2
    degree : exactness of the grid; null: what makes all results exact
    """

    operation = staticmethod(pointwise_product)

    def __init__(
        self,
        lmax_in: Sequence[int],
        outputs: Sequence[tuple[int, Sequence[Term]]],
        degree: int | None = None,
    ) -> None:
        super().__init__(lmax_in, outputs, degree)

    def forward(self, *functions: Tensor) -> tuple[Tensor, ...]:
        """(LM_k, N, C) coefficients of each function -> (LM, N, C) of each output."""
        return self.results(functions)


class GauntProduct(_SphereOperation):
    """Product of two or more functions on the sphere, projected to a degree.

    Parameters
    ----------
    lmax_in : largest degree of each factor
    lmax_out : largest degree of the product
    degree : exactness of the grid; null: the sum of the above, with which the product is exact
    """

    operation = staticmethod(pointwise_product)

    def __init__(self, lmax_in: Sequence[int], lmax_out: int, degree: int | None = None) -> None:
        super().__init__(lmax_in, [(lmax_out, [tuple(range(len(lmax_in)))])], degree)

    def forward(self, *factors: Tensor) -> Tensor:
        """(LM_k, N, C) coefficients of each factor -> (LM, N, C) of the product."""
        return self.results(factors)[0]


class BracketProduct(GauntProduct):
    """Poisson bracket {u, v} = n . (grad u x grad v), projected to a degree; as ``GauntProduct``.

    The paths with l1 + l2 + l3 odd: what ``GauntProduct`` lacks.  Of features of natural parity
    (-1)^l it has the parity -(-1)^l; its bracket with a third is of natural parity again.  Of
    vectors U and V it is sqrt(3) U x V.
    """

    operation = staticmethod(pointwise_bracket)

    def __init__(self, lmax_in: tuple[int, int], lmax_out: int, degree: int | None = None) -> None:
        super().__init__(lmax_in, lmax_out, degree)

    @staticmethod
    def matrix(points: Tensor, Y: Tensor) -> Tensor:
        """Slopes along two tangents: (2 P, LM)."""
        gradient = harmonics_gradient(points, Y.shape[1])  # (P, LM, 3)
        # Two tangents with e1 x e2 = n: {u, v} = d1 u d2 v - d2 u d1 v; radial slopes are no
        # concern of theirs.
        axis = torch.eye(3, dtype=points.dtype)[points.abs().argmin(dim=1)]
        e1 = nn.functional.normalize(torch.linalg.cross(axis, points), dim=1)
        frame = [e1, torch.linalg.cross(points, e1)]
        return torch.cat([(gradient * e[:, None]).sum(-1) for e in frame])


def harmonics_gradient(points: Tensor, components: int) -> Tensor:
    """(P, LM, 3) gradients of the first harmonics, as polynomials in space, at points (P, 3)."""
    with torch.enable_grad():
        r = points.detach().requires_grad_()
        Y = SphericalHarmonics(math.isqrt(components) - 1).double()(r)
        rows = [torch.autograd.grad(y.sum(), r, retain_graph=True)[0] for y in Y.T[1:]]
    return torch.stack([torch.zeros_like(points), *rows], dim=1)


class _OnGrid(torch.autograd.Function):
    """A pointwise polynomial of functions on the grid, in chunks that stay in cache; the values on
    the grid are never stored.

    The mean over the sphere of u_1 ... u_d g is symmetric in its functions, and that of {u, v} g
    antisymmetric in its three.  So the gradient of a term with respect to a factor is again a term,
    of the other factors and of the gradient that comes from above: the derivative of such a
    polynomial is such a polynomial, to any order, and each is one pass over the grid.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        plan: Plan,
        to_grid: Tensor,
        from_grid: Tensor,
        *functions: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.operation, ctx.plan = operation, plan
        ctx.save_for_backward(to_grid, from_grid, *functions)
        ctx.set_materialize_grads(False)
        return tuple(evaluate(operation, plan, to_grid, from_grid, functions))

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        to_grid, from_grid, *functions = ctx.saved_tensors
        place, given = {}, list(functions)
        for o, G in enumerate(above):
            if G is not None:
                place[o] = len(given)
                given.append(G)
        wanted, plan = [], []
        for k in range(len(functions)):
            terms: Counter[Term] = Counter()
            for o in place:
                for term, times in ctx.plan[o][1].items():
                    for n in range(len(term)):
                        if term[n] == k:
                            # Cyclic order, which matters for brackets: {V, G} for U, {G, U} for V.
                            new = (*term[n + 1 :], place[o], *term[:n])
                            if ctx.operation is pointwise_product:
                                new = tuple(sorted(new))
                            terms[new] += times
            if terms and ctx.needs_input_grad[4 + k]:
                wanted.append(k)
                plan.append((len(functions[k]), terms))
        gradients: list[Tensor | None] = [None] * len(functions)
        if not plan:
            return None, None, None, None, *gradients
        results = _OnGrid.apply(ctx.operation, tuple(plan), to_grid, from_grid, *given)
        for k, result in zip(wanted, results, strict=True):
            gradients[k] = result
        return None, None, None, None, *gradients


def evaluate(
    operation: Operation,
    plan: Plan,
    to_grid: Tensor,
    from_grid: Tensor,
    functions: Sequence[Tensor],
) -> list[Tensor]:
    """Functions (LM_k, N, C) -> the outputs of the plan; each function is evaluated once."""
    flat = [f.reshape(f.shape[0], -1) for f in functions]  # (LM_k, N C)
    columns = flat[0].shape[1]
    step = columns
    if flat[0].device.type == "cpu" and not isinstance(columns, torch.SymInt):
        step = max(CHUNK_BYTES // (to_grid.shape[0] * flat[0].element_size()), 64)
    used = {k for _, terms in plan for term in terms for k in term}
    there = {k: to_grid[:, : flat[k].shape[0]] for k in used}
    back = [from_grid[:size] for size, _ in plan]

    def projected(chunk: Sequence[Tensor]) -> Iterator[Tensor]:
        values = {k: matrix @ chunk[k] for k, matrix in there.items()}  # (P, step)
        for matrix, (_, terms) in zip(back, plan, strict=True):
            (term, times), *others = terms.items()
            total = operation([values[k] for k in term])
            if times != 1:
                total.mul_(times)
            for term, times in others:
                total.add_(operation([values[k] for k in term]), alpha=times)
            yield matrix @ total

    if step >= columns:
        results = list(projected(flat))
    else:
        results = [flat[0].new_empty(size, columns) for size, _ in plan]
        for start in range(0, columns, step):
            part = slice(start, start + step)
            found = projected([f[:, part] for f in flat])
            for result, value in zip(results, found, strict=True):
                result[:, part] = value
    return [result.view(result.shape[0], *functions[0].shape[1:]) for result in results]
