"""Functions on the sphere: to a quadrature grid and back.

A grid integrates every function of degree up to ``degree`` exactly; so the projection to degree L
of a product of d functions of degree L is exact for ``degree >= (d + 1) L``, and then equivariance
is exact too.  Weights have the sum one: integrals are means over the sphere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.rotations import lebedev_nodes
from mlip.nn.spherical import SphericalHarmonics


def gauss_legendre_nodes(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre in cos(beta), uniform in alpha: (degree // 2 + 1) x (degree + 1) points.

    Returns points (P, 3) and weights (P,) > 0.
    """
    cosine, weight = np.polynomial.legendre.leggauss(degree // 2 + 1)
    # Half a step off the axis: no point of the grid lies on a coordinate plane where bonds of
    # crystals like to be.
    alpha = (np.arange(degree + 1) + 0.5) * 2 * np.pi / (degree + 1)
    sine = np.sqrt(1 - cosine**2)[:, None]
    points = np.stack(
        [sine * np.sin(alpha), cosine[:, None] + 0 * alpha, sine * np.cos(alpha)], axis=-1
    )
    return points.reshape(-1, 3), np.repeat(weight / 2, len(alpha)) / len(alpha)


def fewest_nodes(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """The smaller of Gauss's and Lebedev's grids of this degree: points (P, 3), weights (P,).

    Lebedev's has about two thirds of the points, of degrees that exist and where scipy has it;
    single weights may be negative, to which sums are indifferent.
    """
    grids = [gauss_legendre_nodes(degree)]
    for larger in range(degree, degree + 4):
        try:
            grids.append(lebedev_nodes(larger))
            break
        except (ImportError, ValueError):  # another degree, or else Gauss's
            continue
    return min(grids, key=lambda grid: len(grid[1]))


class SphereGrid(nn.Module):
    """Synthesis and analysis of functions given by coefficients (LM, ...) of harmonics."""

    def __init__(self, lmax: int, degree: int) -> None:
        super().__init__()
        points, weights = (torch.from_numpy(x) for x in gauss_legendre_nodes(degree))
        Y = SphericalHarmonics(lmax).double()(points)  # (P, LM)
        self.to_grid = Constant(Y)
        self.from_grid = Constant((Y * weights[:, None]).T.contiguous())

    def synthesis(self, x: Tensor) -> Tensor:
        """(LM, N, C) coefficients -> (P, N, C) values."""
        return (self.to_grid() @ x.flatten(1)).unflatten(1, x.shape[1:])

    def analysis(self, f: Tensor) -> Tensor:
        """(P, N, C) values -> (LM, N, C) coefficients of the projection."""
        return (self.from_grid() @ f.flatten(1)).unflatten(1, f.shape[1:])
