"""Batches: structures in a reproducible order, grouped up to a number of structures, atoms or
edges.

The order of an epoch is a function of (seed, epoch), and of weights where there are some, and the
batches one of the order and the limits, so that workers, ranks and a resumed run all agree without
talking to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph

BLOCK = 256  # consecutive structures that are shuffled as one
BUFFER = 64  # blocks among whose structures the order is then random


class GraphLoader:
    """Iterate over batches of a data set.

    Parameters
    ----------
    dataset : the structures
    batch_size, max_atoms, max_edges : limits of a batch on each rank, at least one of them
    shuffle : a new order in every epoch
    seed : of the order
    num_workers : processes that read ahead; 0 reads in this process; the batches are the same to
        the bit
    rank, world_size : this process among those that train together; each gets its own structures
    drop_last : leave out the last batch if it is smaller than ``batch_size``
    start_method : how worker processes start, "fork" or "spawn"
    pin_memory : page-locked batches, for a GPU
    """

    def __init__(
        self,
        dataset: HDF5Dataset,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        start_method: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        limits = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        if all(limit is None for limit in limits.values()):
            raise ValueError("give at least one of batch_size, max_atoms and max_edges")
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if len(dataset) == 0:
            raise ValueError(f"{dataset.path}: no structures to load")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} processes")
        if len(dataset) < world_size:
            raise ValueError(
                f"{dataset.path}: {len(dataset)} structures cannot feed {world_size} processes"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.rank, self.world_size = rank, world_size
        self.drop_last = drop_last
        self.start_method = start_method
        self.pin_memory = pin_memory
        self.epoch = 0
        self.position = 0  # batches of this epoch that were handed out
        self._resume_at = 0
        self._sizes: list[tuple[np.ndarray, int]] = []  # (cost of each structure, limit of a batch)
        if max_atoms is not None or world_size > 1:
            num_atoms = dataset.num_atoms
        if max_atoms is not None:
            self._sizes.append((num_atoms, max_atoms))
        if max_edges is not None:
            self._sizes.append((dataset.num_edges(), max_edges))
        for (sizes, limit), unit in zip(
            self._sizes, [k for k in ("atoms", "edges") if limits[f"max_{k}"]], strict=True
        ):
            if sizes.max() > limit:
                frame = int(dataset.indices[int(sizes.argmax())])
                raise ValueError(
                    f"{dataset.path}: frame {frame} has {sizes.max()} {unit}, more than "
                    f"max_{unit}={limit}; raise the limit"
                )
        self._num_atoms = num_atoms if world_size > 1 else None
        self._weights: np.ndarray | None = None
        self._plan: tuple[int, list[list[int]]] | None = None
        self._queue = _Queue()
        self._workers: DataLoader | None = None

    def __len__(self) -> int:
        """Batches of the current epoch on this rank."""
        return len(self.batches())

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; where it is already under way, stay."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resume_at = epoch, 0, 0

    def set_weights(self, weights: np.ndarray | None) -> None:
        """How often structures are to be shown relative to each other, (M,); None: once each.

        An epoch keeps its length M.  The weights are not part of the state.
        """
        if weights is not None and not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError("weights of structures have to be finite and not negative")
        self._weights, self._plan = weights, None

    def times_shown(self, epoch: int) -> np.ndarray:
        """(M,) how often each structure is in an epoch with the present weights, on all ranks."""
        return np.bincount(self._order(epoch), minlength=len(self.dataset))

    def state_dict(self) -> dict[str, int]:
        """Where the loader is: an epoch, and the number of its batches that were handed out."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``: the next iteration begins with the batch after the last one
        handed out."""
        if int(state.get("seed", self.seed)) != self.seed:
            raise ValueError(
                f"the state is of a loader with seed {state['seed']}, this one has {self.seed}"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._resume_at = self.position

    def __iter__(self) -> Iterator[AtomicGraph]:
        batches = self.batches()
        start, self._resume_at = self._resume_at, 0
        self.position = start
        for graph in self._load(batches[start:]):
            self.position += 1
            yield graph
        self.epoch, self.position = self.epoch + 1, 0

    def batches(self) -> list[list[int]]:
        """Batches of this epoch on this rank, as positions in the data set."""
        if self._plan is None or self._plan[0] != self.epoch:
            plan = self._fill(self._order(self.epoch))
            if self.world_size > 1:
                plan = self._share(plan)
            self._plan = (self.epoch, plan)
        return self._plan[1]

    def _load(self, batches: list[list[int]]) -> Iterator[AtomicGraph]:
        source = _Source(self.dataset)
        keys = [(self.epoch, batch) for batch in batches]
        if self.num_workers == 0:
            yield from map(source.__getitem__, keys)
            return
        self._queue.keys = keys
        if self._workers is None:
            self._workers = DataLoader(
                source,
                batch_size=None,
                sampler=self._queue,
                num_workers=self.num_workers,
                persistent_workers=True,
                pin_memory=self.pin_memory,
                multiprocessing_context=self.start_method,
                # Its own generator: DataLoader would otherwise draw from, and so change, the global
                # one.
                generator=torch.Generator().manual_seed(self.seed),
            )
        yield from self._workers

    def _order(self, epoch: int) -> np.ndarray:
        chosen = np.arange(len(self.dataset))
        rng = np.random.default_rng([self.seed, epoch])
        if self._weights is not None:
            chosen = np.repeat(chosen, systematic_sample(self._weights, rng))
        if not self.shuffle:
            return chosen
        n = len(chosen)
        # Neighbouring structures are read from disk together, so blocks move as a whole; a buffer
        # of many of them is then mixed thoroughly.  A data set that fits into the buffer is simply
        # shuffled.
        blocks = [chosen[start : start + BLOCK] for start in range(0, n, BLOCK)]
        blocks = [blocks[k] for k in rng.permutation(len(blocks))]
        buffers = [
            np.concatenate(blocks[start : start + BUFFER])
            for start in range(0, len(blocks), BUFFER)
        ]
        return np.concatenate([rng.permutation(buffer) for buffer in buffers])

    def _fill(self, order: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        batch: list[int] = []
        loads = [0] * len(self._sizes)
        for k in order.tolist():
            costs = [int(sizes[k]) for sizes, _ in self._sizes]
            full = len(batch) == self.batch_size or any(
                load + cost > limit
                for load, cost, (_, limit) in zip(loads, costs, self._sizes, strict=True)
            )
            if batch and full:
                batches.append(batch)
                batch, loads = [], [0] * len(self._sizes)
            batch.append(k)
            loads = [load + cost for load, cost in zip(loads, costs, strict=True)]
        if not (
            self.drop_last
            and batches
            and self.batch_size is not None
            and len(batch) < self.batch_size
        ):
            batches.append(batch)
        return batches

    def _share(self, batches: list[list[int]]) -> list[list[int]]:
        """This rank's batches: step s takes the batches s W ... s W + W - 1, one for each of the W
        ranks."""
        W = self.world_size
        batches = list(batches)
        # All ranks must make the same number of steps: halve batches near the end until the number
        # divides, ...
        while len(batches) % W:
            tail = range(max(0, len(batches) - 2 * W), len(batches))
            widest = max(tail, key=lambda k: (len(batches[k]), k))
            if len(batches[widest]) == 1:
                widest = max(range(len(batches)), key=lambda k: (len(batches[k]), k))
            half = len(batches[widest]) // 2
            if half == 0:  # ... and where no batch can be halved join the last ones to others
                batches = self._joined(batches, len(batches) % W)
                break
            batches[widest : widest + 1] = [batches[widest][:half], batches[widest][half:]]
        return [self._balanced(batches[s : s + W])[self.rank] for s in range(0, len(batches), W)]

    def _joined(self, batches: list[list[int]], number: int) -> list[list[int]]:
        """The last ``number`` batches, of one structure each, added to those before them.

        Where limits of size forbid that, a structure is left out of this epoch.
        """
        batches, rest = batches[:-number], batches[-number:]
        for k in range(len(batches)):
            together = [*batches[k], *(rest[-1] if rest else [])]
            if rest and all(sizes[together].sum() <= limit for sizes, limit in self._sizes):
                batches[k] = together
                rest.pop()
        return batches

    def _balanced(self, step: list[list[int]]) -> list[list[int]]:
        """Redistribute the structures of a step so that all ranks have about the same number of
        atoms."""
        if self._sizes:
            return step  # already filled to a limit of size
        assert self._num_atoms is not None
        room = max(len(batch) for batch in step)
        atoms = self._num_atoms
        shares: list[list[int]] = [[] for _ in step]
        loads = [0] * len(step)
        for k in sorted((k for batch in step for k in batch), key=lambda k: (-atoms[k], k)):
            rank = min(
                (r for r in range(len(step)) if len(shares[r]) < room), key=lambda r: (loads[r], r)
            )
            shares[rank].append(k)
            loads[rank] += int(atoms[k])
        return shares


def systematic_sample(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(M,) how often each of M items is taken in M draws with these weights.

    Each number is the expected one rounded up or down, which independent draws would scatter about.
    """
    n = len(weights)
    order = rng.permutation(n)
    marks = np.cumsum(weights[order]) / weights.sum() * n + rng.random()
    marks[-1] = n  # rounding must not change the length of an epoch
    times = np.empty(n, dtype=np.int64)
    times[order] = np.diff(np.floor(marks).astype(np.int64), prepend=0)
    return times


class _Source(Dataset[AtomicGraph]):
    """What a worker holds: (epoch, positions) -> batch."""

    def __init__(self, dataset: HDF5Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, list[int]]) -> AtomicGraph:
        epoch, batch = key
        return AtomicGraph.collate([self.dataset.graph(k, epoch) for k in batch])


class _Queue:
    """Batches still to load; its content is replaced at each epoch while the workers live on."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(list(self.keys))

    def __len__(self) -> int:
        return len(self.keys)
