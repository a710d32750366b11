"""Neighbour lists of many structures at a time, each reused from step to step as by
``NeighborCache``.

Which lists are still complete, vectors, lengths and the cutoff are computed for all structures
together; a list is made anew for its structure alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlip.calculators.neighbor_cache import (
    SLACK,
    Edges,
    Reference,
    Within,
    cell_offsets,
    list_with_skin,
)
from mlip.calculators.structure_arrays import Problems, StructureArrays, problems_of


class BatchedNeighbors:
    """Edges within ``cutoff`` of M structures that change little from call to call.

    Parameters
    ----------
    cutoff, skin : float, angstrom
        As of ``NeighborCache``.
    device : where the edges are wanted
    """

    def __init__(self, cutoff: float, skin: float, device: torch.device) -> None:
        self.cutoff, self.skin, self.device = cutoff, skin, device
        self.num_builds = 0  # how often a list was made
        self._references: list[Reference | None] = []
        self._joined: _Joined | None = None  # of the references as they are

    def admit(self, number: int) -> None:
        """Make room for structures behind the others."""
        self._references += [None] * number
        self._joined = None

    def keep(self, which: np.ndarray) -> None:
        """Forget the other structures."""
        self._references = [r for r, kept in zip(self._references, which, strict=True) if kept]
        self._joined = None

    def update(
        self, batch: StructureArrays, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
    ) -> Problems:
        """Make lists anew where they may have become incomplete.

        Parameters
        ----------
        batch : says whose atoms are whose
        positions : (A, 3), angstrom
        cell : (M, 3, 3), angstrom, non-periodic directions completed
        pbc : (M, 3)

        Returns
        -------
        Problems
            Of structures that have no list.
        """

        def build(k: int) -> None:
            self._references[k] = list_with_skin(
                positions[batch.rows(k)], cell[k], pbc[k], self.cutoff + self.skin, self.device
            )
            self._joined = None
            self.num_builds += 1

        missing = [k for k, reference in enumerate(self._references) if reference is None]
        problems = problems_of(build, missing)
        if not problems:
            old = np.flatnonzero(~self._complete(batch, positions, cell))
            problems = problems_of(build, old.tolist())
        return problems

    def edges(self, positions: Tensor, cell: Tensor) -> Edges:
        """Edges of all structures after ``update``: positions (A, 3) and cell (M, 3, 3) as given to
        it, on the device; one that has not changed is best the same object."""
        lists = self._lists()
        if lists.offsets is None or lists.offsets[0] is not cell:
            of_edges = cell.index_select(0, lists.owner)
            lists.offsets = (cell, cell_offsets(lists.shifts, of_edges))
        return lists.within.edges(positions, lists.offsets[1])

    def _complete(
        self, batch: StructureArrays, positions: np.ndarray, cell: np.ndarray
    ) -> np.ndarray:
        """(M,) the bound of ``NeighborCache``."""
        old = self._lists()
        reach, start = np.full(len(batch), self.cutoff + self.skin), old.positions
        if not np.array_equal(old.cell, cell):
            F = np.linalg.solve(old.cell, cell)
            # The least singular value; rounding of its square is far below the slack.
            squares = np.linalg.eigvalsh(F @ F.transpose(0, 2, 1))[:, 0]
            reach *= np.sqrt(np.maximum(squares, 0))
            start = (start[:, None] @ F[batch.owner])[:, 0]
        d = positions - start
        d -= (batch.sums(d) / batch.sizes[:, None])[batch.owner]
        moved = np.sqrt(batch.maxima(np.einsum("kc,kc->k", d, d)))
        return reach - 2 * moved > self.cutoff + SLACK

    def _lists(self) -> _Joined:
        if self._joined is None:
            self._joined = _Joined(self._references, self.cutoff, self.device)
        return self._joined


class _Joined:
    """All lists as one, and the geometries for which they were made."""

    def __init__(
        self, references: list[Reference | None], cutoff: float, device: torch.device
    ) -> None:
        lists = [reference for reference in references if reference is not None]
        assert len(lists) == len(references)
        self.positions = np.concatenate([r.positions for r in lists])  # (A, 3)
        self.cell = np.stack([r.cell for r in lists])  # (M, 3, 3)
        first = np.cumsum([0, *(len(r.positions) for r in lists)]).tolist()
        numbers = torch.tensor([len(r.shifts) for r in lists])
        if len({r.shifts.device for r in lists}) > 1:
            lists = [
                r._replace(edge_index=r.edge_index.to(device), shifts=r.shifts.to(device))
                for r in lists
            ]
        # Sent at once where all are on the processor.
        self.shifts = torch.cat([r.shifts for r in lists]).to(device)  # (E, 3)
        edge_index = torch.cat(
            [r.edge_index + n for r, n in zip(lists, first, strict=False)], dim=1
        ).to(device)
        self.within = Within(cutoff, edge_index, self.shifts)
        self.owner = torch.repeat_interleave(numbers).to(device)  # (E,) structure of each edge
        self.offsets: tuple[Tensor, Tensor] | None = None  # cell, (E, 3) shifts @ cell
