"""Evaluation that does not depend on the modes of the program around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

IMPORTED_BY = os.getpid()


@contextmanager
def shielded(device: torch.device) -> Iterator[None]:
    """Evaluate as if the caller had set nothing: his modes would leave no gradients, or coarse
    ones."""
    threads = torch.get_num_threads()
    # The threads of OpenMP do not survive a fork: a child that waited for them would wait for ever.
    orphan = threads > 1 and os.getpid() != IMPORTED_BY
    if orphan:
        torch.set_num_threads(1)
    try:
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.type):
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                yield
        else:  # nothing to undo
            yield
    finally:
        if orphan:
            torch.set_num_threads(threads)
