"""Energy and gradient of Facet written out: one pass forward, one back, no graph of operations.

What ``mlip.models.facet`` computes, and its derivative by the vectors, for evaluation: equations
and weights are those of the model, in the order in which they cost least.

- The first layer's neighbours differ in their element only.  What an element sends is multiplied
  into the weights once for each set of elements, and neighbours are counted by element: few columns
  instead of S.
- What depends on the element of an atom alone is a row of one table.
- Edges are the last dimension of what has edges: operations run along contiguous memory.
- The derivatives of all layers by the basis are added up in one tensor, whose own are taken once.
- Atoms come in pieces, whose edges stay in cache.

A block gives its value and its pullback, which takes the derivative of the energy by the value to
that by what the block was given.  ``mlip.backends`` compares the whole with the model in float64
on two structures before it is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlip.compiled import Program, SameModel, edges_of_slots
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.models.facet import Facet, Layer
from mlip.nn.buckets import bucketed_neighborhoods
from mlip.nn.density import Coupling, EdgeBasis
from mlip.nn.radial import BesselWithSlope
from mlip.nn.remembered import remembered

PIECE = 6000  # slots of a piece; fewer cost more in Python than the cache saves
KEPT = 32  # sets of elements whose weights are kept

silu_backward = torch.ops.aten.silu_backward.default
Hood = tuple[Tensor, Tensor]  # vectors (n, K, 3) of consecutive atoms, neighbours (n K,)


class AnalyticFacet(SameModel):
    """Energy model that computes what a ``Facet`` does, with the gradient written out.

    Parameters
    ----------
    model : as of ``FacetGradient``
    elements : atomic numbers for which its program is made
    """

    bucketed = True

    @staticmethod
    def writes(model: Facet) -> bool:
        """Whether the gradient of such a model is written here."""
        c = model.config
        return c.grid == "poly" and not c.quartic and c.field is None

    def __init__(self, model: Facet, elements: Sequence[int]) -> None:
        super().__init__(model)
        self.elements = tuple(elements)
        self._every: FacetGradient | None = None
        self._gradients: dict[tuple[int, ...], FacetGradient] = {}  # by elements

    def with_gradient(self, graph: AtomicGraph) -> tuple[NodeOutput, Tensor]:
        Z, E = graph.atomic_numbers, len(graph.vectors)
        if E == 0:
            return cast(NodeOutput, self.model(graph)), graph.vectors
        order, hoods = bucketed_neighborhoods(
            graph.vectors, graph.edge_index, len(Z), self.config.cutoff
        )
        gradient = self._gradient_of(Z)
        if order is not None:
            Z = Z.index_select(0, order)
        pieces = [piece for hood in hoods for piece in in_pieces(*hood[:2])]
        # What autograd notes of each operation is a fifth of the time of small structures.
        with torch.inference_mode():
            energy, features, gradients = gradient(Z, pieces)
        g = edges_of_slots(
            joined([x.reshape(-1, 3) for x in gradients]),
            joined([cast(Tensor, hood.edges) for hood in hoods]),
            E,
        )
        # Copies: what is made in that mode can be no part of what is differentiated later.
        if order is None:
            energy, features = energy.clone(), features.clone()
        else:
            back = torch.argsort(order)
            energy, features = energy.index_select(0, back), features.index_select(0, back)
        return NodeOutput(energy, features), g

    def _gradient_of(self, atomic_numbers: Tensor) -> FacetGradient:
        """With weights for the elements of these atoms (N,), which are kept; on a GPU for all that
        the potential knows, lest the host wait for it."""
        device = atomic_numbers.device.type
        elements = elements_of(atomic_numbers) if device == "cpu" else self.elements
        if (found := self._gradients.get(elements)) is None:
            with torch.autocast(device, enabled=False):
                every = self._every = self._every or FacetGradient(self.model)
                found = every.folded(elements)
            kept = list(self._gradients.items())[1 - KEPT :]  # without the oldest
            self._gradients = dict([*kept, (elements, found)])
        return found

    def program(self) -> Program:
        """Energies, features and gradient of neighbourhoods that are laid out."""
        gradient = FacetGradient(self.model).folded(self.elements)

        def run(Z: Tensor, v: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            energy, features, (g,) = gradient(Z, [(v, neighbors.flatten())])
            return energy, features, g

        return run

    def forget(self) -> None:
        self._every, self._gradients = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_every": None, "_gradients": {}}


@remembered
def elements_of(atomic_numbers: Tensor) -> tuple[int, ...]:
    """Atomic numbers that occur among those of the atoms (N,), rising."""
    return tuple(np.flatnonzero(np.bincount(atomic_numbers.cpu().numpy())).tolist())


def in_pieces(vectors: Tensor, neighbors: Tensor) -> list[Hood]:
    """Neighbourhoods (n, K, 3) and neighbours (n K,) of few atoms each."""
    n, K, _ = vectors.shape
    number = min(n, max(1, round(n * K / PIECE)))
    of_atoms = neighbors.view(n, K)
    return [
        (v, j.flatten())
        for v, j in zip(vectors.tensor_split(number), of_atoms.tensor_split(number), strict=True)
    ]


class FacetGradient:
    """Energies, features and gradient of a ``Facet`` with the weights that it has now.

    Parameters
    ----------
    model : with exact products on the sphere, without quartic invariants and an external field
    """

    def __init__(self, model: Facet) -> None:
        layers = [cast(Layer, layer) for layer in model.layers]
        with torch.no_grad():
            species = model.embed.weight  # (119, C)
            columns = [layers[0].send[0](species), species]  # (119, S), (119, C)
            for layer in layers:
                columns += [1 + layer.species_gate(species), 1 + layer.mlp.gate(species)]
            self.table = torch.cat(columns, dim=1)  # (119, ...)
            self.widths = [x.shape[1] for x in columns]
            self.edges = EdgeGradient(model.edges)
            senders = [list(layer.send) for layer in layers[1:]]
            self.layers = [
                LayerGradient(layer, send)
                for layer, send in zip(layers, [*senders, []], strict=True)
            ]

    def folded(self, elements: Sequence[int]) -> FacetGradient:
        """The same with what each of these elements sends multiplied into the weights of the first
        layer; as it is if they are no fewer than what is sent. Others give no number."""
        sent, *others = self.table.split(self.widths, dim=1)
        if len(elements) >= sent.shape[1]:
            return self
        other = copy.copy(self)
        known = torch.tensor(elements, device=sent.device)
        other.layers = [self.layers[0].folded(sent[known]), *self.layers[1:]]
        Z = torch.arange(len(sent), device=sent.device)[:, None]
        one = (Z == known).to(sent)
        there = (Z == 0) | one.any(dim=1, keepdim=True)
        other.table = torch.cat([torch.where(there, one, torch.nan), *others], dim=1)
        other.widths = [len(elements), *self.widths[1:]]
        return other

    def __call__(
        self, atomic_numbers: Tensor, hoods: Sequence[Hood]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Energies (N,), features (N, C), and for the edges of each piece dE/dv (n, K, 3)."""
        rows = self.table.index_select(0, atomic_numbers)
        messages, scalars, *gates = rows.split(self.widths, dim=1)
        sizes = [v.shape[0] for v, _ in hoods]
        edges = [self.edges(v) for v, _ in hoods]
        state = list(scalars.split(sizes))
        energy: Tensor | float = 0.0
        near: list[list[Tensor]] = []  # of each layer and piece what neighbours sent, (n, K, S)
        pulls: list[list[Pull]] = []
        for layer in self.layers:
            gate, hidden_gate, *gates = gates
            S = messages.shape[1]
            near.append([messages.index_select(0, j).view(*v.shape[:2], S) for v, j in hoods])
            done = [
                layer(basis, *of_atoms)
                for (basis, _), *of_atoms in zip(
                    edges, near[-1], state, gate.split(sizes), hidden_gate.split(sizes), strict=True
                )
            ]
            state = [x.scalars for x in done]
            energy = energy + joined([x.energy for x in done])
            messages = joined([x.sent for x in done])
            pulls.append([x.pull for x in done])

        by_state: list[Tensor | None] = [None] * len(hoods)
        by_sent: Sequence[Tensor | None] = by_state
        by_sums: list[list[Sums]] = [[] for _ in hoods]
        for t in reversed(range(len(self.layers))):
            by_messages = None if t == 0 else rows.new_zeros(rows.shape[0], near[t][0].shape[-1])
            for k, ((basis, _), (_, j)) in enumerate(zip(edges, hoods, strict=True)):
                by_state[k], sums = pulls[t][k](by_state[k], by_sent[k])
                by_sums[k].append(sums)
                if by_messages is not None:
                    by_near = [torch.bmm(basis[:, : x.shape[1]].mT, x) for x in sums]
                    by_messages.index_add_(0, j, torch.cat(by_near, dim=-1).flatten(0, 1))
            if by_messages is not None:
                by_sent = by_messages.split(sizes)
        gradients = []
        for k, (_, pull_edges) in enumerate(edges):
            sent = [g[k] for g in reversed(near)]
            gradients.append(pull_edges(by_basis(by_sums[k], sent)))
        return cast(Tensor, energy), joined(state), gradients


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """All rows; without a copy of a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


class EdgeGradient:
    """The tensor Y_lm B_b of the edges of a piece; e numbers its n K edges."""

    def __init__(self, edges: EdgeBasis) -> None:
        self.cutoff = edges.cutoff
        self.raising = [raising().mT for raising in edges.harmonics.raising]  # (2l + 3, (2l + 1) 3)
        self.lowering = edges.harmonics.lowering().mT  # (3 L^2, LM)
        self.below = self.lowering.shape[0] // 3
        self.radial = BesselWithSlope(self.lowering, edges.num_basis, edges.stretch, edges.scale)

    def __call__(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(n, K, 3) -> (n, LM B, K)."""
        n, K, _ = v.shape
        flat = v.permute(2, 0, 1).reshape(3, -1)  # (3, e)
        r = flat.square().sum(0).sqrt()
        u = flat / r
        Y = [torch.ones_like(flat[:1]), u * math.sqrt(3)]
        for matrix in self.raising:
            Y.append(matrix @ (Y[-1][:, None] * u).flatten(0, 1))
        harmonics = torch.cat(Y)  # (LM, e)
        radial, slope = self.radial(r / self.cutoff)  # (B, e)
        rows = harmonics.shape[0] * radial.shape[0]
        basis = (harmonics[:, None] * radial).view(rows, n, K).transpose(0, 1)

        def pull(G: Tensor) -> Tensor:
            """(n, LM B, K) -> (n, K, 3)."""
            G = G.view(n, len(harmonics), len(radial), K)
            f, f1, y = (
                x.view(x.shape[0], n, K).transpose(0, 1) for x in (radial, slope, harmonics)
            )
            by_harmonics = (G * f[:, None]).sum(2)  # (n, LM, K)
            by_length = ((G * y[:, :, None]).sum(1) * f1).sum(1).flatten()  # (e,)
            by_length = by_length / self.cutoff
            slopes = self.lowering @ by_harmonics.transpose(0, 1).reshape(harmonics.shape)
            by_u = (slopes.view(3, self.below, n * K) * harmonics[: self.below]).sum(1)  # (3, e)
            across = by_u / r
            found = across + u * (by_length - (across * u).sum(0))
            return found.view(3, n, K).permute(1, 2, 0)

        return basis, pull


