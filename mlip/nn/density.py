"""The equivariant density of an atom: sums over neighbours without weights, weights on atoms.

    T_i[lm b, l'm' s] = sum_j Y_lm(r_ij) B_b(r_ij) g_j[l'm', s]
    A_i[l''m'', c]    = sum_{l l' b s} W[l l' l'', b s, c] CG(l l' l'') T_i

Radial weights that are linear in B_b commute with the sum.  So this is a convolution with weights
for each path and radial function whose only work on edges is one product of matrices for each atom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.neighborhoods import Neighborhoods, gather_neighborhoods
from mlip.nn.radial import bessel, polynomial_envelope
from mlip.nn.spherical import SphericalHarmonics, clebsch_gordan, degree_of_component


class EdgeBasis(nn.Module):
    """Y_lm B_b f / (4 n)^1/2 of all edges, with the envelope f and n neighbours on average.

    Edges (E, 3), sorted by centre -> (N, LM B, K) and the neighbourhoods they are laid out in.
    """

    def __init__(self, lmax: int, num_basis: int, cutoff: float, avg_num_neighbors: float) -> None:
        super().__init__()
        self.harmonics = SphericalHarmonics(lmax)
        self.num_basis, self.cutoff = num_basis, cutoff
        self.scale = 1 / math.sqrt(4 * avg_num_neighbors)

    def forward(
        self, vectors: Tensor, edge_index: Tensor, num_nodes: int
    ) -> tuple[Tensor, Neighborhoods]:
        hood = gather_neighborhoods(vectors, edge_index, num_nodes, self.cutoff)
        r = hood.vectors.norm(dim=-1, keepdim=True)  # (N, K, 1)
        Y = self.harmonics(hood.vectors / r)  # (N, K, LM)
        x = r[..., 0] / self.cutoff
        B = bessel(x, self.num_basis) * (polynomial_envelope(x) * self.scale).unsqueeze(-1)
        return (Y[..., :, None] * B[..., None, :]).flatten(2).mT, hood


class Density(nn.Module):
    """Sum over neighbours of Y_lm B_b g_l'm's, coupled to total degree, mixed to channels."""

    degree: Tensor  # (LM,)

    def __init__(self, lmax: int, num_basis: int, degrees: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lmax, self.num_basis, self.degrees = lmax, num_basis, degrees
        couplings = [Coupling(lmax, l) for l in range(1, len(degrees))]
        self.couplings = nn.ModuleList(couplings)
        paths = [lmax + 1, *(coupling.num_paths for coupling in couplings)]
        # Each output degree receives about (number of paths / number of degrees) inputs of each
        # kind.
        fan_in = sum(p / (lmax + 1) * num_basis * S for p, S in zip(paths, degrees, strict=True))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(p, num_basis * S, channels) / math.sqrt(fan_in))
            for p, S in zip(paths, degrees, strict=True)
        )
        self.register_buffer("degree", degree_of_component(lmax), persistent=False)

    def forward(self, edges: Tensor, messages: list[Tensor], neighbors: Tensor) -> Tensor:
        N, _, K = edges.shape
        g = torch.cat(messages, dim=-1).index_select(0, neighbors).view(N, K, -1)
        S0 = self.degrees[0]
        T = torch.bmm(edges, g[..., :S0])  # (N, LM B, S0)
        T = T.view(N, -1, self.num_basis * S0).transpose(0, 1)  # (LM, N, B S0)
        A = torch.bmm(T, self.weights[0].index_select(0, self.degree))
        first = S0
        couplings = cast(Iterable[Coupling], self.couplings)
        weights = list(self.weights)[1:]
        for coupling, S, weight in zip(couplings, self.degrees[1:], weights, strict=True):
            width = (2 * coupling.l + 1) * S
            rows = coupling.filter_components * self.num_basis
            T = torch.bmm(edges[:, :rows], g[..., first : first + width])  # (N, lm B, m' S)
            first += width
            T = coupling(
                T.view(N, coupling.filter_components, self.num_basis, 2 * coupling.l + 1, S)
            )
            T = torch.bmm(T, weight.index_select(0, coupling.path))  # (Q, N, C)
            A = A.index_add(0, coupling.component, T)
        return A


class Coupling(nn.Module):
    """Clebsch-Gordan coupling Y_l1 x g_l -> all l3 <= L of natural parity, l1 <= 2.

    (N, lm, B, m', S) -> (Q, N, B S), Q components of all paths; ``path`` and ``component`` say
    which.
    """

    path: Tensor  # (Q,)
    component: Tensor  # (Q,)

    def __init__(self, lmax: int, l: int) -> None:
        super().__init__()
        self.l = l
        filter_max = min(lmax, 2)
        self.filter_components = (filter_max + 1) ** 2
        rows, path, component, num = [], [], [], 0
        for l1 in range(filter_max + 1):
            for l3 in range(abs(l1 - l), min(l1 + l, lmax) + 1):
                if (l1 + l + l3) % 2:
                    continue  # would have unnatural parity
                C = clebsch_gordan(l1, l, l3) * math.sqrt(2 * l3 + 1)  # (m1, m, m3)
                block = torch.zeros(2 * l3 + 1, self.filter_components, 2 * l + 1, dtype=C.dtype)
                block[:, l1 * l1 : (l1 + 1) ** 2] = C.permute(2, 0, 1)
                rows.append(block.flatten(1))
                path += [num] * (2 * l3 + 1)
                component += list(range(l3 * l3, (l3 + 1) ** 2))
                num += 1
        self.num_paths = num
        self.matrix = Constant(torch.cat(rows))  # (Q, lm m')
        self.register_buffer("path", torch.tensor(path), persistent=False)
        self.register_buffer("component", torch.tensor(component), persistent=False)

    def forward(self, T: Tensor) -> Tensor:
        N, _, B, _, S = T.shape
        T = T.permute(1, 3, 0, 2, 4).reshape(-1, N * B * S)  # (lm m', N B S)
        return (self.matrix() @ T).view(-1, N, B * S)
