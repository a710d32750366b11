"""EScAIP: self-attention inside every neighbourhood, with the angles in its logits.

Atom i with its K neighbours is a sequence of K + 1 tokens e_ij; j = i in slot 0 is the atom itself
at distance zero.  In each block

    x_ij = norm(e_ij + W h_i + W h_j + W e_ji)                                       messages
    s_jk = d^-1/2 sum_l q_j^l . k_k^l P_l(cos jik)                                   logits
    o_ij = sum_k f_ik exp(s_jk) v_k / sum_k f_ik exp(s_jk)                           attention
    A_i  = n^-1/2 sum_j f_ij (W x_ij) Y(r_ij),     p_i = sum_m A A                   density
    h_i <- h_i + W o_ii,     h_i <- h_i + MLP(h_i, p_i)                              atoms
    e_ij <- e_ij + W o_ij + Y(r_ij) . W A_i,       e_ij <- e_ij + MLP(e_ij)          edges

By the addition theorem P_l comes from multiplying queries and keys with harmonics.  The envelope f
multiplies the weight of a key in numerator and denominator, so that every atom in the cutoff takes
part and none enters with a jump.  A mean forgets how many there are and an average over angles
blurs them; the density beside it, a sum with harmonics, does not.  Inputs are radial functions,
elements and the same density with weights w(Z_j, r_ij).

After E. Qu and A. Krishnapriyan, "The importance of being scalable" (EScAIP, NeurIPS 2024,
arXiv:2410.24169).  Differences: forces are gradients by default; smooth envelope and no cap on
neighbours; densities with elements and envelope instead of bond-order parameters; Bessel functions
instead of 600 Gaussians; the reversed edge e_ji in the message; each readout computed once.

An external field F enters the first edges by its scalar products with r_ij / |r_ij| and itself.

Symmetry: translations and permutations exactly; O(3) exactly with ``angular="legendre"`` (an
isolated atom's token has no direction), only learned with ``angular="vectors"``.
Cost: O(E D^2 + E K D), D the width of an edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.attention import attend, log_envelope
from mlip.nn.constant import Constant
from mlip.nn.radial import bessel
from mlip.nn.rigid_motion import without_rigid_motion
from mlip.nn.soft_neighbors import log_soft_knn, soft_ranks
from mlip.nn.spherical import SphericalHarmonics, degree_of_component
from mlip.nn.tokens import Tokens, lay_out_tokens


class EScAIPConfig(Config):
    """Hyperparameters of EScAIP, the important ones first."""

    cutoff: float = Field(5.0, gt=0, description="neighbours up to this distance, angstrom")
    hidden: int = Field(64, ge=4, le=4096, description="D, width of an edge's state")
    node_hidden: int = Field(128, ge=4, le=4096, description="width of an atom's state")
    num_layers: int = Field(2, ge=1, le=32)
    num_heads: int = Field(4, ge=1, le=64)
    angular: Literal["legendre", "vectors"] = Field(
        "legendre",
        description="legendre: angles as P_l, exact O(3) symmetry; vectors: raw displacement "
        "vectors as inputs, symmetry only learned",
    )
    angular_channels: tuple[int, ...] = Field(
        (8, 2, 2, 1),
        description="legendre: channels of degree 0, 1, ... of a head's queries; densities have "
        "these degrees, with vectors, too",
    )
    graph: Literal["envelope", "soft_knn"] = Field(
        "envelope",
        description="weight of a neighbour: its distance's envelope, or the published soft choice "
        "of the nearest",
    )
    max_neighbors: int = Field(30, ge=1, description="soft_knn: how many are chosen, softly")
    density_channels: int = Field(32, ge=1, le=512, description="channels of the densities")
    num_basis: int = Field(8, ge=2, le=64, description="B, Bessel functions")
    stretch: float = Field(
        2.0, ge=0, le=10, description="Bessel functions are 1 + this times finer at short distances"
    )
    field: Literal["given"] | tuple[float, float, float] | None = Field(
        None,
        description="external vector: given with each structure, or a fixed one, such as the "
        "normal (0, 0, 1) of slabs; null: none",
    )
    direct_forces: bool = Field(
        False, description="predict forces beside the energy; for pre-training, not conservative"
    )
    avg_num_neighbors: float = Field(
        20.0, gt=0, description="scale of sums over neighbours, from the training set"
    )


class Hood(NamedTuple):
    """The neighbourhoods of one bucket: n atoms with T slots, slot 0 the atom itself."""

    first: int
    last: int
    neighbors: Tensor  # (n T,)
    reverse: Tensor  # (n T,) slot of the reversed edge among those of all buckets
    x: Tensor  # (n, T) distance / cutoff
    unit: Tensor  # (n, T, 3) zero in slot 0
    radial: Tensor  # (n, T, B) zero in slot 0
    fade: Tensor  # (n, T) envelope; 1 in slot 0
    log_fade: Tensor  # (n, T)
    Y: Tensor  # (n, T, LM)
    angular: Tensor  # (n, T, 1, d) harmonics of each channel of a query
    of_program: bool  # the fused kernel asks for sizes, and has no second derivative


class EScAIP(nn.Module):
    """The model; see the module's docstring for the equations."""

    reads_reversed = True  # edges
    bucketed = True  # edges are laid out in ``mlip.nn.buckets``

    def __init__(self, config: EScAIPConfig) -> None:
        super().__init__()
        c = self.config = config
        lmax = len(c.angular_channels) - 1
        self.harmonics = SphericalHarmonics(lmax)
        self.angles = AngularChannels(
            c.angular_channels if c.angular == "legendre" else (sum(c.angular_channels),)
        )
        self.embed = nn.Embedding(119, c.node_hidden)  # one row per Z, row 0 unused
        self.node_input = NodeInput(c, lmax)
        self.edge_input = EdgeInput(c, lmax)
        self.blocks = nn.ModuleList(
            Block(c, self.angles, edges=t < c.num_layers - 1 or c.direct_forces)
            for t in range(c.num_layers)
        )
        self.forces = DirectForces(c) if c.direct_forces else None
        self.readout = readout((c.num_layers + 1) * c.node_hidden, c.node_hidden, 1)

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        c = self.config
        return (c.num_layers + (1 if c.graph == "envelope" else 2)) * c.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections, of a given field as well, are exact, unless raw vectors are
        inputs or a fixed field singles out an axis."""
        return self.config.angular == "legendre" and self.config.field in (None, "given")

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """What the model reads besides the geometry."""
        return ("field",) if self.config.field == "given" else ()

    def forward(
        self, graph: AtomicGraph, share: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> NodeOutput:
        """Evaluate a graph.

        ``share`` maps states (n, C) of the nodes (n,) before others read them; edges are then
        reversed between the atoms that ``graph.view_of`` (N,) names.
        """
        order, hoods = self.neighborhoods(graph)
        Z = graph.atomic_numbers
        nodes = torch.arange(Z.shape[0], device=Z.device) if order is None else order
        h, A = self.node_input(self.embed(Z[nodes]), hoods)
        h = h if share is None else share(h, nodes)
        field = None
        if self.config.field is not None:
            field = graph.external_field(self.config.field)  # (N, 3)
            field = field if order is None else field[order]
        e = self.edge_input(h, A, hoods, field)
        states = [h]
        for number, block in enumerate(self.blocks):
            read = e  # by the reversed edges
            if share is not None:
                h = share(h, nodes) if number else h
                read = [
                    share(part.flatten(1), nodes[hood.first : hood.last]).view_as(part)
                    for hood, part in zip(hoods, e, strict=True)
                ]
            h, e = block(h, e, read, hoods)
            states.append(h)
        # An atom without neighbours has energy zero; squared, so that the last one leaves gently.
        count = torch.cat([hood.fade[:, 1:].sum(dim=1) for hood in hoods]).square()  # (N,)
        energy = self.readout(torch.cat(states, dim=-1)).squeeze(-1) * (count / (1 + count))
        forces = None if self.forces is None else self.forces(h, e, hoods)
        if order is not None:
            back = torch.argsort(order)
            energy, h = energy[back], h[back]
            forces = None if forces is None else forces[back]
        if forces is not None:
            free = ~graph.pbc.any(dim=1)
            forces = without_rigid_motion(forces, graph.positions, graph.batch, free)
        return NodeOutput(energy=energy, features=h, forces=forces)

    def neighborhoods(self, graph: AtomicGraph) -> tuple[Tensor | None, list[Hood]]:
        """Sort atoms by degree (None: not necessary) and lay out their edges in few buckets."""
        order, tokens = lay_out_tokens(graph, self.config.cutoff)
        hoods = [self.hood(part) for part in tokens]
        return order, hoods if self.config.graph == "envelope" else self.nearest(hoods)

    def hood(self, tokens: Tokens) -> Hood:
        """What a model reads of the neighbourhoods of a bucket."""
        c, v = self.config, tokens.vectors
        other = (torch.arange(v.shape[1], device=v.device) > 0).to(v.dtype)[:, None]  # (T, 1)
        r = v.norm(dim=-1, keepdim=True)
        unit = v / r * other
        x = r[..., 0] / c.cutoff
        log_fade = log_envelope(x) * other[:, 0]  # (n, T)
        Y = self.harmonics(unit)
        return Hood(
            first=tokens.first,
            last=tokens.last,
            neighbors=tokens.neighbors,
            reverse=tokens.reverse,
            x=x,
            unit=unit,
            radial=bessel(x, c.num_basis, c.stretch) * other,
            fade=log_fade.exp(),
            log_fade=log_fade,
            Y=Y,
            angular=self.angles(Y).unsqueeze(2),
            of_program=tokens.of_program,
        )

    def nearest(self, hoods: list[Hood]) -> list[Hood]:
        """The same neighbourhoods with the weights of the published soft bi-kNN graph."""
        c = self.config
        ranks = [
            nn.functional.pad(soft_ranks(hood.x[:, 1:] * c.cutoff, hood.fade[:, 1:]), (1, 0))
            for hood in hoods
        ]
        flat = torch.cat([rank.flatten() for rank in ranks])
        chosen = []
        for hood, rank in zip(hoods, ranks, strict=True):
            reverse_rank = flat.index_select(0, hood.reverse).view_as(rank)
            log_fade = log_soft_knn(rank, reverse_rank, hood.x, c.max_neighbors)
            # The atom itself stays; empty slots, which lie beyond the cutoff, are not chosen.
            log_fade = torch.cat([hood.log_fade[:, :1], log_fade[:, 1:]], dim=1)
            chosen.append(hood._replace(log_fade=log_fade, fade=log_fade.exp()))
        return chosen


def norm(width: int) -> nn.LayerNorm:
    """Layer norm without bias; one fused pass, where the root mean square would be several."""
    return nn.LayerNorm(width, bias=False)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Norm and two layers."""
    return nn.Sequential(
        norm(inputs), nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs, bias=False)
    )


