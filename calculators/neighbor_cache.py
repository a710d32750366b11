"""Neighbour lists reused from step to step, with the same edges as a fresh list to the bit.

A list made with cutoff + skin stays complete while no pair can have come from outside it to within
the cutoff. If the cell has gone from C0 to C = C0 F and atom k is displaced by d_k = r_k - r0_k F
from where the strain alone would have put it, every pair left out, |v0| >= cutoff + skin, obeys

    |v| = |v0 F + d_j - d_i|  >=  s_min(F) (cutoff + skin) - 2 max_k |d_k - d|,

with s_min the smallest singular value and d any common translation.  The list is made anew when
this bound is no longer above the cutoff: exact for moving atoms and for strained, sheared and
rotated cells alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase.geometry import complete_cell

from mlip.data.neighbors import neighbor_list

SLACK = 1e-9  # angstrom; rounding of the bound itself


class Edges(NamedTuple):
    """Pairs within the cutoff, ordered by (i, j, shift)."""

    edge_index: np.ndarray  # (2, E) int64, neighbour j and centre i
    shifts: np.ndarray  # (E, 3) float64, integers
    lengths: np.ndarray  # (E,) angstrom


class _Reference(NamedTuple):
    """The list with skin, and the geometry for which it was made."""

    positions: np.ndarray  # (N, 3)
    pbc: np.ndarray  # (3,)
    cell: np.ndarray  # (3, 3), non-periodic directions completed
    edge_index: np.ndarray  # (2, E)
    shifts: np.ndarray  # (E, 3)


class NeighborCache:
    """Edges within ``cutoff`` of a structure that changes little from call to call.

    Parameters
    ----------
    cutoff : float, angstrom
    skin : float, angstrom
        Extra radius of the stored list.  It changes the time, never the result.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        if not (np.isfinite(skin) and skin >= 0):
            raise ValueError(f"skin = {skin} angstrom; give a number >= 0")
        self.cutoff, self.skin = float(cutoff), float(skin)
        self.num_builds = 0  # how often a list was made
        self._reference: _Reference | None = None
        self._offsets: tuple[np.ndarray, np.ndarray] | None = None  # cell, shifts @ cell

    def edges(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> Edges:
        """Edges of a structure: positions (N, 3) and cell (3, 3) in angstrom, pbc (3,)."""
        full = complete_cell(cell * np.asarray(pbc, dtype=bool)[:, None])
        reference = self._reference
        if reference is None or not self._complete(reference, positions, full, pbc):
            reference = self._build(positions, cell, full, pbc)
        j, i = reference.edge_index
        vectors = positions.take(j, axis=0)
        vectors -= positions.take(i, axis=0)
        vectors += self._cell_offsets(reference, full)
        squares = np.einsum("ec,ec->e", vectors, vectors)
        kept = np.flatnonzero(squares < self.cutoff**2)
        return Edges(
            reference.edge_index.take(kept, axis=1),
            reference.shifts.take(kept, axis=0),
            np.sqrt(squares.take(kept)),
        )

    def _complete(
        self, old: _Reference, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
    ) -> bool:
        if len(old.positions) != len(positions) or not np.array_equal(old.pbc, pbc):
            return False
        reach, start = self.cutoff + self.skin, old.positions
        if not np.array_equal(old.cell, cell):
            F = np.linalg.solve(old.cell, cell)
            reach *= np.linalg.svd(F, compute_uv=False)[-1]
            start = start @ F
        d = positions - start
        d -= d.mean(axis=0)
        moved = np.sqrt(np.einsum("kc,kc->k", d, d).max())
        return bool(reach - 2 * moved > self.cutoff + SLACK)

    def _build(
        self, positions: np.ndarray, cell: np.ndarray, full: np.ndarray, pbc: np.ndarray
    ) -> _Reference:
        index, shifts = neighbor_list(positions, cell, pbc, self.cutoff + self.skin)
        # One order for all lists, so that sums over edges have the same bits whenever the list was
        # made.
        order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], index[0], index[1]))
        self._reference = _Reference(
            positions.copy(), np.array(pbc, dtype=bool), full, index[:, order], shifts[order]
        )
        self._offsets = None
        self.num_builds += 1
        return self._reference

    def _cell_offsets(self, reference: _Reference, cell: np.ndarray) -> np.ndarray:
        if self._offsets is None or not np.array_equal(self._offsets[0], cell):
            S = reference.shifts
            # Written out: a matrix product may round differently for other numbers of edges.
            offsets = S[:, :1] * cell[0] + S[:, 1:2] * cell[1] + S[:, 2:] * cell[2]
            self._offsets = (cell.copy(), offsets)
        return self._offsets[1]
