"""Neighbour lists made where the positions are, for large systems on a GPU.

The same pairs in the same order as ``mlip.data.neighbors``, by bins at least as high as the cutoff
and operations of torch alone.  Cost O(N + E); on a processor matscipy is faster.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from mlip.data.neighbors import CELLS_PER_ATOM, MIN_GRID, OVERLAP, search_room


def neighbor_list_on(
    device: torch.device,
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    cutoff: float,
) -> tuple[Tensor, Tensor]:
    """As ``mlip.data.neighbors.neighbor_list``, of tensors on ``device``.

    Returns
    -------
    edge_index : (2, E) int64, sorted by centre, neighbour, shift
    shifts : (E, 3) float64

    Raises
    ------
    ValueError
        As there.
    """
    positions, cell = np.asarray(positions, dtype=np.float64), np.asarray(cell, dtype=np.float64)
    pbc = np.asarray(pbc, dtype=bool)
    room = search_room(positions, cell, pbc, cutoff)
    if room is None:
        return torch.zeros(2, 0, dtype=torch.int64, device=device), torch.zeros(
            0, 3, dtype=torch.float64, device=device
        )
    N = len(room.home)
    bins = np.maximum(np.floor(room.heights / cutoff), 1)
    most = max(CELLS_PER_ATOM * N, MIN_GRID)
    if bins.prod() > most:  # few atoms far from each other
        bins = np.maximum(np.floor(bins * (most / bins.prod()) ** (1 / 3)), 1)
    reach = np.ceil(cutoff * bins / room.heights).astype(int)
    i, j, turns = _pairs(
        *(torch.as_tensor(x, device=device) for x in (room.positions, room.box, bins, pbc)),
        reach=reach,
        cutoff=cutoff,
    )
    home = torch.as_tensor(room.home, device=device)
    shift = turns + home[i] - home[j]
    if room.reduction is not None:
        shift = shift @ torch.as_tensor(room.reduction, dtype=shift.dtype, device=device)
    shift = shift * torch.as_tensor(pbc, device=device)
    _refuse_overlap(torch.as_tensor(positions.reshape(-1, 3), device=device), cell, i, j, shift)
    order = torch.arange(len(i), device=device)
    for key in (*shift.T.flip(0), j, i):  # the last one counts most
        order = order[key[order].argsort(stable=True)]
    return torch.stack([j[order], i[order]]), shift[order]


def _pairs(
    r: Tensor, box: Tensor, bins: Tensor, pbc: Tensor, *, reach: np.ndarray, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs i, j (E,) of atoms at r (N, 3) in the box, with the turns (E, 3) of j's image."""
    N, device = len(r), r.device
    place = (r @ torch.linalg.inv(box) * bins).floor()
    place = torch.minimum(place.clamp(min=0), bins - 1)  # (N, 3), rounding at the faces
    weights = torch.stack([bins[1] * bins[2], bins[2], torch.ones_like(bins[0])])
    number = (place @ weights).long()
    count = torch.bincount(number, minlength=int(bins.prod()))
    first = count.cumsum(0) - count
    members = number.argsort(stable=True)
    everyone = torch.arange(N, device=device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in itertools.product(*(range(-n, n + 1) for n in reach.tolist())):
        other = place + torch.tensor(step, dtype=r.dtype, device=device)
        turns = (other / bins).floor()  # (N, 3)
        inside = ((turns == 0) | pbc).all(dim=1)
        target = ((other - turns * bins) @ weights).long()
        candidates = torch.where(inside, count[target], 0)
        i = everyone.repeat_interleave(candidates)
        rank = torch.arange(len(i), device=device) - (candidates.cumsum(0) - candidates)[i]
        j = members[first[target[i]] + rank]
        image = turns[i]
        v = r[j] - r[i] + image @ box
        near = (v * v).sum(1) < cutoff**2
        if not any(step):
            near &= i != j
        found.append((i[near], j[near], image[near]))
    i, j, turns = (torch.cat(parts) for parts in zip(*found, strict=True))
    return i, j, turns


def _refuse_overlap(r: Tensor, cell: np.ndarray, i: Tensor, j: Tensor, shift: Tensor) -> None:
    if len(i) == 0:
        return
    v = r[j] - r[i] + shift @ torch.as_tensor(cell, device=r.device)
    squared, edge = (v * v).sum(1).min(dim=0)
    if float(squared) < OVERLAP**2:
        a, b = sorted((int(i[edge]), int(j[edge])))
        raise ValueError(
            f"atoms {a} and {b} overlap: they are {float(squared) ** 0.5:.1e} angstrom apart"
        )