# dE/d of the sums over neighbours: (n, LM B, S0) of scalars, (n, lm B, S) of the others if any
Sums = list[Tensor]
# dE/d of the scalars after the layer and of what was sent on -> of those before, and of the sums
Pull = Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Sums]]


def by_basis(sums: Sequence[Sums], near: Sequence[Tensor]) -> Tensor:
    """dE/d of the basis (n, LM B, K): products of the derivatives by the sums and of what was
    summed, over all layers."""
    pairs = [
        pair
        for s, g in zip(sums, near, strict=True)
        for pair in zip(s, g.split([x.shape[-1] for x in s], dim=-1), strict=True)
    ]
    # All rows first; of the others are those of low degrees.
    (first, sent), *others = sorted(pairs, key=lambda pair: pair[0].shape[1:], reverse=True)
    G = torch.bmm(first, sent.mT)
    for by_sum, sent in others:
        part = G[:, : by_sum.shape[1]]
        if by_sum.shape[2] == 1:  # a product of a column and a row is no matter for matrices
            part.addcmul_(by_sum, sent.mT)
        elif part.is_contiguous():
            part.baddbmm_(by_sum, sent.mT)
        else:  # which would be done atom by atom
            part += torch.bmm(by_sum, sent.mT)
    return G


def summed(basis: Tensor, near: Tensor) -> Tensor:
    """Sum over neighbours: (n, R, K), (n, K, S) -> (n, R, S)."""
    if near.shape[2] == 1:
        return (basis * near.mT).sum(2, keepdim=True)
    return torch.bmm(basis, near)


