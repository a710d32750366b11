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


class BesselWithSlope:
    """``bessel`` times ``polynomial_envelope``, and the derivative by ``x`` = r / cutoff.

    With q = 1 + a x, t = (1 + a) x / q and the envelope f they are

        w sin(n pi t),    w = c f / (x q),    c = (2 (1 + a))^1/2.

    Parameters
    ----------
    like : tensor of the dtype and device wanted
    num_basis, stretch : as of ``bessel``
    scale : a factor
    """

    def __init__(self, like: Tensor, num_basis: int, stretch: float = 0.0, scale: float = 1.0):
        self.stretch, self.c = stretch, scale * math.sqrt(2 * (1 + stretch))
        n = torch.arange(1, num_basis + 1, dtype=torch.float64, device=like.device)
        self.n = (math.pi * (1 + stretch) * n).to(like.dtype)[:, None]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distances in units of the cutoff (e,) -> values and derivatives, (num_basis, e) each."""
        y = x.clamp(max=1)
        y5 = y.square().square() * y
        envelope = (1 - y5 * y * (28 - y * (48 - 21 * y))) * self.c
        fall = y5 * (1 - y).square() * (-168 * self.c)  # its derivative
        q = 1 + self.stretch * x
        p, rise = (x * q).reciprocal(), q.reciprocal().square()  # rise = t' / (1 + a)
        w = p * envelope
        slope = torch.addcmul(fall, w, 2 * q - 1, value=-1) * p
        angle = self.n * (p * x.square())
        sine, cosine = torch.sin(angle), torch.cos(angle)
        return w * sine, torch.addcmul(slope * sine, w * rise, self.n * cosine)
