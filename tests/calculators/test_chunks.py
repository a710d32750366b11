"""Evaluation in pieces gives what the whole gives, takes less memory, and says so."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch.testing import assert_close

from mlip.calculators import EqCalculator
from mlip.calculators.chunks import (
    EDGE,
    MARGIN,
    BoundedPotential,
    evaluate_piece,
    in_pieces,
    piece,
    pieces,
    slots,
)
from mlip.calculators.memory import LiveBytes, available_memory, parse_memory
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.nn.cohesion import Cohesion
from mlip.nn.zbl import ZBL
from mlip.potential import Potential
from tests.conftest import without_zeros

SMALL: dict[str, dict[str, Any]] = {
    "facet": {"channels": 4, "lmax": 1, "hidden": 4, "message_channels": (3, 2), "num_basis": 4},
    "gaunt": {"channels": 4, "lmax": 1, "hidden": 4, "message_channels": (3, 2), "num_basis": 4},
    "mace": {"channels": 4, "lmax": 1, "radial_hidden": (4,), "correlation": 2, "num_basis": 4},
    "escaip": {"hidden": 8, "node_hidden": 8, "num_heads": 2, "num_basis": 4},
    "ponita": {"channels": 4, "message_channels": 2, "hidden": 4},
    "transip": {"hidden": 12, "num_layers": 2, "num_heads": 2, "latent": (2, 1)},
    "environment": {"hidden": 8, "edge_hidden": 8, "num_heads": 2},
}


def potential(name: str = "facet", cutoff: float = 3.0, **more: Any) -> Potential:
    """A small random model in which no weight is zero, with both priors."""
    torch.manual_seed(0)
    model = build(name, cutoff=cutoff, **SMALL[name], **more)
    without_zeros(model, 0.3)
    e0 = torch.full((119,), torch.nan)
    e0[[1, 6, 8, 14]] = torch.tensor([-13.0, -1030.0, -2040.0, -1.5])
    priors = ZBL(), Cohesion(torch.linspace(0, 5, 119))
    return Potential(model, e0, 2.0, *priors).double().eval().requires_grad_(False)


def crystal(length: int = 7) -> Atoms:
    """A long one of two elements: pieces of it are smaller than the whole."""
    atoms = bulk("Si", cubic=True) * (1, 1, length)
    atoms.numbers[::3] = 6
    atoms.rattle(0.1, seed=0)
    atoms.set_cell(atoms.cell + 0.1, scale_atoms=True)
    atoms.positions += [0.0, 0.0, 9.0]  # some lie beyond the cell
    return atoms


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert_close(a[key], b[key], atol=1e-10, rtol=1e-10, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    plain = potential(name)
    graph = AtomicGraph.from_atoms(crystal(), plain.cutoff)
    hops = BoundedPotential(plain).hops
    assert hops == round(plain.model.receptive_field / plain.cutoff)
    parts = pieces(graph, hops, slots(graph) / 2)
    assert len(parts) > 1 and all(part.slots < slots(graph) for part in parts)
    whole = plain(graph, stress=True)
    assert whole["forces"].abs().max() > 0.01
    assert_same(in_pieces(plain, graph, parts, stress=True), whole)


def test_each_atom_belongs_to_one_piece_and_no_piece_is_too_large() -> None:
    graph = AtomicGraph.from_atoms(crystal(12), 3.0)
    limit = slots(graph) / 3
    parts = pieces(graph, 2, limit)
    atoms = torch.cat([part.atoms for part in parts]).sort().values
    assert torch.equal(atoms, torch.arange(len(graph.atomic_numbers)))
    assert all(part.slots <= limit for part in parts)
    for part in parts:
        assert torch.equal(part.graph.atomic_numbers[part.own], graph.atomic_numbers[part.atoms])
        assert (part.graph.edge_index[1].diff() >= 0).all()  # sorted, as models ask for


def test_batches_molecules_and_atoms_without_neighbours() -> None:
    plain = potential()
    ghost = Atoms("OSi", positions=[[0, 0, 0], [50, 0, 0]])
    slab = crystal(3)
    slab.pbc = (True, True, False)
    frames = [crystal(4), molecule("CH3COOH"), ghost, slab, bulk("Si")]
    graph = AtomicGraph.collate([AtomicGraph.from_atoms(a, plain.cutoff) for a in frames])
    parts = pieces(graph, 2, slots(graph) / 6)
    assert len(parts) > 3
    assert_same(in_pieces(plain, graph, parts, stress=True), plain(graph, stress=True))


def test_structures_are_parted_before_they_are_cut() -> None:
    """They see nothing of each other, so that costs nothing."""
    graph = AtomicGraph.collate([AtomicGraph.from_atoms(crystal(5), 3.0) for _ in range(6)])
    parts = pieces(graph, 2, slots(graph) / 3)
    assert len(parts) == 4  # 3, 3, and again
    assert sum(part.slots for part in parts) == slots(graph)


def test_a_cell_smaller_than_the_halo_stays_right() -> None:
    plain = potential(cutoff=4.5)
    graph = AtomicGraph.from_atoms(bulk("Si") * (2, 1, 1), plain.cutoff)
    halves = [piece(graph, atoms, 2) for atoms in torch.arange(4).split(2)]
    assert all(half.slots == slots(graph) for half in halves)
    assert_same(in_pieces(plain, graph, halves, stress=True), plain(graph, stress=True))
    assert len(pieces(graph, 2, 1)) == 1  # nothing would be gained


def test_a_calculator_with_little_memory_gives_the_same_and_says_so_once() -> None:
    atoms = crystal(10)
    plain = EqCalculator(potential())
    edges = EDGE * AtomicGraph.from_atoms(atoms, plain.cutoff).edge_index.shape[1]
    needs = MARGIN * _bytes(plain.potentials[0], atoms) + edges
    small = EqCalculator(potential(), max_memory=(needs + edges) / 2)
    with pytest.warns(UserWarning, match=r"80 atoms need about .* evaluated in \d pieces"):
        b = small.evaluate([atoms])[0]
    a = plain.evaluate([atoms])[0]
    assert abs(a["energy"] - b["energy"]) < 1e-10 * abs(a["energy"])
    for key in ("forces", "stress", "energies"):
        assert np.abs(a[key] - b[key]).max() < 1e-10 * max(np.abs(a[key]).max(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.rattle(0.01, seed=1)
        small.evaluate([atoms])
        EqCalculator(potential(), max_memory=2 * needs).evaluate([atoms])


def test_where_pieces_need_as_much_the_whole_is_taken_and_said() -> None:
    atoms = bulk("Si")
    calc = EqCalculator(potential(), max_memory=1000)
    with pytest.warns(UserWarning, match="2 atoms need about .* and no less in several"):
        result = calc.evaluate([atoms])[0]
    expected = EqCalculator(potential()).evaluate([atoms])[0]
    assert result["energy"] == expected["energy"]


@pytest.mark.filterwarnings("ignore:symmetrize")  # of an exact model
def test_copies_of_a_mean_over_rotations_are_bounded_too() -> None:
    atoms, options = crystal(8), {"symmetrize": "tetrahedral"}
    plain = EqCalculator(potential(), **options)
    small = EqCalculator(potential(), max_memory=6e6, **options)
    with pytest.warns(UserWarning, match="768 atoms need .* MB may be used, so they are evaluated"):
        b = small.evaluate(atoms)[0]
    a = plain.evaluate(atoms)[0]
    for key in ("forces", "stress", "energies", "forces_spread"):
        assert np.abs(a[key] - b[key]).max() < 1e-10 * max(np.abs(a[key]).max(), 1)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "environment"])  # one hop
def test_a_model_that_sees_farther_than_it_says_is_not_cut(name: str) -> None:
    plain, atoms = potential(name), crystal(8)
    graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
    for short in (False, True):
        bounded = BoundedPotential(plain, max_memory=1.0)
        assert bounded.hops is not None and bounded.hops > 1
        bounded.hops -= short
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert_same(bounded(graph, stress=True), plain(graph, stress=True))
            assert_same(bounded(graph, stress=True), plain(graph, stress=True))
        refused = [str(w.message) for w in told if "as a whole: 'pieces'" in str(w.message)]
        assert len(refused) == short and (bounded.hops is None) == short


def test_pieces_of_a_model_with_a_field_are_checked_in_it() -> None:
    plain = potential(field="given")
    frames = [AtomicGraph.from_atoms(crystal(8), plain.cutoff) for _ in range(2)]
    fields = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.0, 0.0]], dtype=torch.float64)
    graph = AtomicGraph.collate(
        [frame.replace(field=field[None]) for frame, field in zip(frames, fields, strict=True)]
    )
    bounded = BoundedPotential(plain, max_memory=1.0)
    with pytest.warns(UserWarning, match="evaluated in"):
        found = bounded(graph, stress=True)
    assert bounded.hops is not None
    assert_same(found, plain(graph, stress=True))


def test_forces_of_their_own_are_taken_from_the_whole() -> None:
    plain = potential("escaip", direct_forces=True)
    atoms = molecule("C6H6")
    bounded = BoundedPotential(plain, 1.0)
    graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
    assert_same(bounded(graph), plain(graph))


def test_memory_is_predicted() -> None:
    """What was counted on a piece is what a larger system takes."""
    plain = potential("facet", cutoff=4.0)
    atoms = bulk("Si", cubic=True) * (4, 4, 4)
    atoms.rattle(0.05, seed=0)
    graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
    predicted = BoundedPotential(plain).count(graph) * slots(graph) / MARGIN
    assert 0.8 < predicted / _bytes(plain, atoms) < 1.5


def test_what_is_alive_is_counted() -> None:
    with LiveBytes() as live:
        a = torch.ones(1000, dtype=torch.float64)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        del b, c
    assert live.peak == 16_000 and live.now == 0
    assert available_memory(torch.device("cpu")) > 1e6


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("8GB", 8e9), ("512 MiB", 2**29), ("1.5e3", 1500), (4096, 4096), ("2k", 2000), ("1TB", 1e12)],
)
def test_sizes_of_memory_are_read(text: str | float, bytes_: float) -> None:
    assert parse_memory(text) == bytes_


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "8XB", "nan", "1e", "GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give a number of bytes"):
        EqCalculator(potential(), max_memory=text)


def _bytes(plain: Potential, atoms: Atoms) -> int:
    graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
    everything = piece(graph, torch.arange(len(atoms)), 1)
    vectors = graph.edge_vectors().detach()
    with LiveBytes() as live:
        evaluate_piece(plain, everything, vectors)
    return live.peak
