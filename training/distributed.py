"""Data-parallel training under ``torchrun``: sums over processes, and nothing else.

Every average of the package is (sum over all processes) / (count over all processes), so batches
may be ragged and the gradient is that of one process with the union of the batches.  Gradients are
summed after ``backward`` in one flat buffer; there is no module wrapper, hence nothing that second
derivatives or unused parameters could upset. In a single process all functions return their
argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(
    minutes=30
)  # a process that died is noticed at once, this is for one that hangs


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the other processes if ``torchrun`` started this one; gives the device of this process.

    Parameters
    ----------
    device : "auto", "cpu", "cuda" or "cuda:1"; each process of a node takes its own GPU
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device '{device}': torch sees no GPU here; take device cpu or auto")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        place = torch.device(device)
        # What takes the GPU in use, such as page-locked memory, takes this one.
        with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
            yield place
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if device.startswith("cuda") else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield place
    finally:
        dist.destroy_process_group()


def all_sum(values: Tensor) -> Tensor:
    """Sum over processes; no gradient flows through it."""
    if world_size() == 1:
        return values.detach()
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def all_max(values: Iterable[float], device: torch.device) -> list[float]:
    """Largest of each number over processes: all of them then decide alike."""
    values = list(values)
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def gathered(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """The tensor of each process, in the order of ranks; shapes must agree."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor, device=device) for _ in range(world_size())]
    dist.all_gather(parts, tensor.to(device))
    return [part.to(tensor.device) for part in parts]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over processes; a missing one counts as zero."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of the first process."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def barrier() -> None:
    """Wait for the other processes."""
    if world_size() > 1:
        dist.barrier()
