"""Ziegler-Biersack-Littmark screened nuclear repulsion, faded out where bonds begin.

    V(r) = k Z_i Z_j / r * phi(r / a) * f(r / r_ij),
    a    = 0.8854 a_0 / (Z_i^0.23 + Z_j^0.23),   r_ij = R_i + R_j

phi is the universal screening function (J. F. Ziegler, J. P. Biersack, U. Littmark, 1985), R the
covalent radius and f the polynomial envelope, so that V and its first two derivatives vanish at the
sum of covalent radii: a trained model is untouched at bonding distances and cannot fall into the
hole at short ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from ase.data import covalent_radii
from ase.units import Bohr, Hartree
from torch import Tensor, nn

from mlip.nn.radial import polynomial_envelope

if TYPE_CHECKING:
    from mlip.data.graph import AtomicGraph

COULOMB = Hartree * Bohr  # e^2 / (4 pi eps_0), eV angstrom
PHI = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))


class ZBL(nn.Module):
    """Pair repulsion, half of each pair's energy to each of its atoms."""

    radii: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "radii", torch.tensor(covalent_radii, dtype=torch.float64), persistent=False
        )

    def forward(self, graph: AtomicGraph) -> Tensor:
        """(N,) energies in eV, in the dtype of ``graph.vectors``."""
        j, i = graph.edge_index
        r = graph.vectors.norm(
            dim=-1
        )  # (E,) never zero: the neighbour list has no self pairs at zero shift
        Zi, Zj = graph.atomic_numbers[i], graph.atomic_numbers[j]
        reach = self.radii[Zi] + self.radii[Zj]
        zi, zj = Zi.to(r.dtype), Zj.to(r.dtype)
        x = r / (0.8854 * Bohr) * (zi**0.23 + zj**0.23)
        phi = sum(c * torch.exp(-d * x) for c, d in PHI)
        energy = 0.5 * COULOMB * zi * zj / r * phi * polynomial_envelope(r / reach)
        return torch.zeros(len(graph.positions), dtype=r.dtype, device=r.device).index_add(
            0, i, energy
        )
