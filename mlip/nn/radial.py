"""Radial functions: a Bessel basis and the envelope that fades it out at the cutoff."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bessel(x: Tensor, num_basis: int, stretch: float = 0.0) -> Tensor:
    """Radial Bessel functions sqrt(2) sin(n pi x) / x.

    Gasteiger et al. 2020 (arXiv:2003.03123), eq. 7.
    ``x`` = r / cutoff, any shape (...) -> (..., num_basis); orthonormal on [0, 1] under the weight
    x^2, finite at 0.  With ``stretch`` = a they are sqrt(2 t') sin(n pi t) / x of the distance t =
    (1 + a) x / (1 + a x): 1 + a times finer at x = 0, as much coarser at x = 1, still orthonormal.
    """
    n = torch.arange(1, num_basis + 1, dtype=x.dtype, device=x.device)
    x = x[..., None]
    if not stretch:
        return math.sqrt(2) * math.pi * n * torch.sinc(n * x)
    ratio = (1 + stretch) / (1 + stretch * x)  # t / x
    scale = math.sqrt(2 / (1 + stretch)) * math.pi * ratio.square()
    return scale * n * torch.sinc(n * (ratio * x))


def polynomial_envelope(x: Tensor, p: int = 6) -> Tensor:
    """Cutoff function of the same paper, eq. 8: 1 at x = 0, zero beyond x = 1.

    Value and two derivatives vanish at x = 1.
    """
    x = x.clamp(max=1)
    c1, c2, c3 = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return 1 - x**p * (c1 - x * (c2 - c3 * x))


def bessel_with_slope(x: Tensor, num_basis: int, stretch: float = 0.0) -> tuple[Tensor, Tensor]:
    """``bessel`` times ``polynomial_envelope`` and the derivative by ``x``: (e,) -> (num_basis, e).

    With t = (1 + a) x / (1 + a x) and the envelope f they are w sin(n pi t), w = (2 / (1 + a))^1/2
    t f / x^2.
    """
    a = stretch
    n = math.pi * torch.arange(1, num_basis + 1, dtype=x.dtype, device=x.device)[:, None]
    y = x.clamp(max=1)
    y5, c = y.square().square() * y, math.sqrt(2 * (1 + a))
    envelope = (1 - y5 * y * (28 - y * (48 - 21 * y))) * c
    fall = y5 * (1 - y).square() * (-168 * c)
    p = 1 / (x + a * x.square())  # t / ((1 + a) x^2)
    px = p * x
    w = p * envelope
    slope = p * fall - w * p * (1 + 2 * a * x)
    t, dt = (1 + a) * (px * x), (1 + a) * px.square()
    angle = n * t
    sine = torch.sin(angle)
    return w * sine, slope * sine + (w * dt) * (n * torch.cos(angle))
