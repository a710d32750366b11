"""Functions on the sphere: to a quadrature grid and back.

Gauss-Legendre nodes in cos(beta), uniform in alpha.  The grid integrates every function of degree up to ``degree``
exactly, with (degree // 2 + 1) x (degree + 1) points; so the projection to degree L of a product of d functions of
degree L is exact for ``degree >= (d + 1) L``, and then equivariance is exact too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.spherical import SphericalHarmonics


class SphereGrid(nn.Module):
    """Synthesis and analysis of functions given by their coefficients (LM, ...), component-normalised harmonics."""

    def __init__(self, lmax: int, degree: int) -> None:
        super().__init__()
        cosine, weight = np.polynomial.legendre.leggauss(degree // 2 + 1)
        # Half a step off the axis: no point of the grid lies on a coordinate plane where bonds of crystals like to be.
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
