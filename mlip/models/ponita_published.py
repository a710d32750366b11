"""PONITA as published: polynomials of position and orientation, on a grid without symmetry.

Features f_i(o) in R^C on atoms and O orientations; for an edge D = r_j - r_i, with j = i included,

    a1 = D.o,   a2 = |D - (D.o) o|,   a3 = o.o'
    B(a)   = GELU(W GELU(W (a, a (x) a, a (x) a (x) a)))                            basis
    u_i(o) = n^-1/2 sum_j f_ij K1 B(a1, a2) * f_j(o)                                space
    v_i(o) = 1/O sum_o' K2 B'(a3) * u_i(o')                                         orientations
    f_i   <- f_i + W GELU(W LayerNorm(v_i + b))                                     ConvNeXt
    E_i    = mean over layers and o of W f_i(o),  minus the same of the atom alone

After E. Bekkers et al. (ICLR 2024, arXiv:2310.02970).  It is here for comparisons; ``ponita``
is to be used.  What it suffers from, and that is not:

- a2 has a kink where D is parallel to o: forces jump there.
- The basis grows as |D|^3; without the window f (``envelope=False``, published for molecules, with
  a cutoff beyond their size) the energy of far atoms knows no bounds, and jumps at the cutoff.
- The grid has no symmetry at all, rotations are learned: train with ``data.augment:
  proper_rotations``.  The published errors are of means over 5 rotations of each test structure.
- There are E O basis_hidden numbers in memory.

Differences: sums over neighbours are scaled by their mean number instead of a look at the first
batch; atoms alone have energy zero; periodic.

Symmetry: translations and permutations exactly, rotations learned, reflections as well (but for the
grid, all depends on dot products only).  Cost: O(E O H C), H = ``basis_hidden``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.radial import polynomial_envelope


class PonitaPublishedConfig(Config):
    """Hyperparameters; the defaults are those of the published runs on rMD17."""

    cutoff: float = Field(5.0, gt=0, description="neighbours up to this distance, angstrom")
    channels: int = Field(128, ge=2, le=1024, description="C, at each orientation")
    num_layers: int = Field(5, ge=1, le=16)
    orientations: int = Field(20, ge=2, le=128, description="O, spread by repulsion")
    basis_hidden: int = Field(256, ge=4, le=1024, description="H, width of the kernel basis")
    widening: int = Field(4, ge=1, le=8, description="of the layers at each orientation")
    envelope: bool = Field(
        True, description="false: no window, as for molecules smaller than the cutoff"
    )
    avg_num_neighbors: float = Field(
        20.0, gt=0, description="scale of sums over neighbours, from the training set"
    )


class PonitaPublished(nn.Module):
    """The model; see the module's docstring for the equations."""

    points: Tensor  # (O, 3)

    def __init__(self, config: PonitaPublishedConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(119, c.channels)  # one row per Z, row 0 unused
        # In the state dict: another machine might find another minimum.
        self.register_buffer("points", repelled(c.orientations).to(torch.get_default_dtype()))
        self.space_basis = PolynomialBasis(2, c.basis_hidden)
        self.fiber_basis = PolynomialBasis(1, c.basis_hidden)
        self.layers = nn.ModuleList(ConvNeXt(c) for _ in range(c.num_layers))

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.num_layers * self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections are learned."""
        return False

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        N = len(graph.atomic_numbers)
        # Each element once more, without neighbours, at the end.
        elements, which = graph.atomic_numbers.unique(return_inverse=True)
        kernels = self.kernels(graph, N + len(elements))
        Z = torch.cat([graph.atomic_numbers, elements])
        f = self.embed(Z).expand(len(self.points), -1, -1)  # (O, N, C)
        energy = torch.zeros_like(f[0, :, 0])
        for layer in self.layers:
            f, e = layer(f, kernels)
            energy = energy + e / len(self.layers)
        return NodeOutput(energy=energy[:N] - energy[N:][which], features=f.mean(dim=0)[:N])

    def kernels(self, graph: AtomicGraph, num_nodes: int) -> Kernels:
        """Bases of all pairs of an edge and an orientation, slot 0 being the atom itself."""
        c, o = self.config, self.points
        hood = gather_neighborhoods(graph.vectors, graph.edge_index, num_nodes, c.cutoff)
        own = torch.arange(num_nodes, device=o.device)[:, None]
        neighbors = torch.cat([own, hood.neighbors.view(num_nodes, -1)], dim=1)  # (N, T)
        D = nn.functional.pad(hood.vectors, (0, 0, 1, 0))  # (N, T, 3)
        a1 = torch.einsum("ox,ntx->ont", o, D)
        across = (D - a1[..., None] * o[:, None, None]).square().sum(dim=-1)
        # Zero for the atom itself and for D parallel to o, where a2 has no derivative.
        parallel = across < 1e-12
        a2 = torch.where(parallel, 0.0, torch.where(parallel, 1.0, across).sqrt())
        x = hood.vectors.norm(dim=-1) / c.cutoff
        # Empty slots are at the cutoff.
        fade = polynomial_envelope(x) if c.envelope else (x < 1).to(x.dtype)
        fade = nn.functional.pad(fade, (1, 0), value=1.0) / math.sqrt(1 + c.avg_num_neighbors)
        space = self.space_basis(torch.stack([a1, a2], dim=-1)) * fade[..., None]
        fiber = self.fiber_basis((o @ o.T)[..., None]) / len(o)
        return Kernels(space, fiber, neighbors.flatten())


class Kernels(NamedTuple):
    """What all layers share."""

    space: Tensor  # (O, N, T, H)
    fiber: Tensor  # (O, O, H)
    neighbors: Tensor  # (N T,)


class PolynomialBasis(nn.Module):
    """All monomials of degree 1 to 3 in the given numbers, and two layers."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        terms = inputs + inputs**2 + inputs**3
        self.layers = nn.Sequential(
            nn.Linear(terms, max(1, hidden // 2)),
            nn.GELU(),
            nn.Linear(max(1, hidden // 2), hidden),
            nn.GELU(),
        )

    def forward(self, a: Tensor) -> Tensor:
        """(..., inputs) -> (..., hidden)."""
        powers = [a]
        for _ in range(2):
            powers.append((powers[-1][..., :, None] * a[..., None, :]).flatten(-2))
        return self.layers(torch.cat(powers, dim=-1))


class ConvNeXt(nn.Module):
    """Separable convolution, two layers at each orientation, and a readout."""

    def __init__(self, c: PonitaPublishedConfig) -> None:
        super().__init__()
        C = c.channels
        self.space = nn.Linear(c.basis_hidden, C, bias=False)
        self.fiber = nn.Linear(c.basis_hidden, C, bias=False)
        self.bias = nn.Parameter(torch.zeros(C))
        self.update = nn.Sequential(
            nn.LayerNorm(C), nn.Linear(C, c.widening * C), nn.GELU(), nn.Linear(c.widening * C, C)
        )
        self.readout = nn.Linear(C, 1)
        nn.init.zeros_(self.readout.weight)  # training starts from the reference energies

    def forward(self, f: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """(O, N, C) -> the same, and energies (N,)."""
        K = self.space(kernels.space)  # (O, N, T, C)
        u = (K * f.index_select(1, kernels.neighbors).view_as(K)).sum(dim=2)
        v = torch.einsum("poc,onc->pnc", self.fiber(kernels.fiber), u)
        f = f + self.update(v + self.bias)
        return f, self.readout(f).squeeze(-1).mean(dim=0)


def repelled(number: int) -> Tensor:
    """(O, 3) float64 unit vectors at a minimum of sum 1 / |o - o'|, from a fixed random start."""
    generator = torch.Generator().manual_seed(0)
    o = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    o = nn.functional.normalize(o, dim=1)
    far = torch.eye(number, dtype=torch.float64) * 1e6
    for _ in range(500):
        between = o[:, None] - o[None]
        force = (between / (between.norm(dim=-1) + far)[..., None] ** 3).sum(dim=1)
        o = nn.functional.normalize(o + 2 / number * force, dim=1)
    return o
