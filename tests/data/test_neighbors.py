"""The neighbour list against brute force, and in the situations in which others went wrong."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from ase.neighborlist import primitive_neighbor_list

from mlip.data.neighbors import neighbor_list

FREE = np.zeros(3, dtype=bool)
PERIODIC = np.ones(3, dtype=bool)


def edges(positions, cell, pbc, cutoff):
    edge_index, shifts = neighbor_list(positions, cell, pbc, cutoff)
    j, i = edge_index
    found = list(zip(i.tolist(), j.tolist(), *shifts.astype(int).T.tolist(), strict=True))
    assert found == sorted(set(found))  # each pair once, ordered by (i, j, shift)
    return set(found)


def lengths(positions, cell, pbc, cutoff):
    (j, i), shifts = neighbor_list(positions, cell, pbc, cutoff)
    return np.linalg.norm(positions[j] - positions[i] + shifts @ cell, axis=1)


def random_cell(rng):
    while True:
        cell = rng.normal(size=(3, 3)) * rng.uniform(1.5, 5)
        if abs(np.linalg.det(cell)) > 5:
            return cell


@pytest.mark.parametrize("block", range(4))
def test_agrees_with_brute_force(block):
    """200 random cells in all, of both handedness, every pbc, cutoffs up to three cells, atoms far
    outside."""
    for k in range(block * 50, block * 50 + 50):
        rng = np.random.default_rng(k)
        pbc = np.array([k & 1, k >> 1 & 1, k >> 2 & 1], dtype=bool)
        cell = random_cell(rng)
        n = int(rng.integers(1, 8))
        positions = rng.uniform(-2, 3, (n, 3)) @ cell
        heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        cutoff = min(rng.uniform(0.5, 3) * heights.min(), 8.0)
        i, j, S = primitive_neighbor_list("ijS", pbc, cell, positions, cutoff)
        expected = set(zip(i.tolist(), j.tolist(), *S.T.tolist(), strict=True))
        assert edges(positions, cell, pbc, cutoff) == expected, k


@pytest.mark.parametrize("pbc", [(k & 1, k >> 1 & 1, k >> 2 & 1) for k in range(8)])
def test_sparse_search_agrees_with_dense(pbc, monkeypatch):
    """The k-d tree, which takes over in empty space, finds what the grid finds."""
    rng = np.random.default_rng(5)
    cell, pbc = random_cell(rng), np.array(pbc, dtype=bool)
    positions = rng.uniform(-1, 2, (9, 3)) @ cell
    dense = edges(positions, cell, pbc, 4.0)
    monkeypatch.setattr("mlip.data.neighbors.MIN_GRID", 0)
    monkeypatch.setattr("mlip.data.neighbors.CELLS_PER_ATOM", 0)
    assert edges(positions, cell, pbc, 4.0) == dense
    assert dense


@pytest.mark.parametrize("origin", [0.0, 1e4, -3e5])
def test_molecule_anywhere_without_a_cell(origin):
    positions = np.random.default_rng(0).uniform(0, 6, (20, 3))
    expected = edges(positions, np.eye(3) * 50, FREE, 4.0)
    assert edges(positions + origin, np.zeros((3, 3)), FREE, 4.0) == expected
    assert expected


def test_vacuum_vector_does_not_matter():
    """A slab: the third vector may be zero, long, short or tilted, and the atoms may stick out of
    the box."""
    rng = np.random.default_rng(1)
    plane = np.array([[4.0, 0, 0], [1.0, 5.0, 0]])
    positions = rng.uniform(0, 1, (12, 2)) @ plane + np.array([0, 0, 1]) * rng.uniform(
        -9, 9, (12, 1)
    )
    pbc = np.array([True, True, False])
    answers = [
        edges(positions, np.vstack([plane, third]), pbc, 5.0)
        for third in ([0, 0, 0], [0, 0, 1e4], [0, 0, 0.5], [30.0, -12, 8], [4.0, 0, 0], [0, 0, -20])
    ]
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) > 50


def test_wire_along_any_axis():
    rng = np.random.default_rng(2)
    positions = rng.uniform(0, 3, (6, 3))
    counts = set()
    for axis in range(3):
        cell, pbc = np.zeros((3, 3)), np.zeros(3, dtype=bool)
        cell[axis, axis], pbc[axis] = 3.0, True
        counts.add(len(edges(np.roll(positions, axis, axis=1), cell, pbc, 5.0)))
    assert len(counts) == 1


def test_unwrapped_atoms_have_shifts_for_the_given_positions():
    rng = np.random.default_rng(3)
    cell = random_cell(rng)
    positions = rng.uniform(0, 1, (10, 3)) @ cell
    moved = positions + rng.integers(-2500, 2500, (10, 3)) @ cell  # up to 1e4 angstrom away
    expected = np.sort(lengths(positions, cell, PERIODIC, 5.0))
    np.testing.assert_allclose(np.sort(lengths(moved, cell, PERIODIC, 5.0)), expected, atol=1e-10)
    assert expected.max() < 5.0


def test_equivalent_skewed_cell_gives_the_same_distances_quickly():
    cell = np.diag([3.0, 4.0, 5.0])
    skewed = np.array([[1, 0, 0], [700, 1, 0], [-300, 900, 1]]) @ cell
    positions = np.random.default_rng(4).uniform(0, 3, (4, 3))
    start = time.perf_counter()
    found = lengths(positions, skewed, PERIODIC, 5.0)
    assert time.perf_counter() - start < 1.0
    np.testing.assert_allclose(
        np.sort(found), np.sort(lengths(positions, cell, PERIODIC, 5.0)), atol=1e-9
    )


def test_single_atom():
    assert edges(np.zeros((1, 3)), np.zeros((3, 3)), FREE, 5.0) == set()
    crystal = edges(np.zeros((1, 3)), np.eye(3) * 3, PERIODIC, 3.5)
    assert crystal == {
        (0, 0, *s) for s in [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    }


def test_no_edges_and_no_atoms():
    edge_index, shifts = neighbor_list(
        np.array([[0, 0, 0], [9.0, 0, 0]]), np.zeros((3, 3)), FREE, 5.0
    )
    assert edge_index.shape == (2, 0) and shifts.shape == (0, 3)
    edge_index, shifts = neighbor_list(np.zeros((0, 3)), np.zeros((3, 3)), FREE, 5.0)
    assert edge_index.shape == (2, 0) and edge_index.dtype == np.int64


@pytest.mark.parametrize("pbc", [PERIODIC, FREE, np.array([True, False, True])])
def test_empty_space_costs_nothing(pbc):
    """A few atoms in a box of 10^4 angstrom: a grid over it would have 8e9 cells."""
    rng = np.random.default_rng(6)
    positions = np.concatenate([rng.uniform(0, 5, (10, 3)), rng.uniform(9990, 9999, (10, 3))])
    tracemalloc.start()
    start = time.perf_counter()
    found = edges(positions, np.eye(3) * 1e4, pbc, 5.0)
    assert time.perf_counter() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert len(found) > 50


def test_arguments_are_left_alone():
    rng = np.random.default_rng(7)
    cell, positions = random_cell(rng), rng.uniform(-9, 9, (5, 3))
    before = cell.copy(), positions.copy()
    neighbor_list(positions, cell, np.array([True, False, True]), 5.0)
    np.testing.assert_array_equal(cell, before[0])
    np.testing.assert_array_equal(positions, before[1])


@pytest.mark.parametrize(
    ("cell", "pbc", "message"),
    [
        (np.zeros((3, 3)), PERIODIC, "pbc is set along a"),
        (np.diag([3.0, 3.0, 0.0]), PERIODIC, "pbc is set along c"),
        (np.array([[3.0, 0, 0], [0, 3, 0], [3, 3, 0]]), PERIODIC, "flat"),
        (np.array([[3.0, 0, 0], [0, 3, 0], [3, 3, 1e-7]]), PERIODIC, "flat"),
        (np.diag([3.0, np.nan, 3.0]), PERIODIC, "non-finite"),
    ],
)
def test_unusable_cells_are_refused(cell, pbc, message):
    with pytest.raises(ValueError, match=message):
        neighbor_list(np.zeros((1, 3)), cell, pbc, 5.0)


def test_unusable_positions_are_refused():
    with pytest.raises(ValueError, match="atom 1 has a non-finite position"):
        neighbor_list(np.array([[0, 0, 0], [np.inf, 0, 0]]), np.zeros((3, 3)), FREE, 5.0)
    with pytest.raises(ValueError, match="atoms 0 and 2 overlap"):
        neighbor_list(np.array([[0, 0, 0], [2.0, 0, 0], [0, 0, 1e-5]]), np.zeros((3, 3)), FREE, 5.0)
    with pytest.raises(ValueError, match="atoms 0 and 1 overlap"):  # through the boundary
        neighbor_list(np.array([[0, 0, 0], [3.0, 3.0, -3.0]]), np.eye(3) * 3, PERIODIC, 5.0)
    with pytest.raises(ValueError, match="cutoff"):
        neighbor_list(np.zeros((1, 3)), np.zeros((3, 3)), FREE, -1.0)


def test_absurd_density_is_refused_before_memory_runs_out():
    with pytest.raises(ValueError, match="pairs within"):
        neighbor_list(
            np.random.default_rng(8).uniform(0, 1, (5000, 3)), np.eye(3) * 0.1, PERIODIC, 5.0
        )
