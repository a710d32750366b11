"""RotationAveraging: the mean of a model over rotated copies of its input.

    E_i(x) = sum_k w_k E_i(R_k x),        F_i(x) = sum_k w_k R_k^T F_i(R_k x)  of direct forces

over a group or a quadrature {R_k, w_k}.  Over a group G the mean is exactly invariant under G, for
any model: E(g x) = E(x) for g in G, because {R_k g} = {R_k}.  A crystal whose own rotations are in
G then has exactly the degeneracies, forces and stresses that they ask for.  Over all other
rotations the error falls to the part of degree l > L, beyond the rule's exactness
(``mlip.nn.rotations``).

The copies are one batch, and their vectors are linear functions R_k v of the same vectors: one
gradient gives forces that are exactly those of the mean energy.  Cost: K times the model.  Beyond
``max_edges`` edges the copies are taken in parts that are computed again on the way back, which
bounds the memory and costs a third more time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.constant import Constant
from mlip.nn.irreps import rotate_irreps
from mlip.nn.rotations import Rotations, rotations


class RotationAveragingConfig(Config):
    """Over what is averaged."""

    rotations: str = Field("octahedral", description="a rule of mlip.nn.rotations")
    mirrors: bool = Field(False, description="average over reflections, too")
    max_edges: int = Field(200_000, ge=1, description="of copies that are held in memory at a time")


class RotationAveraging(nn.Module):
    """The wrapper; itself an energy model.

    Parameters
    ----------
    model : the energy model
    options : a ``RotationAveragingConfig``, or the name of a rule such as "icosahedral", or
        "icosahedral+mirrors"
    """

    def __init__(self, model: Any, options: RotationAveragingConfig | str = "octahedral") -> None:
        super().__init__()
        if isinstance(options, str):
            name, plus, more = options.partition("+")
            if plus and more != "mirrors":
                raise ValueError(f"rotations '{options}': after the + there can be only 'mirrors'")
            options = RotationAveragingConfig(rotations=name, mirrors=bool(plus))
        if not isinstance(options, RotationAveragingConfig):
            raise TypeError(
                f"rotations have names, such as 'octahedral' for 24 or 'icosahedral' for 60; "
                f"{options!r} is none"
            )
        self.model = model
        self.options = options
        self.matrices = Constant(self.rotations.matrices)
        self.weights = Constant(self.rotations.weights)
        for parameter in self.model.parameters():  # be where the model is
            self.to(device=parameter.device, dtype=parameter.dtype)
            break

    @property
    def rotations(self) -> Rotations:
        """The rule."""
        return rotations(self.options.rotations, self.options.mirrors)

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    @property
    def receptive_field(self) -> float:
        """Angstrom; that of the model."""
        return float(self.model.receptive_field)

    @property
    def exact_symmetry(self) -> bool:
        """Whether it is exact under all rotations: only if the model is."""
        return bool(self.model.exact_symmetry)

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """What the model reads besides the geometry."""
        return tuple(getattr(self.model, "graph_inputs", ()))

    @property
    def latent_irreps(self) -> Sequence[int]:
        """Channels of each degree in the features, if the model's have directions."""
        irreps: Sequence[int] = self.model.latent_irreps
        return irreps

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        R, w = self.matrices(), self.weights()
        irreps = getattr(self.model, "latent_irreps", None)
        return average(self.model, graph, R, w, self.options.max_edges, irreps)


def average(
    model: Any,
    graph: AtomicGraph,
    R: Tensor,
    w: Tensor,
    max_edges: int,
    irreps: Sequence[int] | None = None,
) -> NodeOutput:
    """Mean of a model over the copies of a graph under ``R`` (K, 3, 3), weights ``w`` (K,).

    Copies of more than ``max_edges`` edges in all are taken in parts.  Forces of the copies are
    turned back before, and so are features, where ``irreps`` says what they are.
    """
    step = max(1, max_edges // max(1, graph.edge_index.shape[1]))
    if step >= len(R):
        return _part(model, graph.vectors, R, w, graph, irreps)
    total = None
    for first in range(0, len(R), step):
        part = checkpoint(
            _part,
            model,
            graph.vectors,
            R[first : first + step],
            w[first : first + step],
            graph,
            irreps,
            use_reentrant=False,
        )
        total = part if total is None else _sum(total, part)
    assert total is not None
    return total


def _part(
    model: Any,
    vectors: Tensor,
    R: Tensor,
    w: Tensor,
    graph: AtomicGraph,
    irreps: Sequence[int] | None,
) -> NodeOutput:
    """Weighted sums over some of the copies: energy, features, forces."""
    out = model(graph.replace(vectors=vectors).rotated_copies(R))
    N, K = len(graph.atomic_numbers), len(R)
    forces = None
    if out.forces is not None:
        back = (out.forces.view(K, N, 3) @ R.to(out.forces.dtype)).view(K * N, 3)
        forces = _weighted(back, w, N)
    features = out.features
    if features is not None:
        if irreps is not None:
            features = rotate_irreps(features, irreps, R.mT.repeat_interleave(N, dim=0))
        features = _weighted(features, w, N)
    return NodeOutput(_weighted(out.energy, w, N), features, forces)


def _sum(a: NodeOutput, b: NodeOutput) -> NodeOutput:
    def add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else x + y

    return NodeOutput(a.energy + b.energy, add(a.features, b.features), add(a.forces, b.forces))


def _weighted(x: Tensor, w: Tensor, N: int) -> Tensor:
    return torch.tensordot(w.to(x.dtype), x.view(len(w), N, *x.shape[1:]), dims=1)
