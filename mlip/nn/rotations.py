"""Quadratures of the rotation groups SO(3) and O(3), and Wigner matrices.

A rule is a set of matrices R_k with positive weights w_k of sum one.  It is exact to degree L if

    sum_k w_k D^l(R_k) = 0    for l = 1 ... L,

as for the integral over the group: the mean over it of an anisotropy of degree l <= L vanishes.

    name           rotations                L
    none           1                        0    the identity
    tetrahedral    12                       2    (its first invariant has l = 3, xyz)
    octahedral     24                       3    (l = 4)
    icosahedral    60                       5    (l = 6)
    lebedev-N      points(N) (N + 1)        N    Lebedev's rule on the sphere x a uniform circle
    gauss-N        ceil((N+1)/2) (N+1)^2    N    Gauss-Legendre x two uniform circles

The first four are groups: the mean over one of them is a function that this group leaves exactly as
it is.  Of Lebedev's rules those with 12 | N + 1 (lebedev-11, lebedev-23) are unions of cosets of
the octahedral group, and so are invariant under that.  With mirrors each R_k is joined by -R_k:
then all representations of odd parity vanish whatever their degree, and those of even parity up to
L as before.

V. I. Lebedev and D. N. Laikov, Doklady Mathematics 59, 477 (1999).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mlip.nn.spherical import clebsch_gordan

GROUPS = {"none": 0, "tetrahedral": 2, "octahedral": 3, "icosahedral": 5}  # name -> degree
RULES = ("none", "tetrahedral", "octahedral", "icosahedral", "lebedev-N", "gauss-N")
MAX_DEGREE = 47  # lebedev-47: 36960 rotations; more serves no potential


@dataclass(frozen=True)
class Rotations:
    """A quadrature of SO(3), or with mirrors of O(3)."""

    name: str
    matrices: Tensor  # (K, 3, 3) float64, orthogonal
    weights: Tensor  # (K,) float64, positive, sum 1
    degree: int
    mirrors: bool = False

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def is_group(self) -> bool:
        """Whether the matrices form a group."""
        return self.name in GROUPS

    def after(self, R: Tensor) -> Rotations:
        """The rule R_k R, of the same degree: a crystal whose axes are those of a group is turned
        out of them first."""
        return Rotations(
            f"{self.name} after a rotation", self.matrices @ R, self.weights, self.degree,
            self.mirrors,
        )  # fmt: skip


@cache
def rotations(name: str, mirrors: bool = False) -> Rotations:
    """The rule of this name.

    Parameters
    ----------
    name : one of ``RULES``, N a number
    mirrors : join each rotation by its product with the inversion

    Raises
    ------
    ValueError
        For an unknown name, a degree above ``MAX_DEGREE``, or a degree of which Lebedev's rule does
        not exist or has negative weights (with those a mean of squares may be negative).
    ImportError
        For Lebedev's rules where scipy is older than 1.15.
    """
    kind, dash, text = name.partition("-")
    if name in GROUPS:
        R = torch.from_numpy(_group(name))
        weights, degree = torch.full((len(R),), 1 / len(R), dtype=torch.float64), GROUPS[name]
    elif kind in ("lebedev", "gauss") and dash and text.isdecimal() and len(text) < 4:
        degree = int(text)
        if not 1 <= degree <= MAX_DEGREE:
            raise ValueError(f"rotations '{name}': the degree goes from 1 to {MAX_DEGREE}")
        made = _lebedev(degree) if kind == "lebedev" else _gauss(degree)
        R, weights = (torch.from_numpy(x) for x in made)
    else:
        raise ValueError(f"unknown rotations '{name}'; known are {', '.join(RULES)}")
    if mirrors:
        R, weights = torch.cat([R, -R]), torch.cat([weights, weights]) / 2
    return Rotations(name, R, weights, degree, mirrors)


def random_rotations(
    number: int, generator: torch.Generator | None = None, mirrors: bool = False
) -> Rotations:
    """Rotations drawn uniformly from SO(3); with mirrors each one of O(3).

    Means over them are unbiased.
    """
    q = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    R = torch.from_numpy(_matrices((q / q.norm(dim=1, keepdim=True)).numpy()))
    if mirrors:
        sign = torch.randint(2, (number, 1, 1), generator=generator) * 2 - 1
        R = R * sign
    weights = torch.full((number,), 1 / number, dtype=torch.float64)
    return Rotations(f"{number} at random", R, weights, 0, mirrors)


def wigner_matrices(R: Tensor, lmax: int) -> list[Tensor]:
    """D^l(R) for l = 0 ... lmax in the basis of ``mlip.nn.spherical``: Y_l(R r) = D^l(R) Y_l(r).

    Parameters
    ----------
    R : (K, 3, 3) rotations, or products of such with the inversion: D^l is then of the parity
        (-1)^l of the harmonics

    Returns
    -------
    list
        (K, 2l+1, 2l+1) for each l, orthogonal, by the recursion D^{l+1} in D^l x D^1 with
        Clebsch-Gordan coefficients.
    """
    D = [torch.ones_like(R[:, :1, :1])]
    if lmax > 0:
        D.append(R)
    for l in range(1, lmax):
        C = clebsch_gordan(l, 1, l + 1).to(R).flatten(0, 1)  # (3 (2l+1), 2l+3)
        product = (D[l][:, :, None, :, None] * R[:, None, :, None, :]).flatten(3).flatten(1, 2)
        D.append((2 * l + 3) * (C.T @ product @ C))
    return D


def lebedev_nodes(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Lebedev's rule on the sphere: points (P, 3), weights (P,) of sum one, of any sign.

    Raises
    ------
    ValueError
        If there is no rule of this degree.
    ImportError
        Where scipy is older than 1.15.
    """
    try:
        from scipy.integrate import lebedev_rule
    except ImportError:
        raise ImportError(
            f"'lebedev-{degree}' needs scipy >= 1.15 (pip install -U scipy); "
            f"'gauss-{degree}' is of the same degree and needs nothing"
        ) from None
    try:
        points, weights = lebedev_rule(degree)
    except NotImplementedError:
        raise ValueError(
            f"there is no Lebedev rule of degree {degree}; there are 3, 5, ..., 31, 35, 41, 47; "
            f"or take 'gauss-{degree}'"
        ) from None
    return np.ascontiguousarray(points.T), weights / weights.sum()


