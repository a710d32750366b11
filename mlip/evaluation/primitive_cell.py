"""The smallest cell of a crystal, from the translations that bring each atom to one of its kind."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from ase.geometry import minkowski_reduce
from torch import Tensor

from mlip.data.graph import AtomicGraph

TOLERANCE = 1e-6  # angstrom, of translations that leave a crystal as it is
FEW = 4  # atoms by which nearly all translations that do not are found out


def primitive(graph: AtomicGraph, cutoff: float) -> tuple[AtomicGraph, Tensor] | None:
    """A smallest cell of a crystal that is periodic in three directions.

    Returns
    -------
    (graph, atoms) or None
        ``atoms`` (1, N): which of its atoms is atom i.  None where the cell is the smallest already
        (to ``TOLERANCE``), and for structures with a charge or spin, which belong to the cell.
    """
    if not bool(graph.pbc.all()) or "charge" in graph or "spin" in graph:
        return None
    Z, X = graph.atomic_numbers.numpy(), graph.positions.numpy()
    cell = minkowski_reduce(graph.cell[0].numpy())[0]
    kinds, counts = np.unique(Z, return_counts=True)
    rarest = np.flatnonzero(Z == kinds[counts.argmin()])
    found = []  # (translation, image of each atom under it)
    for k in rarest:
        t = X[k] - X[rarest[0]]
        if _where(Z[:FEW], X[:FEW] + t, Z, X, cell) is None:
            continue
        images = _where(Z, X + t, Z, X, cell)
        if images is not None:
            found.append((t, images))
    if len(found) == 1:  # only the lattice itself
        return None
    shifts = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ cell
    vectors = np.concatenate([t + shifts for t, _ in found])
    lengths = np.linalg.norm(vectors, axis=1)
    vectors = vectors[np.argsort(lengths, kind="stable")][(lengths < TOLERANCE).sum() :]
    volume = abs(np.linalg.det(cell)) / len(found)
    small = next(
        np.array(rows)
        for rows in itertools.combinations(vectors, 3)
        if abs(abs(np.linalg.det(np.array(rows))) / volume - 1) < 0.01
    )
    members = np.min([images for _, images in found], axis=0)  # (N,) first atom of each class
    order, atoms = np.unique(members, return_inverse=True)
    field = {"field": graph.field} if "field" in graph else {}
    made = AtomicGraph.from_arrays(Z[order], X[order], small, graph.pbc[0].numpy(), cutoff, **field)
    return made, torch.from_numpy(atoms.reshape(1, -1))


def _where(
    kinds: np.ndarray, moved: np.ndarray, Z: np.ndarray, X: np.ndarray, cell: np.ndarray
) -> np.ndarray | None:
    """(n,) the atom of the same element on whose site each of n moved atoms lies; None if one has
    none."""
    difference = (moved[:, None] - X) @ np.linalg.inv(cell)
    distance = np.linalg.norm((difference - np.rint(difference)) @ cell, axis=-1)  # (n, N)
    distance[kinds[:, None] != Z] = np.inf
    nearest = distance.argmin(axis=1)
    return nearest if distance.min(axis=1).max() < TOLERANCE else None
