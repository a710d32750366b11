"""A small labelled data set, and runs on it in this process or in children."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT

from mlip import checkpoint
from mlip.data.hdf5 import HDF5Writer
from mlip.training.config import TrainConfig, parse_training
from mlip.training.log import read_rows
from mlip.training.run import train
from mlip.training.trainer import Interrupted, Trainer

SMALL = {"cutoff": 3.6, "channels": 8, "num_layers": 1, "lmax": 1, "num_basis": 4, "hidden": 8}


def write_copper(path: Path, num: int, seed: int, element: str = "Cu") -> Path:
    """Strained, rattled copper with EMT's labels; two config types; stress on two of three."""
    rng = np.random.default_rng(seed)
    with HDF5Writer(path, {"level_of_theory": "EMT"}) as file:
        for k in range(num):
            atoms = bulk(element, cubic=True)
            if k % 2:
                del atoms[0]
            atoms.set_cell(
                atoms.cell @ (np.eye(3) + 0.02 * rng.normal(size=(3, 3))), scale_atoms=True
            )
            atoms.positions += 0.08 * rng.normal(size=atoms.positions.shape)
            atoms.calc = EMT()
            file.append(
                atoms.numbers,
                atoms.positions,
                np.array(atoms.cell),
                atoms.pbc,
                energy=atoms.get_potential_energy(),
                forces=atoms.get_forces(),
                stress=atoms.get_stress(voigt=False) if k % 3 else None,
                config_type="vacancy" if k % 2 else "bulk",
            )
    return path


@pytest.fixture(scope="session")
def copper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train.h5`` (14 frames), ``valid.h5`` (5) and ``test.h5`` (4)."""
    folder = tmp_path_factory.mktemp("copper")
    for name, num, seed in (("train", 14, 0), ("valid", 5, 1), ("test", 4, 2)):
        write_copper(folder / f"{name}.h5", num, seed)
    return folder


@pytest.fixture
def configure(copper: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Make a configuration: ``configure("run", data={"batch_size": 2}, seed=1)``."""

    def make(name: str = "run", **sections: Any) -> TrainConfig:
        content: dict[str, Any] = {
            "run_dir": str(tmp_path / name),
            "data": {
                "train": str(copper / "train.h5"),
                "valid": str(copper / "valid.h5"),
                "batch_size": 4,
            },
            "model": SMALL,
            "schedule": {"max_epochs": 3},
            "precision": {"dtype": "float64"},
            "runtime": {"tune_allocator": False, "device": "cpu"},
            "logging": {"plots": False},
        }
        for key, value in sections.items():
            old = content.get(key)
            merge = isinstance(old, dict) and key != "model"
            content[key] = {**old, **value} if merge else value
        return parse_training(content)

    return make


@pytest.fixture
def spawn() -> Any:
    """Start a function in a forked child, which need not import torch anew; ended with the test."""
    children: list[BaseProcess] = []

    def start(function: Callable[..., None], *args: Any) -> BaseProcess:
        child = multiprocessing.get_context("fork").Process(target=function, args=args)
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()


def alone_and_in_two_processes(
    configure: Callable[..., TrainConfig], spawn: Any, sections: dict[str, Any]
) -> tuple[TrainConfig, TrainConfig]:
    """The same training by one process and by two; both are finished."""
    one, two = configure("one", **sections), configure("two", **sections)
    train_in_two_processes(two, spawn)
    train(one)
    return one, two


def train_in_two_processes(
    config: TrainConfig, spawn: Any, number: signal.Signals | None = None, code: int = 0
) -> None:
    """``train`` in two children, which end with this code; a signal, if one is given, goes to the
    second of them once an epoch is done."""
    port = free_port()
    children = [spawn(train_in_group, config, rank, 2, port) for rank in range(2)]
    if number is not None:
        deadline = time.monotonic() + 60
        while not read_rows(config.run_dir) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(children[1].pid, number)
    for child in children:
        child.join(300)
        assert child.exitcode == code


def whole_and_in_parts(
    configure: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    steps: Sequence[int],
    sections: dict[str, Any],
) -> tuple[TrainConfig, TrainConfig]:
    """The same training at once, and stopped by SIGTERM at these steps and continued."""
    whole, parts = configure("whole", **sections), configure("parts", **sections, resume="auto")
    train(whole)
    train_in_parts(parts, monkeypatch, steps)
    return whole, parts


def train_in_parts(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]
) -> None:
    """Train, stopped by SIGTERM at these steps and continued."""
    for step in steps:
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(Interrupted) as stopped:
                train(config)
        assert stopped.value.code == 143
    train(config)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if SIGTERM came during this step."""
    agree = Trainer._agree

    def stopping(self: Trainer) -> None:
        if self.step == step:
            self.signals.received = signal.SIGTERM
        agree(self)

    monkeypatch.setattr(Trainer, "_agree", stopping)


def log_without_times(config: TrainConfig) -> list[dict[str, Any]]:
    """Rows of the log without the times, which no two runs share."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(config.run_dir)]


def train_in_group(config: TrainConfig, rank: int, size: int, port: int) -> None:
    """``train`` as one of several processes, as ``torchrun`` would start it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    train(config)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file, checksum verified."""
    return checkpoint.read_tensors(path)[0]


def assert_same_bits(a: Path, b: Path) -> None:
    """Both files hold the same tensors to the bit."""
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    assert not [name for name in x if not same_bits(x[name], y[name])]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality for which NaN equals NaN and 0 is not -0."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and a.numpy().tobytes() == b.numpy().tobytes()
