"""Learning curves are found, budgets go where the gain is, and a weighted run continues exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlip.data.dataset import HDF5Dataset
from mlip.data.loader import GraphLoader, systematic_sample
from mlip.training.config import TrainConfig
from mlip.training.log import read_rows
from mlip.training.run import train
from mlip.training.sampling import (
    AdaptiveSampling,
    LearningCurves,
    allot,
    fit_power_law,
    members,
)
from mlip.training.sampling_config import SamplingConfig
from mlip.training.trainer import BEST, LAST, STATE
from tests.training.conftest import (
    alone_and_in_two_processes,
    assert_same_bits,
    log_without_times,
    tensors,
    whole_and_in_parts,
    write_copper,
)

Configure = Callable[..., TrainConfig]


@pytest.mark.parametrize(("a", "b", "c"), [(0.3, 0.5, 0.1), (0.2, 1.2, 0.0), (0.05, 0.2, 0.01)])
def test_a_power_law_is_found(a: float, b: float, c: float) -> None:
    n = np.arange(1, 31) * 100.0
    error = a * (n / n[-1]) ** -b + c
    found = fit_power_law(n, error)
    curve = found[0] * (n / n[-1]) ** -found[1] + found[2]
    assert np.abs(curve / error - 1).max() < 0.02  # the exponents are a grid
    assert found[0] * found[1] == pytest.approx(a * b, rel=0.05)  # the gain at the end
    noisy = error * np.exp(0.05 * np.random.default_rng(0).normal(size=len(n)))
    found = fit_power_law(n, noisy)
    assert found[0] * found[1] == pytest.approx(a * b, rel=0.6)
    assert min(found) >= 0


def test_an_error_that_does_not_fall_has_no_gain() -> None:
    n = np.arange(1, 10.0)
    for error in (np.full(9, 0.3), np.linspace(0.1, 0.2, 9)):
        a, _, c = fit_power_law(n, error)
        assert a == 0 and c > 0.05


def curves() -> LearningCurves:
    columns = ((1000, 1000, 100), (0.3, 0.1, 0.3), (0.5, 0.5, 0.5), (0.1, 0.1, 0.0))
    return LearningCurves(*(np.array(column, dtype=float) for column in columns))


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_gains_are_equal_where_the_budget_goes(power: float) -> None:
    budget = 1000.0
    m = allot(curves(), budget, power)
    assert m.sum() == pytest.approx(budget, rel=1e-9) and (m >= 0).all()
    gain = curves().gain(curves().n + m, power)
    used = m > 1e-6 * budget
    assert np.ptp(gain[used]) < 1e-4 * gain[used].max()
    assert (gain[~used] <= gain[used].min() * (1 + 1e-6)).all()
    # No other division is better.
    best = (curves().error(curves().n + m) ** power).sum()
    for other in np.random.default_rng(0).dirichlet(np.ones(3), 50) * budget:
        assert (curves().error(curves().n + other) ** power).sum() >= best - 1e-12


def test_a_gain_is_the_derivative_and_power_favours_the_worst() -> None:
    c, h = curves(), 1e-3
    n = c.n * 1.3
    for power in (1.0, 3.0):
        slope = (c.error(n + h) ** power - c.error(n - h) ** power) / (2 * h * power)
        assert np.allclose(-slope, c.gain(n, power), rtol=1e-6)
    worst = int(c.error(c.n).argmax())
    assert allot(c, 1000.0, 8.0)[worst] > allot(c, 1000.0, 1.0)[worst]


def test_a_sample_has_its_expected_numbers() -> None:
    rng = np.random.default_rng(0)
    w = rng.random(50) * 3
    total = np.zeros(50)
    for _ in range(400):
        times = systematic_sample(w, rng)
        expected = w / w.sum() * 50
        assert times.sum() == 50
        assert (np.abs(times - expected) < 1 + 1e-9).all()
        total += times
    assert np.abs(total / 400 - expected).max() < 0.1


def test_weights_of_a_loader(copper: Path) -> None:
    dataset = HDF5Dataset(copper / "train.h5", 3.6)
    loaders = [GraphLoader(dataset, batch_size=4, shuffle=True, seed=3, rank=r, world_size=2)
               for r in (0, 1)]  # fmt: skip
    alone = GraphLoader(dataset, batch_size=4, shuffle=True, seed=3)
    plain = [alone.batches(), alone.times_shown(5).tolist()]
    assert plain[1] == [1] * 14
    weights = np.linspace(0, 2, 14)
    for loader in (*loaders, alone):
        loader.set_weights(weights)
    assert alone.times_shown(0)[0] == 0 and alone.times_shown(0)[-1] >= 1
    shown = [k for loader in loaders for batch in loader.batches() for k in batch]
    assert np.array_equal(np.bincount(shown, minlength=14), alone.times_shown(0))
    assert alone.batches() != plain[0]
    alone.set_weights(None)
    assert alone.batches() == plain[0]
    with pytest.raises(ValueError, match="finite"):
        alone.set_weights(np.full(14, np.nan))


def test_the_group_that_learns_is_shown_more(copper: Path) -> None:
    data = HDF5Dataset(copper / "train.h5", 3.6)
    sampling = AdaptiveSampling(SamplingConfig(first=3), data, data)
    assert sampling.names == ["bulk", "vacancy"]
    for k in range(1, 7):
        sampling.add_epoch(np.ones(14))
        sampling.update({"bulk": 0.1, "vacancy": 0.5 / k + 0.1})
        assert (sampling.weights == 1).all() == (k < 3)
    bulk, vacancy = sampling.weights
    assert bulk == pytest.approx(0.3) and vacancy == pytest.approx(0.3 + 0.7 * 2)
    assert sampling.of_structures().tolist() == [bulk, vacancy] * 7
    assert sampling.flat() == {"sampling_bulk": bulk, "sampling_vacancy": vacancy}


def test_elements_weigh_structures_by_their_atoms(tmp_path: Path) -> None:
    from ase.build import molecule

    from mlip.data.hdf5 import HDF5Writer

    with HDF5Writer(tmp_path / "a.h5") as file:
        for name in ("H2O", "CH4", "H2"):
            atoms = molecule(name)
            file.append(atoms.numbers, atoms.positions, np.zeros((3, 3)), atoms.pbc, energy=0.0)
    data = HDF5Dataset(tmp_path / "a.h5", 3.0)
    names, items = members(data, "element")
    assert names == ["H", "C", "O"] and items.tolist() == [[2, 0, 1], [4, 1, 0], [2, 0, 0]]
    sampling = AdaptiveSampling(SamplingConfig(by="element"), data, data)
    sampling.weights = np.array([1.0, 2.0, 4.0])
    assert sampling.of_structures() == pytest.approx([2, 1.2, 1])
    with pytest.raises(ValueError, match="1 of them"):
        AdaptiveSampling(SamplingConfig(), data, data)


def test_a_weighted_run_continues_to_the_bit(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "sampling": {"by": "config_type", "first": 3, "power": 4},
        "optimizer": {"ema_decay": 0.3, "lr": 0.02, "muon_lr": 0.02},
        "loss": {"stress": 0},
        "schedule": {"max_epochs": 7},
        "data": {"num_workers": 1},
    }
    # 4 steps an epoch; weights are first set after the third.
    whole, parts = whole_and_in_parts(configure, monkeypatch, (5, 16, 18), options)
    for name in (STATE, BEST, LAST):
        assert_same_bits(whole.run_dir / name, parts.run_dir / name)
    assert log_without_times(whole) == log_without_times(parts)
    rows = read_rows(whole.run_dir)
    assert rows[1]["sampling_bulk"] == 1 and rows[-1]["sampling_bulk"] != 1
    state = tensors(whole.run_dir / STATE)
    assert state["sampling.history"].shape == (7, 2, 2)
    assert int(state["sampling.shown"].sum()) == 7 * 14
    assert "sampling: " in (whole.run_dir / "train.log").read_text()


def test_two_processes_weigh_alike(configure: Configure, spawn: Any) -> None:
    options: dict[str, Any] = {
        "sampling": {"first": 3},
        "optimizer": {"ema_decay": 0.3, "lr": 0.02, "muon_lr": 0.02},
        "loss": {"kind": "mse", "stress": 0},
        "schedule": {"max_epochs": 5},
    }
    one, two = alone_and_in_two_processes(configure, spawn, options)
    a, b = (tensors(c.run_dir / STATE) for c in (one, two))
    assert not bool((a["sampling.weights"] == 1).all())
    for name in ("shown", "weights", "history"):
        x, y = a[f"sampling.{name}"], b[f"sampling.{name}"]
        assert torch.allclose(x, y, rtol=1e-6, atol=0)


def test_another_sampling_is_another_run(configure: Configure) -> None:
    train(configure(schedule={"max_epochs": 1}))
    with pytest.raises(ValueError, match="sampling was None"):
        train(configure(schedule={"max_epochs": 2}, sampling={}, resume="must"))


def test_worst_groups_are_in_the_final_tables(configure: Configure, copper: Path) -> None:
    config = configure(data={"test": str(copper / "test.h5")}, schedule={"max_epochs": 1})
    train(config)
    text = (config.run_dir / "errors.txt").read_text()
    assert text.count("worst forces MAE: config_type ") == 3  # train, valid, test
    assert text.count(", element Cu ") == 3
    assert text.count("worst energy MAE: config_type ") == 3


def test_sampling_by_what_is_not_there(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sampling.by=group: .*has 1 of them; .*--group-key"):
        train(configure(sampling={"by": "group"}))
    other = write_copper(tmp_path / "a.h5", 6, seed=5, element="Ag")
    both = {"train": str(other), "valid": str(other), "batch_size": 4}
    with pytest.raises(ValueError, match="1 of them"):
        train(configure(sampling={"by": "element"}, data=both))