def readout(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The same, zero in the beginning: training starts from the reference energies."""
    layers = mlp(inputs, hidden, outputs)
    nn.init.zeros_(layers[-1].get_parameter("weight"))
    return layers


class AngularChannels(nn.Module):
    """Which harmonic multiplies which channel of queries and keys: q^l . k^l P_l by the addition
    theorem.

    ``channels[l]`` channels of degree l become d = sum_l (2 l + 1) channels[l] columns.
    """

    channel: Tensor  # (d,)

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        lmax = len(channels) - 1
        self.num_channels = sum(channels)
        l_of = degree_of_component(lmax)
        rows, channel, first = [], [], 0
        for l, n in enumerate(channels):
            unit = torch.diag((2 * l_of + 1).double().rsqrt())[l_of == l]  # (2l+1, LM)
            for k in range(n):
                rows.append(unit)
                channel += [first + k] * (2 * l + 1)
            first += n
        self.select = Constant(torch.cat(rows).mT)  # (LM, d)
        self.register_buffer("channel", torch.tensor(channel), persistent=False)

    def forward(self, Y: Tensor) -> Tensor:
        """(..., LM) -> (..., d); of degree 0 alone for the atom itself, which has no direction."""
        select = self.select()
        return Y[..., : len(select)] @ select


class Density(nn.Module):
    """Sums over neighbours with harmonics, and their invariants.

    The atom itself, which has no direction, adds to degree 0.
    """

    degree: Tensor  # (LM,)

    def __init__(self, c: EScAIPConfig, lmax: int) -> None:
        super().__init__()
        C = c.density_channels
        self.scale = 1 / math.sqrt(c.avg_num_neighbors)
        self.mix = nn.Parameter(torch.randn(lmax + 1, C, C) / math.sqrt(C))
        l = degree_of_component(lmax)
        self.register_buffer("degree", l, persistent=False)
        self.sum = Constant(
            (l == torch.arange(lmax + 1)[:, None]) * (2 * l + 1).double().rsqrt()
        )  # (L + 1, LM)

    def forward(self, weights: Tensor, hood: Hood) -> tuple[Tensor, Tensor]:
        """Weights (n, T, C) -> densities (n, LM, C) and invariants (n, (L + 1) C)."""
        A = hood.Y.mT @ (weights * (hood.fade * self.scale)[..., None])
        mixed = (A.transpose(0, 1) @ self.mix.index_select(0, self.degree)).transpose(0, 1)
        return A, torch.einsum("lm,nmc->nlc", self.sum(), A * mixed).flatten(1)


class AlongEdges(nn.Module):
    """The density in the direction of each edge, Y(r_ij) . W A_i with weights for each degree."""

    degree: Tensor  # (LM,)

    def __init__(self, c: EScAIPConfig, lmax: int) -> None:
        super().__init__()
        fan_in = c.density_channels * (lmax + 1)
        self.weight = nn.Parameter(
            torch.randn(lmax + 1, c.density_channels, c.hidden) / math.sqrt(fan_in)
        )
        self.register_buffer("degree", degree_of_component(lmax), persistent=False)

    def forward(self, A: Tensor, hood: Hood) -> Tensor:
        """(n, LM, C) -> (n, T, D)."""
        W = self.weight.index_select(0, self.degree)
        return hood.Y @ (A.transpose(0, 1) @ W).transpose(0, 1)


class NodeInput(nn.Module):
    """First state of an atom: its element and the density of elements around it."""

    def __init__(self, c: EScAIPConfig, lmax: int) -> None:
        super().__init__()
        H, C = c.node_hidden, c.density_channels
        self.radial = nn.Linear(c.num_basis, C, bias=False)
        self.species = nn.Linear(H, C)
        self.density = Density(c, lmax)
        self.update = mlp((lmax + 1) * C + H, 2 * H, H)

    def forward(self, species: Tensor, hoods: list[Hood]) -> tuple[Tensor, list[Tensor]]:
        """Species (N, H) -> states (N, H), and densities (n, LM, C) of each bucket."""
        w = self.species(species)  # (N, C)
        A, p = [], []
        for hood in hoods:
            wj = w.index_select(0, hood.neighbors).view(*hood.radial.shape[:2], -1)
            density, invariants = self.density(self.radial(hood.radial) * wj, hood)
            A.append(density)
            p.append(invariants)
        return species + self.update(torch.cat([torch.cat(p), species], dim=-1)), A


class EdgeInput(nn.Module):
    """First states of the edges: distance, elements, and their angles with the environment."""

    def __init__(self, c: EScAIPConfig, lmax: int) -> None:
        super().__init__()
        D = c.hidden
        self.vectors = nn.Linear(3, D, bias=False) if c.angular == "vectors" else None
        self.field = nn.Linear(2, D, bias=False) if c.field is not None else None
        self.nodes = nn.Linear(c.node_hidden, 2 * D)
        self.radial = nn.Linear(c.num_basis, 2 * D)
        self.along = AlongEdges(c, lmax) if c.angular == "legendre" else None
        self.out = nn.Linear(D, D)

    def forward(
        self, h: Tensor, A: list[Tensor], hoods: list[Hood], field: Tensor | None
    ) -> list[Tensor]:
        center, source = self.nodes(h).chunk(2, dim=-1)  # (N, D)
        states = []
        for hood, density in zip(hoods, A, strict=True):
            rows = slice(hood.first, hood.last)
            a, gate = self.radial(hood.radial).chunk(2, dim=-1)
            a = a + source.index_select(0, hood.neighbors).view_as(a) + center[rows, None]
            if self.along is not None:
                a = a + self.along(density, hood)
            if self.vectors is not None:
                a = a + self.vectors(hood.unit)
            if self.field is not None and field is not None:  # its angle with the edge, its square
                F = field[rows, :, None]  # (n, 3, 1)
                square = F.square().sum(dim=1, keepdim=True).expand(-1, hood.unit.shape[1], 1)
                a = a + self.field(torch.cat([hood.unit @ F, square], dim=-1))
            states.append(self.out(nn.functional.silu(a) * gate))
        return states


class Block(nn.Module):
    """Messages, attention inside each neighbourhood, density, update of atoms and edges."""

    def __init__(self, c: EScAIPConfig, angles: AngularChannels, edges: bool) -> None:
        super().__init__()
        H, D = c.node_hidden, c.hidden
        self.heads, self.edges = c.num_heads, edges
        self.width = D // c.num_heads
        self.norm_node = norm(H)
        self.nodes = nn.Linear(H, 2 * D)
        self.reverse = nn.Linear(D, D, bias=False)
        self.norm = norm(D)
        self.angles = [angles]  # in a list: shared, not a part of this block
        d = angles.num_channels
        # attend() divides by the root of the columns; the channels are what is summed.
        scale = math.sqrt(len(angles.channel) / d)
        self.query = nn.Parameter(torch.randn(self.heads, d, D) * scale / math.sqrt(D))
        self.key = nn.Parameter(torch.randn(self.heads, d, D) / math.sqrt(D))
        self.value = nn.Linear(D, self.heads * self.width, bias=False)
        self.to_node = nn.Linear(self.heads * self.width, H, bias=False)
        lmax = len(c.angular_channels) - 1
        self.weights = nn.Linear(D, c.density_channels, bias=False)
        self.density = Density(c, lmax)
        self.node_mlp = mlp(H + (lmax + 1) * c.density_channels, 2 * H, H)
        if edges:
            self.along = AlongEdges(c, lmax)
            self.to_edge = nn.Linear(self.heads * self.width, D, bias=False)
            self.edge_mlp = mlp(D, 2 * D, D)

    def forward(
        self, h: Tensor, e: list[Tensor], read: list[Tensor], hoods: list[Hood]
    ) -> tuple[Tensor, list[Tensor]]:
        center, source = self.nodes(self.norm_node(h)).chunk(2, dim=-1)  # (N, D)
        backward = self.reverse(torch.cat([part.flatten(0, 1) for part in read]))
        atoms, invariants, new = [], [], []
        for hood, part in zip(hoods, e, strict=True):
            x = self.norm(
                part
                + source.index_select(0, hood.neighbors).view_as(part)
                + center[hood.first : hood.last, None]
                + backward.index_select(0, hood.reverse).view_as(part)
            )  # (n, T, D)
            out = self.attention(x, hood)
            atoms.append(out[:, 0])
            A, p = self.density(self.weights(x), hood)
            invariants.append(p)
            if self.edges:
                part = part + self.to_edge(out) + self.along(A, hood)
                new.append(part + self.edge_mlp(part))
        h = h + self.to_node(torch.cat(atoms))
        return h + self.node_mlp(torch.cat([h, torch.cat(invariants)], dim=-1)), new

    def attention(self, x: Tensor, hood: Hood) -> Tensor:
        """(n, T, D) -> (n, T, heads width), or for the atom alone (n, 1, heads width)."""
        Q = x.shape[1] if self.edges else 1
        q = self.project(x[:, :Q], self.query) * hood.angular[:, :Q]
        k = self.project(x, self.key) * hood.angular
        v = self.value(x).unflatten(-1, (self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        fused = not (self.training or hood.of_program)
        out = attend(q, k, v, hood.log_fade[:, None], fused=fused)
        return out.transpose(1, 2).flatten(2)

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """(n, T, D) -> (n, T, heads, d), each channel repeated for the harmonics it meets."""
        W = weight.index_select(1, self.angles[0].channel).flatten(0, 1)
        return nn.functional.linear(x, W).unflatten(-1, (self.heads, -1))


class DirectForces(nn.Module):
    """Forces from the edges' states, F_i = s_i sum_j f_ij v_ij r_ij / |r_ij|.

    With ``angular="legendre"`` v_ij is a number and forces rotate with the structure; with raw
    vectors it is, as published, one number for each component, and they only learn to.
    """

    def __init__(self, c: EScAIPConfig) -> None:
        super().__init__()
        self.atoms = nn.Linear(c.node_hidden, 1)
        self.edges = readout(c.hidden, c.hidden, 1 if c.angular == "legendre" else 3)

    def forward(self, h: Tensor, e: list[Tensor], hoods: list[Hood]) -> Tensor:
        """(N, H) and the edges' states -> (N, 3)."""
        sums = [
            (self.edges(part) * hood.unit * hood.fade[..., None]).sum(dim=1)
            for hood, part in zip(hoods, e, strict=True)
        ]
        return (1 + self.atoms(h)) * torch.cat(sums)
