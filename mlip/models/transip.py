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

After A. Elhag et al., "TransIP" (arXiv:2510.00027).  Differences: neighbourhoods, periodic and
smooth; forces are gradients by default; per-atom latents with a fixed action.

Symmetry: translations and permutations exactly, rotations and reflections only learned.
Cost: O(E (H + G V)) + O(N (H^2 + G V H)), G functions of an edge, V value channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.attention import log_envelope
from mlip.nn.constant import Constant
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.radial import bessel
from mlip.nn.rigid_motion import without_rigid_motion

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
    latent: tuple[int, int] = Field(
        (16, 4), description="channels of degree 1 and 2 in the latents; the rest are scalars"
    )
    direct_forces: bool = Field(
        False, description="predict forces beside the energy; for pre-training, not conservative"
    )


class Edges(NamedTuple):
    """What all layers use of the neighbourhoods, slot 0 being the atom itself."""

    neighbors: Tensor  # (N T,)
    cos: Tensor  # (N, T, heads, d/2) of the phases
    sin: Tensor  # (N, T, heads, d/2)
    radial: Tensor  # (N, T, B) zero in slot 0
    functions: Tensor  # (N, G, T)
    log_fade: Tensor  # (N, T)


class TransIP(nn.Module):
    """The model; see the module's docstring for the equations."""

    def __init__(self, config: TransIPConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.head_width % 2:
            raise ValueError(f"head_width={c.head_width} is odd; planes of rotation need pairs")
        self.latent_irreps = (c.hidden - 3 * c.latent[0] - 5 * c.latent[1], *c.latent)
        if self.latent_irreps[0] < 1:
            raise ValueError(
                f"hidden={c.hidden} has no room for latent={c.latent}: 3 x {c.latent[0]} + "
                f"5 x {c.latent[1]} channels and a scalar at least"
            )
        self.embed = nn.Embedding(119, c.hidden)  # one row per Z, row 0 unused
        self.frequencies = Constant(wave_vectors(c.num_heads, c.head_width // 2, c.cutoff))
        self.edge_mlp = nn.Sequential(
            nn.Linear(3 + c.num_basis, c.edge_hidden),
            nn.SiLU(),
            nn.Linear(c.edge_hidden, c.edge_hidden),
            nn.SiLU(),
            nn.Linear(c.edge_hidden, c.edge_functions),
        )
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.hidden, bias=False)
        invariants = sum(self.latent_irreps)
        self.readout = nn.Sequential(
            nn.Linear(invariants, c.hidden), nn.SiLU(), nn.Linear(c.hidden, 1, bias=False)
        )
        nn.init.zeros_(self.readout[-1].weight)  # training starts from the reference energies
        self.forces = nn.Linear(invariants, c.latent[0]) if c.direct_forces else None
        if c.direct_forces and c.latent[0] == 0:
            raise ValueError("direct forces are combinations of latent vectors; latent has none")

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.num_layers * self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections are learned."""
        return False

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        edges = self.edges(graph)
        h = self.embed(graph.atomic_numbers)  # (N, H)
        for block in self.blocks:
            h = block(h, edges)
        h = self.norm(h)
        scalars, vectors, tensors = self.sectors(h)
        invariants = torch.cat(
            [scalars, vectors.square().sum(-1), tensors.square().sum(-1)], dim=-1
        )
        # An atom without neighbours has energy zero; squared, so that the last one leaves gently.
        count = edges.log_fade[:, 1:].exp().sum(dim=1).square()  # (N,)
        alone = count / (1 + count)
        energy = self.readout(invariants).squeeze(-1) * alone
        forces = None
        if self.forces is not None:
            weights = self.forces(invariants) * alone[:, None]
            forces = without_rigid_motion(
                (weights[:, None] @ vectors)[:, 0],
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
        N = len(graph.atomic_numbers)
        hood = gather_neighborhoods(graph.vectors, graph.edge_index, N, c.cutoff)
        v = hood.vectors  # (N, K, 3)
        r = v.norm(dim=-1)
        x = r / c.cutoff
        # All that slot 0 gets of a distance and a direction is zero.
        own = nn.functional.pad
        unit = own(v / r[..., None], (0, 0, 1, 0))
        radial = own(bessel(x, c.num_basis), (0, 0, 1, 0))
        phase = own(v, (0, 0, 1, 0)) @ self.frequencies()  # (N, T, heads d/2)
        phase = phase.unflatten(-1, (c.num_heads, -1))
        functions = self.edge_mlp(torch.cat([unit, radial], dim=-1))
        neighbors = torch.cat(
            [torch.arange(N, device=v.device)[:, None], hood.neighbors.view(N, -1)], dim=1
        )
        return Edges(
            neighbors=neighbors.flatten(),
            cos=phase.cos(),
            sin=phase.sin(),
            radial=radial,
            functions=functions.mT,
            log_fade=own(log_envelope(x), (1, 0)),
        )


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


class Block(nn.Module):
    """Attention to the neighbourhood, then a gated network on each atom."""

    def __init__(self, c: TransIPConfig) -> None:
        super().__init__()
        self.heads, self.width = c.num_heads, c.head_width
        V = c.num_heads * c.value_channels
        d = c.num_heads * c.head_width
        self.sizes = [d, d, V]
        self.norm_attention = nn.LayerNorm(c.hidden, bias=False)
        self.project = nn.Linear(c.hidden, sum(self.sizes), bias=False)
        self.bias = nn.Linear(c.num_basis, c.num_heads, bias=False)
        self.out = nn.Linear(c.edge_functions * V, c.hidden, bias=False)
        self.norm_mlp = nn.LayerNorm(c.hidden, bias=False)
        self.up = nn.Linear(c.hidden, 4 * c.hidden)
        self.down = nn.Linear(2 * c.hidden, c.hidden, bias=False)
        nn.init.zeros_(self.bias.weight)
        nn.init.zeros_(self.down.weight)  # training starts from the attention alone

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        h = h + self.attention(self.norm_attention(h), edges)
        a, gate = self.up(self.norm_mlp(h)).chunk(2, dim=-1)
        return h + self.down(nn.functional.silu(gate) * a)

    def attention(self, x: Tensor, edges: Edges) -> Tensor:
        """(N, H) -> (N, H)."""
        N, T = edges.log_fade.shape
        q, k, v = self.project(x).split(self.sizes, dim=-1)
        kv = torch.cat([k, v], dim=-1).index_select(0, edges.neighbors).view(N, T, -1)
        k, v = kv.split(self.sizes[1:], dim=-1)
        q0, q1 = (q / math.sqrt(self.width)).view(N, 1, self.heads, -1).chunk(2, dim=-1)
        k0, k1 = k.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)  # (N, T, heads, d/2)
        logits = (edges.cos * (q0 * k0 + q1 * k1) + edges.sin * (q1 * k0 - q0 * k1)).sum(-1)
        logits = logits + self.bias(edges.radial) + edges.log_fade[..., None]  # (N, T, heads)
        a = torch.softmax(logits, dim=1)
        values = v.unflatten(-1, (self.heads, -1)) * a[..., None]
        return self.out((edges.functions @ values.flatten(2)).flatten(1))
