"""Gaunt: many-body messages of the atomic density as products of functions on the sphere.

Features h_i are O(3) irreps of natural parity with equal multiplicities, h[lm, i, c], l <= H.  One
layer, with the density A of degrees l <= L:

    A_i[lm, c]   = n^-1/2 sum_j sum W CG ( Y(r_ij) B(r_ij) f(r_ij) x g_j ),   g_j = W h_j   density
    A_i[1m, c]  += F_m sum W A_i[00]                     F an external field, where there is one
    B2_i, B3_i   = project ( a_i(n)^2 ),  project ( a_i(n)^3 )         products of order 2 and 3
    m_i[lm, c]   = W_l [ A_i, w_2l(Z_i) B2_i, w_3l(Z_i) B3_i ]                      message
    h_i          <- h_i + m_i,       E_i <- E_i + readout( MLP(m_i[00], Z_i) )

a_i(n) = sum_lm A_i[lm] Y_lm(n) is the density as a function on the sphere.  Its powers take the
place of the Clebsch-Gordan contractions of MACE (I. Batatia et al., arXiv:2206.07697), as proposed
by S. Luo et al., "Gaunt tensor products" (arXiv:2401.10216): there is one weight for each element,
channel, degree and order, whereas a full contraction has one for each path.  All powers of a layer
come from one pass over an exact quadrature grid (``mlip.nn.gaunt_product``) which stores nothing.

The convolution has radial weights linear in the Bessel functions, so that it acts on atoms
(``mlip.nn.density``).

Symmetry: O(3), translations and permutations exactly.  An isolated atom has energy zero.
Cost: O(E LM B S) + O(N LM C^2), memory O(E LM B + N LM C).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.constant import Constant
from mlip.nn.density import Density, EdgeBasis, Edges
from mlip.nn.gaunt_product import BracketProduct, GauntPolynomial
from mlip.nn.layers import ExternalField, InvariantMLP, soft_norm
from mlip.nn.spherical import degree_of_component


class GauntConfig(Config):
    """Hyperparameters of Gaunt, the important ones first."""

    cutoff: float = Field(5.0, gt=0, description="neighbours up to this distance, angstrom")
    channels: int = Field(64, ge=4, le=1024, description="C, multiplicity of every degree")
    num_layers: int = Field(2, ge=1, le=8)
    lmax: int = Field(3, ge=1, le=6, description="L, largest degree of the density")
    order: int = Field(3, ge=2, le=4, description="largest power of the density")
    message_channels: tuple[int, ...] = Field(
        (16, 8, 4), description="channels of degree 0, 1, ... H that a neighbour sends"
    )
    num_basis: int = Field(8, ge=2, le=64, description="B, Bessel functions")
    stretch: float = Field(
        2.0, ge=0, le=10, description="Bessel functions are 1 + this times finer at short distances"
    )
    hidden: int = Field(64, ge=4, le=4096, description="width of the readouts")
    factors: int = Field(
        1, ge=1, le=3, description="densities with weights of their own that are multiplied"
    )
    antisymmetric: bool = Field(
        False, description="add products of odd degree l1 + l2 + l3, which functions do not have"
    )
    field: Literal["given"] | tuple[float, float, float] | None = Field(
        None,
        description="external vector: given with each structure, or a fixed one, such as the "
        "normal (0, 0, 1) of slabs; null: none",
    )
    avg_num_neighbors: float = Field(
        20.0, gt=0, description="scale of sums over neighbours, from the training set"
    )

    @model_validator(mode="after")
    def _degrees(self) -> GauntConfig:
        if not 1 <= len(self.message_channels) <= self.lmax + 1:
            raise ValueError(
                f"message_channels has {len(self.message_channels)} degrees; give 1 to "
                f"{self.lmax + 1}, for the density has lmax = {self.lmax}"
            )
        if self.antisymmetric and self.factors == 1:
            raise ValueError(
                "antisymmetric products of one density with itself vanish; give factors 2 or 3"
            )
        return self


class Gaunt(nn.Module):
    """The model; see the module's docstring for the equations."""

    bucketed = True  # edges are laid out in ``mlip.nn.buckets``

    def __init__(self, config: GauntConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(119, c.channels)  # one row per Z, row 0 unused
        self.edges = EdgeBasis(c.lmax, c.num_basis, c.cutoff, c.avg_num_neighbors, c.stretch)
        H = len(c.message_channels) - 1
        self.layers = nn.ModuleList(
            Layer(c, lmax_in=H if t else 0, lmax_out=H if t < c.num_layers - 1 else 0)
            for t in range(c.num_layers)
        )

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.num_layers * self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections, of a given field as well, are exact, unless a fixed field
        singles out an axis: the grids integrate all that is on them."""
        return self.config.field in (None, "given")

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """What the model reads besides the geometry."""
        return ("field",) if self.config.field == "given" else ()

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        c = self.config
        N = graph.atomic_numbers.shape[0]  # unlike len(), a symbol to a compiler
        edges = self.edges(graph.vectors, graph.edge_index, N)
        species = self.embed(edges.sorted(graph.atomic_numbers))  # (N, C)
        h = species[None]  # (LM, N, C), here of degree 0
        field = None if c.field is None else edges.sorted(graph.external_field(c.field))  # (N, 3)
        energy = torch.zeros_like(species[:, 0])
        for layer in self.layers:
            m, e = layer(h, species, edges, field)
            h = torch.cat([h[: len(m)] + m[: len(h)], m[len(h) :]])  # the last has scalars alone
            energy = energy + e
        return NodeOutput(edges.restored(energy), edges.restored(h[0]))


class Layer(nn.Module):
    """Density, its powers, message, readout."""

    def __init__(self, c: GauntConfig, lmax_in: int, lmax_out: int) -> None:
        super().__init__()
        C, degrees = c.channels, c.message_channels[: lmax_in + 1]
        self.send = nn.ModuleList(nn.Linear(C, S, bias=False) for S in degrees)
        self.density = Density(c.lmax, c.num_basis, degrees, c.factors * C)
        self.field = ExternalField(c.factors * C) if c.field is not None else None
        self.products = NodeProducts(c, lmax_out)
        self.mlp = InvariantMLP(C, c.hidden, C, C)
        self.readout = nn.Linear(C, 1, bias=False)
        nn.init.zeros_(self.readout.weight)  # training starts from the reference energies

    def forward(
        self, h: Tensor, species: Tensor, edges: Edges, field: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        messages = [
            send(h[l * l : (l + 1) ** 2]).transpose(0, 1).flatten(1)  # (N, (2l+1) S)
            for l, send in enumerate(self.send)
        ]
        A = self.density(edges, messages)  # (LM, N, F C)
        if self.field is not None and field is not None:
            A = self.field(A, field)
        m = self.products(A * soft_norm(A, (0, 2))[:, None], species)  # (LM', N, C)
        return m, self.readout(self.mlp(m[0], species)).squeeze(-1)


class NodeProducts(nn.Module):
    """Powers of the density, weighted for each element, order and degree, and mixed."""

    degree: Tensor  # (LM',)

    def __init__(self, c: GauntConfig, lmax_out: int) -> None:
        super().__init__()
        C, L, F = c.channels, c.lmax, c.factors
        self.factors = F
        self.size = (lmax_out + 1) ** 2
        terms = [tuple(k % F for k in range(order)) for order in range(2, c.order + 1)]
        self.powers = GauntPolynomial((L,) * F, [(lmax_out, [term]) for term in terms])
        scales = [product_scales(L, term, lmax_out) for term in terms]
        self.brackets = None
        if c.antisymmetric and lmax_out > 0:
            self.brackets = nn.ModuleList(
                [BracketProduct((L, L), L), BracketProduct((L, L), lmax_out)]
            )
            scales.append(torch.full_like(scales[0], bracket_scale(L) ** 2))
        self.scales = Constant(torch.stack(scales, dim=1))  # (H + 1, number of products)
        self.element = nn.Linear(C, self.scales.exact.numel() * C, bias=False)
        nn.init.zeros_(self.element.weight)
        inputs = (F + len(scales)) * C
        self.mix = nn.Parameter(torch.randn(lmax_out + 1, inputs, C) / math.sqrt(inputs))
        self.register_buffer("degree", degree_of_component(lmax_out), persistent=False)

    def forward(self, A: Tensor, species: Tensor) -> Tensor:
        """(LM, N, F C) densities -> (LM', N, C) messages."""
        functions = A.chunk(self.factors, dim=-1)
        found = list(self.powers(*functions))
        if self.brackets is not None:
            first, second = self.brackets
            u, v, w = (functions[k % self.factors] for k in range(3))
            found.append(second(first(u, v), w))
        B = torch.cat(found, dim=-1)  # (LM', N, number of products C)
        w = 1 + self.element(species).unflatten(-1, (*self.scales.exact.shape, -1))
        w = (w * self.scales()[..., None]).flatten(2).transpose(0, 1)  # (H + 1, N, ...)
        B = torch.cat([A[: self.size], B * w.index_select(0, self.degree)], dim=-1)
        return torch.bmm(B, self.mix.index_select(0, self.degree))


def product_scales(lmax: int, term: tuple[int, ...], lmax_out: int) -> Tensor:
    """(H + 1,) factors that give each degree of a product of random functions unit variance.

    Functions with normal coefficients of unit variance are Gaussian fields on the sphere with the
    kernel K(x) = sum_l (2 l + 1) P_l(x), x the cosine between two points.  Powers u^k at two points
    correlate as sum_j j! a_j^2 K(1)^(k-j) K(x)^j, with a_j the coefficients of x^k in Hermite
    polynomials; the correlation of the product has a coefficient for each degree.
    """
    top = max(lmax, lmax_out)
    x, weight = np.polynomial.legendre.leggauss((len(term) * lmax + lmax_out) // 2 + 1)
    P = np.polynomial.legendre.legvander(x, top)  # (x, l)
    K = P[:, : lmax + 1] @ (2 * np.arange(lmax + 1) + 1)
    variance = (lmax + 1) ** 2
    product = np.ones_like(x)
    for factor in set(term):
        k = term.count(factor)
        moments = np.zeros_like(x)
        for j in range(k % 2, k + 1, 2):
            pairs = (k - j) // 2
            a = math.factorial(k) / (math.factorial(pairs) * 2**pairs * math.factorial(j))
            moments += math.factorial(j) * a**2 * variance ** (k - j) * K**j
        product *= moments
    return torch.from_numpy((weight / 2 * product @ P[:, : lmax_out + 1]) ** -0.5)


def bracket_scale(lmax: int) -> float:
    """The like for a bracket, about: its mean square, of two slopes of each function, spread over
    the components that it has."""
    slope = sum(l * (l + 1) * (2 * l + 1) for l in range(lmax + 1)) / 2
    return (2 * lmax + 1) / (math.sqrt(2) * slope)
