"""Neighbour lists reused from step to step, with the same edges as a fresh list to the bit.

A list made with cutoff + skin stays complete while no pair can have come from outside it to within
the cutoff. If the cell has gone from C0 to C = C0 F and atom k is displaced by d_k = r_k - r0_k F
from where the strain alone would have put it, every pair left out, |v0| >= cutoff + skin, obeys

    |v| = |v0 F + d_j - d_i|  >=  s_min(F) (cutoff + skin) - 2 max_k |d_k - d|,

with s_min the smallest singular value and d any common translation.  The list is made anew when
this bound is no longer above the cutoff: exact for moving atoms and for strained, sheared and
rotated cells alike.

Lists of large systems are made and kept on the GPU, if the model is there: no list is sent to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from ase.geometry import complete_cell
from torch import Tensor

from mlip.data.device_neighbors import neighbor_list_on
from mlip.data.neighbors import neighbor_list

SLACK = 1e-9  # angstrom; rounding of the bound itself
LARGE = 2000  # atoms; lists of fewer are made by the processor before a GPU has begun


class Edges(NamedTuple):
    """Pairs within the cutoff, ordered by (i, j, shift)."""

    edge_index: Tensor  # (2, E) int64, neighbour j and centre i
    shifts: Tensor  # (E, 3) float64, integers
    lengths: Tensor  # (E,) float64, angstrom


class Reference(NamedTuple):
    """A list with skin, and the geometry for which it was made."""

    positions: np.ndarray  # (N, 3)
    pbc: np.ndarray  # (3,)
    cell: np.ndarray  # (3, 3), non-periodic directions completed
    edge_index: Tensor  # (2, E)
    shifts: Tensor  # (E, 3)


def list_with_skin(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, radius: float, device: torch.device
) -> Reference:
    """All pairs within ``radius``, cutoff and skin; the cell's other directions are completed."""
    if device.type != "cpu" and len(positions) >= LARGE:
        index, shifts = neighbor_list_on(device, positions, cell, pbc, radius)
    else:
        index, shifts = (torch.from_numpy(x) for x in neighbor_list(positions, cell, pbc, radius))
    return Reference(positions.copy(), np.array(pbc, dtype=bool), cell.copy(), index, shifts)


def cell_offsets(shifts: Tensor, cell: Tensor) -> Tensor:
    """(E, 3) shifts @ cell, for one cell (3, 3) or one of each edge (E, 3, 3)."""
    # Written out: a matrix product may round differently for other numbers of edges.
    a, b, c = cell.unbind(dim=-2)
    return shifts[:, :1] * a + shifts[:, 1:2] * b + shifts[:, 2:] * c


class Within:
    """Those pairs of a list that are within ``cutoff``, angstrom: the same tensors as long as they
    are the same pairs, so that what was made of them need not be made again.

    Parameters
    ----------
    edge_index, shifts : (2, E), (E, 3) the list
    """

    def __init__(self, cutoff: float, edge_index: Tensor, shifts: Tensor) -> None:
        self.cutoff, self.edge_index, self.shifts = cutoff, edge_index, shifts
        self.neighbors, self.centers = edge_index.unbind()
        self._last: tuple[Tensor, ...] | None = None

    def edges(self, positions: Tensor, offsets: Tensor) -> Edges:
        """For positions (N, 3), and shifts in angstrom (E, 3)."""
        vectors = positions.index_select(0, self.neighbors)
        vectors -= positions.index_select(0, self.centers)
        vectors += offsets
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        inside, last = lengths < self.cutoff, self._last
        # For the answer the host would wait for a GPU; of many pairs there, some always change.
        known = last is not None and inside.device.type == "cpu" and torch.equal(inside, last[0])
        if last is None or not known:
            kept = inside.nonzero()[:, 0]
            index, shifts = self.edge_index.index_select(1, kept), self.shifts.index_select(0, kept)
            # All at once, whatever interrupts.
            last = self._last = (inside, kept, index, shifts)
        _, kept, index, shifts = last
        return Edges(index, shifts, lengths.index_select(0, kept))


class NeighborCache:
    """Edges within ``cutoff`` of a structure that changes little from call to call.

    Parameters
    ----------
    cutoff : float, angstrom
    skin : float, angstrom
        Extra radius of the stored list.  It changes the time, never the result.
    device : where edges of large systems are wanted; those of others are on the processor
    """

    def __init__(self, cutoff: float, skin: float, device: torch.device | str = "cpu") -> None:
        if not (np.isfinite(skin) and skin >= 0):
            raise ValueError(f"skin = {skin} angstrom; give a number >= 0")
        self.cutoff, self.skin = float(cutoff), float(skin)
        self.device = torch.device(device)
        self.num_builds = 0  # how often a list was made
        self._reference: Reference | None = None
        self._within: Within | None = None
        self._offsets: tuple[np.ndarray, Tensor] | None = None  # cell, shifts @ cell

    def anew(self, skin: float | None = None) -> NeighborCache:
        """One without a list, with another skin or the same."""
        return NeighborCache(self.cutoff, self.skin if skin is None else skin, self.device)

    def edges(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> Edges:
        """Edges of a structure: positions (N, 3) and cell (3, 3) in angstrom, pbc (3,)."""
        pbc = np.asarray(pbc, dtype=bool)
        full = cell if pbc.all() else complete_cell(cell * pbc[:, None])
        reference, within = self._reference, self._within
        complete = reference is not None and self._complete(reference, positions, full, pbc)
        if reference is None or within is None or not complete:
            radius = self.cutoff + self.skin
            reference = list_with_skin(positions, full, pbc, radius, self.device)
            within = Within(self.cutoff, reference.edge_index, reference.shifts)
            self._reference, self._within, self._offsets = reference, within, None
            self.num_builds += 1
        r = torch.from_numpy(positions).to(reference.edge_index.device)
        return within.edges(r, self._cell_offsets(reference, full))

    def _complete(
        self, old: Reference, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
    ) -> bool:
        if len(old.positions) != len(positions) or not np.array_equal(old.pbc, pbc):
            return False
        reach, start = self.cutoff + self.skin, old.positions
        if not np.array_equal(old.cell, cell):
            F = np.linalg.solve(old.cell, cell)
            reach *= np.linalg.svd(F, compute_uv=False)[-1]
            start = start @ F
        d = positions - start
        d -= d.sum(axis=0) / len(d)
        moved = np.sqrt(np.einsum("kc,kc->k", d, d).max())
        return bool(reach - 2 * moved > self.cutoff + SLACK)

    def _cell_offsets(self, reference: Reference, cell: np.ndarray) -> Tensor:
        if self._offsets is None or not np.array_equal(self._offsets[0], cell):
            S = reference.shifts
            self._offsets = (cell.copy(), cell_offsets(S, torch.from_numpy(cell).to(S.device)))
        return self._offsets[1]
