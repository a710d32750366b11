"""Structures that occur twice, above all in training and in test data, where they flatter the errors.

Two structures are the same if their cells agree and a permutation of atoms of the same element, each moved by some lattice
vector, brings all positions together within a tolerance.  Candidates share a composition and, nearly, one number K that
does not change under permutation and lattice translation; candidates are then compared atom by atom.
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
        plural = "s" if self.num_across > 1 else ""
        return f"{self.num_across} duplicate{plural} across data sets: {', '.join(named[:limit])}{more}"


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
    places: list[Place] = []
    keys: list[tuple[int, int, float]] = []
    for name, dataset in datasets.items():
        skip = np.zeros(len(dataset), dtype=bool) if isolated else dataset.isolated
        for k in np.flatnonzero(~skip):
            places.append((name, int(k)))
            keys.append(_key(dataset.structure(int(k))))
    order = sorted(range(len(keys)), key=lambda n: keys[n])

    groups: list[list[Place]] = []
    window: list[tuple[tuple[int, int, float], Structures, list[Place]]] = []
    for n in order:
        name, k = places[n]
        key = keys[n]
        # Members of a window have the same composition and a K that rounding may have moved.
        window = [w for w in window if w[0][:2] == key[:2] and key[2] - w[0][2] < _spread(key, tolerance)]
        structure = datasets[name].structure(k)
        for _, first, group in window:
            if _same(first, structure, tolerance):
                group.append((name, k))
                break
        else:
            group = [(name, k)]
            groups.append(group)
            window.append((key, structure, group))
    rank = {name: number for number, name in enumerate(datasets)}
    found = [tuple(sorted(g, key=lambda p: (rank[p[0]], p[1]))) for g in groups if len(g) > 1]
    return Duplicates(tuple(sorted(found, key=lambda g: (rank[g[0][0]], g[0][1]))))


def _key(s: Structures) -> tuple[int, int, float]:
    """(number of atoms, hash of the sorted elements, K)."""
    z = np.sort(s.atomic_numbers)
    return len(z), hash(z.tobytes()), _invariant(s)


def _invariant(s: Structures) -> float:
    """K = sum_i Z_i (sum_periodic cos 2 pi s_i + sum_free r_i / 10 angstrom): unchanged by order and wrapping."""
    pbc, z = s.pbc[0], s.atomic_numbers.astype(float)
    box = _box(s.cell[0], pbc)
    coordinates = s.positions @ np.linalg.inv(box)
    terms = np.where(pbc, np.cos(2 * np.pi * coordinates), coordinates / 10)
    return float(z @ terms.sum(axis=1))


def _spread(key: tuple[int, int, float], tolerance: float) -> float:
    # |dK| <= sum_i Z_i |grad| tolerance with Z <= 118 and a gradient below 2 pi per angstrom of height
    return key[0] * 118 * 2 * np.pi * 3 * tolerance


def _box(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Cell whose non-periodic rows are Cartesian-like unit vectors that depend on the periodic rows only."""
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
