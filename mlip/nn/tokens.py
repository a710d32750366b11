"""Neighbourhoods with the atom itself in front, as attention inside of them reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mlip.nn.buckets import bucket_by_degree
from mlip.nn.neighborhoods import pole, reversed_edges

if TYPE_CHECKING:
    from mlip.data.graph import AtomicGraph


class Tokens(NamedTuple):
    """Atoms ``first ... last - 1`` with T slots each; slot 0 is the atom itself.

    Empty slots lie at the cutoff or beyond, where envelopes are exactly zero.  The vector of slot 0
    has the length 1 until all it gives is masked, so that no length is zero.
    """

    first: int
    last: int
    vectors: Tensor  # (n, T, 3) centre to neighbour, angstrom
    neighbors: Tensor  # (n T,) index of the neighbour, of the atom itself in slot 0
    reverse: Tensor  # (n T,) slot of the reversed edge among those of all buckets; its own if none
    of_program: bool = False  # neighbourhoods that were laid out before, of sizes yet unknown


def lay_out_tokens(graph: AtomicGraph, cutoff: float) -> tuple[Tensor | None, list[Tokens]]:
    """Atoms (N,) by rising degree (None: as they were), and their edges in few buckets.

    Vectors (N, K, 3) with neighbours and slots of the reversed edges (2, N, K) are laid out
    already.
    """
    if graph.vectors.dim() == 3:
        return None, [_laid(graph.vectors, *graph.edge_index)]
    vectors, (j, i) = graph.vectors, graph.edge_index
    order, buckets = bucket_by_degree(i, len(graph.atomic_numbers))
    if order is not None:
        j = torch.argsort(order).index_select(0, j)
    E = len(j)
    vectors = torch.cat([vectors, pole(vectors, 2 * cutoff), pole(vectors, 1)])
    slots = torch.cat([bucket.edges.flatten() for bucket in buckets])  # edge of each slot
    own = torch.arange(len(slots), device=j.device)
    slot_of = torch.zeros(E + 2, dtype=torch.int64, device=j.device).scatter_(0, slots, own)
    reverse = torch.cat([reversed_edges(graph), j.new_full((2,), E)]).index_select(0, slots)
    # An atom itself is its own reverse, and so is, without effect, an empty slot.
    reverse = torch.where(reverse < E, slot_of.index_select(0, reverse), own)
    reverses = reverse.split([bucket.edges.numel() for bucket in buckets])
    j = torch.cat([j, j.new_zeros(2)])
    parts = []
    for (first, last, edges), reverse in zip(buckets, reverses, strict=True):
        neighbors = j.index_select(0, edges.flatten()).view_as(edges)
        neighbors[:, 0] = torch.arange(first, last, device=j.device)
        v = vectors.index_select(0, edges.flatten()).view(*edges.shape, 3)
        parts.append(Tokens(first, last, v, neighbors.flatten(), reverse))
    return order, parts


def _laid(vectors: Tensor, neighbors: Tensor, slots: Tensor) -> Tokens:
    """The same in one bucket, from neighbourhoods (N, K) without the atoms themselves."""
    N, K = neighbors.shape
    own = torch.arange(N, device=neighbors.device)[:, None]
    v = torch.cat([pole(vectors, 1).expand(N, 1, 3), vectors], dim=1)
    neighbors = torch.cat([own, neighbors], dim=1)
    reverse = neighbors * (K + 1) + nn.functional.pad(slots + 1, (1, 0))
    return Tokens(0, N, v, neighbors.flatten(), reverse.flatten(), of_program=True)
