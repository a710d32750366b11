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

    def __init__(
        self,
        lmax: int,
        num_basis: int,
        cutoff: float,
        avg_num_neighbors: float,
        stretch: float = 0.0,
    ) -> None:
        super().__init__()
        self.harmonics = SphericalHarmonics(lmax)
        self.num_basis, self.cutoff, self.stretch = num_basis, cutoff, stretch
        self.scale = 1 / math.sqrt(4 * avg_num_neighbors)

    def forward(
        self, vectors: Tensor, edge_index: Tensor, num_nodes: int
    ) -> tuple[Tensor, Neighborhoods]:
        hood = gather_neighborhoods(vectors, edge_index, num_nodes, self.cutoff)
        r = hood.vectors.norm(dim=-1, keepdim=True)  # (N, K, 1)
        Y = self.harmonics(hood.vectors / r)  # (N, K, LM)
        x = r[..., 0] / self.cutoff
        fade = (polynomial_envelope(x) * self.scale).unsqueeze(-1)
        B = bessel(x, self.num_basis, self.stretch) * fade
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
        self.filter_components = (min(lmax, 2) + 1) ** 2
        self.register_buffer("degree", degree_of_component(lmax), persistent=False)

    def forward(self, edges: Tensor, messages: list[Tensor], neighbors: Tensor) -> Tensor:
        N, _, K = edges.shape
        B, S = self.num_basis, self.degrees
        g = torch.cat(messages, dim=-1).index_select(0, neighbors).view(N, K, -1)
        widths = [(2 * l + 1) * n for l, n in enumerate(S)]
        scalars, others = g.split([widths[0], sum(widths[1:])], dim=-1)
        T = torch.bmm(edges, scalars)  # (N, LM B, S0)
        T = T.view(N, -1, B * S[0]).transpose(0, 1)  # (LM, N, B S0)
        A = torch.bmm(T, self.weights[0].index_select(0, self.degree))
        if len(S) > 1:
            # One product and one slice for all degrees: a gradient of a slice is as large as what
            # it was cut from.
            rows = self.filter_components
            T = torch.bmm(edges[:, : rows * B], others)  # (N, lm B, m' S of all degrees)
            couplings = cast(Iterable[Coupling], self.couplings)
            parts = zip(
                couplings, list(self.weights)[1:], T.split(widths[1:], -1), S[1:], strict=True
            )
            for coupling, weight, part, n in parts:
                T = coupling(part.reshape(N, rows, B, -1, n))
                T = torch.bmm(T, weight.index_select(0, coupling.path))  # (Q, N, C)
                A = A + (coupling.collect() @ T.flatten(1)).view(A.shape)
        return A


class Coupling(nn.Module):
    """Clebsch-Gordan coupling Y_l1 x g_l -> all l3 <= L of natural parity, l1 <= 2.

    (N, lm, B, m', S) -> (Q, N, B S), Q components of all paths; ``path`` says of which, ``collect``
    adds up those that are one component of A.
    """

    path: Tensor  # (Q,)

    def __init__(self, lmax: int, l: int) -> None:
        super().__init__()
        filter_max = min(lmax, 2)
        components = (filter_max + 1) ** 2
        rows, path, component, num = [], [], [], 0
        for l1 in range(filter_max + 1):
            for l3 in range(abs(l1 - l), min(l1 + l, lmax) + 1):
                if (l1 + l + l3) % 2:
                    continue  # would have unnatural parity
                C = clebsch_gordan(l1, l, l3) * math.sqrt(2 * l3 + 1)  # (m1, m, m3)
                block = torch.zeros(2 * l3 + 1, components, 2 * l + 1, dtype=C.dtype)
                block[:, l1 * l1 : (l1 + 1) ** 2] = C.permute(2, 0, 1)
                rows.append(block.flatten(1))
                path += [num] * (2 * l3 + 1)
                component += list(range(l3 * l3, (l3 + 1) ** 2))
                num += 1
        self.num_paths = num
        self.matrix = Constant(torch.cat(rows))  # (Q, lm m')
        self.register_buffer("path", torch.tensor(path), persistent=False)
        self.collect = Constant(torch.eye((lmax + 1) ** 2, dtype=torch.float64)[:, component])

    def forward(self, T: Tensor) -> Tensor:
        N, _, B, _, S = T.shape
        T = T.permute(1, 3, 0, 2, 4).reshape(-1, N * B * S)  # (lm m', N B S)
        return (self.matrix() @ T).view(-1, N, B * S)
