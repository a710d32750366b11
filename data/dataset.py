"""A data file as a sequence of labelled graphs, and how it is divided into training and
validation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mlip.data.graph import AtomicGraph
from mlip.data.hdf5 import HDF5File, Structures
from mlip.data.neighbors import neighbor_list
from mlip.data.transforms import Transform

CACHE_BYTES = 1 << 30
ISOLATED = "IsolatedAtom"  # the field's config_type of reference atoms


class HDF5Dataset:
    """Labelled graphs of a data file, made on demand; the file may be larger than memory.

    Every graph carries ``energy`` (1,), ``forces`` (N, 3), ``stress`` (1, 3, 3), NaN where not
    labelled, ``weight`` (1,), ``frame`` (1,), its number in the file, and ``charge`` (1,),
    ``spin`` (1,) and ``field`` (1, 3) if the file has these columns.

    Parameters
    ----------
    path : data file written by ``mlip convert``
    cutoff : float, angstrom
    transform : (graph, generator) -> graph, applied last; its random numbers depend on seed, epoch
        and frame only
    indices : frames to use, in this order; all of them by default
    cache : keep graphs after first use, up to ``CACHE_BYTES`` in each process
    seed : of the transform
    """

    def __init__(
        self,
        path: str | Path,
        cutoff: float,
        transform: Transform | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        *,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        self.file = HDF5File(path)
        self.cutoff = float(cutoff)
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.cache = cache
        self._graphs: dict[int, AtomicGraph] = {}
        self._cached_bytes = 0
        self.indices = np.arange(len(self.file))
        if indices is not None:
            self.indices = self._select(indices)

    @property
    def path(self) -> Path:
        """The data file."""
        return self.file.path

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> AtomicGraph:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: no structure {index}, the data set has {len(self)}")
        return self.graph(index, self.epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}, "_cached_bytes": 0}

    def graph(self, index: int, epoch: int = 0) -> AtomicGraph:
        """Graph ``index`` as it is seen in ``epoch``: the transform's random numbers are those of
        that epoch."""
        frame = int(self.indices[index])
        graph = self._graphs.get(frame)
        if graph is None:
            graph = self._make(frame)
            if self.cache:
                size = sum(
                    v.numel() * v.element_size()
                    for v in graph.to_dict().values()
                    if isinstance(v, Tensor)
                )
                if self._cached_bytes + size <= CACHE_BYTES:
                    self._graphs[frame] = graph
                    self._cached_bytes += size
        if self.transform is None:
            return copy.copy(graph)
        entropy = np.random.SeedSequence([self.seed, epoch, frame]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> np.uint64(1)))
        return self.transform(copy.copy(graph), generator)

    def structure(self, index: int) -> Structures:
        """Arrays of structure ``index`` without neighbours."""
        return self.file.read(int(self.indices[index]))

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The same data restricted to some structures, given by position in this data set or by a
        mask."""
        other = copy.copy(self)
        other.indices = self._select(indices)
        other._graphs, other._cached_bytes = {}, 0
        return other

    def _select(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(
                    f"{self.path}: a mask of shape {chosen.shape} for {len(self)} structures"
                )
            chosen = np.flatnonzero(chosen)
        if chosen.size == 0:
            return np.zeros(0, dtype=np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise ValueError(f"{self.path}: indices must be a list of integers or a mask")
        if chosen.min() < 0 or chosen.max() >= len(self):
            bad = int(chosen.min()) if chosen.min() < 0 else int(chosen.max())
            raise ValueError(
                f"{self.path}: index {bad} is outside the {len(self)} structures of the data set"
            )
        return self.indices[chosen]

    @property
    def num_atoms(self) -> np.ndarray:
        """(M,) number of atoms of each structure."""
        ptr = self.file.column("ptr")
        assert ptr is not None
        return np.diff(ptr)[self.indices]

    @property
    def config_types(self) -> np.ndarray:
        """(M,) str; empty where a structure has none."""
        return self._text("config_type")

    @property
    def groups(self) -> np.ndarray:
        """(M,) str, for example the trajectory a structure is from; empty where it has none."""
        return self._text("group")

    @property
    def isolated(self) -> np.ndarray:
        """(M,) bool: frames of one atom that give its reference energy; they teach a model nothing
        else."""
        pbc = self.file.column("pbc")
        assert pbc is not None
        alone: np.ndarray = ~np.any(pbc, axis=1)
        alone = alone[self.indices]
        return (self.num_atoms == 1) & (alone | (self.config_types == ISOLATED))

    def num_edges(self) -> np.ndarray:
        """(M,) number of neighbour pairs of each structure; costs one pass over the data set."""
        return np.array(
            [
                self._neighbors(int(frame), self.file.read(int(frame)))[0].shape[1]
                for frame in self.indices
            ]
        )

    def _text(self, name: str) -> np.ndarray:
        values = self.file.column(name)
        return np.full(len(self), "", dtype=np.str_) if values is None else values[self.indices]

    def _neighbors(self, frame: int, s: Structures) -> tuple[np.ndarray, np.ndarray]:
        try:
            return neighbor_list(s.positions, s.cell[0], s.pbc[0], self.cutoff)
        except ValueError as error:
            raise ValueError(f"{self.path}: frame {frame}: {error}") from None

    def _make(self, frame: int) -> AtomicGraph:
        s = self.file.read(frame)
        n = len(s.positions)
        if s.atomic_numbers.min() < 1 or s.atomic_numbers.max() > 118:
            raise ValueError(f"{self.path}: frame {frame}: an atomic number is outside 1..118")
        edge_index, shifts = self._neighbors(frame, s)
        fields: dict[str, np.ndarray] = {
            "energy": np.full(1, np.nan) if s.energy is None else s.energy,
            "forces": np.full((n, 3), np.nan) if s.forces is None else s.forces,
            "stress": np.full((1, 3, 3), np.nan) if s.stress is None else s.stress,
            "weight": np.ones(1) if s.weight is None else s.weight,
            "frame": np.array([frame]),
        }
        for name in ("charge", "spin", "field"):
            if (value := getattr(s, name)) is not None:
                fields[name] = value
        return AtomicGraph(
            atomic_numbers=torch.from_numpy(s.atomic_numbers.astype(np.int64)),
            positions=torch.from_numpy(s.positions),
            cell=torch.from_numpy(s.cell),
            pbc=torch.from_numpy(s.pbc),
            edge_index=torch.from_numpy(edge_index),
            cell_shifts=torch.from_numpy(shifts),
            batch=torch.zeros(n, dtype=torch.int64),
            ptr=torch.tensor([0, n]),
            num_nodes=n,
            **{key: torch.from_numpy(value) for key, value in fields.items()},
        )


def split(
    dataset: HDF5Dataset, valid_fraction: float, seed: int = 0, *, by: str | None = None
) -> tuple[HDF5Dataset, HDF5Dataset]:
    """Divide into training and validation part, reproducibly; isolated atoms stay in the training
    part.

    Parameters
    ----------
    valid_fraction : share of the structures for validation, 0 < f < 1
    seed : of the choice
    by : "group" or "config_type" to keep all structures with the same value on one side

    Raises
    ------
    ValueError
        If either part would be empty.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}")
    candidates = np.flatnonzero(~dataset.isolated)
    target = max(1, round(valid_fraction * len(candidates)))
    rng = np.random.default_rng(seed)
    if by is None:
        chosen = rng.permutation(candidates)[:target]
    else:
        if by not in ("group", "config_type"):
            raise ValueError(f"a split can be by 'group' or 'config_type', not by {by!r}")
        keys = (dataset.groups if by == "group" else dataset.config_types)[candidates]
        names, members = np.unique(keys, return_inverse=True)
        if len(names) < 2:
            raise ValueError(
                f"{dataset.path}: all structures have the same {by} {names.tolist()}; it cannot be "
                f"split by {by}"
            )
        sizes = np.bincount(members)
        taken: list[int] = []
        count = 0
        # Take whole groups in random order as long as each brings the size nearer to the target.
        for k in rng.permutation(len(names)):
            if len(taken) < len(names) - 1 and abs(count + sizes[k] - target) < abs(count - target):
                taken.append(int(k))
                count += int(sizes[k])
        if not taken:
            taken = [int(sizes.argmin())]
        chosen = candidates[np.isin(members, taken)]
    if len(chosen) == 0 or len(chosen) == len(candidates):
        raise ValueError(
            f"{dataset.path}: {len(candidates)} structures are too few to split off "
            f"{valid_fraction:.0%}"
        )
    return _parts(dataset, chosen)


def split_by_file(dataset: HDF5Dataset, path: str | Path) -> tuple[HDF5Dataset, HDF5Dataset]:
    """Divide by a text file with the numbers of the validation structures, separated by blanks or
    lines."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        chosen = np.array([int(word) for word in text.split()], dtype=np.int64)
    except ValueError:
        raise ValueError(f"{path}: must hold integers only") from None
    if len(np.unique(chosen)) != len(chosen):
        raise ValueError(f"{path}: an index occurs twice")
    if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= len(dataset):
        raise ValueError(
            f"{path}: must hold indices between 0 and {len(dataset) - 1} of {dataset.path}"
        )
    return _parts(dataset, chosen)


def _parts(dataset: HDF5Dataset, valid: np.ndarray) -> tuple[HDF5Dataset, HDF5Dataset]:
    mask = np.zeros(len(dataset), dtype=bool)
    mask[valid] = True
    return dataset.subset(~mask), dataset.subset(mask)
