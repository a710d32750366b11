"""The state of a training as named tensors and JSON, for an exact continuation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlip.training.distributed import gathered, rank, world_size

FORMAT = 1


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """``{"optimizer.0.12.exp_avg": tensor}``: optimizer, parameter, entry."""
    return {
        f"optimizer.{k}.{number}.{key}": torch.as_tensor(value)
        for k, optimizer in enumerate(optimizers)
        for number, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def load_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``; learning rates and the like stay as configured."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            k, number, key = rest.split(".", 2)
            states[int(k)].setdefault(int(number), {})[key] = tensor.clone()
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """torch's random states of all processes, (W, bytes); every process has to call this."""
    found = {"rng.cpu": torch.stack(gathered(torch.get_rng_state(), device))}
    if device.type == "cuda":
        found["rng.cuda"] = torch.stack(gathered(torch.cuda.get_rng_state(device), device))
    return found


def load_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set this process's random states."""
    if len(tensors["rng.cpu"]) != world_size():
        return
    torch.set_rng_state(tensors["rng.cpu"][rank()].clone())
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"][rank()].clone(), device)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names with ``prefix.`` in front."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``prefixed``."""
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old, now new`` for entries of two nested tables that differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [f"{key}.{text}" for text in differences(a, b)]
        elif a != b:
            found.append(f"{key} was {a}, now {b}")
    return found
