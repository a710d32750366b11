"""Mean energy of cohesion, switched on smoothly with the number of neighbours.

    E_i = D[Z_i] (1 - exp(-c_i)),      c_i = 3 sum_j f( r_ij / 2 (R_i + R_j) )

R is the covalent radius and f the polynomial envelope.  Relative to isolated atoms a structure lies
electronvolts per atom lower; with D fitted to the training set a model has only the differences to
learn, and an atom without neighbours still has exactly the energy of the isolated atom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from ase.data import covalent_radii
from torch import Tensor, nn

from mlip.nn.radial import polynomial_envelope

if TYPE_CHECKING:
    from mlip.data.graph import AtomicGraph


class Cohesion(nn.Module):
    """The energy above; ``energies`` (119,) in eV is D."""

    energies: Tensor
    radii: Tensor

    def __init__(self, energies: Tensor) -> None:
        super().__init__()
        if energies.shape != (119,):
            raise ValueError(f"energies have shape {tuple(energies.shape)}, not (119,)")
        self.register_buffer("energies", energies.to(torch.float64))
        radii = torch.tensor(covalent_radii[:119], dtype=torch.float64)
        self.register_buffer("radii", radii, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # As the reference energies of a potential, these stay float64 and only change device.
        kept = {"energies": self.energies, "radii": self.radii}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def saturation(self, graph: AtomicGraph) -> Tensor:
        """(N,) the factors 1 - exp(-c_i)."""
        j, i = graph.edge_index
        reach = 2 * self.radii[graph.atomic_numbers]
        f = polynomial_envelope(graph.vectors.norm(dim=-1) / (reach[i] + reach[j]))
        return -torch.expm1(-3 * f.new_zeros(len(graph.atomic_numbers)).index_add(0, i, f))

    def forward(self, graph: AtomicGraph) -> Tensor:
        """(N,) energies in eV."""
        return self.energies[graph.atomic_numbers] * self.saturation(graph)
