"""A model as one compiled program of energies and gradient, for structures of any size.

Energy and dE/dv are traced together (the compiler cannot differentiate twice), with the number of
atoms and of slots as symbols, so that it is compiled once and never again when neighbours come and
go.  Edges are laid out before: empty slots of the padded neighbourhoods lie at the cutoff, where
they contribute exactly zero.  The compiler merges operations element by element and leaves out
what Python and the gradient's bookkeeping cost: most for small structures.

What the program does not give, gradients of some atoms' energies and second derivatives, comes from
the model itself.

The same program can be compiled ahead of time, into a file: ``mlip.programfile``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.neighborhoods import gather_neighborhoods, pole, reversed_slots

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# (Z, v, neighbors) -> energies (N,), features (N, C), gradient (N, K, 3); neighbors are (N, K), or
# (2, N, K) with the slots of the reversed edges in the rows of the neighbours
Program = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Laid(NamedTuple):
    """A graph for models that read vectors (N, K, 3) and neighbours (N, K) as they are, and those
    that read reversed edges with their slots: (2, N, K)."""

    atomic_numbers: Tensor
    vectors: Tensor
    edge_index: Tensor


class SameModel(nn.Module):
    """Energy model that computes what another one does, in another way.

    Parameters
    ----------
    model : its weights are shared, not trained
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

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
        """That of the model."""
        return bool(self.model.exact_symmetry)

    @property
    def exact_groups(self) -> tuple[str, ...]:
        """Those of the model."""
        return tuple(getattr(self.model, "exact_groups", ()))

    @property
    def latent_irreps(self) -> tuple[int, ...] | None:
        """Those of the model's features, if it has any."""
        irreps = getattr(self.model, "latent_irreps", None)
        return None if irreps is None else tuple(irreps)

    @property
    def plain(self) -> Any:
        """The model that is computed in another way."""
        model = self.model
        return model.plain if isinstance(model, SameModel) else model

    def with_gradient(self, graph: AtomicGraph) -> tuple[NodeOutput, Tensor]:
        """Energies and features of the atoms, and dE/dv (E, 3) of the sum of the energies."""
        raise NotImplementedError

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        with torch.no_grad():
            node, g = self.with_gradient(graph.replace(vectors=graph.vectors.detach()))

        def again(v: Tensor) -> Tensor:
            energy: Tensor = self.plain(graph.replace(vectors=v)).energy
            return energy

        return NodeOutput(KnownGradient.apply(graph.vectors, node.energy, g, again), node.features)

    def forget(self) -> None:
        """Called when tensors of the model have changed: what was made of them is no longer it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._held()
        super()._apply(fn, recurse)
        if self._held() != before:
            self.forget()
        return self

    def _held(self) -> list[tuple[int, torch.dtype]]:
        """Where the tensors of the model are, and what."""
        tensors = [*self.parameters(), *self.buffers()]
        return [(x.data_ptr(), x.dtype) for x in tensors]


class Compiled(SameModel):
    """Energy model that computes what another one does, compiled at its first call.

    Parameters
    ----------
    model : an energy model that lays out edges with ``gather_neighborhoods`` and reads nothing but
        elements and vectors; its weights are shared, not trained
    ready : function of the model that gives its program, where it has been compiled before
    """

    def __init__(self, model: Any, ready: Callable[[Any], Program] | None = None) -> None:
        super().__init__(model)
        self.ready = ready
        self._program: Program | None = None

    def with_gradient(self, graph: AtomicGraph) -> tuple[NodeOutput, Tensor]:
        N = len(graph.atomic_numbers)
        Z, v, neighbors, edges = padded(graph, self.model)
        if self._program is None:
            self._program = (self.ready or compiled)(self.model)
        with torch.no_grad():
            energy, features, g = self._program(Z, v, neighbors)
            of_edges = edges_of_slots(g[:N, :-1].reshape(-1, 3), edges, len(graph.vectors))
        return NodeOutput(energy[:N], features[:N]), of_edges

    def forget(self) -> None:
        self._program = None  # it holds the weights as they were

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_program": None}


class CompiledTraining(nn.Module):
    """Energy model for steps of training: energies, features and their gradient by the vectors are
    results of one compiled program, which is compiled together with its derivative by the weights.

    Energies are correct, and so is the gradient of their sum over all atoms by the vectors, which
    may be differentiated by the weights; that of some atoms' energies is not.

    Parameters
    ----------
    model : as of ``Compiled``; its weights are shared
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._program: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        N = len(graph.atomic_numbers)
        Z, v, neighbors, _ = padded(graph, self.model)
        if self._program is None:
            self._program = torch.compile(traced_for_training(self.model), dynamic=True)
        weights = list(self.model.parameters())
        energy, features, g = self._program(weights, Z, v.detach(), neighbors)
        # Nothing is added to the value; the derivative by v is g, that of g nothing.
        energy = energy + ((v - v.detach()) * g).sum(dim=(1, 2))
        return NodeOutput(energy[:N], features[:N])


