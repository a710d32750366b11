"""Ragged neighbourhoods in few dense pieces: atoms sorted by degree and cut where padding is dear.

A bucket is a run of atoms with K + 1 slots each: slot 0 is the atom itself, K is the largest degree
among them.  A crystal is one bucket without padding; a cluster needs a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlip.nn.neighborhoods import (
    Neighborhoods,
    Slots,
    first_edges,
    gather_neighborhoods,
    in_slots,
)
from mlip.nn.remembered import remembered

MAX_BUCKETS = 4
MAX_PADDING = 0.2  # share of empty slots that is not worth another bucket
# A bucket costs as much as the launch of its operations, which is about this many slots.
MIN_SAVING = 256


class Bucket(NamedTuple):
    """Atoms ``first ... last - 1`` of the sorted order, and their edges."""

    first: int
    last: int
    edges: Tensor  # (last - first, K + 1) edge in each slot; E where empty, E + 1 in slot 0


class Buckets(NamedTuple):
    """All atoms, each in one bucket."""

    order: Tensor | None  # (N,) atoms by rising degree; None: as they were
    parts: list[Bucket]

    @property
    def padding(self) -> float:
        """Share of the slots that is empty."""
        slots = sum(bucket.edges.numel() for bucket in self.parts)
        filled = sum(int((bucket.edges != bucket.edges[0, 0] - 1).sum()) for bucket in self.parts)
        return 1 - filled / max(slots, 1)


def bucket_by_degree(centers: Tensor, num_nodes: int) -> Buckets:
    """Distribute edges with the centres ``centers`` (E,), sorted, over buckets of atoms."""
    E = len(centers)
    bounds = first_edges(centers, num_nodes)
    first, degree = bounds[:-1], bounds.diff()  # (N,)
    histogram = np.bincount(degree.cpu().numpy()).tolist()  # the host has to know
    cuts = cut_by_degree(histogram)
    order = None if len(cuts) <= 1 else torch.argsort(degree, stable=True)
    if order is not None:
        degree, first = degree.index_select(0, order), first.index_select(0, order)
    parts, start = [], 0
    for K in cuts:
        size = sum(histogram[: K + 1]) - start
        rows = slice(start, start + size)
        slot = torch.arange(-1, K, device=centers.device)
        edges = torch.where(slot < degree[rows, None], first[rows, None] + slot, E)
        edges[:, 0] = E + 1
        parts.append(Bucket(start, start + size, edges))
        start += size
    return Buckets(order, parts)


def bucketed_neighborhoods(
    vectors: Tensor, edge_index: Tensor, num_nodes: int, cutoff: float
) -> tuple[Tensor | None, list[Neighborhoods]]:
    """Atoms (N,) by rising degree (None: as they were), and their edges in few pieces without the
    slots of the atoms themselves.

    Vectors (N, K, 3) with neighbours (N, K) are laid out already.
    """
    if vectors.dim() == 3 or not num_nodes:
        return None, [gather_neighborhoods(vectors, edge_index, num_nodes, cutoff)]
    order, slots = slots_in_buckets(edge_index, num_nodes)
    return order, in_slots(vectors, slots, cutoff)


@remembered
def slots_in_buckets(edge_index: Tensor, num_nodes: int) -> tuple[Tensor | None, list[Slots]]:
    """Order of the atoms as of ``Buckets``, and slots of edges (2, E) in each bucket without those
    of the atoms themselves."""
    j, i = edge_index
    order, buckets = bucket_by_degree(i, num_nodes)
    if order is not None:
        j = torch.argsort(order).index_select(0, j)
    j = torch.cat([j, j.new_zeros(1)])
    slots = []
    for bucket in buckets:
        n, K = bucket.edges.shape
        edges = bucket.edges[:, 1:].flatten()
        slots.append(Slots((n, K - 1), edges, j.index_select(0, edges)))
    return order, slots


def cut_by_degree(histogram: Sequence[int]) -> list[int]:
    """Largest degree K of each bucket, rising, for ``histogram[d]`` atoms of degree d.

    The cut that saves most is made first, until few slots are empty.
    """
    present = [(d, n) for d, n in enumerate(histogram) if n]
    filled = sum((d + 1) * n for d, n in present)
    groups = [present] if present else []
    while len(groups) < MAX_BUCKETS:
        slots = sum((group[-1][0] + 1) * sum(n for _, n in group) for group in groups)
        if slots - filled <= MAX_PADDING * slots:
            break
        saving, which, where = max(
            ((group[-1][0] - group[cut - 1][0]) * sum(n for _, n in group[:cut]), which, cut)
            for which, group in enumerate(groups)
            for cut in range(1, len(group))
        )
        if saving < MIN_SAVING:
            break
        group = groups[which]
        groups[which : which + 1] = [group[:where], group[where:]]
    return [group[-1][0] for group in groups]
