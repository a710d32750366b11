"""Facet: messages with radial weights linear in few Bessel functions, products on the sphere.

Features x_i are O(3) irreps of natural parity with equal multiplicities, x[lm, i, c], l <= L.
One layer; g_j are few channels of x_j, U and V are linear in A:

    T_i[lm b, l'm' s] = n^-1/2 sum_j Y_lm(r_ij) B_b(r_ij) f(r_ij) g_j[l'm', s]     density
    A_i[l''m'', c]    = sum W CG (T_i)                                             weights
    A_i[1m, c]       += F_m sum W A_i[00]                  F an external field, where there is one
    P_i               = project_L ( U_i(r) V_i(r) )         products of functions on the sphere
    q_i               = A_0, |U_l|^2, U_l.P_l               invariants of 2 to 4 bodies per layer,
                                                            |P_l|^2 of 5 with ``quartic``
    x_i <- x_i + linear(U_i, P_i),   scalars <- scalars + MLP(q_i),   E_i <- E_i + readout(MLP(q_i))

Because the radial weights are linear in B_b, they commute with the sum over neighbours: the sum has
no weights at all.  It is one batched matrix product per atom with a tensor Y B that all layers
share; weights and Clebsch-Gordan coupling act on atoms, not on edges.

After N. Miklaucic et al., "Facet" (arXiv:2509.08418): linear radial functions and S2-grid mixing.
Differences: parity kept, full neighbourhood with a smooth envelope, energies summed, exact products
on a Gauss-Legendre grid by default.

Symmetry: O(3), translations and permutations exactly with ``grid="poly"``; with ``grid="mlp"``
rotations only up to aliasing (measured in ``docs/models.md``).  No term survives without
neighbours: an isolated atom has energy zero.
Cost: O(E LM B S) + O(N LM C^2).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.constant import Constant
from mlip.nn.density import Density, EdgeBasis, Edges
from mlip.nn.gaunt_product import GauntProduct
from mlip.nn.layers import ExternalField, InvariantMLP, soft_norm
from mlip.nn.sphere_grid import SphereGrid
from mlip.nn.spherical import degree_of_component


class FacetConfig(Config):
    """Hyperparameters of Facet, the important ones first."""

    cutoff: float = Field(5.0, gt=0, description="neighbours up to this distance, angstrom")
    channels: int = Field(64, ge=4, le=1024, description="C, multiplicity of every degree")
    num_layers: int = Field(2, ge=1, le=8)
    lmax: int = Field(3, ge=1, le=6, description="L, largest degree of features and products")
    message_channels: tuple[int, ...] = Field(
        (16, 8, 4), description="channels of degree 0, 1, ... that a neighbour sends"
    )
    num_basis: int = Field(8, ge=2, le=64, description="B, Bessel functions")
    stretch: float = Field(
        2.0, ge=0, le=10, description="Bessel functions are 1 + this times finer at short distances"
    )
    quartic: bool = Field(False, description="invariants of the product with itself, too")
    hidden: int = Field(64, ge=4, le=4096, description="width of the networks on invariants")
    grid: Literal["poly", "mlp"] = Field(
        "poly", description="on the sphere: exact products, or a pointwise network (approximate)"
    )
    field: Literal["given"] | tuple[float, float, float] | None = Field(
        None,
        description="external vector: given with each structure, or a fixed one, such as the "
        "normal (0, 0, 1) of slabs; null: none",
    )
    grid_degree: int | None = Field(
        None, ge=1, le=64, description="exactness of the grid, 3 L if null"
    )
    avg_num_neighbors: float = Field(
        20.0, gt=0, description="scale of sums over neighbours, from the training set"
    )


class Facet(nn.Module):
    """The model; see the module's docstring for the equations."""

    bucketed = True  # edges are laid out in ``mlip.nn.buckets``

    def __init__(self, config: FacetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(119, c.channels)  # one row per Z, row 0 unused
        self.edges = EdgeBasis(c.lmax, c.num_basis, c.cutoff, c.avg_num_neighbors, c.stretch)
        self.layers = nn.ModuleList(
            Layer(c, degrees=c.message_channels if t else c.message_channels[:1])
            for t in range(c.num_layers)
        )

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.num_layers * self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections, of a given field as well, are exact, unless a network on the
        grid aliases or a fixed field singles out an axis."""
        return self.config.grid == "poly" and self.config.field in (None, "given")

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """What the model reads besides the geometry."""
        return ("field",) if self.config.field == "given" else ()

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        c = self.config
        N = graph.atomic_numbers.shape[0]  # unlike len(), a symbol to a compiler
        edges = self.edges(graph.vectors, graph.edge_index, N)

        species = self.embed(edges.sorted(graph.atomic_numbers))  # (N, C)
        scalars, steerable = species, None
        field = None if c.field is None else edges.sorted(graph.external_field(c.field))  # (N, 3)
        energy = torch.zeros_like(species[:, 0])
        for layer in self.layers:
            scalars, steerable, e = layer(scalars, steerable, species, edges, field)
            energy = energy + e
        return NodeOutput(edges.restored(energy), edges.restored(scalars))


class Layer(nn.Module):
    """Density, product on the sphere, invariants, update."""

    def __init__(self, c: FacetConfig, degrees: tuple[int, ...]) -> None:
        super().__init__()
        C, L = c.channels, c.lmax
        self.channels = C
        self.send = nn.ModuleList(
            nn.Linear(C if l == 0 else 2 * C, S, bias=False) for l, S in enumerate(degrees)
        )
        self.density = Density(L, c.num_basis, degrees, 2 * C)
        self.field = ExternalField(2 * C) if c.field is not None else None
        self.species_gate = nn.Linear(C, 2 * C, bias=False)
        self.product = GridProduct(L, C, c.grid, c.grid_degree or 3 * L)
        self.invariants = Invariants(L)
        self.quartic = c.quartic
        self.mlp = InvariantMLP((2 + (2 + c.quartic) * (L + 1)) * C, c.hidden, C, C)
        self.readout = nn.Linear(C, 1, bias=False)
        nn.init.zeros_(self.species_gate.weight)
        nn.init.zeros_(self.readout.weight)  # training starts from the reference energies

    def forward(
        self,
        scalars: Tensor,
        steerable: Tensor | None,
        species: Tensor,
        edges: Edges,
        field: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        messages = [self.send[0](scalars)]  # (N, S0)
        for l, send in enumerate(self.send):
            if l > 0:
                assert steerable is not None
                g = send(steerable[l * l : (l + 1) ** 2])  # (2l+1, N, S)
                messages.append(g.transpose(0, 1).flatten(1))  # (N, (2l+1) S)
        A = self.density(edges, messages)  # (LM, N, 2C)
        if self.field is not None and field is not None:
            A = self.field(A, field)
        A = A * (soft_norm(A, (0, 2))[:, None] * (1 + self.species_gate(species)))
        U, V = A.split(self.channels, dim=-1)
        P = self.product(U, V)  # (LM, N, C)
        invariants = [A[0], self.invariants(U, U), self.invariants(U, P)]
        if self.quartic:
            invariants.append(self.invariants(P, P))
        q = torch.cat(invariants, dim=-1)
        update = self.mlp(q * soft_norm(q, (1,))[:, None], species)  # (N, C)
        return scalars + update, torch.cat([U, P], dim=-1), self.readout(update).squeeze(-1)


class GridProduct(nn.Module):
    """Combine two functions on the sphere pointwise and project back to degree L.

    ``poly``: the product, exact for a grid of degree 3 L.  ``mlp``: a pointwise network of both,
    approximate.
    """

    def __init__(self, lmax: int, channels: int, kind: str, degree: int) -> None:
        super().__init__()
        self.scale = (2 * lmax + 1) / (lmax + 1) ** 2  # unit variance in, unit variance out
        if kind == "poly":
            self.product = GauntProduct((lmax, lmax), lmax, degree)
        else:
            self.grid = SphereGrid(lmax, degree)
        self.mlp = (
            nn.Sequential(
                nn.Linear(2 * channels, channels, bias=False),
                nn.SiLU(),
                nn.Linear(channels, channels, bias=False),
            )
            if kind == "mlp"
            else None
        )

    def forward(self, U: Tensor, V: Tensor) -> Tensor:
        if self.mlp is None:
            return cast(Tensor, self.product(U, V)) * self.scale
        u, v = self.grid.synthesis(U), self.grid.synthesis(V)  # (P, N, C)
        return self.grid.analysis(self.mlp(torch.cat([u, v], dim=-1)))


class Invariants(nn.Module):
    """Scalar products per degree: (LM, N, C), (LM, N, C) -> (N, (L + 1) C)."""

    def __init__(self, lmax: int) -> None:
        super().__init__()
        l = degree_of_component(lmax)
        degree = torch.arange(lmax + 1)[:, None]
        rows = (l == degree).double() / (2 * degree + 1)
        self.rows = Constant(rows)  # (L + 1, LM)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        q = self.rows() @ (a * b).flatten(1)  # (L + 1, N C)
        return q.view(-1, *a.shape[1:]).transpose(0, 1).flatten(1)
