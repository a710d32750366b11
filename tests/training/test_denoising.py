"""Noise and the forces that undo it; a pre-trained model starts a training with labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.units import kB

from mlip import checkpoint
from mlip.calculators import EqCalculator
from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.data.hdf5 import HDF5Writer
from mlip.data.neighbors import neighbor_list
from mlip.data.transforms import RandomDisplacement
from mlip.evaluation.evaluate import evaluate_files
from mlip.training.config import TrainConfig
from mlip.training.log import read_rows
from mlip.training.run import train
from mlip.training.trainer import STATE
from tests.training.conftest import SMALL, assert_same_bits, whole_and_in_parts

Configure = Callable[..., TrainConfig]
KT = 300 * kB


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copper without labels, strained."""
    path = tmp_path_factory.mktemp("unlabelled") / "copper.h5"
    rng = np.random.default_rng(0)
    with HDF5Writer(path) as file:
        for _ in range(12):
            atoms = bulk("Cu", cubic=True)
            strain = np.eye(3) + 0.02 * rng.normal(size=(3, 3))
            atoms.set_cell(atoms.cell @ strain, scale_atoms=True)
            file.append(atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc)
    return path


def test_forces_undo_the_noise(copper: Path) -> None:
    data = HDF5Dataset(copper / "train.h5", 3.6)
    plain = data[0]
    noise = RandomDisplacement([0.1], KT, 3.6)
    noisy = noise(plain, torch.Generator().manual_seed(0))
    back = noisy.positions + noisy.forces * 0.1**2 / KT
    torch.testing.assert_close(back, plain.positions, rtol=0, atol=1e-12)
    assert noisy.forces.sum(0).abs().max() < 1e-12
    assert noisy.energy.isnan().all() and noisy.stress.isnan().all()
    edges, _ = neighbor_list(
        noisy.positions.numpy(), noisy.cell[0].numpy(), noisy.pbc[0].numpy(), 3.6
    )
    assert np.array_equal(noisy.edge_index.numpy(), edges)
    assert float(noisy.edge_vectors().norm(dim=1).max()) < 3.6
    assert not plain.energy.isnan().any()  # what was given stays
    again = AtomicGraph.collate([noisy, noise(plain, torch.Generator().manual_seed(1))])
    assert (again.forces[:4] - again.forces[4:]).abs().max() > 0.01


def test_noise_has_its_size_and_one_of_several() -> None:
    g = AtomicGraph.from_atoms(bulk("Cu", cubic=True) * (4, 4, 4), 3.0)
    g = g.replace(energy=torch.zeros(1), stress=torch.zeros(1, 3, 3))
    noise, found = RandomDisplacement([0.02, 0.2], KT, 3.0), []
    for seed in range(20):
        moved = noise(g, torch.Generator().manual_seed(seed))
        found.append(float((moved.positions - g.positions).std()))
    small = [x for x in found if x < 0.1]
    assert 2 < len(small) < 18
    assert np.mean(small) == pytest.approx(0.02, rel=0.05)
    assert np.mean([x for x in found if x >= 0.1]) == pytest.approx(0.2, rel=0.05)


def test_the_harmonic_energy_is_learned(configure: Configure, tmp_path: Path) -> None:
    """Noise about one structure: the energy is kT d^2 / 2 sigma^2, its forces are known."""
    sigma, atoms = 0.1, bulk("Cu", cubic=True)
    with HDF5Writer(tmp_path / "one.h5") as file:
        for _ in range(24):
            file.append(atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc)
    config = configure(
        data={"train": str(tmp_path / "one.h5"), "valid": str(tmp_path / "one.h5")},
        model={**SMALL, "num_layers": 2, "lmax": 2, "hidden": 16},
        denoising={"sigma": sigma},
        schedule={"max_epochs": 12, "valid_every": 12},
        optimizer={"ema_decay": 0.8, "lr": 0.01, "muon_lr": 0.02},
        precision={"dtype": "float32"},
    )
    potential = checkpoint.load(train(config))
    assert potential.metadata["training"]["objective"] == "denoising"
    nothing = KT / sigma * np.sqrt(1 - 1 / len(atoms))  # the forces themselves; no net force
    assert read_rows(config.run_dir)[-1]["valid_forces_rmse"] < 0.3 * nothing
    assert "energy" not in checkpoint.read_metadata(config.run_dir / "best.safetensors")["errors"]


def test_no_labels_are_needed_and_the_run_continues_to_the_bit(
    configure: Configure, unlabelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "data": {"train": str(unlabelled), "valid": None, "augment": "rotations", "batch_size": 4},
        "denoising": {"sigma": [0.05, 0.1]},
        "schedule": {"max_epochs": 3},
    }
    with pytest.raises(ValueError, match="energies"):
        train(configure("labels", **{**options, "denoising": None}))
    whole, parts = whole_and_in_parts(configure, monkeypatch, (2, 3), options)
    assert_same_bits(whole.run_dir / STATE, parts.run_dir / STATE)
    assert (whole.run_dir / "config.yaml").read_text().count("kind: mse") == 1


def test_a_training_with_labels_starts_from_it(
    configure: Configure, unlabelled: Path, copper: Path
) -> None:
    first = configure(
        "first",
        data={"train": str(unlabelled), "valid": None},
        denoising={"sigma": 0.05},
        schedule={"max_epochs": 2},
    )
    best = train(first)
    with pytest.warns(UserWarning, match="pre-trained .denoising.*init_from"):
        EqCalculator(best)
    with pytest.warns(UserWarning, match="pre-trained .denoising.*init_from"):
        evaluate_files(best, [copper / "test.h5"], device="cpu")
    frozen = {"lr": 1e-30, "muon_lr": 1e-30, "weight_decay": 0.0, "ema_decay": None}
    second = configure("second", init_from=str(best), optimizer=frozen, schedule={"max_epochs": 1})
    a, b = checkpoint.load(best), checkpoint.load(train(second))
    assert "objective" not in b.metadata["training"]
    for key, value in a.model.state_dict().items():
        torch.testing.assert_close(b.model.state_dict()[key], value, rtol=0, atol=1e-20)
    # The constant that denoising leaves open is fitted: energies are unbiased from the start.
    data = HDF5Dataset(copper / "train.h5", 3.6)
    errors = [
        float((b(g)["energy"] - g.energy) / len(g.positions))
        for g in (data[k] for k in range(len(data)))
    ]
    assert abs(np.mean(errors)) < 0.05
    assert b.cohesion is not None and b.scale == a.scale
