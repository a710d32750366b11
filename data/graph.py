"""What goes into a model and what comes out: AtomicGraph, NodeOutput, and the protocol of a model.

N atoms, E directed edges, G structures.  Row 0 of ``edge_index`` is the neighbour j, row 1 the
centre i; edges are sorted by i.  ``vectors = r_j - r_i + S . cell`` points from the centre to the
neighbour's image.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mlip.data.neighbors import neighbor_list

_environment = set(os.environ)
from torch_geometric.data import Data  # noqa: E402

# PyG loads torch's compiler, which leaves the folder of its cache in the environment of the user's
# program and of its children; the compiler sets it again when it is used.
for _name in set(os.environ) - _environment:
    del os.environ[_name]

if TYPE_CHECKING:
    from ase import Atoms


LABELS = ("energy", "forces", "stress")


class NodeOutput(NamedTuple):
    """What a model says about each atom."""

    energy: Tensor  # (N,) interaction energy in units of the potential's scale
    features: Tensor | None = None  # (N, C) invariant descriptors
    forces: Tensor | None = None  # (N, 3) only of models that predict forces directly


class EnergyModel(Protocol):
    """A model: reads ``vectors, edge_index, atomic_numbers, batch`` of a graph, answers per
    atom."""

    config: Any  # has ``cutoff: float``, angstrom

    @property
    def receptive_field(self) -> float:
        """Distance in angstrom beyond which no atom can change an atom's energy."""

    @property
    def exact_symmetry(self) -> bool:
        """Whether rotations and reflections are exact by construction, or else only learned."""

    def __call__(self, graph: AtomicGraph) -> NodeOutput: ...


