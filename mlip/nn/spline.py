"""Costly functions of one variable as a table: splines of degree five, with their derivatives.

On each of n equal intervals of [0, 1] a polynomial that has the values and the first two
derivatives of the functions at both ends.  What is differentiated is the spline itself, so forces
stay exactly the gradient of the energy, and second derivatives are continuous.  The error falls as
n^-6.  On the first interval, where no atoms are and Bessel functions have no numerical derivatives,
it is the parabola of its right end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant

Functions = Callable[[Tensor], Tensor]  # (M,) float64 -> (M, F)
MAX_INTERVALS = 4096


class Spline(nn.Module):
    """Functions on [0, 1], constant beyond 1.

    x of any shape (...) -> (..., F).

    Parameters
    ----------
    functions : from (M,) float64 to (M, F), twice differentiable
    tolerance : largest error of values and of slopes, relative to the largest of each; the number
        of intervals follows from it

    Raises
    ------
    ValueError
        If ``MAX_INTERVALS`` are too few.
    """

    def __init__(self, functions: Functions, tolerance: float) -> None:
        super().__init__()
        n, error = 32, math.inf
        while not error <= tolerance:
            n *= 2
            if n > MAX_INTERVALS:
                raise ValueError(
                    f"{MAX_INTERVALS} intervals leave an error of {error:.1e}, not "
                    f"{tolerance:.1e}: the functions are not smooth"
                )
            table = coefficients(functions, n)
            error = interpolation_error(functions, table)
        self.num_functions = table.shape[2]
        self.table = Constant(table)  # (n + 1, 6, F), of t = n x - k on interval k
        self.rules = Constant(derivatives_of_powers(n, table.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = _Piecewise.apply(x.reshape(-1), self.table(), self.rules(), 0)
        return values.view(*x.shape, self.num_functions)


class _Piecewise(torch.autograd.Function):
    """Derivative of a given order of the piecewise polynomials, differentiable without end.

    The next derivative is found in the same pass over the table and kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, rules: Tensor, order: int) -> Tensor:
        both = evaluate(x, table, rules, order, ctx.needs_input_grad[0])  # (M, 1 or 2, F)
        ctx.order = order
        ctx.save_for_backward(x, table, rules, both[:, -1])
        return both[:, 0]

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        x, table, rules, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # what comes out will be differentiated
            slope = _Piecewise.apply(x, table, rules, ctx.order + 1)
        return (above * slope).sum(dim=-1), None, None, None


def evaluate(x: Tensor, table: Tensor, rules: Tensor, order: int, slope: bool) -> Tensor:
    """(M,) -> (M, 2, F) derivatives of ``order`` and, if ``slope``, the next."""
    last, D, F = len(table) - 1, table.shape[1], table.shape[2]
    u = x * last
    k = u.floor().clamp(0, last)
    t = torch.where(k < last, u - k, 0)
    powers = [torch.ones_like(t)]
    for _ in range(D - 1):
        powers.append(powers[-1] * t)
    rows = torch.stack(powers, dim=1)  # (M, D)
    order = min(order, D)  # from there on all are zero
    weights = rows @ rules[:, order : order + 1 + slope].flatten(1)
    weights = weights.view(-1, 1 + slope, D)
    return torch.bmm(weights, table.flatten(1).index_select(0, k.long()).view(-1, D, F))


@cache
def derivatives_of_powers(n: int, D: int) -> Tensor:
    """(D, D + 2, D) float64: the coefficients of t^0 ... t^(D-1) in all derivatives d/dx of t^d,
    d/dx t^d = n d t^(d-1); the last two are zero."""
    rules = torch.zeros(D, D + 2, D, dtype=torch.float64)
    rules[:, 0] = torch.eye(D, dtype=torch.float64)
    for order in range(1, D):
        for d in range(order, D):
            rules[d - order, order, d] = math.perm(d, order) * float(n) ** order
    return rules


def coefficients(functions: Functions, n: int) -> Tensor:
    """(n + 1, 6, F) of the powers of t = n x - k; in the last row only the value at 1."""
    f, d, s = jet(functions, torch.arange(1, n + 1, dtype=torch.float64) / n)
    d, s = d / n, s / (2 * n * n)
    f, d, s = (  # at 0 by the parabola at 1 / n
        torch.cat([first[None], x])
        for first, x in ((f[0] - d[0] + s[0], f), (d[0] - 2 * s[0], d), (s[0], s))
    )
    a = f[1:] - f[:-1] - d[:-1] - s[:-1]
    b = d[1:] - d[:-1] - 2 * s[:-1]
    c = s[1:] - s[:-1]
    cubic, quartic, quintic = 10 * a - 4 * b + c, -15 * a + 7 * b - 2 * c, 6 * a - 3 * b + c
    table = torch.zeros(n + 1, 6, f.shape[1], dtype=torch.float64)
    table[:-1] = torch.stack([f[:-1], d[:-1], s[:-1], cubic, quartic, quintic], dim=1)
    table[-1, 0] = f[-1]
    return table


def jet(functions: Functions, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and two derivatives (M, F) at the points x (M,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = functions(x)
        found = [y]
        for _ in range(2):
            # sum_c v_c f_c' by one backward pass; it is linear in v, and its slopes are all f_c'.
            v = torch.ones_like(y, requires_grad=True)
            (mixed,) = torch.autograd.grad(found[-1], x, v, create_graph=True)
            found += torch.autograd.grad(mixed.sum(), v, create_graph=True)
    f, d, s = (t.detach() for t in found)
    return f, d, s


def interpolation_error(functions: Functions, table: Tensor) -> float:
    """Largest error of values and slopes in the middle of the intervals, each relative to the
    largest value or slope."""
    n = len(table) - 1
    x = (torch.arange(1, n, dtype=torch.float64) + 0.4) / n
    f, d, _ = jet(functions, x)
    rules = derivatives_of_powers(n, table.shape[1])
    values, slopes = evaluate(x, table, rules, 0, slope=True).unbind(1)
    errors = [(a - b).abs().max() / b.abs().max() for a, b in ((values, f), (slopes, d))]
    return float(torch.stack(errors).max())  # NaN if one is


def leading_functions(values: Tensor, weights: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Few combinations of functions that stand for all in a linear map.

    Of functions h (M points, H) only h @ weights (H, C) is needed.  Returns ``mix`` (H, k) and
    ``back`` (k, C) with (h @ mix) @ back = h @ weights up to ``tolerance``, relative to the largest
    singular value; the k combinations have their share in the result as their size.
    """
    eigenvalues, Q = torch.linalg.eigh(weights @ weights.T)
    root = Q * eigenvalues.clamp(min=0).sqrt()  # root root^T = weights weights^T
    U, s, Vh = torch.linalg.svd(values @ root, full_matrices=False)
    k = max(int((s > tolerance * s[0]).sum()), 1)
    mix = root @ Vh[:k].T
    back = (U[:, :k].T @ values @ weights) / s[:k, None]
    return mix, back
