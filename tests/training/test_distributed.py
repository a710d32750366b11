"""Two processes do what one does, and end together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential
from mlip.training import distributed
from mlip.training.config import LossConfig, TrainConfig
from mlip.training.log import read_rows
from mlip.training.loss import Objective
from mlip.training.trainer import BEST, STATE
from tests.training.conftest import (
    SMALL,
    alone_and_in_two_processes,
    assert_same_bits,
    free_port,
    tensors,
    train_in_group,
    train_in_two_processes,
)

Configure = Callable[..., TrainConfig]


def gradients(data: Path, frames: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat gradient and loss of a batch, summed over processes."""
    torch.manual_seed(0)
    potential = Potential(build("facet", **SMALL), torch.zeros(119)).double().train()
    dataset = HDF5Dataset(data, potential.cutoff)
    graph = AtomicGraph.collate([dataset[k] for k in frames])
    objective = Objective.from_config(LossConfig(kind="mse"))
    loss = objective(potential, graph, potential(graph, stress=True))
    loss.backward()
    parameters = list(potential.parameters())
    distributed.sum_gradients(parameters)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return flat, distributed.all_sum(loss)


def gradients_in_group(
    data: Path, frames: list[list[int]], rank: int, port: int, out: Path
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(frames)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with distributed.process_group("cpu"):
        flat, loss = gradients(data, frames[rank])
    from safetensors.torch import save_file

    save_file({"gradients": flat, "loss": loss}, out / f"{rank}.safetensors")


@pytest.mark.parametrize("frames", [[[0, 1], [2, 3]], [[0, 3, 6], [1]]], ids=["even", "ragged"])
def test_gradients_of_two_processes_are_those_of_one(
    frames: list[list[int]], copper: Path, tmp_path: Path, spawn: Any
) -> None:
    port = free_port()
    data = copper / "train.h5"  # frames 0, 3, 6 have no stress, so that counts differ as well
    children = [spawn(gradients_in_group, data, frames, r, port, tmp_path) for r in range(2)]
    flat, loss = gradients(data, [*frames[0], *frames[1]])
    for rank, child in enumerate(children):
        child.join(60)
        assert child.exitcode == 0
        from safetensors.torch import load_file

        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.allclose(found["gradients"], flat, rtol=0, atol=1e-10)
        assert float(found["loss"]) == pytest.approx(float(loss), abs=1e-12)
    assert flat.abs().max() > 1e-3


def test_a_run_of_two_processes_equals_that_of_one_and_continues(
    configure: Configure, spawn: Any
) -> None:
    # 12 training structures: no ragged last batch, which two processes divide in another way.
    sections: dict[str, Any] = {
        "data": {"valid": None, "valid_fraction": 2 / 14, "batch_size": 4},
        "schedule": {"max_epochs": 2},
        "runtime": {"device": "cpu", "tune_allocator": False, "save_interval": 1e-6},
    }
    one, two = alone_and_in_two_processes(configure, spawn, sections)
    a, b = tensors(one.run_dir / BEST), tensors(two.run_dir / BEST)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-9, equal_nan=True), name
    for x, y in zip(read_rows(one.run_dir), read_rows(two.run_dir), strict=True):
        for key in x.keys() - {"seconds"}:
            assert x[key] == pytest.approx(y[key], abs=1e-9), key


def test_a_signal_stops_all_processes_and_they_continue(configure: Configure, spawn: Any) -> None:
    sections: dict[str, Any] = {"data": {"batch_size": 2}, "seed": 5}
    constant = {"kind": "constant", "warmup": 0.0}
    parts = configure("parts", **sections, schedule={**constant, "max_epochs": 10000})
    train_in_two_processes(parts, spawn, signal.SIGTERM, 143)
    from mlip import checkpoint

    epoch = checkpoint.read_tensors(parts.run_dir / STATE)[1]["epoch"] + 1
    schedule = {**constant, "max_epochs": epoch}
    again = configure("parts", **sections, schedule=schedule, resume="must")
    train_in_two_processes(again, spawn)
    whole = configure("whole", **sections, schedule=schedule)
    train_in_two_processes(whole, spawn)
    assert_same_bits(parts.run_dir / BEST, whole.run_dir / BEST)


def test_a_killed_process_ends_the_other(configure: Configure, spawn: Any) -> None:
    config = configure(schedule={"max_epochs": 100000})
    port = free_port()
    children = [spawn(train_in_group, config, rank, 2, port) for rank in range(2)]
    deadline = time.monotonic() + 60
    while not read_rows(config.run_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    children[1].kill()
    start = time.monotonic()
    children[0].join(60)
    assert time.monotonic() - start < 60
    assert children[0].exitcode not in (0, None)


def test_a_batch_that_cannot_be_shared_is_rounded_up(configure: Configure, spawn: Any) -> None:
    odd = configure("odd", data={"batch_size": 3}, schedule={"max_epochs": 2})
    even = configure("even", data={"batch_size": 4}, schedule={"max_epochs": 2})
    for config in (odd, even):
        train_in_two_processes(config, spawn)
    assert_same_bits(odd.run_dir / BEST, even.run_dir / BEST)
    assert "batch_size=3 cannot be shared by 2 processes, taking 4" in (
        odd.run_dir / "train.log"
    ).read_text(encoding="utf-8")
    assert "cannot be shared" not in (even.run_dir / "train.log").read_text(encoding="utf-8")