class KnownGradient(torch.autograd.Function):
    """Energies (N,) whose gradient g by the vectors v is known already, if it is asked for with
    equal weights; otherwise, and where it is differentiated again, it is that of ``again(v)``, the
    energies once more."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, energy: Tensor, g: Tensor, again: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(v, g)
        return energy.view_as(energy)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        v, g = ctx.saved_tensors
        if not torch.is_grad_enabled() and bool((above == above[0]).all()):
            return above[0] * g, None, None, None
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(ctx.again(v), v, above, create_graph=True)
        return gradient, None, None, None


def compiled(model: Any) -> Program:
    """The program of a model, from torch's compiler."""
    trace, _ = traced(model)
    with torch.no_grad():
        fast: Program = torch.compile(trace, dynamic=True, fullgraph=True)
    return fast


def uncompiled(model: Any) -> Program:
    """The program of a model as its operations one after another."""
    trace, _ = traced(model)
    program: Program = trace
    return program


class Padded(NamedTuple):
    """What a program reads, and which edges are in its slots."""

    atomic_numbers: Tensor  # (N + 1,)
    vectors: Tensor  # (N + 1, K + 1, 3)
    neighbors: Tensor  # ([2,] N + 1, K + 1)
    edges: Tensor  # (N K,) in the slots of the atoms that are there; E where empty


def padded(graph: AtomicGraph, model: Any) -> Padded:
    """The neighbourhoods that a model reads.

    One slot and one atom more than there are: sizes 0 and 1 would be compiled anew.
    """
    N, cutoff = len(graph.atomic_numbers), model.config.cutoff
    if hasattr(model, "require_weights"):  # which a program cannot ask for
        model.require_weights(graph.atomic_numbers)
    hood = gather_neighborhoods(graph.vectors, graph.edge_index, N, cutoff)
    empty = pole(hood.vectors, cutoff)
    K = hood.vectors.shape[1]
    v = torch.cat([hood.vectors, empty.expand(N, 1, 3)], dim=1)
    v = torch.cat([v, empty.expand(1, K + 1, 3)])
    neighbors = hood.neighbors.view(N, K)
    if reads_reversed(model):
        neighbors = torch.stack([neighbors, reversed_slots(graph, K)])
    assert hood.edges is not None
    return Padded(
        nn.functional.pad(graph.atomic_numbers, (0, 1)),
        v,
        nn.functional.pad(neighbors, (0, 1, 0, 1)),
        hood.edges,
    )


def edges_of_slots(x: Tensor, edges: Tensor, number: int) -> Tensor:
    """Rows of slots (s, 3) as rows of the ``number`` edges in them; ``edges`` (s,), of empty slots
    ``number``."""
    return x.new_empty(number + 1, 3).index_copy_(0, edges, x)[:number]


