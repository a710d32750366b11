"""From edges to padded neighbourhoods: sums over neighbours become batched matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlip.nn.remembered import remembered

if TYPE_CHECKING:
    from mlip.data.graph import AtomicGraph


class Neighborhoods(NamedTuple):
    """Edges laid out by centre: N centres with K slots each.

    Empty slots hold a vector of the cutoff's length, where the envelope and two of its derivatives
    vanish: they add exactly nothing to any sum, and need no mask.
    """

    vectors: Tensor  # (N, K, 3) centre to neighbour, angstrom
    neighbors: Tensor  # (N * K,) index of the neighbour; 0 in empty slots
    edges: Tensor | None = None  # (N * K,) edge in each slot, E where empty; None: laid out before


class Slots(NamedTuple):
    """Where edges are laid out: n atoms with K slots each."""

    shape: tuple[int, int]  # n, K
    edges: Tensor  # (n K,) edge in each slot, E where empty
    neighbors: Tensor  # (n K,) index of the neighbour, 0 where empty


def gather_neighborhoods(
    vectors: Tensor, edge_index: Tensor, num_nodes: int, cutoff: float
) -> Neighborhoods:
    """Lay out edges (E), sorted by centre, in K slots each; K is the largest neighbour count.

    Vectors (N, K, 3) with neighbours (N, K) are laid out already.
    """
    if vectors.dim() == 3:
        return Neighborhoods(vectors, edge_index.flatten())
    (hood,) = in_slots(vectors, [slots_of_all(edge_index, num_nodes)], cutoff)
    return hood


@remembered
def slots_of_all(edge_index: Tensor, num_nodes: int) -> Slots:
    """Slots of edges (2, E), sorted by centre, K for each of all atoms."""
    j, i = edge_index
    E = len(j)
    first = first_edges(i, num_nodes)
    K = max(most_neighbors(edge_index, num_nodes), 1)
    slot = torch.arange(E, device=i.device) + i * K - first.index_select(0, i)
    table = torch.full((num_nodes * K,), E, device=i.device)
    table[slot] = torch.arange(E, device=i.device)
    return Slots((num_nodes, K), table, torch.cat([j, j.new_zeros(1)]).index_select(0, table))


@remembered
def most_neighbors(edge_index: Tensor, num_nodes: int) -> int:
    """The largest number of neighbours that an atom has among edges (2, E), sorted by centre."""
    return int(first_edges(edge_index[1], num_nodes).diff().max()) if num_nodes else 0


def in_slots(vectors: Tensor, slots: Sequence[Slots], cutoff: float) -> list[Neighborhoods]:
    """Vectors (E, 3), angstrom, in their slots (n, K, 3); empty ones at the cutoff, angstrom."""
    vectors = torch.cat([vectors, pole(vectors, cutoff)])
    return [
        Neighborhoods(vectors.index_select(0, s.edges).view(*s.shape, 3), s.neighbors, s.edges)
        for s in slots
    ]


def first_edges(centers: Tensor, num_nodes: int) -> Tensor:
    """(num_nodes + 1,) where the edges of each centre begin among the sorted ``centers`` (E,), and
    their number at the end.

    By a search: for a histogram the host waits for a GPU.
    """
    nodes = torch.arange(num_nodes + 1, device=centers.device)
    return torch.searchsorted(centers.contiguous(), nodes)


def pole(like: Tensor, length: float) -> Tensor:
    """(1, 3) the vector (0, 0, length) in dtype and on the device of another tensor, to which no
    number is sent from the host."""
    vector = like.new_zeros(1, 3)
    vector[:, 2] = length
    return vector


def reversed_edges(graph: AtomicGraph) -> Tensor:
    """(E,) for each edge i <- j the edge j <- i with the opposite shift; E where there is none.

    Where nodes are views of atoms, i there is the node ``view_of[i]``.
    """
    j, i = graph.edge_index
    S = graph.cell_shifts.round().long()
    E, N = len(j), len(graph.atomic_numbers)
    if E == 0:
        return j
    base = 2 * int(S.abs().max()) + 1
    if N**2 * base**3 > 2**62:
        raise ValueError(
            f"{N} atoms with cell shifts up to {base // 2} are too many to number all pairs; "
            "wrap the atoms into the cell"
        )
    number = (S[:, 0] * base + S[:, 1]) * base + S[:, 2]
    offset, step = (base**3 - 1) // 2, base**3
    key = (i * N + j) * step + offset + number
    other = graph.view_of.index_select(0, i) if "view_of" in graph else i
    reverse = (j * N + other) * step + offset - number
    key, edge = key.sort()
    place = torch.searchsorted(key, reverse).clamp(max=E - 1)
    return torch.where(key[place] == reverse, edge[place], E)


def reversed_slots(graph: AtomicGraph, K: int) -> Tensor:
    """(N, K) for the edge i <- j in a slot of row i, the slot of j <- i in row j; 0 where there is
    none.  Edges are laid out as by ``gather_neighborhoods``."""
    i = graph.edge_index[1]
    N, E = len(graph.atomic_numbers), len(i)
    slot = torch.arange(E, device=i.device) - first_edges(i, N).index_select(0, i)  # (E,)
    there = torch.cat([slot, slot.new_zeros(1)]).index_select(0, reversed_edges(graph))
    return slot.new_zeros(N, K).index_put((i, slot), there)
