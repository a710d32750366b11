"""Augmentation: callables (graph, generator) -> graph; the generator is seeded by (seed, epoch,
frame)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlip.data.graph import AtomicGraph

Transform = Callable[[AtomicGraph, torch.Generator], AtomicGraph]


def random_rotation(generator: torch.Generator) -> Tensor:
    """Rotation matrix (3, 3) float64, uniform over SO(3): a unit quaternion uniform on the sphere
    S^3."""
    q = torch.randn(4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm()).tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


class RandomRotation:
    """Rotate a structure and its labels at random.

    Parameters
    ----------
    reflect : also mirror it, with probability 1/2: uniform over O(3) instead of SO(3)
    """

    def __init__(self, reflect: bool = True) -> None:
        self.reflect = reflect

    def __call__(self, graph: AtomicGraph, generator: torch.Generator) -> AtomicGraph:
        R = random_rotation(generator)
        if self.reflect and torch.rand((), generator=generator) < 0.5:
            R = -R
        return graph.rotated(R)


class Compose:
    """Several transforms, first to last."""

    def __init__(self, *transforms: Transform) -> None:
        self.transforms = transforms

    def __call__(self, graph: AtomicGraph, generator: torch.Generator) -> AtomicGraph:
        for transform in self.transforms:
            graph = transform(graph, generator)
        return graph