class AtomicGraph(Data):
    """One structure or a batch of structures with their neighbours.

    Attributes
    ----------
    atomic_numbers : (N,) int64
    positions : (N, 3) float64, angstrom
    cell : (G, 3, 3) float64, rows are lattice vectors in angstrom; zero rows where there are none
    pbc : (G, 3) bool
    edge_index : (2, E) int64, row 0 neighbour j, row 1 centre i, sorted by i
    cell_shifts : (E, 3) float64, integers S: the image of j
    vectors : (E, 3), angstrom, written by ``Potential`` (or by another engine)
    batch, ptr : (N,), (G + 1,) int64
    energy, forces, stress : (G,), (N, 3), (G, 3, 3) labels in eV, eV/angstrom, eV/angstrom^3; NaN =
        not labelled
    charge, spin : (G,) optional total charge (e) and spin multiplicity
    field : (G, 3) optional external vector, such as an electric field in V/angstrom
    """

    @classmethod
    def from_atoms(cls, atoms: Atoms, cutoff: float) -> AtomicGraph:
        """Graph of an ASE structure: geometry, and charge, spin and field where ``atoms.info`` has
        them; no labels."""
        extra = {
            key: torch.as_tensor(np.asarray(atoms.info[name], dtype=np.float64))[None]
            for key, names in (
                ("charge", ("charge", "total_charge")),
                ("spin", ("spin", "total_spin")),
                ("field", ("field", "electric_field")),
            )
            for name in names
            if name in atoms.info
        }
        return cls.from_arrays(
            atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc, cutoff, **extra
        )

    @classmethod
    def from_arrays(
        cls,
        atomic_numbers: np.ndarray,
        positions: np.ndarray,
        cell: np.ndarray,
        pbc: np.ndarray,
        cutoff: float,
        **fields: Tensor,
    ) -> AtomicGraph:
        """Graph of one structure given as arrays; ``fields`` are labels and the like, already
        tensors."""
        positions = np.array(positions, dtype=np.float64)
        cell = np.array(cell, dtype=np.float64)
        pbc = np.array(pbc, dtype=bool)
        edge_index, shifts = neighbor_list(positions, cell, pbc, cutoff)
        n = len(positions)
        return cls(
            atomic_numbers=torch.as_tensor(np.array(atomic_numbers, dtype=np.int64)),
            positions=torch.from_numpy(positions),
            cell=torch.from_numpy(cell)[None],
            pbc=torch.from_numpy(pbc)[None],
            edge_index=torch.from_numpy(edge_index),
            cell_shifts=torch.from_numpy(shifts),
            batch=torch.zeros(n, dtype=torch.int64),
            ptr=torch.tensor([0, n]),
            num_nodes=n,
            **fields,
        )

    @staticmethod
    def collate(graphs: Sequence[AtomicGraph]) -> AtomicGraph:
        """Batch of structures; the given graphs stay as they are.

        All fields are joined along their first dimension, except that atom indices are shifted.
        (PyG's ``Batch`` does the same and more slowly, because it asks every graph anew how
        each field is joined.)
        """
        if not graphs:
            raise ValueError("there is no graph to put into a batch")
        stores = [
            graph._store._mapping for graph in graphs
        ]  # the plain dict below PyG's attribute access
        made_here = {"edge_index", "batch", "ptr", "num_nodes"}
        keys = [key for key in stores[0] if key not in made_here]
        for number, store in enumerate(stores):
            if odd := (store.keys() ^ stores[0].keys()) - made_here:
                raise ValueError(
                    f"graph {number} of the batch differs from the first in having or lacking "
                    f"{sorted(odd)}"
                )
        sizes = torch.cat([store["ptr"].diff() for store in stores])  # (G,)
        ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        edges, offset = [], 0
        for store in stores:
            edges.append(store["edge_index"] + offset)
            offset += len(store["positions"])
        return AtomicGraph(
            **{key: torch.cat([store[key] for store in stores]) for key in keys},
            edge_index=torch.cat(edges, dim=1),
            batch=torch.repeat_interleave(sizes),
            ptr=ptr,
            num_nodes=offset,
        )

    @property
    def num_structures(self) -> int:
        return len(self.cell)

    @property
    def volume(self) -> Tensor:
        """(G,) cell volumes in angstrom^3; NaN where a direction is not periodic."""
        a, b, c = self.cell.unbind(dim=1)
        volume = (a * torch.linalg.cross(b, c)).sum(dim=1).abs()
        return torch.where(self.pbc.all(dim=1) & (volume > 0), volume, torch.nan)

    def edge_vectors(self) -> Tensor:
        """(E, 3) vectors from centre to neighbour, differentiable in positions and cell."""
        (j, i), cell, positions = self.edge_index, self.cell, self.positions
        if len(cell) == 1:
            shift = self.cell_shifts @ cell[0]
        else:
            cell = cell.index_select(0, self.batch.index_select(0, i))
            shift = (self.cell_shifts[:, None, :] @ cell)[:, 0]
        return positions.index_select(0, j) - positions.index_select(0, i) + shift

    def replace(self, **fields: Tensor) -> AtomicGraph:
        """Shallow copy with other fields."""
        other = copy.copy(self)
        for key, value in fields.items():
            other[key] = value
        return other

    def external_field(self, which: Literal["given"] | Sequence[float]) -> Tensor:
        """(N, 3) the external vector at each atom in the dtype of the edges: the given one of its
        structure, or one for all.

        Raises
        ------
        ValueError
            If a structure has none.
        """
        if which != "given":
            return self.vectors.new_tensor(which).expand(len(self.atomic_numbers), 3)
        if "field" not in self or bool(self.field.isnan().any()):
            raise ValueError(
                "the model reads an external field and a structure has none; give 3 numbers as "
                "atoms.info['field'], or as column 'field' of the data file; zeros for no field"
            )
        return self.field.index_select(0, self.batch).to(self.vectors.dtype)

    def strained(self, strain: Tensor) -> AtomicGraph:
        """Copy under r -> r (1 + eps), eps the symmetric part of ``strain`` (G, 3, 3)."""
        F = (
            torch.eye(3, dtype=strain.dtype, device=strain.device) + (strain + strain.mT) / 2
        )  # (G, 3, 3)
        positions = (self.positions[:, None, :] @ F.index_select(0, self.batch))[:, 0]
        return self.replace(positions=positions, cell=self.cell @ F)

    def rotated(self, R: Tensor) -> AtomicGraph:
        """Copy rotated by the orthogonal matrix ``R`` (3, 3), r -> R r, labels and field with
        it."""
        new = {"positions": self.positions @ R.T, "cell": self.cell @ R.T}
        if "vectors" in self:
            new["vectors"] = self.vectors @ R.T.to(self.vectors.dtype)
        for key in ("forces", "field"):
            if key in self:
                new[key] = self[key] @ R.T
        if "stress" in self:
            new["stress"] = R @ self.stress @ R.T
        return self.replace(**new)

    def rotated_copies(self, R: Tensor) -> AtomicGraph:
        """One batch of the structures under each of the orthogonal matrices ``R`` (K, 3, 3).

        The structures of copy k follow those of copy k - 1: (K N) atoms, (K E) edges, (K G)
        structures, without labels.  ``vectors``, if there are any, are linear functions of the
        given ones, through which gradients pass.
        """
        K, (N, G) = len(R), (len(self.positions), self.num_structures)
        copies = torch.arange(K, device=R.device)[:, None]

        def turned(x: Tensor) -> Tensor:  # (M, ..., 3) -> (K M, ..., 3)
            rows = x.reshape(-1, 3) @ R.mT.to(x.dtype)
            return rows.reshape(K * len(x), *x.shape[1:])

        made: dict[str, Any] = {
            "edge_index": (self.edge_index[:, None] + copies * N).flatten(1),
            "batch": (self.batch + copies * G).flatten(),
            "ptr": torch.cat([self.ptr[:1], (self.ptr[1:] + copies * N).flatten()]),
            "num_nodes": K * N,
        }
        for key, value in self._store._mapping.items():
            if key in ("positions", "cell", "vectors", "field"):
                made[key] = turned(value)
            elif key not in made and key not in LABELS:
                made[key] = value.repeat(K, *(1,) * (value.dim() - 1))
        return AtomicGraph(**made)
