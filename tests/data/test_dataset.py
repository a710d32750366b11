"""Data set, splits, duplicates, loader and transforms."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from ase import Atoms

from mlip.data.dataset import HDF5Dataset, split, split_by_file
from mlip.data.duplicates import find_duplicates
from mlip.data.graph import AtomicGraph
from mlip.data.hdf5 import HDF5Writer
from mlip.data.loader import GraphLoader
from mlip.data.transforms import Compose, RandomRotation, random_rotation

SIZES = (3, 5, 2, 8, 1, 4, 6, 7, 3, 5, 2, 9, 4, 1, 6, 3, 8, 2, 5, 4, 7, 3, 6)


def write(path, sizes=SIZES, isolated=True, seed=0):
    rng = np.random.default_rng(seed)
    with HDF5Writer(path) as writer:
        for k, n in enumerate(sizes):
            single = n == 1 and isolated
            writer.append(
                rng.choice([1, 6, 8], n),
                rng.uniform(0, 6, (n, 3)),
                np.zeros((3, 3)) if single else np.eye(3) * 6 + rng.normal(size=(3, 3)) / 2,
                [not single] * 3,
                energy=float(k),
                forces=rng.normal(size=(n, 3)) if k % 3 else None,
                stress=np.eye(3) * k if k % 2 else None,
                config_type="IsolatedAtom" if single else "bulk",
                group=f"run{k // 4}",
            )
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "data.h5")


def equal(a: AtomicGraph, b: AtomicGraph) -> bool:
    """Equal to the bit in all fields; NaN equals NaN."""
    assert set(a.keys()) == set(b.keys())
    tensors = [k for k in a.keys() if isinstance(a[k], torch.Tensor)]
    return all(
        a[k].dtype == b[k].dtype
        and torch.equal(torch.nan_to_num(a[k], nan=1e9), torch.nan_to_num(b[k], nan=1e9))
        for k in tensors
    )


def test_graph_has_labels_with_nan_for_missing_ones(path):
    dataset = HDF5Dataset(path, 4.0)
    assert len(dataset) == len(SIZES)
    for k in range(len(dataset)):
        g = dataset[k]
        n = SIZES[k]
        assert g.energy.shape == (1,) and g.forces.shape == (n, 3) and g.stress.shape == (1, 3, 3)
        assert g.energy.item() == k and g.weight.item() == 1 and g.frame.item() == k
        assert g.forces.isnan().all() == (k % 3 == 0) and g.stress.isnan().all() == (k % 2 == 0)
        s = dataset.structure(k)
        atoms = Atoms(s.atomic_numbers, s.positions, cell=s.cell[0], pbc=s.pbc[0])
        plain = AtomicGraph.from_atoms(atoms, 4.0)
        for key in plain.keys():
            assert key == "num_nodes" or torch.equal(g[key], plain[key]), key
    with pytest.raises(IndexError):
        dataset[len(SIZES)]
    assert equal(dataset[-1], dataset[len(SIZES) - 1])


def test_subsets_compose(path):
    dataset = HDF5Dataset(path, 4.0, indices=[5, 3, 9])
    assert [dataset[k].frame.item() for k in range(3)] == [5, 3, 9]
    assert dataset.subset([2, 0]).indices.tolist() == [9, 5]
    assert dataset.subset(np.array([True, False, True])).indices.tolist() == [5, 9]
    assert dataset.num_atoms.tolist() == [SIZES[5], SIZES[3], SIZES[9]]
    assert dataset.groups.tolist() == ["run1", "run0", "run2"]
    with pytest.raises(ValueError, match="index 3"):
        dataset.subset([3])
    with pytest.raises(ValueError, match="mask"):
        dataset.subset(np.array([True, False]))


def test_cache_gives_the_same_and_is_not_shared_with_the_caller(path):
    plain, cached = HDF5Dataset(path, 4.0), HDF5Dataset(path, 4.0, cache=True)
    first = cached[3]
    first.energy = torch.tensor([99.0])
    assert equal(cached[3], plain[3])


def test_cache_is_bounded(path, monkeypatch):
    monkeypatch.setattr("mlip.data.dataset.CACHE_BYTES", 5000)
    dataset = HDF5Dataset(path, 4.0, cache=True)
    for k in range(len(dataset)):
        dataset[k]
    assert 0 < dataset._cached_bytes <= 5000


def test_bad_frame_is_named(tmp_path):
    with HDF5Writer(tmp_path / "bad.h5") as writer:
        writer.append([1], np.zeros((1, 3)), np.eye(3), [False] * 3, energy=0.0)
        writer.append([1, 1], np.zeros((2, 3)), np.eye(3), [False] * 3, energy=0.0)
    with pytest.raises(ValueError, match=r"bad\.h5: frame 1: atoms 0 and 1 overlap"):
        HDF5Dataset(tmp_path / "bad.h5", 4.0)[1]


def test_isolated_atoms_are_recognised_and_stay_in_training(path):
    dataset = HDF5Dataset(path, 4.0)
    assert np.flatnonzero(dataset.isolated).tolist() == [4, 13]
    for seed in range(5):
        train, valid = split(dataset, 0.5, seed)
        assert not valid.isolated.any() and train.isolated.sum() == 2


def test_split_is_disjoint_complete_and_reproducible(path):
    dataset = HDF5Dataset(path, 4.0)
    train, valid = split(dataset, 0.25, 7)
    assert sorted([*train.indices, *valid.indices]) == list(range(len(dataset)))
    assert len(valid) == round(0.25 * 21)
    assert split(dataset, 0.25, 7)[1].indices.tolist() == valid.indices.tolist()
    assert split(dataset, 0.25, 8)[1].indices.tolist() != valid.indices.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_grouped_split_keeps_a_trajectory_on_one_side(path, seed):
    train, valid = split(HDF5Dataset(path, 4.0), 0.3, seed, by="group")
    learned = set(train.groups[~train.isolated].tolist())
    assert learned.isdisjoint(valid.groups.tolist())
    assert len(valid) > 0 and learned


def test_impossible_splits_are_refused(path):
    dataset = HDF5Dataset(path, 4.0)
    with pytest.raises(ValueError, match="same config_type"):
        split(dataset, 0.3, by="config_type")
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(dataset, 1.5)
    with pytest.raises(ValueError, match="too few"):
        split(dataset.subset([0]), 0.5)


def test_split_by_file(path, tmp_path):
    dataset, file = HDF5Dataset(path, 4.0), tmp_path / "valid.txt"
    file.write_text("3 1\n7\n")
    train, valid = split_by_file(dataset, file)
    assert valid.indices.tolist() == [1, 3, 7] and len(train) == len(dataset) - 3
    for text in ("3 3", "99", "-1", "a", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"valid\.txt"):
            split_by_file(dataset, file)


def test_duplicates_are_counted_and_named(tmp_path):
    """Exact, wrapped, permuted and slightly rounded copies are found; translated or stretched ones
    are not copies."""
    rng = np.random.default_rng(0)

    def frame(k):
        pbc = np.array([k & 1, k >> 1 & 1, k >> 2 & 1], dtype=bool)
        return (
            rng.choice([1, 6], 6),
            rng.uniform(0, 6, (6, 3)),
            np.eye(3) * 6 + rng.normal(size=(3, 3)),
            pbc,
        )

    train = [frame(k) for k in range(40)]
    valid = [frame(k) for k in range(5)]
    for k in range(16):
        z, x, cell, pbc = train[k]
        order = rng.permutation(6)
        wrapped = x[order] + (rng.integers(-3, 4, (6, 3)) * pbc) @ cell
        valid.append((z[order], wrapped + rng.normal(size=x.shape) * 1e-5, cell, pbc))
    z, x, cell, pbc = train[20]
    valid.append((z, x + 0.01 * np.eye(6, 3), cell, pbc))
    valid.append((z, x, cell * 1.01, np.ones(3, dtype=bool)))
    test = [train[3], train[39]]
    for name, frames in (("train", train), ("valid", valid), ("test", test)):
        with HDF5Writer(tmp_path / f"{name}.h5") as writer:
            for f in frames:
                writer.append(*f, energy=0.0)
    found = find_duplicates(
        {n: HDF5Dataset(tmp_path / f"{n}.h5", 4.0) for n in ("train", "valid", "test")}
    )
    expected = [(("train", k), ("valid", 5 + k)) for k in range(16)]
    expected[3] = (*expected[3], ("test", 0))
    expected.append((("train", 39), ("test", 1)))
    assert list(found.across) == expected
    assert found.num_across == 18 and not found.within
    assert "18 duplicates" in found.describe() and "train 3 = valid 8 = test 0" in found.describe()


def test_collate_joins_what_from_data_list_joins(path):
    from torch_geometric.data import Batch

    graphs = [HDF5Dataset(path, 4.0)[k] for k in range(6)]
    batch = AtomicGraph.collate(graphs)
    expected = Batch.from_data_list(graphs, exclude_keys=["batch", "ptr"])
    assert isinstance(batch, AtomicGraph) and batch.num_structures == 6
    for key in expected.keys():
        assert key == "num_nodes" or torch.equal(
            torch.nan_to_num(batch[key]), torch.nan_to_num(expected[key])
        ), key
    twice = AtomicGraph.collate([AtomicGraph.collate(graphs[:2]), AtomicGraph.collate(graphs[2:])])
    assert equal(twice, batch)


def test_collate_refuses_what_does_not_fit(path):
    a, b = HDF5Dataset(path, 4.0)[0], HDF5Dataset(path, 4.0)[1]
    with pytest.raises(ValueError, match="charge"):
        AtomicGraph.collate([a.replace(charge=torch.zeros(1)), b])
    with pytest.raises(ValueError, match="no graph"):
        AtomicGraph.collate([])


def frames_of(loader):
    return [batch.frame.tolist() for batch in loader]


@pytest.mark.parametrize(
    "limits",
    [{"batch_size": 4}, {"max_atoms": 12}, {"max_edges": 200}, {"batch_size": 3, "max_atoms": 12}],
)
def test_batches_hold_everything_once_within_their_limits(path, limits):
    dataset = HDF5Dataset(path, 4.0)
    loader = GraphLoader(dataset, **limits, shuffle=True, seed=1)
    seen = []
    for batch in loader:
        seen += batch.frame.tolist()
        assert batch.num_structures <= limits.get("batch_size", 99)
        assert len(batch.positions) <= limits.get("max_atoms", 999)
        assert batch.edge_index.shape[1] <= limits.get("max_edges", 10**9)
    assert sorted(seen) == list(range(len(dataset)))


def test_epochs_differ_and_repeat(path):
    dataset = HDF5Dataset(path, 4.0)
    a, b = (GraphLoader(dataset, 4, shuffle=True, seed=3) for _ in range(2))
    first, second = frames_of(a), frames_of(a)
    assert first != second
    b.set_epoch(1)
    assert frames_of(b) == second
    b.set_epoch(0)
    assert frames_of(b) == first
    assert frames_of(GraphLoader(dataset, 4, shuffle=True, seed=4)) != first
    assert list(chain.from_iterable(frames_of(GraphLoader(dataset, 4)))) == list(
        range(len(dataset))
    )


def test_shuffling_reaches_across_blocks_and_loses_nothing(path, monkeypatch):
    monkeypatch.setattr("mlip.data.loader.BLOCK", 3)
    monkeypatch.setattr("mlip.data.loader.BUFFER", 2)
    loader = GraphLoader(HDF5Dataset(path, 4.0), 4, shuffle=True)
    order = list(chain.from_iterable(loader.batches()))
    assert sorted(order) == list(range(len(SIZES))) and order != sorted(order)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch(path, workers):
    dataset = HDF5Dataset(path, 4.0, RandomRotation())
    make = lambda: GraphLoader(dataset, 4, shuffle=True, seed=3, num_workers=workers)  # noqa: E731
    loader = make()
    frames_of(loader)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 1, "position": 2, "seed": 3}
    rest = list(iterator)
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # a trainer says so at each epoch; here it must not start over
    again = list(resumed)
    assert len(rest) == len(again) == len(loader) - 2
    assert all(equal(x, y) for x, y in zip(rest, again, strict=True))
    assert loader.state_dict() == resumed.state_dict() == {"epoch": 2, "position": 0, "seed": 3}
    with pytest.raises(ValueError, match="seed"):
        GraphLoader(dataset, 4, seed=9).load_state_dict(state)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_change_nothing(path, method, workers):
    """Two epochs: same order, same bits, and the global random state is not touched."""
    dataset = HDF5Dataset(path, 4.0, RandomRotation(), seed=5)
    plain = GraphLoader(dataset, max_atoms=16, shuffle=True, seed=2)
    parallel = GraphLoader(
        dataset, max_atoms=16, shuffle=True, seed=2, num_workers=workers, start_method=method
    )
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epochs = []
    for _ in range(2):
        a, b = list(plain), list(parallel)
        assert len(a) == len(b) > 3
        assert all(equal(x, y) for x, y in zip(a, b, strict=True))
        epochs.append(a)
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(AtomicGraph.collate(epochs[0]), AtomicGraph.collate(epochs[1]))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("limits", [{"batch_size": 1}, {"batch_size": 3}, {"max_atoms": 12}])
def test_ranks_share_the_structures(path, world, limits):
    dataset = HDF5Dataset(path, 4.0)
    loaders = [
        GraphLoader(dataset, **limits, shuffle=True, seed=1, rank=r, world_size=world)
        for r in range(world)
    ]
    batches = [loader.batches() for loader in loaders]
    assert len({len(b) for b in batches}) == 1
    seen = [k for rank in batches for batch in rank for k in batch]
    assert len(set(seen)) == len(seen)
    assert len(seen) == len(dataset)  # nothing is lost
    assert all(batch for rank in batches for batch in rank)
    # Batches of one cannot be halved where their number does not divide: some get a second.
    largest = limits.get("batch_size", 99) + (limits.get("batch_size") == 1)
    for rank in batches:
        for batch in rank:
            assert len(batch) <= largest
            assert dataset.num_atoms[batch].sum() <= limits.get("max_atoms", 10**9)


def test_two_ranks_together_do_the_steps_of_one(path):
    """World size 2 with batches of 3 sees, step by step, the structures of one process with batches
    of 6."""
    dataset = HDF5Dataset(path, 4.0)
    one = GraphLoader(dataset, 6, shuffle=True, seed=1).batches()
    two = [
        GraphLoader(dataset, 3, shuffle=True, seed=1, rank=r, world_size=2).batches()
        for r in range(2)
    ]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]
    atoms = [[dataset.num_atoms[b].sum() for b in rank] for rank in two]
    assert np.abs(np.subtract(*atoms)).mean() < 3  # balanced: sizes range from 1 to 9


def test_drop_last(path):
    dataset = HDF5Dataset(path, 4.0)
    assert len(GraphLoader(dataset, 4)) == 6 and len(GraphLoader(dataset, 4, drop_last=True)) == 5


def test_loader_refuses_nonsense(path):
    dataset = HDF5Dataset(path, 4.0)
    with pytest.raises(ValueError, match="at least one of"):
        GraphLoader(dataset)
    with pytest.raises(ValueError, match="frame 11 has 9 atoms"):
        GraphLoader(dataset, max_atoms=8)
    with pytest.raises(ValueError, match="batch_size"):
        GraphLoader(dataset, batch_size=0)
    with pytest.raises(ValueError, match="rank 2"):
        GraphLoader(dataset, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="no structures"):
        GraphLoader(dataset.subset([]), 1)


def test_rotation_is_orthogonal_and_uniform():
    generator = torch.Generator().manual_seed(0)
    R = torch.stack([random_rotation(generator) for _ in range(4000)])
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=torch.float64).expand_as(R))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(4000, dtype=torch.float64))
    # Uniform over SO(3): the matrix elements average to 0 and their squares to 1/3.
    assert R.mean(0).abs().max() < 0.04 and (R.square().mean(0) - 1 / 3).abs().max() < 0.03


def test_augmentation_rotates_labels_with_the_structure(path):
    plain, rotated = HDF5Dataset(path, 4.0), HDF5Dataset(path, 4.0, Compose(RandomRotation()))
    signs = set()
    for k in (1, 5, 7, 11):
        g, h = plain[k], rotated[k]
        R = torch.linalg.lstsq(g.cell[0], h.cell[0]).solution.T
        signs.add(round(float(torch.linalg.det(R))))
        torch.testing.assert_close(R @ R.T, torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(h.positions, g.positions @ R.T)
        torch.testing.assert_close(h.forces, g.forces @ R.T)
        torch.testing.assert_close(h.stress, R @ g.stress @ R.T)
        torch.testing.assert_close(h.edge_vectors(), g.edge_vectors() @ R.T)
        assert equal(rotated[k], h) and not equal(rotated.graph(k, epoch=1), h)
    assert signs == {1, -1}
