"""TransIP: a Transformer on atoms that is free to learn its symmetry.

One token h_i per atom.  Edges r_ij of a neighbourhood, with the atom itself in slot 0 at distance
zero, enter as rotary phases w_k . r_ij of the keys, as a bias, and as functions g_ij of the raw
vector in the values.  In each block, for each head,

    s_ij = d^-1/2 Re sum_k conj(q_ik) exp(i w_k . r_ij) k_jk + b(r_ij)                  logits
    a_ij = f_ij exp(s_ij) / sum_j f_ij exp(s_ij),      g_ij = MLP(r_ij / |r_ij|, B(r_ij))
    h_i <- h_i + W sum_j a_ij g_ij (x) v_j,      h_i <- h_i + SwiGLU(h_i)

q, k, v are linear in norm(h); (x) is the outer product of few functions with few channels, so the
sum over neighbours is a batched matrix product without weights.  The envelope f fades a neighbour
in numerator and denominator alike, and f_ii = 1 keeps the latter above zero: one formula for
molecules (a cutoff beyond their size makes it attention of all atoms to all) and for crystals.

The final latents are read as irreps: c_0 scalars, c_1 vectors, c_2 tensors of degree 2, of natural
parity.  The energy is a function of their invariants, direct forces are combinations of the
vectors.  Nothing enforces that they rotate so; where they do, energy and forces are exactly
symmetric (``mlip.training.symmetry_losses.LatentTerm``).

With ``tokens="irreps"`` the tokens of all layers are such irreps, norms and gates respect them, g
are harmonics, and there are no phases: what breaks the symmetry is only the weights between
different irreps, of which a regulariser takes as much as the data let it, or a projection all
(``mlip.training.soft_equivariance``).

After A. Elhag et al., "TransIP" (arXiv:2510.00027).  Differences: neighbourhoods, periodic and
smooth; forces are gradients by default; per-atom latents with a fixed action.

Symmetry: translations and permutations exactly, rotations and reflections only learned.
Cost: O(E (H + G V)) + O(N (H^2 + G V H)), G functions of an edge, V value channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.attention import log_envelope
from mlip.nn.constant import Constant
from mlip.nn.irreps import Block, IrrepsLinear, blocks_of, invariant_lengths
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.radial import bessel
from mlip.nn.rigid_motion import without_rigid_motion
from mlip.nn.spherical import SphericalHarmonics

SHORTEST_WAVE = 1.0  # angstrom; finer phases than this resolve nothing that atoms do


class TransIPConfig(Config):
    """Hyperparameters of TransIP, the important ones first."""

    cutoff: float = Field(
        5.0,
        gt=0,
        description="angstrom; neighbours up to this distance, for molecules beyond their size",
    )
    hidden: int = Field(128, ge=12, le=4096, description="H, width of an atom's token")
    num_layers: int = Field(4, ge=1, le=64)
    num_heads: int = Field(8, ge=1, le=64)
    head_width: int = Field(16, ge=2, le=256, description="d, of queries and keys, even")
    edge_functions: int = Field(24, ge=1, le=512, description="G, functions of the raw vector")
    value_channels: int = Field(4, ge=1, le=256, description="channels of the values of each head")
    edge_hidden: int = Field(64, ge=4, le=4096, description="width of the network of the edges")
    num_basis: int = Field(8, ge=2, le=64, description="B, Bessel functions")
    stretch: float = Field(
        2.0, ge=0, le=10, description="Bessel functions are 1 + this times finer at short distances"
    )
    latent: tuple[int, int] = Field(
        (16, 4), description="channels of degree 1 and 2 in the latents; the rest are scalars"
    )
    tokens: Literal["free", "irreps"] = Field(
        "free", description="irreps: layers between declared representations, see soft equivariance"
    )
    direct_forces: bool = Field(
        False, description="predict forces beside the energy; for pre-training, not conservative"
    )

    @property
    def latent_irreps(self) -> tuple[int, int, int]:
        """Channels of degree 0, 1, 2 in the latents."""
        return self.hidden - 3 * self.latent[0] - 5 * self.latent[1], *self.latent

    @model_validator(mode="after")
    def _consistent(self) -> TransIPConfig:
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} is odd; planes of rotation need pairs")
        if min(self.latent) < 0 or self.latent_irreps[0] < 1:
            raise ValueError(
                f"hidden={self.hidden} has no room for latent={self.latent}: "
                f"3 x {self.latent[0]} + 5 x {self.latent[1]} channels and a scalar at least"
            )
        if self.direct_forces and self.latent[0] == 0:
            raise ValueError("direct forces are combinations of latent vectors; latent has none")
        return self


class Edges(NamedTuple):
    """What all layers use of the neighbourhoods, slot 0 being the atom itself."""

    neighbors: Tensor  # (N T,)
    phase: tuple[Tensor, Tensor] | None  # cos, sin (N, T, heads, d/2)
    radial: Tensor  # (N, T, B) zero in slot 0
    functions: Tensor  # (N, G, T)
    log_fade: Tensor  # (N, T)


class TransIP(nn.Module):
    """The model; see the module's docstring for the equations."""

    def __init__(self, config: TransIPConfig) -> None:
        super().__init__()
        c = self.config = config
        self.latent_irreps = c.latent_irreps
        free = c.tokens == "free"
        # One row per Z, row 0 unused; an element has no direction.
        self.embed = nn.Embedding(119, c.hidden if free else self.latent_irreps[0])
        self.functions = FreeFunctions(c) if free else Harmonics(c)
        self.blocks = nn.ModuleList(
            FreeBlock(c) if free else IrrepsBlock(c, self.latent_irreps)
            for _ in range(c.num_layers)
        )
        self.norm = norm(c)
        invariants = sum(self.latent_irreps)
        last = nn.Linear(c.hidden, 1, bias=False)
        nn.init.zeros_(last.weight)  # training starts from the reference energies
        self.readout = nn.Sequential(nn.Linear(invariants, c.hidden), nn.SiLU(), last)
        self.forces = nn.Linear(invariants, c.latent[0]) if c.direct_forces else None

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.num_layers * self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections are learned."""
        return False

    def forward(
        self, graph: AtomicGraph, share: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> NodeOutput:
        """Evaluate a graph; ``share`` maps tokens (N, H) of the nodes (N,) before others read
        them."""
        edges = self.edges(graph)
        nodes = torch.arange(graph.atomic_numbers.shape[0], device=graph.atomic_numbers.device)
        h = self.embed(graph.atomic_numbers)
        h = nn.functional.pad(h, (0, self.config.hidden - h.shape[1]))  # (N, H)
        for number, block in enumerate(self.blocks):
            h = block(h if share is None or number == 0 else share(h, nodes), edges)
        h = self.norm(h)
        invariants = invariant_lengths(h, self.latent_irreps)
        # An atom without neighbours has energy zero; squared, so that the last one leaves gently.
        count = edges.log_fade[:, 1:].exp().sum(dim=1).square()  # (N,)
        alone = count / (1 + count)
        energy = self.readout(invariants).squeeze(-1) * alone
        forces = None
        if self.forces is not None:
            weights = self.forces(invariants) * alone[:, None]
            forces = without_rigid_motion(
                (weights[:, None] @ self.sectors(h)[1])[:, 0],
                graph.positions,
                graph.batch,
                free=~graph.pbc.any(dim=1),
            )
        return NodeOutput(energy=energy, features=h, forces=forces)

    def sectors(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H) -> (N, c0), (N, c1, 3), (N, c2, 5)."""
        c0, c1, c2 = self.latent_irreps
        scalars, vectors, tensors = h.split([c0, 3 * c1, 5 * c2], dim=-1)
        return scalars, vectors.unflatten(-1, (c1, 3)), tensors.unflatten(-1, (c2, 5))

    def edges(self, graph: AtomicGraph) -> Edges:
        """Lay out the neighbourhoods and compute all functions of the edges."""
        c = self.config
        N = graph.atomic_numbers.shape[0]  # unlike len(), a symbol to a compiler
        hood = gather_neighborhoods(graph.vectors, graph.edge_index, N, c.cutoff)
        v = hood.vectors  # (N, K, 3)
        r = v.norm(dim=-1)
        x = r / c.cutoff
        # All that slot 0 gets of a distance and a direction is zero.
        own = nn.functional.pad
        unit = own(v / r[..., None], (0, 0, 1, 0))
        radial = own(bessel(x, c.num_basis, c.stretch), (0, 0, 1, 0))
        functions, phase = self.functions(own(v, (0, 0, 1, 0)), unit, radial)
        neighbors = torch.cat(
            [torch.arange(N, device=v.device)[:, None], hood.neighbors.view(N, -1)], dim=1
        )
        log_fade = own(log_envelope(x), (1, 0))
        return Edges(neighbors.flatten(), phase, radial, functions.mT, log_fade)

    def irreps_layers(self) -> list[IrrepsLinear]:
        """Linear layers whose two sides are declared representations; none of free tokens."""
        blocks = [block for block in self.blocks if isinstance(block, IrrepsBlock)]
        return [spec for block in blocks for spec in block.irreps_layers()]


