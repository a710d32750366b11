"""Energies, forces and stresses of many structures that stay together for many steps.

What does not change is prepared once: elements, boundaries, charges.  Geometries are checked,
neighbours found and the graph made for all structures at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.calculators.batched_fire import FireBatch
from mlip.calculators.batched_neighbors import BatchedNeighbors
from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.neighbor_cache import Edges
from mlip.calculators.structure_arrays import Problems, problems_of
from mlip.calculators.structure_checks import (
    OVERLAP,
    check_distances,
    check_finite,
    check_structure,
    doubtful,
)
from mlip.data.graph import AtomicGraph

ANY_ELEMENT = np.ones(119, dtype=bool)  # they are checked when structures come


class BatchedEvaluation:
    """Evaluates the structures of a ``FireBatch``, which come and go.

    Parameters
    ----------
    calculator : whose neighbour lists it does without
    """

    def __init__(self, calculator: EqCalculator) -> None:
        self.calculator = calculator
        self.neighbors = {
            p.cutoff: BatchedNeighbors(p.cutoff, calculator.skin, calculator.device)
            for p in calculator.potentials
        }
        self._inputs: list[dict[str, Tensor]] = []  # (1, ...) of each structure
        self._constants: dict[str, Any] | None = None
        self._lattice: tuple[np.ndarray, Tensor] | None = None

    def admit(self, inputs: Sequence[dict[str, Tensor]]) -> None:
        """Structures behind the others, with what the model reads of each beside its geometry."""
        self._inputs += inputs
        self._constants = None
        for neighbors in self.neighbors.values():
            neighbors.admit(len(inputs))

    def keep(self, which: np.ndarray) -> None:
        """Forget the other structures."""
        self._inputs = [x for x, kept in zip(self._inputs, which, strict=True) if kept]
        self._constants = None
        for neighbors in self.neighbors.values():
            neighbors.keep(which)

    def prepare(self, batch: FireBatch) -> Problems:
        """Check geometries and look after lists of neighbours; structures with problems cannot
        be evaluated."""
        problems, unit = _wrong_geometries(batch), self.calculator.length_unit
        for neighbors in self.neighbors.values():
            if not problems:
                problems = neighbors.update(
                    batch, batch.positions / unit, batch.lattice / unit, batch.pbc
                )
        return problems

    def evaluate(self, batch: FireBatch) -> tuple[FireBatch, Problems]:
        """The structures with energies, forces and stresses; after ``prepare``."""
        graphs, edges = self._graphs(batch)
        wanted = bool(batch.crystals.any())
        energy, forces, *stress = self.calculator.evaluate_graphs(graphs, wanted)
        batch = replace(
            batch,
            energy=energy,
            forces=forces,
            stress=stress[0] if stress else np.full_like(batch.cell, np.nan),
        )
        return batch, _not_finite(batch) | self._overlaps(batch, edges)

    def _graphs(self, batch: FireBatch) -> tuple[dict[float, AtomicGraph], Edges]:
        """Graphs within each cutoff in units of the model, and the edges within the largest."""
        device, unit = self.calculator.device, self.calculator.length_unit
        if self._constants is None:
            self._constants = self._constant_fields(batch)
        if self._lattice is None or self._lattice[0] is not batch.lattice:
            lattice = torch.from_numpy(batch.lattice / unit).to(device)
            self._lattice = (batch.lattice, lattice)
        positions = torch.from_numpy(batch.positions / unit).to(device)
        cell = torch.from_numpy(batch.cell / unit).to(device)
        graphs = {}
        for cutoff in sorted(self.neighbors):
            edges = self.neighbors[cutoff].edges(positions, self._lattice[1])
            graphs[cutoff] = AtomicGraph(
                **self._constants,
                positions=positions,
                cell=cell,
                edge_index=edges.edge_index,
                cell_shifts=edges.shifts,
            )
        return graphs, edges

    def _constant_fields(self, batch: FireBatch) -> dict[str, Any]:
        device = self.calculator.device
        fields = {name: torch.cat([x[name] for x in self._inputs]) for name in self._inputs[0]}
        fields |= {
            "atomic_numbers": torch.from_numpy(batch.numbers.astype(np.int64)),
            "pbc": torch.from_numpy(batch.pbc),
            "batch": torch.from_numpy(batch.owner),
            "ptr": torch.from_numpy(np.append(batch.first, len(batch.numbers))),
        }
        on_device: dict[str, Any] = {name: value.to(device) for name, value in fields.items()}
        return on_device | {"num_nodes": len(batch.numbers)}

    def _overlaps(self, batch: FireBatch, edges: Edges) -> Problems:
        lengths = edges.lengths * self.calculator.length_unit
        if not len(lengths) or float(lengths.min()) >= OVERLAP:
            return {}
        close = (lengths < OVERLAP).cpu()
        index, lengths = edges.edge_index.cpu()[:, close], lengths.cpu()[close]
        owner = torch.from_numpy(batch.owner)[index[1]]

        def check(k: int) -> None:
            own = owner == k
            check_distances(batch.atoms(k), index[:, own] - int(batch.first[k]), lengths[own])

        return problems_of(check, owner.unique().tolist())


def _wrong_geometries(batch: FireBatch) -> Problems:
    doubts = doubtful(batch.positions, batch.first, batch.lattice, batch.pbc)
    return problems_of(
        lambda k: check_structure(batch.atoms(k), ANY_ELEMENT), np.flatnonzero(doubts).tolist()
    )


def _not_finite(batch: FireBatch) -> Problems:
    crystals = batch.crystals
    broken = batch.maxima(~np.isfinite(batch.forces).all(axis=1))
    broken |= ~np.isfinite(batch.energy)
    broken |= crystals & ~np.isfinite(batch.stress).all(axis=(1, 2))

    def check(k: int) -> None:
        said = {"energy": batch.energy[k], "forces": batch.forces[batch.rows(k)]}
        if crystals[k]:
            said["stress"] = batch.stress[k]
        check_finite(batch.atoms(k), said)

    return problems_of(check, np.flatnonzero(broken).tolist())
