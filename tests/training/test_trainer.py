"""Laws of the training: it learns, continues to the bit, survives kills, says what went wrong."""

from __future__ import annotations

import importlib.machinery
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlip import checkpoint
from mlip.evaluation.evaluate import evaluate_file
from mlip.training.config import TrainConfig
from mlip.training.log import read_rows
from mlip.training.run import train
from mlip.training.trainer import BEST, LAST, STATE, DivergenceError, Interrupted, Trainer
from tests.training.conftest import (
    SMALL,
    assert_same_bits,
    log_without_times,
    same_bits,
    tensors,
    train_in_parts,
    write_copper,
)

Configure = Callable[..., TrainConfig]

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw cosine ema stages": {"loss": {"stage_two": {"start": 0.5, "energy": 20}}},
    "muon plateau augmentation workers": {
        "optimizer": {"name": "muon", "amsgrad": True},
        "schedule": {"kind": "plateau", "plateau_patience": 1, "max_epochs": 3},
        "data": {"augment": "rotations", "num_workers": 1},
    },
    "float32 without ema, up to 12 atoms": {
        "precision": {"dtype": "float32"},
        "optimizer": {"ema_decay": None},
        "data": {"batch_size": None, "max_atoms": 12},
    },
}


def test_it_fits_four_frames(configure: Configure, tmp_path: Path) -> None:
    data = write_copper(tmp_path / "four.h5", 4, seed=3)
    config = configure(
        data={"train": str(data), "valid": str(data), "batch_size": 4},
        model={"size": "small", "cutoff": 3.6},
        schedule={"max_epochs": 300, "valid_every": 300},
        optimizer={"lr": 0.002},
        precision={"dtype": "float32"},
    )
    errors = evaluate_file(checkpoint.load(train(config)), data).total
    assert errors["forces"]["mae"] < 0.005


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_continued_run_is_identical_to_the_bit(
    variant: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = configure("whole", **VARIANTS[variant])
    parts = configure("parts", **VARIANTS[variant], resume="auto")
    train(whole)
    # In the midst of an epoch, after its last step, and after its validation.
    steps = len(read_rows(whole.run_dir)) and read_rows(whole.run_dir)[0]["step"]
    train_in_parts(parts, monkeypatch, (2, steps, steps + 1))
    for name in (STATE, BEST, LAST):
        assert_same_bits(whole.run_dir / name, parts.run_dir / name)
    assert log_without_times(whole) == log_without_times(parts)


def test_a_signal_during_validation_repeats_the_validation(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = configure("whole"), configure("parts", resume="auto")
    train(whole)
    import mlip.training.trainer as module

    evaluate = module.evaluate

    def stopping(*args: Any, **kwargs: Any) -> Any:
        trainer.signals.received = signal.SIGINT
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        init = Trainer.__init__

        def keep(self: Trainer, *args: Any, **kwargs: Any) -> None:
            nonlocal trainer
            init(self, *args, **kwargs)
            trainer = self

        trainer: Any = None
        patch.setattr(Trainer, "__init__", keep)
        patch.setattr(module, "evaluate", stopping)
        with pytest.raises(Interrupted) as stopped:
            train(parts)
    assert stopped.value.code == 130
    train(parts)
    assert_same_bits(whole.run_dir / STATE, parts.run_dir / STATE)


def test_extending_a_finished_run(configure: Configure) -> None:
    schedule = {"kind": "constant", "warmup": 0.0}
    train(configure("short", schedule={**schedule, "max_epochs": 1}))
    longer = configure("short", schedule={**schedule, "max_epochs": 3}, resume="must")
    whole = configure("whole", schedule={**schedule, "max_epochs": 3})
    train(longer)
    train(whole)
    assert_same_bits(whole.run_dir / STATE, longer.run_dir / STATE)


def test_reported_errors_are_those_of_the_saved_model(configure: Configure, copper: Path) -> None:
    config = configure(data={"test": str(copper / "test.h5")})
    best = train(config)
    potential = checkpoint.load(best)
    rows = [row for row in read_rows(config.run_dir) if row["valid_loss"] is not None]
    reported = min(rows, key=lambda row: row["valid_loss"])
    found = evaluate_file(potential, copper / "valid.h5").total
    for quantity in ("energy", "forces", "stress"):
        for kind in ("mae", "rmse"):
            assert reported[f"valid_{quantity}_{kind}"] == pytest.approx(
                found[quantity][kind], abs=1e-10
            )
    metadata = checkpoint.read_metadata(best)
    assert metadata["errors"]["valid"]["forces MAE / meV/Å"] == pytest.approx(
        1000 * found["forces"]["mae"], rel=1e-3
    )
    assert metadata["level_of_theory"] == "EMT"
    assert metadata["errors"].keys() == {"train", "valid", "test"}
    assert potential.elements == [29]


def test_model_file_has_averaged_and_state_raw_weights(configure: Configure) -> None:
    config = configure(schedule={"max_epochs": 1}, optimizer={"ema_decay": 0.9})
    train(config)
    state = tensors(config.run_dir / STATE)
    last = checkpoint.load(config.run_dir / LAST)
    for k, (name, p) in enumerate(last.named_parameters()):
        assert torch.equal(p.detach(), state[f"ema.{k}"])
        raw = state[f"potential.{name}"]
        assert p.numel() < 4 or not torch.equal(p.detach(), raw)


def test_divergence_names_step_and_frames_and_leaves_the_best(configure: Configure) -> None:
    config = configure(schedule={"kind": "constant", "warmup": 0.0, "max_epochs": 1})
    train(config)
    before = {name: (config.run_dir / name).read_bytes() for name in (BEST, STATE)}
    wild = configure(
        schedule={"kind": "constant", "warmup": 0.0, "max_epochs": 2},
        optimizer={"lr": 1e6},
        resume="must",
    )
    with pytest.raises(DivergenceError, match=r"step \d+ \(epoch 2\).*frames \d+, .*train\.h5"):
        train(wild)
    for name, content in before.items():
        assert (config.run_dir / name).read_bytes() == content
    checkpoint.load(config.run_dir / BEST)


def test_a_full_disk_leaves_the_last_state(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(schedule={"kind": "constant", "max_epochs": 1}))
    config = configure(schedule={"kind": "constant", "max_epochs": 2}, resume="must")
    state, best = tensors(config.run_dir / STATE), (config.run_dir / BEST).read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            train(config)
    after = tensors(config.run_dir / STATE)
    assert all(same_bits(state[name], after[name]) for name in state)
    assert (config.run_dir / BEST).read_bytes() == best
    train(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_a_run_that_then_continues_exactly(
    number: signal.Signals, configure: Configure, spawn: Any
) -> None:
    endless = {"schedule": {"kind": "constant", "warmup": 0.0, "max_epochs": 100000}}
    often = {"runtime": {"save_interval": 0.02, "tune_allocator": False, "device": "cpu"}}
    parts = configure("parts", **endless, **often)
    child = spawn(train, parts)
    deadline = time.monotonic() + 60
    while len(read_rows(parts.run_dir)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    start = time.monotonic()
    os.kill(child.pid, number)
    child.join(30)
    assert time.monotonic() - start < 10
    expected = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert child.exitcode == expected
    checkpoint.load(parts.run_dir / BEST)
    checkpoint.load(parts.run_dir / LAST)
    epoch = checkpoint.read_tensors(parts.run_dir / STATE)[1]["epoch"] + 1
    schedule = {"kind": "constant", "warmup": 0.0, "max_epochs": epoch}
    train(configure("parts", schedule=schedule, resume="must"))
    train(configure("whole", schedule=schedule))
    assert_same_bits(parts.run_dir / STATE, parts.run_dir.parent / "whole" / STATE)
    text = (parts.run_dir / "log.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in text[1:]] == list(range(1, epoch + 1))


def test_a_time_limit_anneals_to_the_end(configure: Configure) -> None:
    config = configure(schedule={"max_epochs": None, "max_time": "1.5s"})
    start = time.monotonic()
    train(config)
    assert time.monotonic() - start < 10
    rates = [row["learning_rate"] for row in read_rows(config.run_dir)]
    assert len(rates) > 3
    assert rates[-1] < 0.05 * max(rates)
    assert rates[-1] == min(rates[1:])


def test_early_stop_and_sparse_validation(configure: Configure) -> None:
    config = configure(
        schedule={"max_epochs": 50, "early_stop": 2, "valid_every": 2, "kind": "constant"},
        optimizer={"lr": 1e-30, "weight_decay": 0, "ema_decay": None},
    )
    train(config)
    rows = read_rows(config.run_dir)
    losses = [row["valid_loss"] for row in rows if row.get("valid_loss") is not None]
    assert len(rows) == 6  # one validation that improves on nothing, and two that do not improve
    assert losses == [losses[0]] * 3


def test_run_folder_and_resume_rules(configure: Configure, copper: Path) -> None:
    with pytest.raises(ValueError, match="no saved state"):
        train(configure(resume="must"))
    config = configure(schedule={"max_epochs": 1}, logging={"plots": True, "tensorboard": True})
    train(config)
    names = {path.name for path in config.run_dir.iterdir()}
    assert names >= {"config.yaml", "log.csv", "log.jsonl", "errors.txt", "train.log"}
    assert names >= {"parity.png", "learning_curve.png", "tensorboard"}
    assert not any(name.endswith(".tmp") for name in names)
    (row,) = read_rows(config.run_dir)  # of a model that is exact up to float32
    assert 0 < row["valid_symmetry_forces_rms"] < 1e-4
    log = (config.run_dir / "train.log").read_text()
    assert f"symmetry E {1000 * row['valid_symmetry_energy_rms']:.2g} meV/atom" in log
    assert "valid: symmetry error (RMS over" in (config.run_dir / "errors.txt").read_text()
    with pytest.raises(ValueError, match=r"holds a training run.*--resume"):
        train(config)
    other = configure(model={**SMALL, "channels": 4}, schedule={"max_epochs": 1}, resume="auto")
    with pytest.raises(ValueError, match=r"model\.channels was 8, now 4"):
        train(other)


def test_wandb_gets_every_epoch_under_one_id(configure, monkeypatch) -> None:
    class Run:
        def __init__(self, **options) -> None:
            self.id = options["id"] or f"id-{len(runs)}"
            self.rows: list[dict] = []

        def log(self, row: dict, step: int) -> None:
            self.rows.append({**row, "step": step})

        def finish(self) -> None:
            pass

    runs: list[Run] = []

    def init(**options) -> Run:
        runs.append(Run(**options))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    logging = {"wandb": True, "plots": False}
    with pytest.raises(ValueError, match=r"pip install 'eqmlip\[wandb\]'"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        train(configure(schedule={"max_epochs": 1}, logging=logging))
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(configure(schedule={"max_epochs": 1}, logging=logging))
    train(configure(schedule={"max_epochs": 2}, logging=logging, resume="must"))
    assert [run.id for run in runs] == ["id-0"] * 2
    assert [row["step"] for run in runs for row in run.rows] == [1, 2]
    assert all(row["valid_forces_mae"] > 0 for run in runs for row in run.rows)


def test_saved_configuration_repeats_the_run(configure: Configure) -> None:
    from mlip.training.config import load_training

    first = configure("first")
    train(first)
    again = load_training(
        first.run_dir / "config.yaml", [f"run_dir={json.dumps(str(first.run_dir) + '2')}"]
    )
    assert again.model.model_dump()["avg_num_neighbors"] > 1
    train(again)
    assert_same_bits(first.run_dir / BEST, again.run_dir / BEST)


def test_unknown_element_in_validation_is_named(configure: Configure, tmp_path: Path) -> None:
    silver = write_copper(tmp_path / "silver.h5", 2, seed=0, element="Ag")
    with pytest.raises(ValueError, match=r"silver\.h5: frame 0 contains Ag"):
        train(configure(data={"valid": str(silver)}))


def test_duplicates_across_splits_are_reported(configure: Configure, copper: Path) -> None:
    config = configure(data={"valid": str(copper / "train.h5")}, schedule={"max_epochs": 1})
    train(config)
    assert "14 duplicates across data sets" in (config.run_dir / "train.log").read_text()


def test_isolated_atoms_give_reference_energies_only(configure: Configure, tmp_path: Path) -> None:
    from mlip.data.hdf5 import HDF5Writer

    rng = np.random.default_rng(0)
    with HDF5Writer(tmp_path / "atoms.h5") as file:
        none = (np.zeros((3, 3)), np.zeros(3, dtype=bool))
        file.append(np.array([29]), np.zeros((1, 3)), *none, energy=-7.25)
        for _ in range(6):
            x = np.array([[0, 0, 0], [2.2, 0, 0], [0, 2.2, 0]]) + 0.1 * rng.normal(size=(3, 3))
            file.append(np.full(3, 29), x, *none, energy=-22.0, forces=rng.normal(size=(3, 3)))
    config = configure(
        data={"train": str(tmp_path / "atoms.h5"), "valid": None, "valid_fraction": 0.3},
        schedule={"max_epochs": 1},
    )
    potential = checkpoint.load(train(config))
    assert float(potential.e0[29]) == -7.25
    assert potential.metadata["training"]["structures"] == 4
