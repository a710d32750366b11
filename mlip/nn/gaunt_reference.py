"""The Gaunt product of ``mlip.nn.gaunt_product`` in two other forms, to compare with.

``FourierProduct`` is the published one (S. Luo et al., arXiv:2401.10216): functions on the sphere
are functions of two angles on a torus, with coefficients in a Fourier basis, where a product is a
convolution.  ``DenseProduct`` is the sum over Clebsch-Gordan paths, by e3nn.
"""

from __future__ import annotations

import math

import torch
from e3nn import o3
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.spherical import SphericalHarmonics, clebsch_gordan


def gaunt_ratio(l1: int, l2: int, l3: int) -> float:
    """Mean over the sphere of Y_l1 Y_l2 Y_l3 divided by the Clebsch-Gordan coefficient.

    Contracted with the coefficient, of which the squares have the sum one, the product of three
    harmonics is invariant; so it is its own mean, and can be had at any point.
    """
    pole = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    Y = SphericalHarmonics(max(l1, l2, l3)).double()(pole)
    factors = [Y[l * l : (l + 1) ** 2] for l in (l1, l2, l3)]
    return float(torch.einsum("ijk,i,j,k->", clebsch_gordan(l1, l2, l3), *factors))


def product_paths(lmax1: int, lmax2: int, lmax_out: int) -> list[tuple[int, int, int]]:
    """Triples (l1, l2, l3) that the triangle rule and an even sum allow."""
    return [
        (l1, l2, l3)
        for l1 in range(lmax1 + 1)
        for l2 in range(lmax2 + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, lmax_out) + 1, 2)
    ]


class FourierProduct(nn.Module):
    """Product of two functions on the sphere by a convolution in a Fourier basis.

    With the polar angle continued to a full circle, Y_lm is a trigonometric polynomial of degree l
    in both angles; a function of degree L has (2 L + 1)^2 complex coefficients.
    """

    def __init__(self, lmax1: int, lmax2: int, lmax_out: int) -> None:
        super().__init__()
        self.lmaxes = lmax1, lmax2, lmax_out
        top = max(self.lmaxes)
        self.size = n = 2 * (lmax1 + lmax2) + 1  # enough for the product
        fine = 2 * max(top, lmax1 + lmax2) + 1
        angle = torch.arange(fine, dtype=torch.float64) * 2 * math.pi / fine
        theta, phi = angle[:, None], angle[None, :]
        xyz = torch.stack(
            [theta.sin() * phi.sin(), theta.cos() + 0 * phi, theta.sin() * phi.cos()], dim=-1
        )
        Y = SphericalHarmonics(top).double()(xyz)  # beyond the poles the polynomial goes on
        waves = torch.fft.fft2(Y, dim=(0, 1)) / fine**2  # (fine, fine, LM)
        k = torch.fft.fftfreq(fine, 1 / fine, dtype=torch.float64).round().long()
        # Back: mean over the sphere of Y_lm exp(i (u theta + v phi)), for each wave (u, v) of the
        # product.  The integral over phi leaves the waves of Y_lm with -v; that over theta is
        # that of sin(theta) exp(i (u + u') theta) / 2 from 0 to pi.
        s = k[:, None] + k[None, :]
        even = 1 / (1 - s.double() ** 2).where(s % 2 == 0, 1.0)
        edge = math.pi / 4 * s.double() * (s.abs() == 1)
        polar = torch.complex(even.where(s % 2 == 0, 0.0), edge)
        back = torch.einsum("us,svl->uvl", polar, waves.index_select(1, (-k) % fine))
        inside = (k.abs() <= lmax1 + lmax2).nonzero()[:, 0]
        self.to_waves = Constant(torch.view_as_real(waves[inside][:, inside]))
        self.from_waves = Constant(torch.view_as_real(back[inside][:, inside]))
        assert len(inside) == n

    def forward(self, U: Tensor, V: Tensor) -> Tensor:
        """(LM_1, N, C), (LM_2, N, C) coefficients -> (LM, N, C) of the product."""
        to_waves = torch.view_as_complex(self.to_waves())  # (n, n, LM)
        from_waves = torch.view_as_complex(self.from_waves())
        f, g = (
            torch.fft.fft2(
                torch.tensordot(to_waves[..., : len(x)], x.to(to_waves.dtype), 1), dim=(0, 1)
            )
            for x in (U, V)
        )
        waves = torch.fft.ifft2(f * g, dim=(0, 1))  # circular, without overlap
        size = (self.lmaxes[2] + 1) ** 2
        return torch.tensordot(from_waves[..., :size], waves, dims=([0, 1], [0, 1])).real


class DenseProduct(nn.Module):
    """The same product as a sum over paths, by e3nn's channel-wise tensor product."""

    weight: Tensor

    def __init__(self, lmax1: int, lmax2: int, lmax_out: int, channels: int) -> None:
        super().__init__()
        irreps = [
            o3.Irreps([(channels, (l, (-1) ** l)) for l in range(lmax + 1)])
            for lmax in (lmax1, lmax2, lmax_out)
        ]
        paths = product_paths(lmax1, lmax2, lmax_out)
        self.channels = channels
        self.tensor_product = o3.TensorProduct(
            *irreps,
            [(*path, "uuu", True) for path in paths],
            irrep_normalization="none",
            path_normalization="none",
            internal_weights=False,
            shared_weights=True,
        )
        ratios = torch.tensor([gaunt_ratio(*path) for path in paths], dtype=torch.float64)
        self.ratios = Constant(ratios.repeat_interleave(channels))

    def forward(self, U: Tensor, V: Tensor) -> Tensor:
        """(LM_1, N, C), (LM_2, N, C) coefficients -> (LM, N, C) of the product."""
        x = self.tensor_product(to_e3nn(U), to_e3nn(V), self.ratios())
        return from_e3nn(x, self.channels)


def to_e3nn(x: Tensor) -> Tensor:
    """(LM, N, C) -> (N, LM C): e3nn's layout, channels before components in each degree."""
    degrees = range(math.isqrt(len(x)))
    return torch.cat([x[l * l : (l + 1) ** 2].permute(1, 2, 0).flatten(1) for l in degrees], dim=1)


def from_e3nn(x: Tensor, channels: int) -> Tensor:
    """(N, LM C) in e3nn's layout -> (LM, N, C)."""
    parts, first = [], 0
    for l in range(math.isqrt(x.shape[1] // channels)):
        size = channels * (2 * l + 1)
        parts.append(x[:, first : first + size].view(-1, channels, 2 * l + 1).permute(2, 0, 1))
        first += size
    return torch.cat(parts)
