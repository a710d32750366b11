"""Real spherical harmonics and Clebsch-Gordan coefficients in e3nn's basis.

``(lm)`` runs over l = 0 ... lmax and m = -l ... l, LM = (lmax + 1)^2 components; l = 1 is
(x, y, z).  Component normalisation: sum_m Y_lm^2 = 2 l + 1, so each component has mean square one
on the sphere.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

from mlip.nn.constant import Constant


@cache
def clebsch_gordan(l1: int, l2: int, l3: int) -> Tensor:
    """(2 l1 + 1, 2 l2 + 1, 2 l3 + 1) float64 coefficients, sum of squares one."""
    return o3.wigner_3j(l1, l2, l3, dtype=torch.float64)


class SphericalHarmonics(nn.Module):
    """Y_lm of unit vectors by the recursion Y_{l+1} = c_l CG(l, 1, l+1) Y_l r.

    Few operations, differentiable to any order.  These are polynomials of r whose gradient is that
    of the recursion with the factor l + 1, since r . grad Y_{l+1} = (l + 1) Y_{l+1}:

        grad Y_{l+1} = (l + 1) c_l CG(l, 1, l+1) Y_l

    (..., 3) unit vectors -> (..., LM).
    """

    def __init__(self, lmax: int) -> None:
        super().__init__()
        self.lmax = lmax
        self.raising = nn.ModuleList()
        axis = torch.tensor(
            [0.0, 1.0, 0.0], dtype=torch.float64
        )  # any direction fixes the norm and sign
        Y = axis * math.sqrt(3)
        lowering = torch.zeros((lmax + 1) ** 2, 3, max(lmax, 1) ** 2, dtype=torch.float64)
        if lmax > 0:
            lowering[1:4, :, 0] = torch.eye(3, dtype=torch.float64) * math.sqrt(3)
        for l in range(1, lmax):
            coupling = clebsch_gordan(l, 1, l + 1)
            raised = torch.einsum("a,b,abc->c", Y, axis, coupling)
            factor = math.sqrt(2 * l + 3) / raised.norm()
            if o3.spherical_harmonics(l + 1, axis, False) @ raised < 0:
                factor = -factor
            Y = raised * factor
            self.raising.append(Constant((coupling * factor).reshape(-1, 2 * l + 3)))
            here, next_ = slice(l**2, (l + 1) ** 2), slice((l + 1) ** 2, (l + 2) ** 2)
            lowering[next_, :, here] = (l + 1) * factor * coupling.permute(2, 1, 0)
        self.lowering = Constant(lowering.flatten(1))  # (LM, 3 L^2)

    def forward(self, r: Tensor) -> Tensor:
        raising = [raising() for raising in self.raising]
        found: Tensor = _Harmonics.apply(r, self.lmax, self.lowering(), *raising)
        return found


class _Harmonics(torch.autograd.Function):
    """Y (..., LM) of r (..., 3); the gradient is made of Y, and so are all further ones."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, lmax: int, lowering: Tensor, *raising: Tensor) -> Tensor:
        Y = [torch.ones_like(r[..., :1])]
        if lmax > 0:
            Y.append(r * math.sqrt(3))
        for l, matrix in enumerate(raising, start=1):
            outer = (Y[l][..., :, None] * r[..., None, :]).flatten(-2)  # (..., (2l+1) 3)
            Y.append(outer @ matrix)
        found = torch.cat(Y, dim=-1)
        ctx.below = max(lmax, 1) ** 2
        ctx.save_for_backward(found, lowering)
        return found

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        Y, lowering = ctx.saved_tensors
        slopes = (above @ lowering).unflatten(-1, (3, ctx.below))  # (..., 3, L^2)
        gradient = (slopes * Y[..., None, : ctx.below]).sum(-1)
        return gradient, None, None, *(None for _ in ctx.needs_input_grad[3:])


def degree_of_component(lmax: int) -> Tensor:
    """(LM,) the degree l of each component."""
    return torch.repeat_interleave(torch.arange(lmax + 1), 2 * torch.arange(lmax + 1) + 1)
