"""Structures that occur twice, above all in training and in test data, where they flatter the
errors.

Two structures are the same if their cells agree and a permutation of atoms of the same element,
each moved by some lattice vector, brings all positions together within a tolerance.  Candidates
share a composition and, nearly, six sums over atoms that do not change under permutation and
lattice translation; they are then compared atom by atom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from mlip.data.dataset import HDF5Dataset
from mlip.data.hdf5 import Structures

TOLERANCE = 1e-3  # angstrom; text files round to less, and steps of dynamics are longer

Place = tuple[str, int]  # name of a data set, position in it


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal structures, each a tuple of (data set, position)."""

    groups: tuple[tuple[Place, ...], ...]

    @property
    def across(self) -> tuple[tuple[Place, ...], ...]:
        """Groups with members in more than one data set."""
        return tuple(g for g in self.groups if len({name for name, _ in g}) > 1)

    @property
    def within(self) -> tuple[tuple[Place, ...], ...]:
        """Groups inside one data set."""
        return tuple(g for g in self.groups if len({name for name, _ in g}) == 1)

    @property
    def num_across(self) -> int:
        """Structures that repeat one of another data set."""
        return sum(len(g) - 1 for g in self.across)

    def describe(self, limit: int = 10) -> str:
        """Text such as "2 duplicates across data sets: train 12 = valid 3, train 7 = test 0"."""
        named = [" = ".join(f"{name} {k}" for name, k in g) for g in self.across]
        if not named:
            return "no duplicates across data sets"
        more = f", and {len(named) - limit} more" if len(named) > limit else ""
        count = f"{self.num_across} duplicate{'s' * (self.num_across > 1)}"
        return f"{count} across data sets: {', '.join(named[:limit])}{more}"


def find_duplicates(
    datasets: Mapping[str, HDF5Dataset], tolerance: float = TOLERANCE, *, isolated: bool = False
) -> Duplicates:
    """Find exact, wrapped and permuted duplicates within and across data sets.

    Parameters
    ----------
    datasets : by name, for example ``{"train": ..., "valid": ...}``
    tolerance : float, angstrom
    isolated : also report isolated atoms, which are the same wherever they occur

    Notes
    -----
    One pass over the files; memory for a few numbers per structure.
    """
    by_composition: dict[bytes, list[tuple[Place, np.ndarray, np.ndarray]]] = {}
    for name, dataset in datasets.items():
        skip = np.zeros(len(dataset), dtype=bool) if isolated else dataset.isolated
        for k in np.flatnonzero(~skip).tolist():
            s = dataset.structure(k)
            composition = np.sort(s.atomic_numbers).tobytes() + s.pbc.tobytes()
            if s.field is not None:  # another field makes another structure
                composition += s.field.astype(np.float64).tobytes()
            by_composition.setdefault(composition, []).append(((name, k), *_invariants(s)))

    groups: list[list[Place]] = []
    for members in by_composition.values():
        places = [place for place, _, _ in members]
        K = np.stack([k for _, k, _ in members])
        room = np.stack([slope for _, _, slope in members]).max(axis=0) * tolerance + 1e-12
        pairs = cKDTree(K / room).query_pairs(1.0, p=np.inf, output_type="ndarray")
        group_of: dict[int, list[int]] = {}
        for a, b in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
            if b in group_of and group_of[b] is group_of.get(a):
                continue
            first, second = (datasets[name].structure(k) for name, k in (places[a], places[b]))
            if _same(first, second, tolerance):
                merged = sorted({a, b, *group_of.get(a, []), *group_of.get(b, [])})
                group_of.update(dict.fromkeys(merged, merged))
        unique = {id(group): group for group in group_of.values()}
        groups += [[places[k] for k in group] for group in unique.values()]
    rank = {name: number for number, name in enumerate(datasets)}
    found = [tuple(sorted(g, key=lambda p: (rank[p[0]], p[1]))) for g in groups]
    return Duplicates(tuple(sorted(found, key=lambda g: (rank[g[0][0]], g[0][1]))))


def _invariants(s: Structures) -> tuple[np.ndarray, np.ndarray]:
    """Six numbers K that order and wrapping leave alone, and bounds on |dK| per angstrom of moving
    all atoms.

    Sums over atoms of Z cos 2 pi s and Z sin 2 pi s along periodic directions, of Z r and Z r^2
    along the others.
    """
    pbc, z = s.pbc[0], s.atomic_numbers.astype(np.float64)
    inverse = np.linalg.inv(_box(s.cell[0], pbc))
    x = s.positions @ inverse
    angle = 2 * np.pi * x
    K = np.concatenate(
        [z @ np.where(pbc, np.cos(angle), x), z @ np.where(pbc, np.sin(angle), x * x)]
    )
    per_angstrom = 2 * np.pi * np.linalg.norm(inverse, axis=0)
    first = np.where(pbc, z.sum() * per_angstrom, z.sum())
    second = np.where(pbc, z.sum() * per_angstrom, z @ (2 * np.abs(x)) + z.sum())
    return K, np.concatenate([first, second])


def _box(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Cell whose non-periodic rows are Cartesian-like unit vectors that depend on the periodic rows
    only."""
    if not pbc.any():
        return np.eye(3)
    box = cell.copy()
    if not pbc.all():
        free = np.linalg.svd(cell[pbc])[2][pbc.sum() :]
        # The basis of the complement is arbitrary; projecting the axes onto it is not.
        projector = free.T @ free
        axes = projector[np.argsort(-np.linalg.norm(projector, axis=1), kind="stable")]
        chosen, _ = np.linalg.qr(axes[: len(free)].T)
        box[~pbc] = chosen.T
    return box


def _same(a: Structures, b: Structures, tolerance: float) -> bool:
    pbc = a.pbc[0]
    if (pbc != b.pbc[0]).any() or (np.abs(a.cell[0] - b.cell[0])[pbc] > tolerance).any():
        return False
    box = _box(a.cell[0], pbc)
    inverse = np.linalg.inv(box)
    heights = 1.0 / np.linalg.norm(inverse, axis=0)
    for z in np.unique(a.atomic_numbers):
        x, y = (s.positions[s.atomic_numbers == z] @ inverse for s in (a, b))
        if len(x) != len(y):
            return False
        period = np.where(pbc, 1.0, 0.0)  # 0: the tree does not wrap there
        x, y = (np.where(pbc, (c % 1.0) % 1.0, c) for c in (x, y))
        # Scaled to heights, one step along a fractional axis is at most the distance in angstrom.
        distance, match = cKDTree(x * heights, boxsize=period * heights).query(y * heights)
        if (distance > 2 * tolerance).any() or len(np.unique(match)) != len(match):
            return False
        difference = y - x[match]
        difference -= np.where(pbc, np.round(difference), 0.0)
        if (np.linalg.norm(difference @ box, axis=1) > tolerance).any():
            return False
    return True
