"""One crystal, many cells: predictions must not depend on how a crystal is described.

The descriptions are those of ``mlip.evaluation.orbits.Cells``: sheared, left-handed and compact
cells, supercells, shifted origins, and the primitive cell where there is one smaller than the cell
given.  Energy per atom, the forces of each atom and the stress are compared: no cell is turned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlip.data.graph import AtomicGraph
from mlip.evaluation.orbits import Cells
from mlip.potential import Potential


@dataclass(frozen=True)
class CellChoices:
    """Predictions for one crystal by T descriptions, in the order of the given atoms."""

    names: tuple[str, ...]
    energy: Tensor  # (T,) eV/atom
    forces: Tensor  # (T, N, 3) eV/angstrom
    stress: Tensor  # (T, 3, 3) eV/angstrom^3, NaN unless periodic in three directions

    def deviations(self) -> dict[str, Tensor]:
        """(T,) largest deviation of each description from the first one; eV/atom, eV/angstrom,
        eV/angstrom^3."""
        found = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        return {q: (x - x[0]).abs().flatten(1).amax(1) if x.dim() > 1 else (x - x[0]).abs()
                for q, x in found.items()}  # fmt: skip


def cell_choices(potential: Potential, graph: AtomicGraph) -> CellChoices:
    """Evaluate one crystal by all its descriptions.

    Parameters
    ----------
    potential : in evaluation mode
    graph : one structure, periodic in one direction at least

    Raises
    ------
    ValueError
        For a molecule, or a batch of several structures.
    """
    if graph.num_structures != 1 or not bool(graph.pbc.any()):
        raise ValueError("cells can be chosen for one structure with periodic directions")
    graph, cutoff = graph.replace().to("cpu"), potential.cutoff
    described = [
        (name, image.graph, image.atoms)
        for name, image in zip(
            Cells().coordinates()["cell"].tolist(), Cells().images(graph, cutoff), strict=True
        )
        if image is not None
    ]
    energies, forces, stresses = [], [], []
    for _, other, atoms in described:
        out = potential(other.to(potential.e0.device), stress=True)
        energies.append(out["energy"][0].cpu() / len(other.positions))
        forces.append(out["forces"].cpu()[atoms].mean(dim=0))
        stresses.append(out["stress"][0].cpu())
    names = tuple(name for name, _, _ in described)
    return CellChoices(names, torch.stack(energies), torch.stack(forces), torch.stack(stresses))
