"""Neighbour lists: the one place where edges are made.

The search runs in a box of our own making.  Periodic directions keep their lattice vectors (reduced
when they are strongly skewed); every other direction gets a unit vector orthogonal to them and just
enough room for the atoms. The answer therefore depends neither on the vacuum, nor on the origin,
nor on which of the equivalent cells or images the user wrote down.  Dense systems go to matscipy's
cell grid; where that grid would have far more cells than there are atoms (a molecule in a 10^4
angstrom box) a k-d tree over atoms and their images takes over.  Cost O(N + E).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase.geometry import minkowski_reduce
from matscipy.neighbours import neighbour_list
from scipy.spatial import cKDTree

OVERLAP = 1e-3  # angstrom; closer pairs are a mistake of the input, not a structure
MIN_HEIGHT = 1e-2  # angstrom between opposite faces; a thinner periodic cell is flat
FAR = 1e9  # angstrom from the origin; beyond it float64 has no digits left for distances
MAX_EDGES = 200_000_000
CELLS_PER_ATOM = 8  # above this, matscipy's grid costs more than the tree
MIN_GRID = 4096  # cells that cost nothing worth mentioning

_AXES = "abc"


def check_cell(cell: np.ndarray, pbc: np.ndarray) -> None:
    """Refuse a cell that does not span its periodic directions.

    Raises
    ------
    ValueError
        For non-finite numbers, a zero vector in a periodic direction, or periodic vectors that are
        (nearly) dependent.
    """
    if not np.isfinite(cell).all():
        raise ValueError("the cell has a non-finite entry")
    periodic = cell[pbc]
    if len(periodic) == 0:
        return
    lengths = np.linalg.norm(periodic, axis=1)
    if (lengths < MIN_HEIGHT).any():
        axis = _AXES[np.flatnonzero(pbc)[int(lengths.argmin())]]
        raise ValueError(
            f"pbc is set along {axis} but that cell vector is (nearly) zero; give the vector or "
            f"clear pbc"
        )
    if pbc.all() and abs(np.linalg.det(cell)) > 1e-3 * lengths.prod():
        return
    # Relative to the lengths: a skewed cell is legal, a flat one is not.
    spread = np.linalg.svd(periodic / lengths[:, None], compute_uv=False)
    if spread[-1] < 1e-9:
        raise ValueError(_flat(pbc))


def _flat(pbc: np.ndarray) -> str:
    axes = ", ".join(_AXES[k] for k in np.flatnonzero(pbc))
    return f"the cell is flat: the periodic vectors {axes} are linearly dependent"


def neighbor_list(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs closer than ``cutoff``, both directions, images included, no self pair at zero
    shift.

    Parameters
    ----------
    positions : (N, 3), angstrom, wrapped or not
    cell : (3, 3), rows are lattice vectors, of either handedness; zero rows are legal where ``pbc``
        is False
    pbc : (3,) bool
    cutoff : float, angstrom

    Returns
    -------
    edge_index : (2, E) int64
        Row 0 neighbour j, row 1 centre i; sorted by i, then j, then shift.
    shifts : (E, 3) float64
        Integers S with ``vectors = r_j - r_i + S @ cell`` for the positions and the cell as given.

    Raises
    ------
    ValueError
        For positions that are not finite or too far away, an unusable cell, overlapping atoms, or
        more pairs than memory could hold.
    """
    positions, cell = np.asarray(positions, dtype=np.float64), np.asarray(cell, dtype=np.float64)
    pbc = np.asarray(pbc, dtype=bool)
    room = search_room(positions, cell, pbc, cutoff)
    if room is None:
        return np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3))
    num_atoms = len(room.home)
    cells = np.maximum(np.floor(room.heights / cutoff), 1).prod()
    search = _tree_pairs if cells > max(CELLS_PER_ATOM * num_atoms, MIN_GRID) else _grid_pairs
    i, j, shift = search(room.positions, room.box, pbc, cutoff, room.heights)
    shift += (room.home[i] - room.home[j]).astype(np.int64)
    if room.reduction is not None:
        shift = shift @ room.reduction
    shift[:, ~pbc] = 0  # a non-periodic direction has no images
    _check_overlap(positions.reshape(-1, 3), cell, i, j, shift)
    order = _order(i, j, shift, num_atoms)
    return np.stack([j[order], i[order]]), shift[order].astype(np.float64)


class SearchRoom(NamedTuple):
    """The atoms in a box in which pairs are searched for."""

    positions: np.ndarray  # (N, 3) in the box
    box: np.ndarray  # (3, 3)
    heights: np.ndarray  # (3,) angstrom between opposite faces
    home: np.ndarray  # (N, 3) turns of the box that were taken off the given positions
    reduction: np.ndarray | None  # (3, 3) integers: shift in cells = shift in boxes @ reduction


