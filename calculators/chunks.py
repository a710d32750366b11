"""Systems that would not fit into memory are evaluated in pieces, with the same result.

The energy of an atom depends on the edges whose centres are fewer than n hops away from it, n the
receptive field in units of the cutoff.  So for groups D of atoms that together are all,

    E = sum_D E_D,    E_D = sum_{i in D} E_i,         dE/dv_e = sum_D dE_D/dv_e,

and each term needs only the graph of these edges.  Atoms n hops away are nothing but neighbours of
others, known by their element: one of each element stands for all of them.  Pieces are made of
atoms, not of images, so a periodic cell may be smaller than the halo: then each piece needs
everything, and nothing is gained.

Memory is predicted, not tried: it is proportional to the number of slots, atoms times the largest
number of neighbours, and what a slot takes is counted once on a small piece of the system; edges of
the whole are always there.

That the receptive field of a model is what it says is not believed: before the first pieces are
used, a row of atoms is evaluated both ways, and compared as accelerations are.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mlip.backends import PATIENCE, BackendError, check, eventually
from mlip.calculators.memory import LiveBytes, available_memory
from mlip.compiled import SameModel
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.buckets import bucket_by_degree
from mlip.nn.neighborhoods import most_neighbors
from mlip.potential import Potential

SAMPLE = 4000  # slots of the piece on which memory is counted
SMALL = 20_000  # slots that fit anywhere; asked about only if there is a limit
SHARE = 0.7  # of the free memory that may be used
EDGE = 700  # bytes for each edge of the whole: lists of neighbours, vectors, gradient, stress
SPACING = 1.8  # angstrom, of the row of atoms on which pieces are checked
MARGIN = 1.25  # buffers inside of operations, and what the allocator loses between blocks


class Piece(NamedTuple):
    """A group of atoms with all that their energies depend on."""

    graph: AtomicGraph
    own: Tensor  # (n,) the group's places in ``graph``
    atoms: Tensor  # (n,) the same atoms in the whole
    edges: Tensor  # (E,) edges of ``graph`` in the whole

    @property
    def slots(self) -> int:
        return slots(self.graph)


def slots(graph: AtomicGraph) -> int:
    """Atoms times the largest number of neighbours, the atom itself included."""
    N = len(graph.atomic_numbers)
    return N * (most_neighbors(graph.edge_index, N) + 1)


def laid_out(graph: AtomicGraph, model: nn.Module) -> int:
    """Slots that a model makes of a graph: fewer if it cuts atoms of few neighbours into buckets of
    their own."""
    if not any(getattr(module, "bucketed", False) for module in model.modules()):
        return slots(graph)
    buckets = bucket_by_degree(graph.edge_index[1], len(graph.atomic_numbers))
    return sum(bucket.edges.numel() for bucket in buckets.parts)


def piece(graph: AtomicGraph, atoms: Tensor, hops: int) -> Piece:
    """The part of a graph on which the energies of ``atoms`` (n,) depend."""
    j, i = graph.edge_index
    N, device = len(graph.atomic_numbers), j.device
    inner = torch.zeros(N, dtype=torch.bool, device=device)
    inner[atoms] = True
    for _ in range(hops - 1):
        inner[j[inner[i]]] = True
    edges = inner[i].nonzero()[:, 0]
    seen = torch.zeros(N, dtype=torch.bool, device=device)
    seen[j[edges]] = True
    outer = (seen & ~inner).nonzero()[:, 0]
    # One atom of each element and structure stands for all outer ones.
    kind = graph.batch[outer] * 119 + graph.atomic_numbers[outer]
    kinds, number = kind.unique(return_inverse=True)
    stand_in = outer.new_zeros(len(kinds)).scatter_(0, number, outer)
    nodes = torch.cat([inner.nonzero()[:, 0], stand_in]).sort().values  # by structure, as it was
    place = torch.zeros(N, dtype=torch.int64, device=device)
    place[nodes] = torch.arange(len(nodes), device=device)
    place[outer] = place[stand_in[number]]
    batch = graph.batch[nodes]
    sizes = torch.bincount(batch, minlength=graph.num_structures)
    part = graph.replace(
        atomic_numbers=graph.atomic_numbers[nodes],
        positions=graph.positions[nodes],
        edge_index=place[graph.edge_index[:, edges]],
        cell_shifts=graph.cell_shifts[edges],
        batch=batch,
        ptr=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
    )
    part.num_nodes = len(nodes)
    return Piece(part, place[atoms], atoms, edges)


def pieces(graph: AtomicGraph, hops: int, limit: float) -> list[Piece]:
    """Pieces of at most ``limit`` slots, or not much larger than what one atom needs.

    Structures of a batch are parted, and then each halved where it is longest, until they are small
    enough.
    """
    everything = torch.arange(len(graph.atomic_numbers), device=graph.edge_index.device)
    limit = max(limit, 2 * piece(graph, everything[:1], hops).slots)
    inverse = torch.linalg.pinv(graph.cell).index_select(0, graph.batch)
    cell = graph.cell.index_select(0, graph.batch)
    turns = (graph.positions[:, None] @ inverse)[:, 0].floor() * graph.pbc[graph.batch]
    places = graph.positions - (turns[:, None] @ cell)[:, 0]  # in the cell
    done, todo = [], [everything]
    while todo:
        atoms = todo.pop()
        part = piece(graph, atoms, hops)
        if part.slots <= limit or len(atoms) == 1:
            done.append(part)
            continue
        owner = graph.batch[atoms]
        first, last = int(owner[0]), int(owner[-1])
        if first < last:
            below = owner <= (first + last) // 2
            todo += [atoms[below], atoms[~below]]
            continue
        r = places[atoms]
        axis = int((r.amax(dim=0) - r.amin(dim=0)).argmax())
        order = r[:, axis].argsort(stable=True)
        todo += [half.sort().values for half in atoms[order].tensor_split(2)]
    return done


def evaluate_piece(potential: Potential, part: Piece, vectors: Tensor) -> tuple[NodeOutput, Tensor]:
    """Atoms of a piece, and dE_D/dv of its edges (E, 3)."""
    with torch.enable_grad():
        vectors = vectors.index_select(0, part.edges).requires_grad_()
        atoms = potential.atoms(part.graph, vectors)
        (g,) = torch.autograd.grad(
            atoms.energy[part.own].sum(), vectors, materialize_grads=True, allow_unused=True
        )
    return atoms, g


def in_pieces(
    potential: Potential, graph: AtomicGraph, parts: list[Piece], stress: bool
) -> dict[str, Tensor]:
    """Output of ``potential(graph, stress=stress)``, one piece after the other."""
    vectors = graph.edge_vectors().detach()
    gradient = torch.zeros_like(vectors)
    energy = vectors.new_zeros(len(graph.atomic_numbers))
    features = None
    for part in parts:
        atoms, g = evaluate_piece(potential, part, vectors)
        gradient.index_add_(0, part.edges, g)
        energy[part.atoms] = atoms.energy.detach()[part.own]
        if atoms.features is not None:
            if features is None:
                features = atoms.features.new_zeros(len(energy), atoms.features.shape[1])
            features[part.atoms] = atoms.features.detach()[part.own]
    return potential.collect(graph, vectors, NodeOutput(energy, features), gradient, stress=stress)


class InPieces:
    """A potential that takes everything in the smallest pieces, to be checked."""

    def __init__(self, potential: Potential, hops: int) -> None:
        self.potential, self.hops = potential, hops
        self.e0, self.dtype = potential.e0, potential.dtype

    def __call__(self, graph: AtomicGraph, *, stress: bool = False) -> dict[str, Tensor]:
        return in_pieces(self.potential, graph, pieces(graph, self.hops, 0.0), stress)


def row_of_atoms(potential: Potential, hops: int, like: AtomicGraph) -> AtomicGraph:
    """A crooked row of some of the potential's elements, three times as long as what an atom sees;
    charge, spin and field as in ``like``."""
    number = math.ceil(6 * hops * potential.cutoff / SPACING)
    rng = np.random.default_rng(0)
    positions = rng.uniform(-0.3, 0.3, (number, 3))
    positions[:, 0] += SPACING * np.arange(number)
    numbers = rng.choice(potential.elements, number)
    row = AtomicGraph.from_arrays(
        numbers, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), potential.cutoff
    )
    names = getattr(potential.model, "graph_inputs", ())
    return row.replace(**{name: like[name][:1].cpu() for name in names})


class BoundedPotential:
    """A potential that takes no more than a given memory, where it can.

    Parameters
    ----------
    potential : in evaluation mode
    max_memory : float, bytes; None: what is free
    patient : after ``mlip.backends.PATIENCE`` evaluations it is made faster, if it can be
    """

    training = False

    def __init__(
        self, potential: Potential, max_memory: float | None = None, patient: bool = False
    ) -> None:
        self.potential, self.max_memory = potential, max_memory
        reach = float(getattr(potential.model, "receptive_field", math.inf))
        self.hops = math.ceil(reach / potential.cutoff - 1e-9) if math.isfinite(reach) else None
        self.bytes_per_slot: float | None = None
        self._fits = 0 if max_memory is not None else SMALL
        self._told = self._checked = False
        self._left = PATIENCE if patient else math.inf  # evaluations

    def __call__(self, graph: AtomicGraph, *, stress: bool = False) -> dict[str, Tensor]:
        """As the potential itself."""
        self._left -= 1
        if self._left < 0:
            self._left = math.inf  # first: other threads go on meanwhile with what there is
            self.potential = eventually(self.potential)
        whole = slots(graph)
        if whole <= self._fits or self.hops is None:
            return self.potential(graph, stress=stress)
        if self.bytes_per_slot is None:
            self.bytes_per_slot = self.count(graph)
        if self.hops is None:
            return self.potential(graph, stress=stress)
        limit = self.limit(graph.positions.device)
        always = EDGE * graph.edge_index.shape[1]
        needed = self.bytes_per_slot * whole + always
        if not needed > limit:
            self._fits = whole  # what has fitted fits, whatever the process keeps for itself
            return self.potential(graph, stress=stress)
        parts = pieces(graph, self.hops, (limit - always) / self.bytes_per_slot)
        if not self._told:
            most = max(part.slots for part in parts) * self.bytes_per_slot + always
            _tell(len(graph.atomic_numbers), len(parts), needed, most, limit)
            self._told = True
        if len(parts) == 1 or not self._may_be_cut(graph):
            return self.potential(graph, stress=stress)
        return in_pieces(self.plain, graph, parts, stress)

    def copies(self, graph: AtomicGraph, wanted: int, times: float) -> int:
        """How many copies of a structure fit, of those wanted, if each takes ``times`` the memory
        of an evaluation; at least one."""
        each = times * slots(graph)
        if wanted * each <= self._fits or self.hops is None:
            return wanted
        if self.bytes_per_slot is None:
            self.bytes_per_slot = self.count(graph)
        needed = wanted * each * self.bytes_per_slot
        limit = self.limit(graph.positions.device)
        return max(1, int(wanted * limit / needed)) if needed > limit else wanted

    @property
    def plain(self) -> Potential:
        """The potential of the plain model."""
        return without_program(self.potential)

    def _may_be_cut(self, graph: AtomicGraph) -> bool:
        """Whether pieces give what the whole gives; asked of a row of atoms, once."""
        if not self._checked and self.hops is not None:
            self._checked = True
            fast: Any = InPieces(self.plain, self.hops)
            try:
                check(self.plain, fast, "pieces", [row_of_atoms(self.plain, self.hops, graph)])
            except BackendError as problem:
                warnings.warn(f"evaluated as a whole: {problem}", stacklevel=3)
                self.hops = None
        return self.hops is not None

    def limit(self, device: torch.device) -> float:
        """Bytes that may be used."""
        return SHARE * available_memory(device) if self.max_memory is None else self.max_memory

    def count(self, graph: AtomicGraph) -> float:
        """Bytes for each slot, counted on a small piece of the system."""
        assert self.hops is not None
        j, i = graph.edge_index
        group = torch.zeros(len(graph.atomic_numbers), dtype=torch.bool, device=j.device)
        group[:1] = True
        while True:
            sample = piece(graph, group.nonzero()[:, 0], self.hops)
            before = int(group.sum())
            group[j[group[i]]] = True
            if sample.slots >= SAMPLE or int(group.sum()) == before:
                break
        vectors, plain = graph.edge_vectors().detach(), self.plain
        with LiveBytes() as live:
            atoms, _ = evaluate_piece(plain, sample, vectors)
        if atoms.forces is not None:  # of the whole structure they have no net force
            self.hops = None
        return MARGIN * live.peak / laid_out(sample.graph, plain.model)


def without_program(potential: Potential) -> Potential:
    """The potential of the plain model: programs refuse to be watched, have no second derivatives,
    and for gradients of some atoms' energies they compute the model once more."""
    model = potential.model
    return potential.with_model(model.plain) if isinstance(model, SameModel) else potential


def _tell(atoms: int, parts: int, needed: float, most: float, limit: float) -> None:
    what = f"{atoms} atoms need about {_size(needed)} in one piece, {_size(limit)} may be used"
    if parts == 1:
        how = "and no less in several, for the model sees all of them from each"
    else:
        how = f"so they are evaluated in {parts} pieces with {_size(most)} at most"
    warnings.warn(f"{what}, {how}", stacklevel=3)


def _size(number: float) -> str:
    return f"{number / 1e9:.2g} GB" if number > 1e8 else f"{number / 1e6:.2g} MB"
