"""PONITA: convolutions over positions and orientations.

Features x_i(o) live on atoms i and a fixed set of orientations o, vertices of a polyhedron with
weights w_o of sum one (``mlip.nn.orientations``).  One layer; g_j are few channels of x_j:

    T_i[nl s](o) = n^-1/2 sum_j R_n(r_ij) f(r_ij) P_l(r_ij.o / |r_ij|) g_j[s](o)       space
    A_i[lm, c]   = sum_o w_o Y_lm(o) sum W_l^c T_i(o) + W_l^c x_i(o),   l <= t/2       orientations
    A_i[1m, c]  += F_m sum W A_i[00]                     F an external field, where there is one
    a, b         = sum_lm Y_lm(o) A_i[lm] / norm_i
    h_i(o)       = phi(a) (1 + b + gate_i),            q_i = sum_o w_o h_i(o)          pointwise
    x_i(o) <- x_i(o) + W h_i(o) + MLP(q_i),            E_i <- E_i + readout(MLP(q_i))

The two middle lines are a convolution with a kernel of o.o', sum_l W_l P_l(o.o'), in its
eigenspaces.  All is made of dot products of vectors with vectors: if o ran over the whole sphere,
the energy would be invariant under O(3).  On the grid it is exactly invariant under the group of
the polyhedron, its rotations and reflections permute the orientations and nothing else; under other
rotations it is so up to the degrees that the grid does not resolve.  With ``pointwise="product"``,
phi(a) = a, all degrees are bounded, and where the grid integrates them exactly
(``exact_symmetry``), so is the symmetry.

After E. Bekkers et al., "Fast, expressive SE(n) equivariant networks through weight-sharing in
position-orientation space" (PONITA, ICLR 2024, arXiv:2310.02970); their recipe as published is
``ponita_published``.  Differences: kernels R_n P_l with an envelope, smooth where a vector is
parallel to o and bounded at any distance; symmetric grids; kernels linear in few functions,
contracted before the channels; the norm is one number per atom; energies summed.

Symmetry: translations and permutations exactly, O(3) as said; ``orientations=0`` knows distances
only (PNITA) and is exact.  No term survives without neighbours: an isolated atom has energy zero.
Cost: O(E O K S) + O(N LM K S C), K = B (L + 1) kernels, S channels sent; memory E O (K + S).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.constant import Constant
from mlip.nn.layers import ExternalField, soft_norm
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.orientations import DEGREE, Orientations
from mlip.nn.radial import bessel, polynomial_envelope
from mlip.nn.rotations import random_rotations
from mlip.nn.spherical import SphericalHarmonics, degree_of_component


class PonitaConfig(Config):
    """Hyperparameters of PONITA, the important ones first."""

    cutoff: float = Field(5.0, gt=0, description="neighbours up to this distance, angstrom")
    channels: int = Field(64, ge=4, le=1024, description="C, at each orientation")
    num_layers: int = Field(2, ge=1, le=8)
    orientations: Literal[0, 6, 12, 20, 32] = Field(
        32, description="O, vertices of a polyhedron; 0: positions only"
    )
    lmax: int = Field(3, ge=0, le=8, description="L, degree of the kernels in space")
    fiber_lmax: int | None = Field(
        None, ge=0, le=4, description="degree of the kernels over orientations; null: 2 or less"
    )
    pointwise: Literal["product", "gelu"] = Field(
        "product", description="at each orientation: a (1 + b), of bounded degree, or gelu(a)"
    )
    message_channels: int = Field(16, ge=1, le=256, description="S, that a neighbour sends")
    num_basis: int = Field(8, ge=2, le=64, description="B, Bessel functions")
    stretch: float = Field(
        2.0, ge=0, le=10, description="Bessel functions are 1 + this times finer at short distances"
    )
    hidden: int = Field(64, ge=4, le=4096, description="width of the networks on invariants")
    random_grid: bool = Field(
        False, description="in training turn the orientations at random, for each structure anew"
    )
    field: Literal["given"] | tuple[float, float, float] | None = Field(
        None,
        description="external vector: given with each structure, or a fixed one, such as the "
        "normal (0, 0, 1) of slabs; null: none",
    )
    avg_num_neighbors: float = Field(
        20.0, gt=0, description="scale of sums over neighbours, from the training set"
    )

    @property
    def grid(self) -> int:
        """Number of points, one where there are no orientations."""
        return self.orientations or 1

    @property
    def degrees(self) -> tuple[int, int]:
        """Of the kernels in space and over orientations."""
        if self.orientations == 0:
            return 0, 0
        fiber = min(2, DEGREE[self.grid] // 2) if self.fiber_lmax is None else self.fiber_lmax
        return self.lmax, fiber

    @model_validator(mode="after")
    def _resolved(self) -> PonitaConfig:
        most = DEGREE[self.grid] // 2
        if self.degrees[1] > most:
            raise ValueError(
                f"fiber_lmax={self.fiber_lmax}: {self.orientations} orientations resolve {most}; "
                "give no more than that, or more orientations"
            )
        if self.field is not None and self.degrees[1] == 0:
            raise ValueError("field needs fiber_lmax of 1 or more, and orientations for it")
        if self.field is not None and self.random_grid:
            raise ValueError(
                "random_grid would leave the field where it is; set random_grid: false and show "
                "rotated structures, data.augment: proper_rotations"
            )
        return self


class Ponita(nn.Module):
    """The model; see the module's docstring for the equations."""

    def __init__(self, config: PonitaConfig) -> None:
        super().__init__()
        c = self.config = config
        L, fiber = c.degrees
        self.embed = nn.Embedding(119, c.channels)  # one row per Z, row 0 unused
        self.harmonics = SphericalHarmonics(max(L, fiber))
        self.grid = Orientations(c.grid, fiber)
        self.kernels = Kernels(self.grid, L)
        self.layers = nn.ModuleList(
            Layer(c, self.grid, SpaceConvolution(c, self.grid) if t else Density(c), t)
            for t in range(c.num_layers)
        )

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.num_layers * self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections, of a given field as well, are exact if the grid integrates all
        that is summed over o, unless a fixed field singles out an axis."""
        c = self.config
        if c.field not in (None, "given"):
            return False
        if c.orientations == 0:
            return True
        L, fiber = c.degrees
        # Analysis of the largest degree of P_l x_j; of one layer there is none.
        largest = L + 3 * fiber if c.num_layers > 1 else 0
        return c.pointwise == "product" and largest <= self.grid.degree

    @property
    def exact_groups(self) -> tuple[str, ...]:
        """Rules of ``mlip.nn.rotations`` over which an average changes nothing."""
        return self.grid.groups if self.config.field in (None, "given") else ()

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """What the model reads besides the geometry."""
        return ("field",) if self.config.field == "given" else ()

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        c = self.config
        N = graph.atomic_numbers.shape[0]  # unlike len(), a symbol to a compiler
        vectors = turned_at_random(graph) if c.random_grid and self.training else graph.vectors
        hood = gather_neighborhoods(vectors, graph.edge_index, N, c.cutoff)
        r = hood.vectors.norm(dim=-1, keepdim=True)  # (N, J, 1)
        Y = self.harmonics(hood.vectors / r).mT  # (N, LM, J)
        u = r[..., 0] / c.cutoff
        R = bessel(u, c.num_basis, c.stretch) * (
            polynomial_envelope(u) / math.sqrt(4 * c.avg_num_neighbors)
        ).unsqueeze(-1)  # (N, J, B)
        edges = Y[:, :, None] * R.mT[:, None]  # (N, LM, B, J)
        kernels = self.kernels(edges) if c.num_layers > 1 else None  # (O N, K, J)

        species = self.embed(graph.atomic_numbers)  # (N, C)
        field = None if c.field is None else graph.external_field(c.field)  # (N, 3)
        x = None
        scalars = torch.zeros_like(species)
        energy = torch.zeros_like(species[:, 0])
        for layer in cast(Iterable[Layer], self.layers):
            A = layer.convolution(x, species, edges if x is None else kernels, hood.neighbors)
            x, update, e = layer(x, species, A, field)
            scalars, energy = scalars + update, energy + e
        return NodeOutput(energy=energy, features=scalars)


def turned_at_random(graph: AtomicGraph) -> Tensor:
    """(E, 3) vectors, each structure turned at random: its orientations turned the other way.

    The numbers are those of torch's own generator, whose state a training saves.
    """
    vectors = graph.vectors
    R = random_rotations(graph.num_structures).matrices.to(vectors)
    of_edge = R.index_select(0, graph.batch.index_select(0, graph.edge_index[1]))
    return (of_edge @ vectors[:, :, None])[:, :, 0]


class Kernels(nn.Module):
    """R_n P_l for all pairs of an edge and an orientation, by the addition theorem.

    (N, LM, B, J) harmonics times radial functions -> (H N, K, J), K = (l, n), for one of each pair
    o, -o.  Linear, so that of all that is as large as this nothing but itself and its gradient is
    ever made.
    """

    def __init__(self, grid: Orientations, lmax: int) -> None:
        super().__init__()
        half = grid.points.exact[: grid.half_size]
        Y = SphericalHarmonics(lmax).double()(half)  # (H, LM)
        l = degree_of_component(lmax)
        # Component normalisation: mean square one for each kernel.
        self.Y = Constant(Y / (2 * l + 1).double().sqrt())

    def forward(self, edges: Tensor) -> Tensor:
        Y = self.Y()
        rows = edges[:, : Y.shape[1]].transpose(0, 1).contiguous()  # (LM, N, B, J)
        return _Spread.apply(rows, Y).flatten(0, 1)


class _Spread(torch.autograd.Function):
    """x (LM, N, B, J) -> (H, N, (l, B), J) = sum_m Y_lm(o) x_lm; each degree in its place.

    A sum over blocks, which a concatenation would write twice and fill with zeros on the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, Y: Tensor) -> Tensor:
        ctx.save_for_backward(Y)
        return spread(x, Y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (Y,) = ctx.saved_tensors
        return _Gather.apply(g, Y), None


class _Gather(torch.autograd.Function):
    """The adjoint of ``_Spread``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, Y: Tensor) -> Tensor:
        ctx.save_for_backward(Y)
        LM, (O, N, K, J) = Y.shape[1], g.shape
        L = math.isqrt(LM) - 1
        B = K // (L + 1)
        x = g.new_empty(LM, N, B, J)
        for l in range(L + 1):
            rows = slice(l * l, (l + 1) ** 2)
            block = g[:, :, l * B : (l + 1) * B].reshape(O, -1)
            x[rows].view(2 * l + 1, -1).addmm_(Y[:, rows].T, block, beta=0)
        return x

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:
        (Y,) = ctx.saved_tensors
        return _Spread.apply(x, Y), None


def spread(x: Tensor, Y: Tensor) -> Tensor:
    """Synthesis of each degree apart: x (LM, N, B, J), Y (H, LM) -> (H, N, (l, B), J)."""
    O, (LM, N, B, J) = len(Y), x.shape
    L = math.isqrt(LM) - 1
    out = x.new_empty(O, N, L + 1, B, J)
    for l in range(L + 1):
        rows = slice(l * l, (l + 1) ** 2)
        out[:, :, l] = (Y[:, rows] @ x[rows].reshape(2 * l + 1, -1)).view(O, N, B, J)
    return out.view(O, N, -1, J)


class Density(nn.Module):
    """Convolution of features that do not depend on o, integrated over o in closed form.

    By the theorem of Funk and Hecke the sum over orientations leaves of R_n P_l only R_n Y_lm, and
    of each degree its own.  (N, C) species -> (LM, N, 2M).
    """

    def __init__(self, c: PonitaConfig) -> None:
        super().__init__()
        S, (_, fiber) = c.channels, c.degrees
        self.send = nn.Linear(c.channels, S, bias=False)
        self.fiber = LinearByDegree(fiber, c.num_basis * S, 2 * c.channels)

    def forward(self, x: None, species: Tensor, edges: Tensor, neighbors: Tensor) -> Tensor:
        N, _, B, J = edges.shape
        LM = sum(self.fiber.sizes)
        g = self.send(species).index_select(0, neighbors).view(N, J, -1)
        T = torch.bmm(edges[:, :LM].reshape(N, LM * B, J), g)  # (N, LM B, S)
        return self.fiber(T.view(N, LM, -1).transpose(0, 1))


class SpaceConvolution(nn.Module):
    """Convolution over positions at each orientation, then over orientations.

    P_l(-x) = (-1)^l P_l(x): the same kernels serve o and -o, the messages of which are columns of
    one matrix; the sign comes in after the analysis, where it is that of degree l times that of lm.

    Operations for each atom, J neighbours: J O K S for the sum, LM O K S for the analysis, LM K S
    2C for the weights, which would be O K S 2C before it.  In memory there are J O K / 2 kernels
    for all layers, and J O S messages and O K S sums; a kernel for each channel would be J O C,
    several times over in each layer.
    """

    def __init__(self, c: PonitaConfig, grid: Orientations) -> None:
        super().__init__()
        S, (L, fiber) = c.message_channels, c.degrees
        self.grid = [grid]  # in a list: shared, not a part of this block
        self.send = nn.Linear(c.channels, S, bias=False)
        self.send_species = nn.Linear(c.channels, S, bias=False)
        K = (L + 1) * c.num_basis
        self.fiber = LinearByDegree(fiber, K * S + c.channels, 2 * c.channels)
        l = torch.arange(L + 1).repeat_interleave(c.num_basis)
        sign = 1.0 - 2 * ((degree_of_component(fiber)[:, None] + l) % 2)  # (LM, K)
        pairs = c.grid // grid.half_size
        signs = torch.stack([torch.ones_like(sign), sign][:pairs], dim=-1)
        self.sign = Constant(signs.double()[:, None, :, :, None])  # (LM, 1, K, 2, 1)
        self.from_half = Constant(grid.from_grid.exact[:, : grid.half_size])

    def forward(self, x: Tensor, species: Tensor, kernels: Tensor, neighbors: Tensor) -> Tensor:
        (O, N, _), (HN, K, J) = x.shape, kernels.shape
        H = HN // N
        g = self.send(x) + self.send_species(species)  # (O, N, S)
        g = g.view(O // H, H, N, -1).permute(1, 2, 0, 3).flatten(2)  # (H, N, 2S)
        g = g.index_select(1, neighbors).view(HN, J, -1)
        T = torch.bmm(kernels, g).view(H, -1)  # (H, N K 2S)
        A = (self.from_half() @ T).view(-1, N, K, O // H, g.shape[-1] * H // O)
        A = (A * self.sign()).sum(dim=3).flatten(2)  # (LM, N, K S)
        (grid,) = self.grid
        return self.fiber(torch.cat([A, grid.analysis(x)], dim=-1))


class LinearByDegree(nn.Module):
    """One matrix for each degree: (LM, N, inputs) -> (LM, N, outputs)."""

    def __init__(self, lmax: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.sizes = [2 * l + 1 for l in range(lmax + 1)]
        self.weight = nn.Parameter(torch.randn(lmax + 1, inputs, outputs) / math.sqrt(inputs))

    def forward(self, A: Tensor) -> Tensor:
        parts = zip(A.split(self.sizes), self.weight.unbind(), strict=True)
        return torch.cat([part.flatten(0, 1) @ W for part, W in parts]).view(len(A), A.shape[1], -1)


class Layer(nn.Module):
    """A convolution, what is done at each orientation, and the energy."""

    def __init__(
        self, c: PonitaConfig, grid: Orientations, convolution: nn.Module, number: int
    ) -> None:
        super().__init__()
        C = c.channels
        self.grid = [grid]
        self.convolution = convolution
        self.field = ExternalField(2 * C) if c.field is not None else None
        self.activation = nn.GELU() if c.pointwise == "gelu" else nn.Identity()
        self.gate = nn.Linear(3 * C, C, bias=False)
        last = number == c.num_layers - 1
        self.update = None if last else nn.Linear(C, C, bias=False)
        self.mlp = InvariantMLP(C, c.hidden, C, C)
        self.readout = nn.Linear(C, 1, bias=False)
        nn.init.zeros_(self.readout.weight)  # training starts from the reference energies

    def forward(
        self, x: Tensor | None, species: Tensor, A: Tensor, field: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Features (O, N, C), species (N, C), coefficients (LM, N, 2C) of the convolution, field
        (N, 3)."""
        (grid,) = self.grid
        if self.field is not None and field is not None:
            A = self.field(A, field)
        A = A * soft_norm(A, (0, 2))[:, None]
        gate = self.gate(torch.cat([species, nn.functional.silu(A[0])], dim=-1))  # (N, C)
        a, b = grid.synthesis(A).chunk(2, dim=-1)  # (O, N, C)
        h = self.activation(a) * (b + (1 + gate))
        q = grid.mean(h)  # (N, C)
        scalars = self.mlp(q * soft_norm(q, (1,))[:, None], species)
        energy = self.readout(scalars).squeeze(-1)
        if self.update is not None:
            h = self.update(h) + scalars
            x = h if x is None else x + h
        return x, scalars, energy


class InvariantMLP(nn.Module):
    """Two layers without biases, gated by the species: zero in, zero out."""

    def __init__(self, inputs: int, hidden: int, outputs: int, species: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden, bias=False)
        self.gate = nn.Linear(species, hidden, bias=False)
        self.second = nn.Linear(hidden, outputs, bias=False)

    def forward(self, q: Tensor, species: Tensor) -> Tensor:
        h = nn.functional.silu(self.first(q)) * (1 + self.gate(species))
        return self.second(h)