def norm(c: TransIPConfig) -> nn.Module:
    """Of tokens; irreps know no mean and no weight of a component."""
    if c.tokens == "free":
        return nn.LayerNorm(c.hidden, bias=False)
    return nn.RMSNorm(c.hidden, eps=1e-6, elementwise_affine=False)


class FreeFunctions(nn.Module):
    """A network on raw vectors, and rotary phases."""

    def __init__(self, c: TransIPConfig) -> None:
        super().__init__()
        self.heads = c.num_heads
        self.frequencies = Constant(wave_vectors(c.num_heads, c.head_width // 2, c.cutoff))
        self.mlp = nn.Sequential(
            nn.Linear(3 + c.num_basis, c.edge_hidden),
            nn.SiLU(),
            nn.Linear(c.edge_hidden, c.edge_hidden),
            nn.SiLU(),
            nn.Linear(c.edge_hidden, c.edge_functions),
        )

    def forward(
        self, vectors: Tensor, unit: Tensor, radial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Functions (N, T, G); cosine and sine of the phases."""
        phase = (vectors @ self.frequencies()).unflatten(-1, (self.heads, -1))
        return self.mlp(torch.cat([unit, radial], dim=-1)), (phase.cos(), phase.sin())


class Harmonics(nn.Module):
    """Harmonics up to degree 2 times radial networks, without phases."""

    def __init__(self, c: TransIPConfig) -> None:
        super().__init__()
        self.radial = nn.Sequential(
            nn.Linear(c.num_basis, c.edge_hidden),
            nn.SiLU(),
            nn.Linear(c.edge_hidden, num_radial(c)),
        )
        self.harmonics = SphericalHarmonics(2)

    def forward(
        self, vectors: Tensor, unit: Tensor, radial: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Functions (N, T, G) in the order (radial, lm)."""
        Y = self.harmonics(unit)
        # Degree 2 of no direction is none: the recursion gives zero for a zero vector.
        return (self.radial(radial)[..., :, None] * Y[..., None, :]).flatten(2), None


def num_radial(c: TransIPConfig) -> int:
    """Radial functions of ``tokens="irreps"``, each times nine harmonics."""
    return max(1, c.edge_functions // 3)


def wave_vectors(num_heads: int, num_planes: int, cutoff: float) -> Tensor:
    """(3, heads planes) wave vectors in 1/angstrom.

    Directions are a Fibonacci lattice on the sphere, lengths grow geometrically from a quarter wave
    in the cutoff to ``SHORTEST_WAVE``; each head has all lengths in directions of its own.
    """
    n = num_heads * num_planes
    k = torch.arange(n, dtype=torch.float64)
    z = 1 - (2 * k + 1) / n
    azimuth = math.pi * (1 + math.sqrt(5)) * k
    rho = (1 - z * z).sqrt()
    directions = torch.stack([rho * azimuth.cos(), rho * azimuth.sin(), z])
    low, high = math.pi / (2 * cutoff), 2 * math.pi / SHORTEST_WAVE
    plane = (k % num_planes) / max(num_planes - 1, 1)
    return directions * low * (high / low) ** plane


class Attention(nn.Module):
    """Attention to the neighbourhood; a block adds its own network on each atom."""

    def __init__(self, c: TransIPConfig, num_functions: int) -> None:
        super().__init__()
        self.heads, self.width = c.num_heads, c.head_width
        V = c.num_heads * c.value_channels
        d = c.num_heads * c.head_width
        self.sizes = [d, d, V]
        self.norm_attention, self.norm_mlp = norm(c), norm(c)
        self.project = nn.Linear(c.hidden, sum(self.sizes), bias=False)
        self.bias = nn.Linear(c.num_basis, c.num_heads, bias=False)
        self.out = nn.Linear(num_functions * V, c.hidden, bias=False)
        nn.init.zeros_(self.bias.weight)

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        h = h + self.attention(self.norm_attention(h), edges)
        return h + self.mlp(self.norm_mlp(h))

    def mlp(self, x: Tensor) -> Tensor:
        """(N, H) -> (N, H)."""
        raise NotImplementedError

    def attention(self, x: Tensor, edges: Edges) -> Tensor:
        """(N, H) -> (N, H)."""
        N, T = edges.log_fade.shape
        q, k, v = self.project(x).split(self.sizes, dim=-1)
        kv = torch.cat([k, v], dim=-1).index_select(0, edges.neighbors).view(N, T, -1)
        k, v = kv.split(self.sizes[1:], dim=-1)
        q = (q / math.sqrt(self.width)).view(N, 1, self.heads, -1)
        k = k.unflatten(-1, (self.heads, -1))  # (N, T, heads, d)
        if edges.phase is None:
            logits = (q * k).sum(-1)
        else:
            cos, sin = edges.phase
            (q0, q1), (k0, k1) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
            logits = (cos * (q0 * k0 + q1 * k1) + sin * (q1 * k0 - q0 * k1)).sum(-1)
        logits = logits + self.bias(edges.radial) + edges.log_fade[..., None]  # (N, T, heads)
        a = torch.softmax(logits, dim=1)
        values = v.unflatten(-1, (self.heads, -1)) * a[..., None]
        return self.out((edges.functions @ values.flatten(2)).flatten(1))


class FreeBlock(Attention):
    """Attention, then SwiGLU."""

    def __init__(self, c: TransIPConfig) -> None:
        super().__init__(c, c.edge_functions)
        self.up = nn.Linear(c.hidden, 4 * c.hidden)
        self.down = nn.Linear(2 * c.hidden, c.hidden, bias=False)
        nn.init.zeros_(self.down.weight)  # training starts from the attention alone

    def mlp(self, x: Tensor) -> Tensor:
        a, gate = self.up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * a)


class IrrepsBlock(Attention):
    """The same between irreps: vectors and tensors pass gates, never a pointwise function."""

    def __init__(self, c: TransIPConfig, irreps: tuple[int, int, int]) -> None:
        super().__init__(c, 9 * num_radial(c))
        self.irreps, self.num_radial = irreps, num_radial(c)
        self.wide = tuple(2 * n for n in irreps)
        m0, m1, m2 = self.wide
        self.up = nn.Linear(c.hidden, 2 * m0 + 4 * m1 + 6 * m2)
        self.down = nn.Linear(m0 + 3 * m1 + 5 * m2, c.hidden, bias=False)
        nn.init.zeros_(self.down.weight)

    def mlp(self, x: Tensor) -> Tensor:
        m0, m1, m2 = self.wide
        a, gates, vectors, tensors = self.up(x).split([m0, m0 + m1 + m2, 3 * m1, 5 * m2], dim=-1)
        g0, g1, g2 = gates.split([m0, m1, m2], dim=-1)
        parts = [nn.functional.silu(g0) * a]
        for gate, part in ((g1, vectors), (g2, tensors)):
            gated = gate.sigmoid()[..., None] * part.unflatten(-1, (gate.shape[-1], -1))
            parts.append(gated.flatten(-2))
        return self.down(torch.cat(parts, dim=-1))

    def irreps_layers(self) -> list[IrrepsLinear]:
        """Layers with the representations of their two sides."""
        m0, m1, m2 = self.wide
        width_v = self.sizes[2] // self.heads
        q = heads_of(self.heads, self.width)
        k = heads_of(self.heads, self.width, self.sizes[0])
        v = heads_of(self.heads, width_v, 2 * self.sizes[0])
        tokens = blocks_of(self.irreps)
        return [
            IrrepsLinear(self.project, q + k + v, tokens),
            IrrepsLinear(self.out, tokens, self.products(heads_of(self.heads, width_v))),
            IrrepsLinear(self.up, blocks_of((2 * m0 + m1 + m2, m1, m2)), tokens),
            IrrepsLinear(self.down, tokens, blocks_of(self.wide)),
        ]

    def products(self, values: list[Block]) -> list[Block]:
        """Blocks of functions (x) values, places (radial, lm, value)."""
        V = self.sizes[2]
        radial = torch.arange(self.num_radial)[:, None, None, None]
        blocks = []
        for l in range(3):
            lm = torch.arange(l * l, (l + 1) ** 2)[None, None, :, None]
            for value in values:
                place = (radial * 9 + lm) * V + value.places[None, :, None, :]
                blocks.append(Block((l, *value.degrees), place.flatten(0, 1).flatten(1)))
        return blocks


def heads_of(num_heads: int, width: int, start: int = 0) -> list[Block]:
    """Channels of queries, keys or values: in each head as many vectors as scalars, about."""
    vectors = width // 4
    place = start + torch.arange(num_heads * width).view(num_heads, width)
    scalars = place[:, 3 * vectors :].reshape(-1, 1)
    blocks = [Block((0,), scalars)]
    if vectors:
        blocks.append(Block((1,), place[:, : 3 * vectors].reshape(-1, 3)))
    return blocks
