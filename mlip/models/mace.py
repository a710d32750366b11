"""MACE: messages coupled by Clebsch-Gordan products, symmetric contraction of the density.

Features h_i are O(3) irreps of natural parity, h[lm, i, c], l <= lmax, equal multiplicities.  One
layer, in the symbols of Batatia et al. 2022, "MACE" (arXiv:2206.07697), eqs. 7-14:

    R_j[p, c]    = MLP( B(r_ij) f(r_ij) )                       one weight per path p = (l1 l2 -> l)
    A_i[lm, c]   = W sum_p n^-1 sum_j R_j[p, c] ( Y_l2(r_ij) x (W h_j)_l1 )[lm, c]      density
    m_i[LM, c]   = sum_nu sum_k W[z_i, k, c] U_k ( A_i x ... x A_i )          nu = 1 ... correlation
    h_i          <- W m_i + W[z_i] h_i,                         E_i <- E_i + readout(h_i[0])

Weights, initialisation and normalisation are those of ScaleShiftMACE of mace-torch with its
residual interaction block, so weights of one give the same energies in the other
(``benchmarks/mace_reference.py``; ``mlip.mace_import``).  With ``first_layer="species"``, as
``mace_run_train`` has it by default, the first layer takes W[z_i] A_i for A_i and its update has no
second term.  With ``correlation=1`` and ``gate=True`` it is in essence
NequIP (Batzner et al. 2022, doi:10.1038/s41467-022-29939-5).

Sums over neighbours are batched matrix products per atom and path: Y is coupled to each direction
of the neighbour's feature before channels enter.

Symmetry: O(3), translations and permutations exactly, parity included.
Cost: O(E P C (2 lmax + 1)) + O(N C nnz(U)); the first term counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.constant import Constant
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.radial import bessel, polynomial_envelope
from mlip.nn.spherical import SphericalHarmonics, clebsch_gordan, degree_of_component
from mlip.nn.symmetric_contraction import SymmetricContraction

# E[silu(z)^2]^(-1/2) for normal z as e3nn estimates it (1.6765 to four digits), so that weights
# mean the same in both packages.
SILU_GAIN = 1.6791767923989418


class MACEConfig(Config):
    """Hyperparameters of MACE, the important ones first."""

    cutoff: float = Field(5.0, gt=0, description="neighbours up to this distance, angstrom")
    channels: int = Field(128, ge=1, le=1024, description="multiplicity of every degree")
    lmax: int = Field(1, ge=0, le=3, description="largest degree of the features (max_L)")
    num_layers: int = Field(2, ge=1, le=8)
    correlation: int = Field(3, ge=1, le=3, description="neighbours whose product is taken")
    max_ell: int = Field(3, ge=1, le=4, description="largest degree of the harmonics")
    num_basis: int = Field(8, ge=1, le=64, description="Bessel functions")
    envelope_power: int = Field(5, ge=2, le=20, description="p of the polynomial envelope")
    radial_hidden: tuple[int, ...] = Field(
        (64, 64, 64), min_length=1, description="widths of the radial network"
    )
    readout_hidden: int = Field(16, ge=1, le=1024, description="width of the last readout")
    first_layer: Literal["residual", "species"] = Field(
        "residual",
        description="as in all others; or its density mixed by species, without a skip "
        "(mace_run_train --model MACE)",
    )
    gate: bool = Field(False, description="NequIP's gate after each layer")
    reduced: bool = Field(
        False, description="linearly independent products only; fewer weights, same functions"
    )
    elements: tuple[int, ...] | None = Field(
        None, description="atomic numbers that have weights; null: of the training set, else all"
    )
    isolated: Literal["zero", "learned"] = Field(
        "zero", description="energy of an isolated atom: exactly its reference, or as published"
    )
    avg_num_neighbors: float = Field(
        20.0, gt=0, description="scale of sums over neighbours, from the training set"
    )

    @model_validator(mode="before")
    @classmethod
    def _irreps(cls, values: Any) -> Any:
        """MACE's ``hidden_irreps: 64x0e + 64x1o`` is ``channels: 64, lmax: 1``."""
        if not isinstance(values, dict) or values.get("hidden_irreps") is None:
            return values
        values = dict(values)
        text = str(values.pop("hidden_irreps")).replace(" ", "")
        found = re.fullmatch(r"(\d+)x0e((?:\+\1x\d[eo])*)", text)
        degrees = re.findall(r"x(\d[eo])", text)
        if not found or degrees != [f"{l}{'eo'[l % 2]}" for l in range(len(degrees))]:
            raise ValueError(
                f"hidden_irreps must be like 64x0e + 64x1o + 64x2e, equal numbers and natural "
                f"parity, got '{text}'"
            )
        return {**values, "channels": int(found[1]), "lmax": len(degrees) - 1}

    @model_validator(mode="after")
    def _known_elements(self) -> MACEConfig:
        if self.elements is not None:
            if not self.elements or any(not 1 <= z <= 118 for z in self.elements):
                raise ValueError("elements are atomic numbers from 1 to 118")
            if list(self.elements) != sorted(set(self.elements)):
                raise ValueError("elements must be ascending, each once")
        return self

    @model_validator(mode="after")
    def _degrees(self) -> MACEConfig:
        if self.lmax > self.max_ell:
            raise ValueError(
                f"lmax={self.lmax}: features cannot have larger degrees than the harmonics, "
                f"max_ell={self.max_ell}"
            )
        return self


