"""Principal axes of a molecule: a frame of the whole, where there is one.

    C = sum_e f(r_e) v_e v_e^T,      C = V diag(lambda) V^T,      v_e -> V^T v_e

over the edges e of a structure with the envelope f.  The signs of the eigenvectors are free: of the
8 choices 4 are rotations.  The mean over them is exactly invariant wherever the three eigenvalues
differ, and jumps where two of them meet (a symmetric top, a cube).

The gradient passes through the eigenvectors.  Its factors 1 / (lambda_b - lambda_a) are replaced by
g / (g^2 + eps^2) of the gaps g, exact to the square of eps / g: zero where the axes are free
because all atoms lie on a line, and finite where the frame does not exist.

O. Puny et al., "Frame averaging", ICLR 2022 (arXiv:2110.03336), who take the covariance of the
positions; edges know no origin, and are all that a model sees.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from mlip.nn.radial import polynomial_envelope

SMALLEST_GAP = 1e-7  # relative to the trace, below which the gradient fades: eps
NEAR = 1e-3  # the same, below which a frame is near a jump
FLAT = 1e-9  # the same of an extent that is none


class Eigen(torch.autograd.Function):
    """Eigenvalues (G, 3), rising, and eigenvectors (G, 3, 3) of symmetric matrices."""

    @staticmethod
    def forward(ctx: Any, C: Tensor) -> tuple[Tensor, Tensor]:
        values, V = torch.linalg.eigh(C)
        ctx.save_for_backward(values, V)
        return values, V

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values, V = ctx.saved_tensors
        g_values, g_V = gradients
        gap = values[:, None, :] - values[:, :, None]  # lambda_b - lambda_a
        small = (SMALLEST_GAP * values.abs().sum(dim=1)).square()[:, None, None]
        tiny = torch.finfo(gap.dtype).tiny  # of a single atom all is zero
        other = 1 - torch.eye(3, dtype=gap.dtype, device=gap.device)
        inner = other * (V.mT @ g_V) * (gap / (gap.square() + small + tiny))
        inner = inner + torch.diag_embed(g_values)
        g = V @ inner @ V.mT
        return (g + g.mT) / 2


def principal_axes(
    vectors: Tensor, owner: Tensor, num_structures: int, cutoff: float
) -> tuple[Tensor, Tensor]:
    """Axes as columns (G, 3, 3), and the smallest gap (G,) relative to the sum of the eigenvalues.

    The gap of atoms on a line is that of its longest axis; about itself a line has no axes.
    ``owner`` (E,) is the structure of an edge.
    """
    weight = polynomial_envelope(vectors.norm(dim=-1) / cutoff)
    outer = weight[:, None, None] * vectors[:, :, None] * vectors[:, None, :]
    C = vectors.new_zeros(num_structures, 3, 3).index_add(0, owner, outer)
    values, V = Eigen.apply(C)
    values = values.detach()
    total = values.sum(dim=1).clamp(min=torch.finfo(values.dtype).tiny)
    gaps = values.diff(dim=1) / total[:, None]  # (G, 2)
    line = values[:, 1] < FLAT * total
    gap = torch.where(line, gaps[:, 1], gaps.amin(dim=1))
    return V, torch.where(values[:, 2] > 0, gap, 1.0)  # a single atom has nothing to turn


def signs(mirrors: bool) -> Tensor:
    """(4 or 8, 3, 3) float64: the choices of signs, rotations only or all."""
    choices = torch.tensor(list(itertools.product([1.0, -1.0], repeat=3)), dtype=torch.float64)
    return torch.diag_embed(choices if mirrors else choices[choices.prod(dim=1) > 0])
