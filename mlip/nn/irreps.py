"""Irreps of O(3) of natural parity: their matrices, and projectors on equivariant weights.

A weight W between representations is equivariant under a group if D'(g) W = W D(g) for all g; the
orthogonal projection onto such weights is the mean of D'(g) W D(g)^T over the group.  Between
irreps it is a projection of few numbers per pair of channels, W -> W B B^T, where the columns of B
are an orthonormal basis of the invariants of l' (x) l.  For O(3) these are, by Schur's lemma, the
identity / sqrt(2 l + 1) for l' = l; for an input that is itself a product l1 (x) l2 the
Clebsch-Gordan coefficients; for subgroups they follow from a mean over finitely many elements,
exact because matrix elements are trigonometric polynomials of low degree.

Parity (-1)^l; components as in ``mlip.nn.spherical``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlip.nn.rotations import wigner_matrices
from mlip.nn.spherical import clebsch_gordan

GROUPS = ("O3", "SO3", "O2_x", "O2_y", "O2_z", "mirror_x", "mirror_y", "mirror_z", "inversion")


def rotate_irreps(x: Tensor, multiplicities: Sequence[int], R: Tensor) -> Tensor:
    """Rotate features (N, C) that hold ``multiplicities[l]`` channels of degree l by R (N, 3, 3).

    Channels of one degree follow each other, each with its 2 l + 1 components.
    """
    sizes = [n * (2 * l + 1) for l, n in enumerate(multiplicities)]
    D = wigner_matrices(R.to(x.dtype), len(multiplicities) - 1)
    parts = []
    for l, part in enumerate(x.split(sizes, dim=-1)):
        blocks = part.unflatten(-1, (multiplicities[l], 2 * l + 1))
        parts.append(part if l == 0 else (blocks @ D[l].mT).flatten(-2))
    return torch.cat(parts, dim=-1)


def invariant_lengths(x: Tensor, multiplicities: Sequence[int]) -> Tensor:
    """(N, C) of the same kind -> (N, sum of ``multiplicities``): scalars as they are, of all other
    channels the squared length, which no rotation changes."""
    sizes = [n * (2 * l + 1) for l, n in enumerate(multiplicities)]
    scalars, *others = x.split(sizes, dim=-1)
    lengths = [
        part.unflatten(-1, (n, 2 * l + 1)).square().sum(-1)
        for (l, n), part in zip(list(enumerate(multiplicities))[1:], others, strict=True)
    ]
    return torch.cat([scalars, *lengths], dim=-1)


class Block(NamedTuple):
    """Channels of one irrep, or of one product of irreps, within a feature vector."""

    degrees: tuple[int, ...]  # (l,) or (l1, l2)
    places: Tensor  # (channels, prod (2 l + 1)) int64, place of each component


class IrrepsLinear(NamedTuple):
    """A dense linear layer whose two sides are declared to be representations."""

    layer: nn.Linear
    outputs: list[Block]
    inputs: list[Block]


def blocks_of(multiplicities: Sequence[int], start: int = 0) -> list[Block]:
    """Blocks of a feature vector in the order of ``rotate_irreps``."""
    blocks = []
    for l, n in enumerate(multiplicities):
        size = n * (2 * l + 1)
        if n:
            blocks.append(Block((l,), torch.arange(start, start + size).view(n, 2 * l + 1)))
        start += size
    return blocks


def group_elements(group: str, degree: int) -> Tensor:
    """(M, 3, 3) elements whose mean is exact for polynomials of this degree in the matrix."""
    kind, _, axis = group.partition("_")
    eye = torch.eye(3, dtype=torch.float64)
    if kind == "inversion":
        return torch.stack([eye, -eye])
    n = "xyz".index(axis)
    if kind == "mirror":
        flip = eye.clone()
        flip[n, n] = -1
        return torch.stack([eye, flip])
    # Rotations about the axis and mirrors that contain it: the symmetry of a field, or of a slab.
    a, b = (n + 1) % 3, (n + 2) % 3
    found = []
    for k in range(degree + 1):
        angle = 2 * math.pi * k / (degree + 1)
        R = eye.clone()
        R[a, a] = R[b, b] = math.cos(angle)
        R[a, b], R[b, a] = -math.sin(angle), math.sin(angle)
        flip = eye.clone()
        flip[a, a] = -1
        found += [R, R @ flip]
    return torch.stack(found)


@cache
def invariants(group: str, degrees: tuple[int, ...]) -> Tensor:
    """(prod (2 l + 1), K) float64, orthonormal basis of the invariants of a product of two or three
    irreps."""
    dims = [2 * l + 1 for l in degrees]
    if group in ("O3", "SO3"):
        none = torch.zeros(math.prod(dims), 0, dtype=torch.float64)
        if group == "O3" and sum(degrees) % 2:
            return none
        if len(degrees) == 2:
            l, other = degrees
            eye = torch.eye(dims[0], dtype=torch.float64) / math.sqrt(dims[0])
            return eye.reshape(-1, 1) if l == other else none
        l1, l2, l3 = degrees
        allowed = abs(l2 - l3) <= l1 <= l2 + l3
        return clebsch_gordan(l1, l2, l3).reshape(-1, 1) if allowed else none
    mean = torch.zeros(math.prod(dims), math.prod(dims), dtype=torch.float64)
    elements = group_elements(group, sum(degrees))
    D = wigner_matrices(elements, max(degrees))
    for k in range(len(elements)):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for l in degrees:
            matrix = torch.kron(matrix, D[l][k])
        mean += matrix / len(elements)
    values, vectors = torch.linalg.eigh((mean + mean.T) / 2)
    return vectors[:, values > 0.5]


def equivariant_part(weight: Tensor, spec: IrrepsLinear, group: str) -> Tensor:
    """Projection of a weight (out, in) onto those that commute with the group; differentiable."""
    result = torch.zeros_like(weight)
    for out, inp in product(spec.outputs, spec.inputs):
        basis = invariants(group, out.degrees + inp.degrees).to(weight)
        if basis.shape[1] == 0:
            continue
        (c1, d1), (c2, d2) = out.places.shape, inp.places.shape
        rows = out.places.flatten().to(weight.device)[:, None]
        columns = inp.places.flatten().to(weight.device)
        W = weight[rows, columns].view(c1, d1, c2, d2).transpose(1, 2).reshape(c1, c2, d1 * d2)
        W = (W @ basis @ basis.mT).view(c1, c2, d1, d2).transpose(1, 2)
        result = result.index_put((rows, columns), W.reshape(c1 * d1, c2 * d2))
    return result


def equivariant_bias(bias: Tensor, spec: IrrepsLinear, group: str) -> Tensor:
    """The same for a bias (out,): an invariant of its own representation."""
    result = torch.zeros_like(bias)
    for out in spec.outputs:
        basis = invariants(group, (*out.degrees, 0)).to(bias)
        rows = out.places.to(bias.device)
        result = result.index_put((rows,), bias[rows] @ basis @ basis.mT)
    return result
