"""The list made by torch, on whatever device, is that of the processor to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from mlip.calculators import EqCalculator
from mlip.calculators.neighbor_cache import NeighborCache
from mlip.data.device_neighbors import neighbor_list_on
from mlip.data.neighbors import neighbor_list

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def agree(positions, cell, pbc, cutoff, device="cpu"):
    expected = neighbor_list(positions, cell, pbc, cutoff)
    found = neighbor_list_on(torch.device(device), positions, cell, pbc, cutoff)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == device
        np.testing.assert_array_equal(a.cpu().numpy(), b)
        assert a.cpu().numpy().dtype == b.dtype
    return expected[0].shape[1]


@pytest.mark.parametrize("block", range(4))
def test_random_cells(block):
    """Of both handedness, every pbc, cutoffs up to three cells, atoms far outside."""
    for k in range(block * 50, block * 50 + 50):
        rng = np.random.default_rng(k)
        pbc = np.array([k & 1, k >> 1 & 1, k >> 2 & 1], dtype=bool)
        cell = rng.normal(size=(3, 3)) * rng.uniform(1.5, 5)
        if abs(np.linalg.det(cell)) < 5:
            continue
        positions = rng.uniform(-2, 3, (int(rng.integers(1, 8)), 3)) @ cell
        heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        agree(positions, cell, pbc, min(rng.uniform(0.5, 3) * heights.min(), 8.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "atoms",
    [
        bulk("Si", cubic=True) * (5, 4, 3),
        bulk("Cu") * 6,
        fcc111("Cu", (4, 4, 3), vacuum=40.0),
        molecule("C60"),
        Atoms("H2", [[0, 0, 0], [0, 0, 3e4]]),
        Atoms("H"),
        Atoms(),
    ],
    ids=["cubic", "skewed", "slab", "molecule", "far", "atom", "none"],
)
def test_structures(atoms, device):
    atoms = atoms.copy()
    atoms.rattle(0.1, seed=0)
    edges = agree(atoms.positions, np.array(atoms.cell), atoms.pbc, 5.0, device)
    assert edges or len(atoms) < 3


def test_atoms_on_faces_of_bins():
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), -1).reshape(-1, 3) * 2.5
    for pbc in (True, False):
        assert agree(grid, np.eye(3) * 15.0, np.full(3, pbc), 2.6)


def test_overlap_is_refused():
    positions = np.array([[0.0, 0, 0], [5, 5, 5], [10.0, 0, 1e-5]])
    with pytest.raises(ValueError, match="atoms 0 and 2 overlap"):
        neighbor_list_on(torch.device("cpu"), positions, np.eye(3) * 10, np.ones(3, bool), 4.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_large_systems_on_a_gpu():
    atoms = bulk("Si", cubic=True) * 7
    atoms.rattle(0.05, seed=0)
    cache = NeighborCache(5.0, 0.5, "cuda")
    assert cache.edges(atoms.positions, np.array(atoms.cell), atoms.pbc).lengths.is_cuda
    forces = []
    for device in ("cpu", "cuda"):
        atoms.calc = EqCalculator("silicon", device=device, dtype="float64")
        forces.append(atoms.get_forces())
    np.testing.assert_allclose(*forces, atol=1e-9)
