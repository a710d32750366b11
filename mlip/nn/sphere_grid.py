"""Functions on the sphere: to a quadrature grid and back.

Gauss-Legendre nodes in cos(beta), uniform in alpha.  The grid integrates every function of degree
up to ``degree`` exactly, with (degree // 2 + 1) x (degree + 1) points; so the projection to degree
L of a product of d functions of degree L is exact for ``degree >= (d + 1) L``, and then
equivariance is exact too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.spherical import SphericalHarmonics


class SphereGrid(nn.Module):
    """Synthesis and analysis of functions given by coefficients (LM, ...) of harmonics."""

    def __init__(self, lmax: int, degree: int) -> None:
        super().__init__()
        cosine, weight = np.polynomial.legendre.leggauss(degree // 2 + 1)
        # Half a step off the axis: no point of the grid lies on a coordinate plane where bonds of
        # crystals like to be.
        alpha = (np.arange(degree + 1) + 0.5) * 2 * np.pi / (degree + 1)
        sine = np.sqrt(1 - cosine**2)[:, None]
        points = np.stack(
            [sine * np.sin(alpha), cosine[:, None] + 0 * alpha, sine * np.cos(alpha)], axis=-1
        )
        Y = SphericalHarmonics(lmax).double()(torch.from_numpy(points.reshape(-1, 3)))  # (P, LM)
        weights = torch.from_numpy(np.repeat(weight / 2, len(alpha)) / len(alpha))  # sum to one
        self.to_grid = Constant(Y)
        self.from_grid = Constant((Y * weights[:, None]).T.contiguous())

    def synthesis(self, x: Tensor) -> Tensor:
        """(LM, N, C) coefficients -> (P, N, C) values."""
        return (self.to_grid() @ x.flatten(1)).unflatten(1, x.shape[1:])

    def analysis(self, f: Tensor) -> Tensor:
        """(P, N, C) values -> (LM, N, C) coefficients of the projection."""
        return (self.from_grid() @ f.flatten(1)).unflatten(1, f.shape[1:])

    def product(self, U: Tensor, V: Tensor) -> Tensor:
        """Coefficients (LM, N, C) of the pointwise product of two functions given by theirs."""
        return _Product.apply(U, V, self.to_grid(), self.from_grid())


CHUNK_BYTES = 1 << 19  # of grid values: two such buffers stay in a core's cache


class _Product(torch.autograd.Function):
    """Product on the grid, in chunks that stay in cache; the values on the grid are never stored.

    With quadrature weights w the form T(U, V, G) = sum_p w_p u_p v_p g_p is symmetric in its three
    functions, so the gradients of a product are products again, dU = V G and dV = U G, and can be
    differentiated to any order.
    """

    @staticmethod
    def forward(ctx: Any, U: Tensor, V: Tensor, to_grid: Tensor, from_grid: Tensor) -> Tensor:
        ctx.save_for_backward(U, V, to_grid, from_grid)
        (P,) = _pointwise([U, V], [(0, 1)], to_grid, from_grid)
        return P

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor, None, None]:
        U, V, to_grid, from_grid = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            apply = _Product.apply
            return apply(V, G, to_grid, from_grid), apply(U, G, to_grid, from_grid), None, None
        dU, dV = _pointwise([U, V, G], [(1, 2), (0, 2)], to_grid, from_grid)
        return dU, dV, None, None


def _pointwise(
    functions: list[Tensor], pairs: list[tuple[int, int]], to_grid: Tensor, from_grid: Tensor
) -> list[Tensor]:
    """Products of the given pairs of functions, all (LM, N, C)."""
    shape = functions[0].shape
    flat = [f.reshape(shape[0], -1) for f in functions]  # (LM, N C)
    columns = flat[0].shape[1]
    step = columns
    if flat[0].device.type == "cpu":
        step = max(CHUNK_BYTES // (len(to_grid) * flat[0].element_size()), 64)
    results = [torch.empty_like(flat[0]) for _ in pairs]
    for first in range(0, columns, step):
        chunk = slice(first, first + step)
        values = [to_grid @ f[:, chunk] for f in flat]  # (P, step)
        for result, (a, b) in zip(results, pairs, strict=True):
            result[:, chunk] = from_grid @ (values[a] * values[b])
    return [result.view(shape) for result in results]