def search_room(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> SearchRoom | None:
    """Where to search for the pairs of a structure, as of ``neighbor_list``, which is checked; None
    without atoms."""
    positions = positions.reshape(-1, 3)
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"cutoff must be a positive length in angstrom, got {cutoff}")
    finite = np.isfinite(positions)
    if not finite.all():
        atom = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise ValueError(f"atom {atom} has a non-finite position {positions[atom].tolist()}")
    if np.abs(positions).max(initial=0.0) > FAR:
        atom = int(np.abs(positions).max(axis=1).argmax())
        raise ValueError(
            f"atom {atom} is at {positions[atom].tolist()}, more than {FAR:g} angstrom away: "
            f"distances are lost to rounding; move the structure to the origin"
        )
    check_cell(cell, pbc)
    num_atoms = len(positions)
    if num_atoms == 0:
        return None

    box, reduction = _search_box(cell, pbc)
    inverse = np.linalg.inv(box)
    fractional = positions @ inverse
    # Home of every atom in the box; the pair's shift later gets the difference of the homes back.
    home = np.where(pbc, np.floor(fractional), 0.0)
    wrapped = positions - home @ box
    if not pbc.all():
        free = ~pbc
        low = fractional[:, free].min(axis=0)
        extent = fractional[:, free].max(axis=0) - low
        origin = np.zeros(3)
        origin[free] = low - cutoff  # box vectors are unit vectors there, so these are angstroms
        wrapped -= origin @ box
        box[free] *= (extent + 2 * cutoff)[:, None]
        inverse[:, free] /= extent + 2 * cutoff

    heights = 1.0 / np.sqrt((inverse * inverse).sum(axis=0))
    if pbc.any() and heights[pbc].min() < MIN_HEIGHT:
        raise ValueError(_flat(pbc))
    images = np.where(pbc, np.ceil(2 * cutoff / heights) + 1, 1.0)
    if (
        num_atoms * images.prod() > MAX_EDGES
        or num_atoms * _mean_neighbors(num_atoms, box, pbc, cutoff) > MAX_EDGES
    ):
        raise ValueError(
            f"{num_atoms} atoms in a cell with {heights.min():.3g} angstrom between faces have "
            f"more than {MAX_EDGES} pairs within {cutoff} angstrom; check the cell and its unit"
        )
    return SearchRoom(wrapped, box, heights, home, reduction)


def _search_box(cell: np.ndarray, pbc: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Box (3, 3) of the search; periodic rows = integer matrix @ cell, other rows orthonormal to
    them and each other."""
    box, reduction = cell.copy(), None
    if pbc.any() and not pbc.all():
        _, _, basis = np.linalg.svd(cell[pbc])  # the last rows span the complement
        box[~pbc] = basis[pbc.sum() :]
    elif not pbc.any():
        return np.eye(3), None
    if pbc.sum() > 1:
        inverse = np.linalg.inv(box)
        lengths, inverse_heights = (box * box).sum(axis=1), (inverse * inverse).sum(axis=0)
        if (lengths * inverse_heights > 6.0)[pbc].any():  # a height below 0.4 of its vector
            # Thin parallelepipeds have many images within the cutoff; a compact cell of the same
            # lattice has few.
            _, reduction = minkowski_reduce(box, pbc)
            box = np.where(pbc[:, None], reduction @ box, box)
            reduction = np.where(np.outer(pbc, pbc), reduction, 0)
    return box, reduction


def _mean_neighbors(num_atoms: int, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> float:
    return 4.2 * cutoff**3 * num_atoms / abs(np.linalg.det(box)) if pbc.all() else 0.0


def _grid_pairs(
    positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float, heights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    i, j, shift = neighbour_list(
        "ijS", positions=positions, cell=box, pbc=pbc, cutoff=float(cutoff)
    )
    return i.astype(np.int64), j.astype(np.int64), shift.astype(np.int64)


def _tree_pairs(
    positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float, heights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs by a k-d tree over the atoms and those images that lie within the cutoff of the box."""
    num_atoms = len(positions)
    points, owner, shifts = (
        positions,
        np.arange(num_atoms),
        np.zeros((num_atoms, 3), dtype=np.int64),
    )
    for axis in np.flatnonzero(pbc):
        reach = int(np.ceil(cutoff / heights[axis]))
        steps = np.array([s for s in range(-reach, reach + 1) if s != 0])
        margin = cutoff / heights[axis] + 1e-9
        x = (points @ np.linalg.inv(box)[:, axis])[None] + steps[:, None]  # (steps, points)
        which, point = np.nonzero((x > -margin) & (x < 1 + margin))
        moved = shifts[point].copy()
        moved[:, axis] += steps[which]
        points = np.concatenate([points, points[point] + steps[which, None] * box[axis]])
        owner = np.concatenate([owner, owner[point]])
        shifts = np.concatenate([shifts, moved])
    found = cKDTree(positions).query_ball_tree(cKDTree(points), cutoff)
    i = np.repeat(np.arange(num_atoms), [len(row) for row in found])
    image = np.fromiter((k for row in found for k in row), dtype=np.int64, count=len(i))
    keep = (image != i) & (np.linalg.norm(points[image] - positions[i], axis=1) < cutoff)
    i, image = i[keep], image[keep]
    return i, owner[image], shifts[image]


def _check_overlap(
    positions: np.ndarray, cell: np.ndarray, i: np.ndarray, j: np.ndarray, shift: np.ndarray
) -> None:
    if len(i) == 0:
        return
    vectors = positions[j] - positions[i] + shift @ cell
    squared = np.einsum("ed,ed->e", vectors, vectors)
    edge = int(squared.argmin())
    if squared[edge] < OVERLAP**2:
        a, b = sorted((int(i[edge]), int(j[edge])))
        raise ValueError(
            f"atoms {a} and {b} overlap: they are {squared[edge] ** 0.5:.1e} angstrom apart"
        )


def _order(i: np.ndarray, j: np.ndarray, shift: np.ndarray, num_atoms: int) -> np.ndarray:
    """Permutation that sorts by (i, j, shift)."""
    if len(i) == 0:
        return np.zeros(0, dtype=np.int64)
    low = shift.min(axis=0)
    span = (shift.max(axis=0) - low + 1).tolist()
    if (
        float(num_atoms) ** 2 * span[0] * span[1] * span[2] < 2**62
    ):  # one integer key sorts faster than five columns
        key = i * num_atoms + j
        for axis in range(3):
            key = key * span[axis] + (shift[:, axis] - low[axis])
        return np.argsort(key, kind="stable")
    return np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], j, i))