class Result(NamedTuple):
    """What a layer makes of the atoms of a piece."""

    scalars: Tensor  # (n, C)
    energy: Tensor  # (n,)
    sent: Tensor  # (n, S) to the next layer; of the last: nothing, (n, 0)
    pull: Pull


class CouplingWeights(NamedTuple):
    """A path from neighbours' degree l to all others."""

    matrix: Tensor  # (Q, lm m')
    weight: Tensor  # (Q, B S, 2C)
    component: Tensor  # (Q,) of A
    shape: tuple[int, int]  # 2 l + 1, S


class LayerGradient:
    """A layer of Facet, from the sums over neighbours to what it sends on.

    Parameters
    ----------
    layer : of the model
    send : linear maps of each degree that the next layer sends
    """

    def __init__(self, layer: Layer, send: Sequence[torch.nn.Module]) -> None:
        density, product = layer.density, layer.product
        C, self.num_basis = layer.channels, density.num_basis
        self.weight = density.weights[0].index_select(0, density.degree)  # (LM, B S, 2C)
        couplings = cast(Iterable[Coupling], density.couplings)
        self.rows = density.filter_components
        self.couplings = [
            CouplingWeights(
                coupling.matrix(), w.index_select(0, coupling.path), coupling.collect().argmax(0),
                (2 * l + 1, density.degrees[l]),
            )
            for l, (coupling, w) in enumerate(zip(couplings, density.weights[1:], strict=True), 1)
        ]  # fmt: skip
        self.to_grid = product.product.to_grid()  # (P, LM)
        self.from_grid = product.product.from_grid() * product.scale  # (LM, P)
        self.degrees = layer.invariants.rows()  # (L + 1, LM)
        # The model's invariants are A_0, |U_l|^2 for all l, U_l.P_l for all l; here the last two
        # alternate.
        first, L1 = layer.mlp.first.weight, len(self.degrees)
        pairs = first[:, 2 * C :].unflatten(1, (2, L1, C)).transpose(1, 2).flatten(1)
        self.first = torch.cat([first[:, : 2 * C], pairs], dim=1)  # (H, 2C + (L + 1) 2C)
        self.second, self.third = layer.mlp.second.weight, layer.mlp.third.weight
        self.readout = layer.readout.weight  # (1, C)
        self.send = [cast(Tensor, linear.weight) for linear in send]  # (S, C), (S', 2C), ...

    def folded(self, sent: Tensor) -> LayerGradient:
        """The same for neighbours that send one of few things (Z, S), and say which: (n, K, Z)."""
        other = copy.copy(self)
        paths = self.weight.unflatten(1, (self.num_basis, -1))  # (LM, B, S, 2C)
        other.weight = torch.einsum("pbsc,zs->pbzc", paths, sent).flatten(1, 2)
        return other

    def __call__(
        self, basis: Tensor, near: Tensor, scalars: Tensor, gate: Tensor, hidden_gate: Tensor
    ) -> Result:
        """Basis (n, LM B, K), what neighbours sent (n, K, S), scalars (n, C), gates by element."""
        n, C = scalars.shape
        A, pull_density = self.density(basis, near)  # (LM, n, 2C)
        norm = torch.rsqrt(1 + A.square().mean(dim=(0, 2)))  # (n,)
        factor = norm[:, None] * gate
        both = A * factor  # U and what it is multiplied with on the sphere
        first = both[0].clone()
        values = (self.to_grid @ both.flatten(1)).view(-1, n, 2, C)
        u, v = values.unbind(2)  # (P, n, C)
        steerable = both.view(-1, n, 2, C)
        U, P = steerable[:, :, 0], steerable[:, :, 1]
        P.copy_((self.from_grid @ (u * v).flatten(1)).view_as(P))  # in the place of the latter
        pairs = self.degrees @ (steerable * U[:, :, None]).flatten(1)  # (L + 1, n 2C)
        q = torch.cat([first, pairs.view(-1, n, 2 * C).transpose(0, 1).flatten(1)], dim=1)
        q_norm = torch.rsqrt(1 + q.square().mean(1, keepdim=True))  # (n, 1)
        a = (q * q_norm) @ self.first.mT
        b = (functional.silu(a) * hidden_gate) @ self.second.mT
        update = functional.silu(b) @ self.third.mT  # (n, C)
        scalars = scalars + update
        energy = (update @ self.readout.mT)[:, 0]
        sent = self.sent(scalars, steerable.flatten(2))

        def pull(by_scalars: Tensor | None, by_sent: Tensor | None) -> tuple[Tensor | None, Sums]:
            by_steerable: list[Tensor] = []
            if by_sent is not None:
                by_state, by_steerable = self.pull_sent(by_sent)
                by_scalars = by_state if by_scalars is None else by_scalars + by_state
            by_update = self.readout if by_scalars is None else by_scalars + self.readout
            by_b = silu_backward(by_update @ self.third, b)
            by_a = silu_backward((by_b @ self.second) * hidden_gate, a)
            by_q = self.softened(by_a @ self.first, q, q_norm, (1,))
            by_pairs = by_q[:, 2 * C :].reshape(n, -1, 2 * C).transpose(0, 1).flatten(1)
            R = (self.degrees.mT @ by_pairs).view_as(steerable)
            by_U = (R * steerable).sum(2)  # (LM, n, C)
            by_both = R * U[:, :, None]  # (LM, n, 2, C), by U and P themselves
            for l, x in enumerate(by_steerable, start=1):
                by_both[l * l : (l + 1) ** 2] += x.view(-1, n, 2, C)
            by_U += by_both[:, :, 0]
            by_values = self.from_grid.mT @ by_both[:, :, 1].flatten(1)  # (P, n C)
            by_values = by_values.view_as(u)
            by_vu = (self.to_grid.mT @ (by_values[:, :, None] * values).flatten(1)).view_as(R)
            by_A = torch.cat([by_vu[:, :, 1] + by_U, by_vu[:, :, 0]], dim=-1)
            by_A[0] += by_q[:, : 2 * C]
            by_A *= factor  # norm gate, where norm depends on A
            inner = (A * by_A).sum(dim=(0, 2)) * norm.square() / (A.shape[0] * 2 * C)
            by_A.addcmul_(A, inner[:, None], value=-1)
            return by_scalars, pull_density(by_A)

        return Result(scalars, energy, sent, pull)

    @staticmethod
    def softened(above: Tensor, x: Tensor, norm: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Pullback of x norm, norm = (1 + mean x^2)^-1/2."""
        mean = (x * above).mean(dims, keepdim=True)
        return (above - x * (mean * norm.square())) * norm

    def density(self, basis: Tensor, near: Tensor) -> tuple[Tensor, Callable[[Tensor], Sums]]:
        """A (LM, n, 2C), and what takes dE/dA to dE/d of the sums over neighbours."""
        LM, B = self.weight.shape[0], self.num_basis
        S = self.weight.shape[1] // B
        n = near.shape[0]
        T = summed(basis, near[..., :S]).view(n, LM, B * S)
        A = torch.bmm(T.transpose(0, 1), self.weight)
        if self.couplings:
            others = summed(basis[:, : self.rows * B], near[..., S:])  # (n, lm B, m' S)
            parts = others.split([m * s for *_, (m, s) in self.couplings], dim=-1)
            for part, (matrix, weight, component, (m, s)) in zip(
                parts, self.couplings, strict=True
            ):
                part = part.reshape(n, self.rows, B, m, s).permute(1, 3, 0, 2, 4)
                coupled = (matrix @ part.reshape(self.rows * m, -1)).view(-1, n, B * s)
                A = A.index_add(0, component, torch.bmm(coupled, weight))

        def pull(by_A: Tensor) -> Sums:
            by_T = torch.bmm(by_A, self.weight.mT).view(LM, n, B, S).transpose(0, 1)
            by_scalars = by_T.reshape(n, LM * B, S)
            if not self.couplings:
                return [by_scalars]
            found = []
            for matrix, weight, component, (m, s) in self.couplings:
                by_coupled = torch.bmm(by_A.index_select(0, component), weight.mT)
                part = (matrix.mT @ by_coupled.flatten(1)).view(self.rows, m, n, B, s)
                found.append(part.permute(2, 0, 3, 1, 4).reshape(n, self.rows * B, m * s))
            return [by_scalars, torch.cat(found, dim=-1)]

        return A, pull

    def sent(self, scalars: Tensor, steerable: Tensor) -> Tensor:
        """(n, S): of degree 0 from the scalars, of others from U and P (LM, n, 2C)."""
        if not self.send:
            return scalars[:, :0]
        found = [scalars @ self.send[0].mT]
        for l, weight in enumerate(self.send[1:], start=1):
            g = steerable[l * l : (l + 1) ** 2] @ weight.mT  # (2l + 1, n, S)
            found.append(g.transpose(0, 1).flatten(1))
        return torch.cat(found, dim=1)

    def pull_sent(self, above: Tensor) -> tuple[Tensor, list[Tensor]]:
        """dE/d scalars (n, C), and of U and P of each degree from 1 on: (2l + 1, n, 2C)."""
        widths = [(2 * l + 1) * len(weight) for l, weight in enumerate(self.send)]
        of_scalars, *others = above.split(widths, dim=1)
        found = []
        for l, (x, weight) in enumerate(zip(others, self.send[1:], strict=True), start=1):
            x = x.reshape(x.shape[0], 2 * l + 1, -1).transpose(0, 1)
            found.append(x @ weight)
        return of_scalars @ self.send[0], found
