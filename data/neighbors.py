"""Neighbour lists: the one place where edges are made."""

from __future__ import annotations

import numpy as np
from ase.geometry import complete_cell
from matscipy.neighbours import neighbour_list


def neighbor_list(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs closer than ``cutoff``, both directions, images included, no self pair at zero shift.

    Parameters
    ----------
    positions : (N, 3), angstrom, wrapped or not
    cell : (3, 3), rows are lattice vectors; zero rows where there are none
    pbc : (3,) bool
    cutoff : float, angstrom

    Returns
    -------
    edge_index : (2, E) int64
        Row 0 neighbour j, row 1 centre i; sorted by i.
    shifts : (E, 3) float64
        Integers S with ``vectors = r_j - r_i + S @ cell``.
    """
    full = complete_cell(cell)
    i, j, S = neighbour_list("ijS", positions=positions, cell=full, pbc=pbc, cutoff=cutoff)
    return np.stack([j, i]).astype(np.int64), S.astype(np.float64)
