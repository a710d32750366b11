"""Radial functions: a Bessel basis and the envelope that fades it out at the cutoff."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bessel(x: Tensor, num_basis: int) -> Tensor:
    """Radial Bessel functions sqrt(2) sin(n pi x) / x.

    Gasteiger et al. 2020 (arXiv:2003.03123), eq. 7.
    ``x`` = r / cutoff, any shape (...) -> (..., num_basis); orthonormal on [0, 1] under the weight
    x^2, finite at 0.
    """
    n = torch.arange(1, num_basis + 1, dtype=x.dtype, device=x.device)
    return math.sqrt(2) * math.pi * n * torch.sinc(n * x[..., None])


def polynomial_envelope(x: Tensor, p: int = 6) -> Tensor:
    """Cutoff function of the same paper, eq. 8: 1 at x = 0, zero beyond x = 1.

    Value and two derivatives vanish at x = 1.
    """
    x = x.clamp(max=1)
    c1, c2, c3 = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return 1 - x**p * (c1 - x * (c2 - c3 * x))
