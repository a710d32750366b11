"""One crystal, many cells: predictions must not depend on how a crystal is described.

The descriptions are those of ``mlip.evaluation.orbits.Cells`` (sheared, left-handed and compact
cells, supercells, shifted origins), and the primitive cell where there is one smaller than the cell
given.  Energy per atom, the forces of each atom and the stress are compared: no cell is turned.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from ase.geometry import minkowski_reduce
from torch import Tensor

from mlip.data.graph import AtomicGraph
from mlip.evaluation.orbits import Cells
from mlip.potential import Potential

TOLERANCE = 1e-6  # angstrom, of translations that leave a crystal as it is


@dataclass(frozen=True)
class CellChoices:
    """Predictions for one crystal by T descriptions, in the order of the given atoms."""

    names: tuple[str, ...]
    energy: Tensor  # (T,) eV/atom
    forces: Tensor  # (T, N, 3) eV/angstrom
    stress: Tensor  # (T, 3, 3) eV/angstrom^3, NaN unless periodic in three directions

    def deviations(self) -> dict[str, Tensor]:
        """(T,) largest deviation of each description from the first one; eV/atom, eV/angstrom,
        eV/angstrom^3."""
        found = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        return {q: (x - x[0]).abs().flatten(1).amax(1) if x.dim() > 1 else (x - x[0]).abs()
                for q, x in found.items()}  # fmt: skip


def cell_choices(potential: Potential, graph: AtomicGraph) -> CellChoices:
    """Evaluate one crystal by all its descriptions.

    Parameters
    ----------
    potential : in evaluation mode
    graph : one structure, periodic in one direction at least

    Raises
    ------
    ValueError
        For a molecule, or a batch of several structures.
    """
    if graph.num_structures != 1 or not bool(graph.pbc.any()):
        raise ValueError("cells can be chosen for one structure with periodic directions")
    graph, cutoff = graph.replace().to("cpu"), potential.cutoff
    described = [
        (name, image.graph, image.atoms)
        for name, image in zip(
            Cells().coordinates()["cell"].tolist(), Cells().images(graph, cutoff), strict=True
        )
        if image is not None
    ]
    if (smaller := primitive(graph, cutoff)) is not None:
        described.append(("primitive", *smaller))
    energies, forces, stresses = [], [], []
    for _, other, atoms in described:
        out = potential(other.to(potential.e0.device), stress=True)
        energies.append(out["energy"][0].cpu() / len(other.positions))
        forces.append(out["forces"].cpu()[atoms].mean(dim=0))
        stresses.append(out["stress"][0].cpu())
    names = tuple(name for name, _, _ in described)
    return CellChoices(names, torch.stack(energies), torch.stack(forces), torch.stack(stresses))


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
        images = _where(X + t, Z, X, cell)
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


def _where(moved: np.ndarray, Z: np.ndarray, X: np.ndarray, cell: np.ndarray) -> np.ndarray | None:
    """(N,) the atom of the same element on whose site each moved atom lies; None if one has
    none."""
    difference = (moved[:, None] - X) @ np.linalg.inv(cell)
    distance = np.linalg.norm((difference - np.rint(difference)) @ cell, axis=-1)  # (N, N)
    distance[Z[:, None] != Z] = np.inf
    nearest = distance.argmin(axis=1)
    return nearest if distance.min(axis=1).max() < TOLERANCE else None
