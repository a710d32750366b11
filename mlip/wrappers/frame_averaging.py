"""FrameAveraging: a model without symmetry sees atoms in axes of their own, and is invariant.

    E(x) = sum_k w_k(x) E( R_k(x) x ) / sum_k w_k(x),      R_k(g x) = R_k(x) g^-1

``kind`` is where the frames R_k come from:

    local        weighted frames of pairs of neighbours, each atom its own; smooth, for molecules
                 and crystals, exact under all rotations (``mlip.wrappers.local_frames``)
    stochastic   in training one of these, drawn for each atom at each step by its weight; in
                 evaluation the mean over all
    pca          the principal axes of a molecule (``mlip.wrappers.principal_axes``); jumps
    group24, group60   the 24 rotations of the octahedron, the 60 of the icosahedron, the same for
                 all structures: smooth, exact only under the group itself

Local frames give each atom neighbours that are seen in its own axes.  A model whose atoms see only
their own edges (receptive field = cutoff) is evaluated for each view, and energies are averaged.  A
model that passes messages has to take them between views: before neighbours read the states of an
atom, these are averaged over its views (``forward(graph, share=...)``).  They are then invariant
numbers, and so all layers are, at the price that what passes between atoms has no direction.

Forces are the gradient of the mean, through frames and weights.  Cost: the number of views, or of
rotations, times the model.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.constant import Constant
from mlip.nn.rotations import rotations
from mlip.wrappers.local_frames import Views, local_views
from mlip.wrappers.principal_axes import NEAR, principal_axes, signs
from mlip.wrappers.rotation_averaging import average

GROUPS = {"group24": "octahedral", "group60": "icosahedral"}
NO_FORCES = (
    "local frames average energies, and their gradient is the force; take direct_forces: false, or "
    "kind: group24 or group60"
)


class FrameAveragingConfig(Config):
    """Which frames."""

    kind: Literal["local", "stochastic", "pca", "group24", "group60"] = Field(
        "local", description="where the frames come from; see mlip.wrappers.frame_averaging"
    )
    mirrors: bool = Field(True, description="mirror images, too: O(3) instead of SO(3)")
    width: float = Field(
        1.0,
        gt=0,
        le=10,
        description="local: angstrom beyond the nearest neighbours, over which others lose their "
        "part in the frames; wider: smoother and dearer",
    )
    fallback: float = Field(
        0.1, gt=0, le=10, description="local: weight of what is seen without a frame"
    )
    allow_nonsmooth: bool = Field(
        False, description="pca: accept that energies jump where two axes are equally long"
    )
    max_edges: int = Field(200_000, ge=1, description="of views that are held in memory at a time")

    @model_validator(mode="after")
    def _warned(self) -> FrameAveragingConfig:
        if self.kind == "pca" and not self.allow_nonsmooth:
            raise ValueError(
                "with kind: pca the energy jumps where two principal axes are equally long (a "
                "symmetric top, a cube); take kind: local, or say allow_nonsmooth: true"
            )
        return self


class FrameAveraging(nn.Module):
    """The wrapper; itself an energy model.

    Parameters
    ----------
    model : the energy model
    options : a ``FrameAveragingConfig``, or a kind

    Raises
    ------
    ValueError
        If the model cannot be seen in frames of this kind.
    """

    def __init__(self, model: Any, options: FrameAveragingConfig | str = "local") -> None:
        super().__init__()
        if isinstance(options, str):
            options = FrameAveragingConfig.model_validate({"kind": options})
        self.model = model
        self.options = options
        self.shares = False
        if options.kind in GROUPS:
            rule = rotations(GROUPS[options.kind], options.mirrors)
            self.matrices, self.weights = Constant(rule.matrices), Constant(rule.weights)
        elif options.kind == "pca":
            R = signs(options.mirrors)
            self.matrices = Constant(R)
            self.weights = Constant(torch.full((len(R),), 1 / len(R), dtype=torch.float64))
        elif model.receptive_field > model.config.cutoff:
            self.shares = "share" in inspect.signature(model.forward).parameters
            if not self.shares:
                raise ValueError(
                    f"{type(model).__name__} passes messages between atoms and offers no "
                    "forward(graph, share=...) to average them over local frames; take kind: "
                    "group24 or group60, or for molecules pca"
                )
        if options.kind in ("local", "stochastic") and getattr(
            model.config, "direct_forces", False
        ):
            raise ValueError(NO_FORCES)
        if options.kind not in GROUPS and getattr(model.config, "field", None) is not None:
            raise ValueError(
                f"kind: {options.kind} turns the structure and not the field in it; take kind: "
                "group24 or group60"
            )
        for parameter in self.model.parameters():  # be where the model is
            self.to(device=parameter.device, dtype=parameter.dtype)
            break
        self.train(getattr(model, "training", True))

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    @property
    def receptive_field(self) -> float:
        """Angstrom; of principal axes infinite, for every atom turns them."""
        return math.inf if self.options.kind == "pca" else float(self.model.receptive_field)

    @property
    def exact_symmetry(self) -> bool:
        """Whether all rotations and reflections are exact."""
        if self.options.kind in GROUPS:
            return bool(self.model.exact_symmetry)
        return self.options.mirrors or bool(self.model.exact_symmetry)

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """What the model reads besides the geometry."""
        return tuple(getattr(self.model, "graph_inputs", ()))

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        kind, most = self.options.kind, self.options.max_edges
        if kind in GROUPS:
            return average(self.model, graph, self.matrices(), self.weights(), most)
        if kind == "pca":
            return self._principal(graph)
        N = len(graph.atomic_numbers)
        views = self.views(graph)
        if kind == "stochastic" and self.training:
            views = views.drawn(N)
            # One view of each atom: the graph is as before, its vectors are seen from the centres.
            return _without_forces(self.model(graph.replace(vectors=views.vectors)))
        if self.shares:
            seen = seen_by_all(graph, views)

            def share(x: Tensor, nodes: Tensor) -> Tensor:
                return views.mean(x, N, nodes).index_select(0, views.atom[nodes])

            return _mean(views, _without_forces(self.model(seen, share=share)), N)
        return _mean(views, self._each(graph, views), N)

    def views(self, graph: AtomicGraph) -> Views:
        """The local views of all atoms of a graph with ``vectors``."""
        o = self.options
        return local_views(
            graph.vectors,
            graph.edge_index,
            len(graph.atomic_numbers),
            float(self.model.config.cutoff),
            width=o.width,
            fallback=o.fallback,
            mirrors=o.mirrors,
        )

    def _each(self, graph: AtomicGraph, views: Views) -> NodeOutput:
        """Evaluate all views, in parts of at most ``max_edges`` edges."""
        most = self.options.max_edges
        ends = torch.bincount(views.view, minlength=len(views.atom)).cumsum(0)
        parts: list[NodeOutput] = []
        view = edge = 0
        while view < len(views.atom):
            stop = int(torch.searchsorted(ends, edge + most, right=True))
            stop = max(stop, view + 1)
            last = int(ends[stop - 1])
            part = (views.vectors[edge:last], graph, views, (view, stop, edge, last))
            if stop - view == len(views.atom):
                return self._part(*part)
            parts.append(checkpoint(self._part, *part, use_reentrant=False))
            view, edge = stop, last
        energy, features, _ = zip(*parts, strict=True)
        whole = None if features[0] is None else torch.cat(features)
        return NodeOutput(torch.cat(energy), whole)

    def _part(
        self, vectors: Tensor, graph: AtomicGraph, views: Views, part: tuple[int, int, int, int]
    ) -> NodeOutput:
        view, stop = part[:2]
        seen = seen_alone(graph, views._replace(vectors=vectors), part)
        out = _without_forces(self.model(seen))
        n = stop - view
        return NodeOutput(out.energy[:n], None if out.features is None else out.features[:n])

    def _principal(self, graph: AtomicGraph) -> NodeOutput:
        if graph.pbc.any():
            raise ValueError(
                "principal axes of a periodic structure: in cubic crystals there are none, and "
                "distant atoms would turn the frame of all others; take kind: local"
            )
        owner = graph.batch.index_select(0, graph.edge_index[1])
        V, gap = principal_axes(
            graph.vectors, owner, graph.num_structures, float(self.model.config.cutoff)
        )
        if (near := int((gap < NEAR).sum())) > 0:
            warnings.warn(
                f"{near} of {len(gap)} structures have two principal axes of nearly the same "
                f"extent (gap below {NEAR:g} of the sum), where energies jump and forces are "
                "large; with kind: local they do not",
                stacklevel=2,
            )
        of_atom = V.index_select(0, graph.batch)
        positions = (graph.positions[:, None, :] @ of_atom.to(graph.positions.dtype))[:, 0]
        vectors = (graph.vectors[:, None, :] @ V.index_select(0, owner))[:, 0]
        framed = graph.replace(
            vectors=vectors, positions=positions.detach(), cell=torch.zeros_like(graph.cell)
        )
        R, w = self.matrices(), self.weights()
        out = average(self.model, framed, R, w, self.options.max_edges)
        if out.forces is None:
            return out
        return out._replace(forces=(of_atom.to(out.forces.dtype) @ out.forces[:, :, None])[..., 0])


def seen_by_all(graph: AtomicGraph, views: Views) -> AtomicGraph:
    """One node for each view, whose neighbours are the first views of the neighbours."""
    neighbor = graph.edge_index[0].index_select(0, views.edge)
    return _nodes(graph, views.atom).replace(
        edge_index=torch.stack([neighbor, views.view]),
        cell_shifts=graph.cell_shifts.index_select(0, views.edge),
        vectors=views.vectors,
        view_of=views.atom,
    )


def seen_alone(graph: AtomicGraph, views: Views, part: tuple[int, int, int, int]) -> AtomicGraph:
    """Some of the views, with one node of each element to be all neighbours of that element."""
    view, stop, edge, last = part
    rows = slice(edge, last)
    elements, first = _first_of_each(graph.atomic_numbers)
    Z = graph.atomic_numbers.index_select(0, graph.edge_index[0].index_select(0, views.edge[rows]))
    neighbor = torch.searchsorted(elements, Z) + (stop - view)
    return _nodes(graph, torch.cat([views.atom[view:stop], first])).replace(
        edge_index=torch.stack([neighbor, views.view[rows] - view]),
        cell_shifts=graph.cell_shifts.index_select(0, views.edge[rows]),
        vectors=views.vectors,
    )


def _first_of_each(Z: Tensor) -> tuple[Tensor, Tensor]:
    elements, place = torch.unique(Z, return_inverse=True)
    number = torch.arange(len(Z), device=Z.device)
    first = number.new_full((len(elements),), len(Z)).scatter_reduce(0, place, number, "amin")
    return elements, first


def _nodes(graph: AtomicGraph, atom: Tensor) -> AtomicGraph:
    """The graph with other nodes, copies of these atoms; without labels, edges as they were."""
    new = {
        key: graph[key].index_select(0, atom) for key in ("atomic_numbers", "positions", "batch")
    }
    dropped = {"energy", "forces", "stress", "ptr"}
    kept = {key: graph[key] for key in graph.keys() if key not in {*new, *dropped}}
    return AtomicGraph(**{**kept, **new, "num_nodes": len(atom)})


def _without_forces(out: NodeOutput) -> NodeOutput:
    if out.forces is not None:
        raise ValueError(NO_FORCES)
    return out


def _mean(views: Views, out: NodeOutput, N: int) -> NodeOutput:
    features = None if out.features is None else views.mean(out.features, N)
    return NodeOutput(views.mean(out.energy, N), features)
