"""Products of features with the harmonics of a bond, in the frame where the bond is the pole.

    m[l3] = sum_{l1 l2}  w(l1 l2 l3) CG(l1 l2 l3) (h[l1] x Y_l2(r)),          l1 + l2 + l3 even

is what equivariant networks send along an edge.  Turned so that r is the pole, Y_l2(r) has a single
component, m = 0, and the product becomes diagonal in m: h[l1 m] times a number K(l1 l3 |m|), a sum
over l2.  Two rotations and O(L^3) products for each channel instead of O(L^5) to O(L^6).

S. Passaro and C. L. Zitnick (arXiv:2302.03655); with a filter whose weights factor into those of
the three degrees this is the Gaunt convolution of S. Luo et al. (arXiv:2401.10216).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.gaunt_reference import product_paths
from mlip.nn.rotations import wigner_matrices
from mlip.nn.spherical import SphericalHarmonics, clebsch_gordan


class AlignedConvolution(nn.Module):
    """Channel-wise product of features with harmonics, weighted for each edge, path and channel.

    Parameters
    ----------
    lmax_in, lmax_filter, lmax_out : largest degrees of h, Y and m

    Attributes
    ----------
    paths : triples (l1, l2, l3) in the order of the weights
    """

    source: Tensor
    target: Tensor
    factor: Tensor

    def __init__(self, lmax_in: int, lmax_filter: int, lmax_out: int) -> None:
        super().__init__()
        self.paths = product_paths(lmax_in, lmax_filter, lmax_out)
        self.lmax_in, self.lmax_out = lmax_in, lmax_out
        pole = SphericalHarmonics(lmax_filter).double()(
            torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        )
        rows: dict[tuple[int, int, int], Tensor] = {}  # (l1, l3, |m|) -> (paths,)
        for number, (l1, l2, l3) in enumerate(self.paths):
            filtered = pole[l2 * l2 : (l2 + 1) ** 2] @ clebsch_gordan(l1, l2, l3)  # (m1, m3)
            for m in range(min(l1, l3) + 1):
                row = rows.setdefault((l1, l3, m), filtered.new_zeros(len(self.paths)))
                row[number] = filtered[l1 + m, l3 + m]
        self.coefficients = Constant(torch.stack(list(rows.values())))  # (K, paths)
        entries = [
            (l1 * l1 + l1 + signed, l3 * l3 + l3 + signed, k)
            for k, (l1, l3, m) in enumerate(rows)
            for signed in sorted({m, -m})
        ]
        columns = torch.tensor(entries).T
        for name, column in zip(("source", "target", "factor"), columns, strict=True):
            self.register_buffer(name, column.clone(), persistent=False)

    def forward(self, h: Tensor, weights: Tensor, frames: list[Tensor]) -> Tensor:
        """Messages of E edges.

        Parameters
        ----------
        h : (E, LM, C) features at the far end of each edge
        weights : (E, paths, C)
        frames : of ``bond_frames`` for the edges, to the larger of the two lmax at least

        Returns
        -------
        Tensor
            (E, LM', C)
        """
        h = turn(h, frames, self.lmax_in)
        K = self.coefficients() @ weights  # (E, K, C)
        m = h.index_select(1, self.source) * K.index_select(1, self.factor)
        out = m.new_zeros(len(h), (self.lmax_out + 1) ** 2, h.shape[2]).index_add(1, self.target, m)
        return turn(out, [D.mT for D in frames], self.lmax_out)


def bond_frames(r: Tensor, lmax: int) -> list[Tensor]:
    """Wigner matrices (E, 2l+1, 2l+1), l = 0 ... lmax, that turn unit vectors r (E, 3) to the pole
    of the harmonics, the axis y.

    The frame is free up to a turn about the bond, on which no product depends.  It is smooth but
    where y changes its sign: bonds in the lower half are turned upside down first, for near -y the
    shortest rotation has no limit.
    """
    sign = torch.where(r[:, 1:2] < 0, -1.0, 1.0).to(r.dtype)
    flip = torch.cat([sign, sign, torch.ones_like(sign)], dim=1)  # half a turn about z
    x, y, z = (r * flip).unbind(1)
    a = 1 / (1 + y)
    rows = [1 - a * x * x, -x, -a * x * z, x, y, z, -a * x * z, -z, 1 - a * z * z]
    R = torch.stack(rows, dim=1).view(-1, 3, 3) * flip[:, None]
    return wigner_matrices(R, lmax)


def turn(x: Tensor, frames: list[Tensor], lmax: int) -> Tensor:
    """(E, LM, C) features in each edge's own frame."""
    blocks = [D @ x[:, l * l : (l + 1) ** 2] for l, D in enumerate(frames[: lmax + 1])]
    return torch.cat(blocks, dim=1)