def _group(name: str) -> np.ndarray:
    """Rotations of a polyhedron from its unit quaternions, of which q and -q are one rotation."""
    if name == "none":
        return np.eye(3)[None]
    q = [np.array(x) for x in itertools.product((0.5, -0.5), repeat=4)]
    q += list(np.eye(4))
    if name == "octahedral":
        for a, b in itertools.combinations(range(4), 2):
            q += [(np.eye(4)[a] + s * np.eye(4)[b]) / math.sqrt(2) for s in (1, -1)]
    if name == "icosahedral":
        golden = (1 + math.sqrt(5)) / 2
        for order in itertools.permutations(range(4)):
            swaps = sum(a > b for a, b in itertools.combinations(order, 2))
            for signs in itertools.product((1, -1), repeat=2):
                x = np.array([0, 1 / (2 * golden), 0.5 * signs[0], golden / 2 * signs[1]])
                if swaps % 2 == 0:
                    q.append(x[list(order)])
    unique = {tuple(np.round(_positive(x), 9) + 0.0): _positive(x) for x in q}
    R = _matrices(np.array(list(unique.values())))
    return R if name == "icosahedral" else np.rint(R) + 0.0  # integers, without rounding


def _positive(q: np.ndarray) -> np.ndarray:
    return q * np.sign(q[np.flatnonzero(np.abs(q) > 1e-9)[0]])


def _matrices(q: np.ndarray) -> np.ndarray:
    """(K, 4) unit quaternions (w, x, y, z) -> (K, 3, 3)."""
    w, x, y, z = q.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0).copy()


def _about_z(angles: np.ndarray) -> np.ndarray:
    c, s, o = np.cos(angles), np.sin(angles), np.zeros_like(angles)
    rows = np.array([[c, -s, o], [s, c, o], [o, o, o + 1]])
    return np.moveaxis(rows, -1, 0)


def _lebedev(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of (frame of n) Rz(chi), over the points n of the rule and N + 1 angles chi.

    Frames are carried along by the octahedral rotations, so that points which these exchange have
    frames which they exchange, up to turns by 90 or 120 degrees about n.
    """
    points, weights = lebedev_nodes(degree)
    if weights.min() <= 0:
        raise ValueError(
            f"Lebedev's rule of degree {degree} has negative weights, with which a variance may be "
            f"negative; take 'lebedev-{degree + 2}' or 'gauss-{degree}'"
        )
    octahedral = _group("octahedral")
    images = np.empty((0, 3, 3))  # of the frames so far, under the octahedral rotations
    frames = []
    for n in points:
        (found,) = np.nonzero(np.abs(images[:, :, 2] - n).max(axis=1) < 1e-9)
        if len(found) == 0:
            x = np.eye(3)[np.argmin(np.abs(n))]
            y = np.cross(n, x) / np.linalg.norm(np.cross(n, x))
            frame = np.stack([np.cross(y, n), y, n], axis=1)
            images = np.concatenate([images, octahedral @ frame])
        frames.append(frame if len(found) == 0 else images[found[0]])
    turns = _about_z(2 * np.pi * np.arange(degree + 1) / (degree + 1))
    R = (np.array(frames)[:, None] @ turns).reshape(-1, 3, 3).swapaxes(1, 2)
    w = np.repeat(weights, degree + 1) / (degree + 1)
    return np.ascontiguousarray(R), w


def _gauss(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Rz(alpha) Ry(beta) Rz(gamma)."""
    cosine, weight = np.polynomial.legendre.leggauss(degree // 2 + 1)
    turns = _about_z(2 * np.pi * np.arange(degree + 1) / (degree + 1))
    tilts = _about_z(np.arccos(cosine))[:, [0, 2, 1]][:, :, [0, 2, 1]]
    R = turns[:, None, None] @ tilts[:, None] @ turns
    w = np.broadcast_to(
        weight[:, None] / 2 / (degree + 1) ** 2, (degree + 1, len(weight), degree + 1)
    )
    return R.reshape(-1, 3, 3), w.reshape(-1).copy()
