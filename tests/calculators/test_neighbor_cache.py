"""A list with a skin gives the edges of a fresh one, whatever moves."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from mlip.calculators.neighbor_cache import NeighborCache
from mlip.data.neighbors import neighbor_list


def silicon() -> Atoms:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=0)
    return atoms


def slab() -> Atoms:
    return fcc111("Cu", (2, 2, 3), vacuum=6.0)


def ethanol() -> Atoms:
    return molecule("CH3CH2OH")


def primitive() -> Atoms:
    return bulk("Cu")


def tilted() -> Atoms:
    atoms = bulk("Si") * (1, 2, 1)
    atoms.set_cell(atoms.cell[[1, 0, 2]])  # left-handed
    atoms.rattle(0.1, seed=1)
    return atoms


STRUCTURES = [silicon, slab, ethanol, primitive, tilted]


def as_set(index: np.ndarray, shifts: np.ndarray) -> set[tuple[int, ...]]:
    rows = np.concatenate([index.T, shifts.astype(int)], axis=1)
    return {tuple(row) for row in rows.tolist()}


def edges_of(cache: NeighborCache, atoms: Atoms) -> set[tuple[int, ...]]:
    found = cache.edges(atoms.positions, np.array(atoms.cell), atoms.pbc)
    return as_set(found.edge_index.numpy(), found.shifts.numpy())


def fresh(atoms: Atoms, cutoff: float) -> set[tuple[int, ...]]:
    index, shifts = neighbor_list(atoms.positions, np.array(atoms.cell), atoms.pbc, cutoff)
    return as_set(index, shifts)


@pytest.mark.parametrize("skin", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("make", STRUCTURES)
def test_edges_are_complete_while_atoms_and_cell_move(make, skin: float) -> None:
    rng = np.random.default_rng(0)
    atoms, cache = make(), NeighborCache(4.5, skin)
    for _ in range(40):
        atoms.positions += rng.normal(scale=0.04, size=atoms.positions.shape)
        if atoms.pbc.any():
            F = np.eye(3) + rng.normal(scale=0.01, size=(3, 3))
            atoms.set_cell(np.array(atoms.cell) @ F, scale_atoms=True)
        assert edges_of(cache, atoms) == fresh(atoms, 4.5)
    if skin == 2.0:
        assert cache.num_builds < 20  # it is of some use


def test_a_sudden_strain_of_the_cell_alone_is_noticed() -> None:
    atoms, cache = silicon() * 2, NeighborCache(4.5, 0.5)
    edges_of(cache, atoms)
    for factor in (0.7, 1.0, 0.98, 1.4):
        atoms.set_cell(silicon().cell[:] * 2 * factor, scale_atoms=True)
        assert edges_of(cache, atoms) == fresh(atoms, 4.5)


def test_a_rotated_or_translated_structure_needs_no_new_list() -> None:
    atoms, cache = silicon(), NeighborCache(4.5, 0.5)
    before = edges_of(cache, atoms)
    atoms.rotate(40, (1, 2, 3), rotate_cell=True)
    atoms.positions += (3.0, -20.0, 1.0)
    assert edges_of(cache, atoms) == before
    assert cache.num_builds == 1


def test_other_boundaries_and_other_numbers_of_atoms() -> None:
    atoms, cache = silicon(), NeighborCache(4.5, 0.5)
    for pbc in (True, False, (True, False, True)):
        for n in (8, 3, 8):
            part = atoms[:n]
            part.pbc = pbc
            assert edges_of(cache, part) == fresh(part, 4.5)


def test_wrapping_an_atom_between_calls() -> None:
    atoms, cache = silicon(), NeighborCache(4.5, 0.5)
    edges_of(cache, atoms)
    atoms.positions[0] += atoms.cell[0] - 2 * atoms.cell[1]
    assert edges_of(cache, atoms) == fresh(atoms, 4.5)


def test_the_order_does_not_depend_on_when_the_list_was_made() -> None:
    atoms, old = silicon(), NeighborCache(4.5, 1.0)
    old.edges(atoms.positions, np.array(atoms.cell), atoms.pbc)
    atoms.rattle(0.1, seed=5)
    a = old.edges(atoms.positions, np.array(atoms.cell), atoms.pbc)
    b = NeighborCache(4.5, 0.1).edges(atoms.positions, np.array(atoms.cell), atoms.pbc)
    assert old.num_builds == 1
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("skin", [-0.1, np.nan, np.inf])
def test_a_skin_that_is_none(skin: float) -> None:
    with pytest.raises(ValueError, match="skin"):
        NeighborCache(5.0, skin)


def test_edges_are_the_same_tensors_while_they_are_the_same_pairs() -> None:
    atoms, cache = silicon(), NeighborCache(4.5, 1.0)
    edges = cache.edges(atoms.positions, np.array(atoms.cell), atoms.pbc)
    atoms.positions += 1e-6
    again = cache.edges(atoms.positions, np.array(atoms.cell), atoms.pbc)
    assert again.edge_index is edges.edge_index and again.shifts is edges.shifts
    atoms.positions[0] += 0.2
    other = cache.edges(atoms.positions, np.array(atoms.cell), atoms.pbc)
    assert cache.num_builds == 1
    found = as_set(other.edge_index.numpy(), other.shifts.numpy())
    assert found == fresh(atoms, 4.5) != as_set(edges.edge_index.numpy(), edges.shifts.numpy())


def test_an_interruption_leaves_no_old_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, cache = silicon(), NeighborCache(4.5, 1.0)
    edges_of(cache, atoms)
    atoms.positions[0] += 0.2
    within = cache._within
    assert within is not None
    whole = within.shifts
    monkeypatch.setattr(within, "shifts", None)  # fails in the middle
    with pytest.raises(AttributeError):
        edges_of(cache, atoms)
    monkeypatch.setattr(within, "shifts", whole)
    assert edges_of(cache, atoms) == fresh(atoms, 4.5)
