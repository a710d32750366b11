"""Augmentation: callables (graph, generator) -> graph; the generator is seeded by (seed, epoch,
frame)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mlip.data.graph import AtomicGraph
from mlip.data.neighbors import neighbor_list

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


def random_rotations(
    num: int, *, reflect: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """(num, 3, 3) float64, uniform over O(3), or over SO(3) without ``reflect``.

    Without a generator the numbers are those of torch's own, whose state a training saves.
    """
    q = nn.functional.normalize(torch.randn(num, 4, generator=generator, dtype=torch.float64))
    w, v = q[:, 0, None, None], q[:, 1:]
    # R = (w^2 - v^2) 1 + 2 v v^T + 2 w [v]x
    cross = torch.linalg.cross(v[:, None], torch.eye(3, dtype=q.dtype)[None]).mT
    R = (
        (2 * w * w - 1) * torch.eye(3, dtype=q.dtype)
        + 2 * v[:, :, None] * v[:, None]
        + 2 * w * cross
    )
    if reflect:
        sign = torch.randint(2, (num, 1, 1), generator=generator)
        R = R * (2 * sign - 1)
    return R


def rotated_each(graph: AtomicGraph, R: Tensor) -> AtomicGraph:
    """Copy in which structure k and its labels are rotated by ``R[k]`` (G, 3, 3)."""
    of_atom = R.index_select(0, graph.batch)  # (N, 3, 3)
    new = {
        "positions": (of_atom @ graph.positions[:, :, None])[:, :, 0],
        "cell": graph.cell @ R.mT,
    }
    if "vectors" in graph:
        of_edge = of_atom.index_select(0, graph.edge_index[1]).to(graph.vectors.dtype)
        new["vectors"] = (of_edge @ graph.vectors[:, :, None])[:, :, 0]
    if "forces" in graph:
        new["forces"] = (of_atom @ graph.forces[:, :, None])[:, :, 0]
    if "field" in graph:
        new["field"] = (R @ graph.field[:, :, None])[:, :, 0]
    if "stress" in graph:
        new["stress"] = R @ graph.stress @ R.mT
    return graph.replace(**new)


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


class RandomReflection:
    """Mirror a structure and its labels, with probability 1/2, at a plane of random direction."""

    def __call__(self, graph: AtomicGraph, generator: torch.Generator) -> AtomicGraph:
        n = nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0)
        if torch.rand((), generator=generator) < 0.5:
            return graph
        return graph.rotated(torch.eye(3, dtype=n.dtype) - 2 * torch.outer(n, n))


class RandomDisplacement:
    """Displace all atoms by Gaussian noise; labels become the forces that undo it.

    r -> r + d with d = sigma normal(0, 1) without its mean over atoms, F = -energy d / sigma^2;
    energy and stress are NaN.  Neighbours are searched anew.

    Parameters
    ----------
    sigmas : angstrom; of each structure one of them, at random
    energy : eV
    cutoff : angstrom
    """

    def __init__(self, sigmas: Sequence[float], energy: float, cutoff: float) -> None:
        self.sigmas, self.energy, self.cutoff = tuple(sigmas), energy, cutoff

    def __call__(self, graph: AtomicGraph, generator: torch.Generator) -> AtomicGraph:
        sigma = self.sigmas[int(torch.randint(len(self.sigmas), (), generator=generator))]
        noise = torch.randn(graph.positions.shape, generator=generator, dtype=torch.float64)
        d = sigma * (noise - noise.mean(dim=0))
        positions = graph.positions + d
        edges, shifts = neighbor_list(
            positions.numpy(), graph.cell[0].numpy(), graph.pbc[0].numpy(), self.cutoff
        )
        return graph.replace(
            positions=positions,
            edge_index=torch.from_numpy(edges),
            cell_shifts=torch.from_numpy(shifts),
            forces=-self.energy / sigma**2 * d,
            energy=torch.full_like(graph.energy, torch.nan),
            stress=torch.full_like(graph.stress, torch.nan),
        )


class SeveralViews:
    """Show each structure ``num`` times, each time transformed anew: a graph of ``num``
    structures."""

    def __init__(self, transform: Transform, num: int) -> None:
        self.transform, self.num = transform, num

    def __call__(self, graph: AtomicGraph, generator: torch.Generator) -> AtomicGraph:
        views = [self.transform(graph, generator) for _ in range(self.num)]
        return AtomicGraph.collate(views)


class Compose:
    """Several transforms, first to last."""

    def __init__(self, *transforms: Transform) -> None:
        self.transforms = transforms

    def __call__(self, graph: AtomicGraph, generator: torch.Generator) -> AtomicGraph:
        for transform in self.transforms:
            graph = transform(graph, generator)
        return graph
