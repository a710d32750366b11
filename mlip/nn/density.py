"""The equivariant density of an atom: sums over neighbours without weights, weights on atoms.

    T_i[lm b, l'm' s] = sum_j Y_lm(r_ij) B_b(r_ij) g_j[l'm', s]
    A_i[l''m'', c]    = sum_{l l' b s} W[l l' l'', b s, c] CG(l l' l'') T_i

Radial weights that are linear in B_b commute with the sum.  So this is a convolution with weights
for each path and radial function whose only work on edges is one product of matrices for each atom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mlip.nn.buckets import bucketed_neighborhoods
from mlip.nn.constant import Constant
from mlip.nn.radial import bessel, polynomial_envelope
from mlip.nn.spherical import SphericalHarmonics, clebsch_gordan, degree_of_component


class Edges(NamedTuple):
    """Edges of all atoms, in few dense pieces of consecutive atoms."""

    parts: list[tuple[Tensor, Tensor]]  # (n, LM B, K) basis, (n K,) neighbours
    order: Tensor | None  # (N,) in which atoms are numbered there; None: as they were

    def sorted(self, x: Tensor) -> Tensor:
        """Rows of atoms as they are numbered here."""
        return x if self.order is None else x.index_select(0, self.order)

    def restored(self, x: Tensor) -> Tensor:
        """Rows of atoms as they were."""
        return x if self.order is None else x.index_select(0, torch.argsort(self.order))


class EdgeBasis(nn.Module):
    """Y_lm B_b f / (4 n)^1/2 of all edges, with the envelope f and n neighbours on average."""

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

    def forward(self, vectors: Tensor, edge_index: Tensor, num_nodes: int) -> Edges:
        """Of vectors (E, 3), sorted by centre."""
        order, hoods = bucketed_neighborhoods(vectors, edge_index, num_nodes, self.cutoff)
        return Edges([(self.basis(hood.vectors), hood.neighbors) for hood in hoods], order)

    def basis(self, v: Tensor) -> Tensor:
        """(n, K, 3) -> (n, LM B, K)."""
        r = v.norm(dim=-1, keepdim=True)  # (n, K, 1)
        Y = self.harmonics(v / r)  # (n, K, LM)
        x = r[..., 0] / self.cutoff
        fade = (polynomial_envelope(x) * self.scale).unsqueeze(-1)
        B = bessel(x, self.num_basis, self.stretch) * fade
        return (Y[..., :, None] * B[..., None, :]).flatten(2).mT


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

    def forward(self, edges: Edges, messages: list[Tensor]) -> Tensor:
        B, S, rows = self.num_basis, self.degrees, self.filter_components
        g = torch.cat(messages, dim=-1)
        N, width = g.shape
        widths = [(2 * l + 1) * n for l, n in enumerate(S)]
        sums, others = [], []
        for basis, neighbors in edges.parts:
            n, _, K = basis.shape
            near = g.index_select(0, neighbors).view(n, K, width)
            # One product and one slice for all degrees but 0: a gradient of a slice is as large as
            # what it was cut from.
            of_scalars, of_others = near.split([widths[0], width - widths[0]], dim=-1)
            sums.append(torch.bmm(basis, of_scalars))  # (n, LM B, S0)
            if len(S) > 1:
                others.append(torch.bmm(basis[:, : rows * B], of_others))  # (n, lm B, m' S)
        T = joined(sums).view(N, -1, B * S[0]).transpose(0, 1)  # (LM, N, B S0)
        A = torch.bmm(T, self.weights[0].index_select(0, self.degree))
        if len(S) > 1:
            T = joined(others)
            couplings = cast(Iterable[Coupling], self.couplings)
            parts = zip(
                couplings, list(self.weights)[1:], T.split(widths[1:], -1), S[1:], strict=True
            )
            for coupling, weight, part, n in parts:
                T = coupling(part.reshape(N, rows, B, -1, n))
                T = torch.bmm(T, weight.index_select(0, coupling.path))  # (Q, N, C)
                A = A + (coupling.collect() @ T.flatten(1)).view(A.shape)
        return A


def joined(parts: list[Tensor]) -> Tensor:
    """All rows; without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
