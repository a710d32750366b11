"""Environments that few-body descriptions cannot tell apart, and models before them.

An environment is a centre at the origin and its neighbours r_k.  Its (n + 1)-body correlations are
what the distances and angles of all n-tuples of neighbours say: the set of Gram matrices r_k . r_l
of all n-tuples.  Two environments that no rotation or reflection maps onto each other may share all
of them up to some n, and then a descriptor of n + 1 bodies is the same for both:

    2 bodies   the same distances, other angles
    3 bodies   { a, c, b, -b } and { a, -c, b, -b } at one height over the centre, a and c at right
               angles: each of a and c meets b and -b, so signs do not matter to pairs
    4 bodies   { A, B, c } and { A, B, -c }, c on the axis, A three points on a circle at height h,
               B the same three turned by an angle, at height -h: an exchange of the partners in a
               pair of A and B undoes the change of sign

A model that sums over few neighbours at a time in its first layer takes them for the same; deeper
layers know more, for neighbours then tell of their own environments.

S. Pozdnyakov, M. Willatt, A. Bartok, C. Ortner, G. Csanyi, M. Ceriotti, Phys. Rev. Lett. 125,
166001 (2020), arXiv:2001.11696.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mlip.data.graph import AtomicGraph
from mlip.potential import Potential

CARBON = 6


class EnvironmentPair(NamedTuple):
    """Two environments with the same correlations of up to ``bodies`` bodies, but not of more."""

    bodies: int
    first: np.ndarray  # (n, 3) neighbours of the centre at the origin, angstrom
    second: np.ndarray

    def graphs(self, cutoff: float) -> tuple[AtomicGraph, AtomicGraph]:
        """Both as clusters of carbon, the centre first."""
        made = []
        for neighbors in (self.first, self.second):
            positions = np.concatenate([np.zeros((1, 3)), neighbors])
            numbers = np.full(len(positions), CARBON)
            made.append(
                AtomicGraph.from_arrays(
                    numbers, positions, np.zeros((3, 3)), np.zeros(3, bool), cutoff
                )
            )
        return made[0], made[1]


def environment_pairs() -> list[EnvironmentPair]:
    """One pair for each of 2, 3 and 4 bodies; nearest atoms are 1 to 1.5 angstrom apart."""

    def polar(radius: float, angle: float, height: float) -> list[float]:
        return [radius * np.cos(angle), radius * np.sin(angle), height]

    two = [[polar(1.4, 0.0, 0.0), polar(1.7, angle, 0.0)] for angle in (1.6, 2.3)]

    a, b, c = (1.5, 0.0), (1.2, 0.9), (1.8, np.pi / 2)  # radius, angle
    rest = [polar(*a, 1.0), polar(*b, 1.0), polar(b[0], b[1] + np.pi, 1.0)]
    three = [[*rest, polar(c[0], sign * c[1], 1.0)] for sign in (1, -1)]

    triangle, turn = (0.0, 1.9, 4.0), 0.7  # scalene, or else a reflection would map A onto B
    ring = [polar(2.0, angle, 0.8) for angle in triangle]
    ring += [polar(2.0, angle + turn, -0.8) for angle in triangle]
    four = [[*ring, [0.0, 0.0, sign * 2.0]] for sign in (1, -1)]
    return [
        EnvironmentPair(bodies, np.array(pair[0]), np.array(pair[1]))
        for bodies, pair in ((2, two), (3, three), (4, four))
    ]


def correlations(neighbors: np.ndarray, bodies: int, seed: int = 0) -> np.ndarray:
    """Sorted projections of the Gram matrices of all tuples of neighbours, (number of tuples,).

    Two environments have the same correlations of ``bodies`` bodies if and, but for a chance of
    measure zero, only if these agree.

    Parameters
    ----------
    neighbors : (n, 3) angstrom, of a centre at the origin
    bodies : 2 or more, the centre included
    seed : of the direction on which Gram matrices are projected
    """
    direction = np.random.default_rng(seed).normal(size=(bodies - 1, bodies - 1))
    gram = neighbors @ neighbors.T
    tuples = np.array(list(itertools.permutations(range(len(neighbors)), bodies - 1)))
    found = gram[tuples[:, :, None], tuples[:, None, :]]  # (tuples, n, n)
    return np.sort((found * direction).sum(axis=(1, 2)))


class Told(NamedTuple):
    """Relative differences of energies of the two environments of a pair."""

    bodies: int
    center: float  # of the centre's energy
    whole: float  # of the energy of the whole cluster


def tell_apart(potential: Potential, pairs: Sequence[EnvironmentPair] | None = None) -> list[Told]:
    """How differently a potential sees the environments of each pair.

    Parameters
    ----------
    potential : in evaluation mode, in float64, with exact symmetry; trained or random
    pairs : of ``environment_pairs`` by default

    Returns
    -------
    list of Told
        |E_1 - E_2| over the larger |E - e0|; rounding, about 1e-14, where it cannot tell.
    """
    found = []
    for pair in environment_pairs() if pairs is None else pairs:
        energies = []
        for graph in pair.graphs(potential.cutoff):
            node = potential(graph)["node_energy"] - potential.e0[graph.atomic_numbers]
            energies.append(torch.stack([node[0], node.sum()]))
        first, second = energies
        size = torch.maximum(first.abs(), second.abs()).clamp(min=torch.finfo(first.dtype).tiny)
        center, whole = ((first - second).abs() / size).tolist()
        found.append(Told(pair.bodies, center, whole))
    return found


def with_random_weights(model: Any, seed: int = 0) -> Potential:
    """Potential in float64 of a model in which no weight is zero, as readouts are at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return Potential(model, torch.zeros(119)).double().eval()
