"""Orientations: vertices of polyhedra as a quadrature of the sphere.

    points                            O     rotations that permute them    t
    octahedron                        6     octahedral, 24                 3
    icosahedron                       12    icosahedral, 60                5
    dodecahedron                      20    icosahedral, 60                5
    both, weights 5/14 and 9/14       32    icosahedral, 60                9

The weighted mean over the points of a polynomial of degree t is its mean over the sphere; all
these sets contain -o with o.  A quantity made of dot products with all o alike is therefore exactly
invariant under the whole group with its reflections, whatever its degree; under other rotations it
changes by its parts of degree 4, 8, ... (octahedral) or 6, 10, 12, ... (icosahedral) only, in
which these groups have invariants.  The weights of the last set cancel degree 6 of the mean over o.

A kernel k(o.o') on such a set takes few distinct values (3, 4, 6 on the first three), and all
kernels have the same eigenspaces: the harmonics of degree l <= t/2, which are orthonormal on the
points.  So a convolution over o is: analysis, one number for each degree, synthesis.

A. D. McLaren, Math. Comp. 17, 361 (1963): integration over the sphere on orbits of polyhedra.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.sphere_grid import SphereGrid
from mlip.nn.spherical import SphericalHarmonics

# O -> t.  A single point has no direction to tell: functions on it are constant.
DEGREE = {1: 0, 6: 3, 12: 5, 20: 5, 32: 9}
GROUPS: dict[int, tuple[str, ...]] = {
    1: ("none", "tetrahedral", "octahedral", "icosahedral"),
    6: ("none", "tetrahedral", "octahedral"),
    12: ("none", "tetrahedral", "icosahedral"),
    20: ("none", "tetrahedral", "icosahedral"),
    32: ("none", "tetrahedral", "icosahedral"),
}  # O -> the rules of mlip.nn.rotations that permute the points


class Orientations(SphereGrid):
    """The points with analysis and synthesis of functions up to degree ``lmax``.

    Parameters
    ----------
    number : O, one of ``DEGREE``
    lmax : of the harmonics, t / 2 at most

    Raises
    ------
    ValueError
        For another number, or a degree that these points do not resolve.
    """

    def __init__(self, number: int, lmax: int) -> None:
        nn.Module.__init__(self)
        if number not in DEGREE:
            raise ValueError(f"there are no {number} orientations; take one of {list(DEGREE)}")
        self.degree, self.groups = DEGREE[number], GROUPS[number]
        if lmax > self.degree // 2:
            raise ValueError(
                f"{number} orientations resolve degree {self.degree // 2}, not {lmax}; "
                "take more of them"
            )
        points, weights = vertices(number)
        Y = SphericalHarmonics(lmax).double()(points)  # (O, LM)
        self.half_size = max(1, number // 2)  # the others are the opposites of these
        self.points, self.weights = Constant(points), Constant(weights)
        self.to_grid = Constant(Y)
        self.from_grid = Constant((Y * weights[:, None]).T.contiguous())

    def mean(self, f: Tensor) -> Tensor:
        """(O, ...) values -> (...) their mean over the sphere."""
        return (self.weights() @ f.flatten(1)).view(f.shape[1:])

    def permutation(self, R: Tensor) -> Tensor:
        """(O,) with R o_k = o_p[k] for an orthogonal matrix (3, 3) of the group.

        Raises
        ------
        ValueError
            If the matrix does not map the points to themselves.
        """
        points = self.points.exact
        distance = torch.cdist(points @ R.double().cpu().T, points)
        nearest, place = distance.min(dim=1)
        if nearest.max() > 1e-6:
            raise ValueError("the matrix does not permute the orientations")
        return place


def vertices(number: int) -> tuple[Tensor, Tensor]:
    """(O, 3) unit vectors and (O,) weights of sum one, float64.

    The second half of the points are the opposites of the first, in the same order.
    """
    golden = (1 + math.sqrt(5)) / 2
    signs = list(itertools.product((1.0, -1.0), repeat=2))

    def cyclic(a: float, b: float) -> list[list[float]]:
        """Of (0, +-a, +-b)."""
        corners = [[0.0, s * a, t * b] for s, t in signs]
        return [[x[-k % 3], x[(1 - k) % 3], x[(2 - k) % 3]] for k in range(3) for x in corners]

    octahedron = [[s * (k == a) for k in range(3)] for a in range(3) for s in (1.0, -1.0)]
    icosahedron = cyclic(golden, 1)
    dodecahedron = [list(x) for x in itertools.product((1.0, -1.0), repeat=3)]
    dodecahedron += cyclic(1 / golden, golden)
    corners = {
        1: [[0.0, 0.0, 1.0]],
        6: octahedron,
        12: icosahedron,
        20: dodecahedron,
        32: icosahedron + dodecahedron,
    }[number]
    points = nn.functional.normalize(torch.tensor(corners, dtype=torch.float64), dim=1)
    weights = torch.full((number,), 1 / number, dtype=torch.float64)
    if number == 32:
        weights[:12], weights[12:] = 5 / 14 / 12, 9 / 14 / 20
    if number > 1:
        half = points @ torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64) > 0
        points, weights = points[half], weights[half].repeat(2)
        points = torch.cat([points, -points])
    return points, weights