def reads_reversed(model: Any) -> bool:
    """Whether a model reads the edge j <- i with i <- j."""
    return bool(getattr(model, "reads_reversed", False))


def exported(model: Any) -> ExportedProgram:
    """The same for compilation ahead of time."""
    from torch.export import Dim, export

    trace, example = traced(model)
    N, K = Dim("atoms", min=2), Dim("slots", min=2)
    first = example[2].dim() - 2
    with torch.no_grad():
        return export(
            trace,
            example,
            dynamic_shapes=({0: N}, {0: N, 1: K}, {first: N, first + 1: K}),
            # True for all sizes, which the exporter does not see of every order of strides.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def traced(model: Any) -> tuple[torch.fx.GraphModule, tuple[Tensor, Tensor, Tensor]]:
    """The operations of a model's program, for any number of atoms and slots, with an example of
    the inputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def program(Z: Tensor, v: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            out = model(Laid(Z, v, neighbors))
            (g,) = torch.autograd.grad(out.energy.sum(), v)
        return out.energy.detach(), out.features.detach(), g.detach()

    given = model.program() if hasattr(model, "program") else program
    trace = make_fx(given, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    with torch.no_grad():
        return folded(trace(*example(model))), example(model)


def folded(trace: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A trace in which what depends on weights alone is computed, once."""
    known: dict[torch.fx.Node, Tensor] = {}
    for node in trace.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            known[node] = getattr(trace, node.target)
        elif inputs and all(x in known for x in inputs) and not node.target._schema.is_mutable:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            if isinstance(value := node.target(*args, **kwargs), Tensor):
                known[node] = value
    for number, (node, value) in enumerate(known.items()):
        if node.op != "get_attr" and not all(user in known for user in node.users):
            trace.register_buffer(f"known{number}", value.contiguous())
            with trace.graph.inserting_before(node):
                node.replace_all_uses_with(trace.graph.get_attr(f"known{number}"))
    trace.graph.eliminate_dead_code()
    trace.recompile()
    return trace


def traced_for_training(model: Any) -> torch.fx.GraphModule:
    """The same with a list of the weights as first input, all differentiable once more."""
    from torch._decomp import get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    names = [name for name, _ in model.named_parameters()]

    def program(
        weights: list[Tensor], Z: Tensor, v: Tensor, neighbors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            by_name = dict(zip(names, weights, strict=True))
            out = torch.func.functional_call(model, by_name, (Laid(Z, v, neighbors),))
            (g,) = torch.autograd.grad(out.energy.sum(), v, create_graph=True)
        return out.energy, out.features, g

    aten = torch.ops.aten
    # Derivatives that have none themselves, as products and sums.
    simpler: Any = get_decompositions(
        [aten.silu_backward, aten.gelu_backward, aten._softmax_backward_data,
         aten.native_layer_norm, aten.native_layer_norm_backward,
         aten._fused_rms_norm, aten._fused_rms_norm_backward,  # of a GPU
         aten.slice_backward, aten.select_backward]
    )  # fmt: skip
    weights = [p.detach().requires_grad_() for p in model.parameters()]
    trace = make_fx(
        program, tracing_mode="symbolic", decomposition_table=simpler, _allow_non_fake_inputs=True
    )
    graph_module: torch.fx.GraphModule = trace(weights, *example(model))
    # Results that an operation keeps for its derivative are recorded as constants, which they are
    # not.
    for node in graph_module.graph.nodes:
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module


def example(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a program, with sizes that differ from all others: equal ones would be taken for
    the same."""
    N, K = 97, 89
    v = next(model.parameters()).new_tensor([0.0, 0.0, model.config.cutoff])
    shape = (2, N, K) if reads_reversed(model) else (N, K)
    neighbors = torch.zeros(shape, dtype=torch.int64, device=v.device)
    Z = torch.ones(N, dtype=torch.int64, device=v.device)
    return Z, v.expand(N, K, 3).contiguous(), neighbors