class Species(NamedTuple):
    """Atoms in runs of one element each."""

    order: Tensor | None  # (N,) None: as they are
    element: Tensor  # (N,) place in ``config.elements``
    present: Tensor  # (M,) the elements of the runs
    sizes: list[int] | None  # (M,) their numbers of atoms; None: one each


class Edges(NamedTuple):
    """Neighbourhoods with what all layers share."""

    Y: Tensor  # (N, K, LM)
    radial: Tensor  # (N, K, B)
    neighbors: Tensor  # (N K,)


class MACE(nn.Module):
    """The model; see the module's docstring for the equations."""

    place: Tensor  # (119,) of each element in ``config.elements``, -1 where it has no weights

    def __init__(self, config: MACEConfig) -> None:
        super().__init__()
        c = self.config = config
        elements = c.elements or tuple(range(1, 119))
        Z = len(elements)
        place = torch.full((119,), -1)
        place[list(elements)] = torch.arange(Z)
        place[0] = 0  # what fills padded neighbourhoods
        self.register_buffer("place", place, persistent=False)
        self.embed = nn.Parameter(torch.randn(Z, c.channels))
        self.harmonics = SphericalHarmonics(c.max_ell)
        self.basis: nn.Module = RadialBasis(c)
        degrees = [0, *[c.lmax] * (c.num_layers - 1), 0]
        self.layers = nn.ModuleList(
            Layer(c, Z, lmax_in, lmax_out, mixed=t == 0 and c.first_layer == "species")
            for t, (lmax_in, lmax_out) in enumerate(pairwise(degrees))
        )
        self.readouts = nn.ModuleList(ScaledLinear(c.channels, 1) for _ in range(c.num_layers - 1))
        self.readouts.append(ScaledMLP((c.channels, c.readout_hidden, 1)))

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.num_layers * self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections are exact."""
        return True

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        species = self.sort_by_element(graph.atomic_numbers)
        edges = self.edges(graph, species.order)
        embed = self.embed / math.sqrt(len(self.embed))
        h = embed.index_select(0, species.element)[None]  # (1, N, C)
        energy, features = torch.zeros_like(h[0, :, 0]), []
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            h = layer(h, edges, species)
            energy = energy + readout(h[0]).squeeze(-1)
            features.append(h[0])
        if self.config.isolated == "zero":
            energy = energy - self.isolated_energy(embed, species)
        out, invariants = energy, torch.cat(features, dim=-1)
        if species.order is not None:
            back = torch.argsort(species.order)
            out, invariants = out.index_select(0, back), invariants.index_select(0, back)
        return NodeOutput(energy=out, features=invariants)

    def isolated_energy(self, embed: Tensor, species: Species) -> Tensor:
        """(N,) energies that the readouts give to the atoms without neighbours."""
        one_each = species._replace(sizes=None)
        h = embed.index_select(0, species.present)[None]  # (1, M, C)
        energy = torch.zeros_like(h[0, :, 0])
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            h = cast(Layer, layer).without_neighbors(h, one_each)
            energy = energy + readout(h[0]).squeeze(-1)
        if species.sizes is None:
            return energy
        run = torch.searchsorted(species.present, species.element)  # (N,) of each atom
        return energy.index_select(0, run)

    def sort_by_element(self, atomic_numbers: Tensor) -> Species:
        """Order in which the weights of each element meet a run of atoms."""
        element = self.place.index_select(0, atomic_numbers)
        if isinstance(atomic_numbers.shape[0], torch.SymInt):
            # Traced for any number of atoms, of which none can be counted.
            return Species(None, element, element, None)
        # The host has to know, and a GPU's histogram would make it wait three times.
        counts = np.bincount((element + 1).cpu().numpy(), minlength=len(self.embed) + 1).tolist()
        if counts[0]:
            self.require_weights(atomic_numbers)
        present = [k for k, n in enumerate(counts[1:]) if n]
        order = None
        if len(present) > 1:
            order = torch.argsort(element, stable=True)
            element = element.index_select(0, order)
        sizes = [counts[k + 1] for k in present]
        return Species(order, element, torch.tensor(present, device=element.device), sizes)

    def require_weights(self, atomic_numbers: Tensor) -> None:
        """ValueError for an element without weights."""
        missing = self.place.index_select(0, atomic_numbers) < 0
        if missing.any():
            odd = sorted(set(atomic_numbers[missing].tolist()))
            raise ValueError(f"the model has no weights for the atomic numbers {odd}")

    def edges(self, graph: AtomicGraph, order: Tensor | None) -> Edges:
        """Harmonics and radial functions of all neighbourhoods."""
        c, N = self.config, graph.atomic_numbers.shape[0]  # unlike len(), a symbol when traced
        hood = gather_neighborhoods(graph.vectors, graph.edge_index, N, c.cutoff)
        vectors, neighbors = hood.vectors, hood.neighbors
        if order is not None:
            rank = torch.argsort(order)
            vectors = vectors.index_select(0, order)
            neighbors = rank.index_select(0, neighbors).view(N, -1).index_select(0, order).flatten()
        r = vectors.norm(dim=-1, keepdim=True)  # (N, K, 1)
        radial = self.basis(r[..., 0] / c.cutoff)
        return Edges(self.harmonics(vectors / r), radial, neighbors)


class RadialBasis(nn.Module):
    """Bessel functions times the envelope: x = r / cutoff (...) -> (..., B)."""

    def __init__(self, c: MACEConfig) -> None:
        super().__init__()
        self.num_basis, self.power, self.scale = c.num_basis, c.envelope_power, c.cutoff**-1.5

    def forward(self, x: Tensor) -> Tensor:
        fade = polynomial_envelope(x, self.power) * self.scale
        return bessel(x, self.num_basis) * fade[..., None]


class Layer(nn.Module):
    """Density, symmetric contraction, update; ``mixed``: weights of the element act on the density,
    not on the features that the layer gets."""

    def __init__(
        self, c: MACEConfig, num_elements: int, lmax_in: int, lmax_out: int, *, mixed: bool
    ) -> None:
        super().__init__()
        C = c.channels
        # Without products of densities, nobody reads the degrees that the output does not have.
        density = lmax_out if c.correlation == 1 else c.max_ell
        self.convolution = Convolution(c, lmax_in, density)
        self.contraction: nn.Module = SymmetricContraction(
            density, lmax_out, c.correlation, C, num_elements, reduced=c.reduced
        )
        self.update = DegreeLinear(lmax_out, C)
        self.mix = SpeciesLinear(density, C, num_elements) if mixed else None
        self.skip = None if mixed else SpeciesLinear(min(lmax_in, lmax_out), C, num_elements)
        self.gate = Gate(lmax_out, C) if c.gate else nn.Identity()

    def forward(self, h: Tensor, edges: Edges, species: Species) -> Tensor:
        """(LM_in, N, C) -> (LM_out, N, C)."""
        A = self.convolution(h, edges)  # (LM, N, C)
        if self.mix is not None:
            A = self.mix(A, species)
        m = self.update(self.contraction(A, species.present, species.sizes))  # (LM_out, N, C)
        return self.gate(m if self.skip is None else add_lowest(m, self.skip(h, species)))

    def without_neighbors(self, h: Tensor, species: Species) -> Tensor:
        """The same where the density is zero; scalars (1, N, C) -> (1, N, C)."""
        return self.gate(torch.zeros_like(h) if self.skip is None else self.skip(h, species)[:1])


def add_lowest(a: Tensor, b: Tensor) -> Tensor:
    """a + b, where b has only the lowest degrees."""
    return a + (b if len(b) == len(a) else nn.functional.pad(b, (0, 0, 0, 0, 0, len(a) - len(b))))


class Convolution(nn.Module):
    """Sum over neighbours of R (Y x h), coupled to each degree up to ``lmax`` and mixed."""

    def __init__(self, c: MACEConfig, lmax_in: int, lmax: int) -> None:
        super().__init__()
        C = c.channels
        self.avg_num_neighbors = c.avg_num_neighbors
        self.up = DegreeLinear(lmax_in, C)
        # (l1, l2, l) of natural parity, by l; the order of the radial weights.
        paths = [
            (l1, l2, l)
            for l in range(lmax + 1)
            for l1 in range(lmax_in + 1)
            for l2 in range(abs(l - l1), min(l + l1, c.max_ell) + 1)
            if (l1 + l2 + l) % 2 == 0
        ]
        self.radial = ScaledMLP((c.num_basis, *c.radial_hidden))
        self.activation = ScaledSiLU()
        self.weights = nn.Parameter(torch.randn(c.radial_hidden[-1], len(paths), C))
        self.sums: nn.Module = PathSums(paths, c.max_ell)
        self.mix = nn.ParameterList(
            nn.Parameter(torch.randn(sum(path[2] == l for path in paths) * C, C))
            for l in range(lmax + 1)
        )

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """(LM_in, N, C) -> (LM, N, C)."""
        hidden = self.activation(self.radial(edges.radial))  # (N, K, H)
        weights = self.weights / math.sqrt(len(self.weights))
        sums = self.sums(edges.Y, hidden, weights, self.up(h).transpose(0, 1), edges.neighbors)
        A = []
        for parts, W in zip(sums, self.mix, strict=True):
            scale = 1 / (self.avg_num_neighbors * math.sqrt(len(W)))
            A.append(torch.cat(parts, dim=-1) @ (W * scale))  # (N, 2l+1, C)
        return torch.cat(A, dim=1).transpose(0, 1)


class PathSums(nn.Module):
    """Sums over neighbours, for each l and each path (l1, l2, l) to it (N, 2l+1, C)."""

    def __init__(self, paths: Sequence[tuple[int, int, int]], max_ell: int) -> None:
        super().__init__()
        self.paths, self.max_ell = list(paths), max_ell
        self.widths = [2 * l1 + 1 for l1 in range(max(path[0] for path in paths) + 1)]
        # Y -> [Y, Q_p of the paths with l1 > 0], Q_p[m, m1] = sum_m2 CG Y_l2m2, and which columns
        # belong to each path; for l1 = 0 the coupling is the identity.
        LM = (max_ell + 1) ** 2
        blocks = [torch.zeros(LM, 0, dtype=torch.float64)]
        self.columns, end = [], LM
        for l1, l2, l in self.paths:
            if l1 == 0:
                self.columns.append((l * l, (l + 1) ** 2))
                continue
            block = torch.zeros(LM, (2 * l + 1) * (2 * l1 + 1), dtype=torch.float64)
            CG = clebsch_gordan(l1, l2, l) * math.sqrt(2 * l + 1)
            block[l2 * l2 : (l2 + 1) ** 2] = CG.permute(1, 2, 0).flatten(1)
            blocks.append(block)
            self.columns.append((end, end + block.shape[1]))
            end += block.shape[1]
        self.couplings = Constant(torch.cat(blocks, dim=1))

    def forward(
        self, Y: Tensor, hidden: Tensor, weights: Tensor, u: Tensor, neighbors: Tensor
    ) -> list[list[Tensor]]:
        """Y (N, K, LM), radial functions ``hidden`` (N, K, H) @ ``weights`` (H, P, C), features of
        the atoms u (N, LM_in, C)."""
        N, K, H = hidden.shape
        C = weights.shape[-1]
        u = u.flatten(1).index_select(0, neighbors).view(N, K, -1, C)
        scalars, *others = u.split(self.widths, dim=2)  # (N, K, 2 l1 + 1, C)
        # One view for all paths: a gradient of a view is as large as what it was taken from.
        degrees = [scalars[:, :, 0], *others]
        left = torch.cat([Y, Y @ self.couplings()], dim=-1).mT  # (N, columns, K)
        hidden = hidden.view(-1, H)
        result: list[list[Tensor]] = [[] for _ in range(self.paths[-1][2] + 1)]
        for (l1, _, l), (start, stop), W in zip(
            self.paths, self.columns, weights.unbind(1), strict=True
        ):
            # One matrix product for each path: what it writes is used at once.
            Q, v, R = left[:, start:stop], degrees[l1], (hidden @ W).view(N, K, C)
            if l1 > 0:  # rows m, columns (neighbour, m1)
                Q = Q.unflatten(1, (2 * l + 1, 2 * l1 + 1)).transpose(2, 3).flatten(2)
                weighted = (R[:, :, None] * v).flatten(1, 2)
            else:
                weighted = R * v
            result[l].append(torch.bmm(Q, weighted))
        return result


class DegreeLinear(nn.Module):
    """Mix channels within each degree: (LM, N, C) -> (LM, N, C)."""

    degree: Tensor  # (LM,)

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(lmax + 1, channels, channels))
        self.register_buffer("degree", degree_of_component(lmax), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        W = self.weight / math.sqrt(h.shape[-1])
        return torch.bmm(h, W.index_select(0, self.degree))


class SpeciesLinear(nn.Module):
    """The same with weights of each atom's element; degrees above ``lmax`` are left out."""

    degree: Tensor  # (LM,)

    def __init__(self, lmax: int, channels: int, num_elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_elements, lmax + 1, channels, channels))
        self.scale = 1 / math.sqrt(num_elements * channels)
        self.register_buffer("degree", degree_of_component(lmax), persistent=False)

    def forward(self, h: Tensor, species: Species) -> Tensor:
        W = self.weight.index_select(0, species.present) * self.scale
        h = h[: len(self.degree)]
        if species.sizes is None:  # sums that a compiler makes without a table of the matrices
            return (h[..., None] * W.index_select(1, self.degree).transpose(0, 1)).sum(dim=2)
        parts = h.split(species.sizes, dim=1)
        mixed = [
            torch.bmm(part, w.index_select(0, self.degree))
            for part, w in zip(parts, W, strict=True)
        ]
        return torch.cat(mixed, dim=1)


class ScaledLinear(nn.Module):
    """x W / sqrt(inputs) with normal weights: unit variance in, unit variance out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight / math.sqrt(len(self.weight)))


class ScaledMLP(nn.Sequential):
    """Such layers with normalised SiLU between them, without biases: zero in, zero out."""

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [ScaledLinear(inputs, outputs), ScaledSiLU()]
        super().__init__(*layers[:-1])


class ScaledSiLU(nn.Module):
    """SiLU, for normal inputs of mean square one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * SILU_GAIN


class Gate(nn.Module):
    """SiLU of scalars; higher degrees times SiLU of linear gates of the scalars."""

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.gates = ScaledLinear(channels, lmax * channels)
        self.lmax = lmax

    def forward(self, h: Tensor) -> Tensor:
        scalars = nn.functional.silu(h[:1]) * SILU_GAIN
        if len(h) == 1:
            return scalars
        gates = nn.functional.silu(self.gates(h[0])) * SILU_GAIN
        out = [scalars]
        for l, gate in enumerate(gates.chunk(self.lmax, dim=-1), start=1):
            out.append(h[l * l : (l + 1) ** 2] * gate)
        return torch.cat(out)
