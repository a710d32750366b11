"""Orbits: a structure under a group, as images on which a symmetric potential must agree.

An image is the structure seen otherwise: rotated, mirrored, shifted, renumbered, or, for a crystal,
described by another cell.  It knows the way back: forces f' of the image become

    f_i = (1/|a(i)|) sum_{k in a(i)} R^T f'_k,        a(i) = atoms of the image that are atom i,

and energies are compared per atom, so that supercells take part.  Each orbit is a grid with weights
that sum to one.  On rotations the grid integrates the Wigner matrices exactly up to degree
``min(2 polar - 1, azimuth - 1, spin - 1)``: Gauss-Legendre in cos(theta), uniform in both angles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from ase.geometry import minkowski_reduce
from torch import Tensor

from mlip.data.graph import AtomicGraph

GEOMETRY = ("atomic_numbers", "positions", "cell", "pbc", "edge_index", "cell_shifts", "batch")
# Directions without a symmetry of their own: along an axis, errors may vanish by accident.
GENERIC = np.array([0.462, 0.727, 0.508]) / math.sqrt(0.462**2 + 0.727**2 + 0.508**2)


class Image(NamedTuple):
    """One element of an orbit."""

    graph: AtomicGraph
    R: Tensor  # (3, 3) orthogonal, from the structure to the image
    atoms: Tensor  # (copies, N): which atoms of the image are atom i


class Orbit(Protocol):
    """A group, or a part of it, on a grid of T points."""

    @property
    def name(self) -> str:
        """Under which it is asked for."""

    @property
    def kind(self) -> str:
        """Of its picture: "sphere", "curve" or "list"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid; its product is T."""

    @property
    def weights(self) -> np.ndarray:
        """(T,), sum 1."""

    def coordinates(self) -> dict[str, np.ndarray]:
        """Axes of the grid, for plots and files; angles in degrees, lengths in angstrom."""

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        """T images of one structure, None where there is none."""


def bare(graph: AtomicGraph) -> AtomicGraph:
    """The structure without labels: what a model may see."""
    keys = (*GEOMETRY, "ptr", *(key for key in ("charge", "spin") if key in graph))
    return AtomicGraph(**{key: graph[key] for key in keys}, num_nodes=len(graph.positions))


def rotation_z(angle: float) -> Tensor:
    """(3, 3) rotation about z by ``angle``, rad."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def rotation_y(angle: float) -> Tensor:
    """(3, 3) rotation about y by ``angle``, rad."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]], dtype=torch.float64)


def mirror(normal: np.ndarray) -> Tensor:
    """(3, 3) reflection at the plane with this unit normal."""
    n = torch.as_tensor(normal, dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) - 2 * torch.outer(n, n)


def directions(polar: int, azimuth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grid of the sphere: theta (polar,), phi (azimuth,) in rad and weights (polar,) of the
    rings."""
    x, w = np.polynomial.legendre.leggauss(polar)
    return np.arccos(x[::-1]), 2 * np.pi * np.arange(azimuth) / azimuth, w[::-1] / 2


def _same_atoms(graph: AtomicGraph) -> Tensor:
    return torch.arange(len(graph.positions))[None]


@dataclass(frozen=True)
class Rotations:
    """SO(3): the structure's z axis points to (theta, phi), after a turn by the spin angle about
    itself."""

    polar: int = 10
    azimuth: int = 20
    spin: int = 6
    name: str = field(default="rotations", init=False)
    kind: str = field(default="sphere", init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.polar, self.azimuth, self.spin

    @property
    def weights(self) -> np.ndarray:
        w = directions(self.polar, self.azimuth)[2]
        return np.repeat(w, self.azimuth * self.spin) / (self.azimuth * self.spin)

    def coordinates(self) -> dict[str, np.ndarray]:
        theta, phi, _ = directions(self.polar, self.azimuth)
        spin = 360.0 * np.arange(self.spin) / self.spin
        return {"theta": np.degrees(theta), "phi": np.degrees(phi), "spin": spin}

    def matrices(self) -> Iterator[Tensor]:
        """R = Rz(phi) Ry(theta) Rz(spin), in the order of the grid."""
        theta, phi, _ = directions(self.polar, self.azimuth)
        for t in theta.tolist():
            for p in phi.tolist():
                tilt = rotation_z(p) @ rotation_y(t)
                for k in range(self.spin):
                    yield tilt @ rotation_z(2 * math.pi * k / self.spin)

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        atoms = _same_atoms(graph)
        for R in self.matrices():
            yield Image(graph.rotated(R), R, atoms)


@dataclass(frozen=True)
class Reflections:
    """Mirror planes by the direction (theta, phi) of their normal; n and -n are one plane."""

    polar: int = 10
    azimuth: int = 20
    name: str = field(default="reflections", init=False)
    kind: str = field(default="sphere", init=False)

    def __post_init__(self) -> None:
        if self.azimuth % 2:
            raise ValueError(f"azimuth must be even, got {self.azimuth}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Half of the meridians: the other half are the same planes."""
        return self.polar, self.azimuth // 2

    @property
    def weights(self) -> np.ndarray:
        w = directions(self.polar, self.azimuth)[2]
        return np.repeat(w, self.azimuth // 2) / (self.azimuth // 2)

    def coordinates(self) -> dict[str, np.ndarray]:
        theta, phi, _ = directions(self.polar, self.azimuth)
        return {"theta": np.degrees(theta), "phi": np.degrees(phi[: self.azimuth // 2])}

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        atoms = _same_atoms(graph)
        theta, phi, _ = directions(self.polar, self.azimuth)
        for t in theta:
            for p in phi[: self.azimuth // 2]:
                R = mirror(np.array([np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)]))
                yield Image(graph.rotated(R), R, atoms)


@dataclass(frozen=True)
class Curve:
    """Equally weighted points along a line of images."""

    points: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.points,)

    @property
    def weights(self) -> np.ndarray:
        return np.full(self.points, 1 / self.points)


@dataclass(frozen=True)
class InPlane(Curve):
    """Rotations about the z axis."""

    points: int = 72
    name: str = field(default="plane", init=False)
    kind: str = field(default="curve", init=False)

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"angle": 360.0 * np.arange(self.points) / self.points}

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        atoms = _same_atoms(graph)
        for k in range(self.points):
            R = rotation_z(2 * math.pi * k / self.points)
            yield Image(graph.rotated(R), R, atoms)


@dataclass(frozen=True)
class Translations(Curve):
    """Shifts in a direction of no symmetry; crystals are wrapped back into their cell."""

    points: int = 24
    length: float = 12.0  # angstrom, the longest shift
    name: str = field(default="translations", init=False)
    kind: str = field(default="curve", init=False)

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"shift": np.linspace(0.0, self.length, self.points)}

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        for shift in self.coordinates()["shift"]:
            moved = graph.positions.numpy() + shift * GENERIC
            yield _rebuilt(graph, cutoff, positions=_wrapped(graph, moved))


@dataclass(frozen=True)
class Permutations(Curve):
    """Random orders of the atoms; the first is the order given."""

    points: int = 24
    seed: int = 0
    name: str = field(default="permutations", init=False)
    kind: str = field(default="list", init=False)

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"number": np.arange(self.points)}

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        rng = np.random.default_rng(self.seed)
        count = len(graph.positions)
        for k in range(self.points):
            order = rng.permutation(count) if k else np.arange(count)
            yield _rebuilt(graph, cutoff, order=order)


SWAP = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
# Name -> (integer matrix M, shift of the origin): cell' = M cell.
CELLS: dict[str, tuple[np.ndarray, float]] = {
    "as given": (np.eye(3, dtype=int), 0.0),
    "origin shifted": (np.eye(3, dtype=int), 0.37),
    "b + a": (np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]]), 0.0),
    "c - b": (np.array([[1, 0, 0], [0, 1, 0], [0, -1, 1]]), 0.0),
    "a + 2c": (np.array([[1, 0, 2], [0, 1, 0], [0, 0, 1]]), 0.0),
    "left-handed": (SWAP, 0.0),
    "compact": (np.zeros((3, 3), dtype=int), 0.0),  # M depends on the cell
    "2 x 1 x 1": (np.diag([2, 1, 1]), 0.0),
    "1 x 2 x 1": (np.diag([1, 2, 1]), 0.0),
    "1 x 1 x 2": (np.diag([1, 1, 2]), 0.0),
    "2 x 2 x 1, shifted": (np.diag([2, 2, 1]), 0.37),
}


@dataclass(frozen=True)
class Cells:
    """Descriptions of one crystal by different cells; none for molecules."""

    name: str = field(default="cells", init=False)
    kind: str = field(default="list", init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(CELLS),)

    @property
    def weights(self) -> np.ndarray:
        return np.full(len(CELLS), 1 / len(CELLS))

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"cell": np.array(list(CELLS))}

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        pbc = graph.pbc[0].numpy()
        for name, (M, shift) in CELLS.items():
            if name == "compact":
                M = np.eye(3, dtype=int)
                if pbc.sum() > 1:
                    reduction = minkowski_reduce(graph.cell[0].numpy(), pbc)[1]
                    M = np.where(np.outer(pbc, pbc), reduction, M)
            change = M - np.eye(3, dtype=int)
            touched = change.any(axis=0) | change.any(axis=1)
            yield _recelled(graph, cutoff, M, shift) if pbc.any() and pbc[touched].all() else None


def _recelled(graph: AtomicGraph, cutoff: float, M: np.ndarray, shift: float) -> Image:
    cell, pbc = graph.cell[0].numpy(), graph.pbc[0].numpy()
    positions = graph.positions.numpy() + (shift * pbc) @ cell
    copies = [np.zeros(3)]
    if abs(round(np.linalg.det(M))) > 1:  # only diagonal matrices here
        copies = [np.array(k) for k in np.ndindex(*np.diag(M))]
    positions = np.concatenate([positions + k @ cell for k in copies])
    cell = np.where(pbc[:, None], M @ cell, cell)
    return _rebuilt(
        graph,
        cutoff,
        positions=_wrapped(graph, positions, cell),
        cell=cell,
        order=np.tile(np.arange(len(graph.positions)), len(copies)),
    )


def _wrapped(
    graph: AtomicGraph, positions: np.ndarray, cell: np.ndarray | None = None
) -> np.ndarray:
    """Positions brought into the cell along its periodic directions."""
    pbc = graph.pbc[0].numpy()
    cell = graph.cell[0].numpy() if cell is None else cell
    if not pbc.any():
        return positions
    homes = np.floor(positions @ np.linalg.pinv(cell[pbc]))  # (N, periodic directions)
    return np.asarray(positions - homes @ cell[pbc])


def _rebuilt(
    graph: AtomicGraph,
    cutoff: float,
    *,
    positions: np.ndarray | None = None,
    cell: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> Image:
    """Image with a new neighbour list; atom k of it is atom ``order[k]`` of the structure.

    ``positions``, if given, are those of the image's atoms.
    """
    count = len(graph.positions)
    order = np.arange(count) if order is None else order
    copies = len(order) // count
    totals = {}
    if "charge" in graph:
        totals["charge"] = graph.charge * copies
    if "spin" in graph:
        totals["spin"] = (graph.spin - 1) * copies + 1  # multiplicity of parallel spins
    made = AtomicGraph.from_arrays(
        graph.atomic_numbers.numpy()[order],
        graph.positions.numpy()[order] if positions is None else positions,
        graph.cell[0].numpy() if cell is None else cell,
        graph.pbc[0].numpy(),
        cutoff,
        **totals,
    )
    atoms = torch.from_numpy(np.argsort(order, kind="stable").reshape(count, -1).T.copy())
    return Image(made, torch.eye(3, dtype=torch.float64), atoms)


def orbits(names: list[str] | None = None, grid: int = 10) -> list[Orbit]:
    """The orbits of these names, all by default, with ``grid`` rings on the sphere.

    Raises
    ------
    ValueError
        For an unknown name, or fewer than three rings.
    """
    if grid < 3:
        raise ValueError(f"the sphere needs at least 3 rings, got {grid}")
    known: list[Orbit] = [
        Rotations(grid, 2 * grid, max(3, round(0.6 * grid))),
        Reflections(grid, 2 * grid),
        InPlane(),
        Translations(),
        Permutations(),
        Cells(),
    ]
    by_name = {orbit.name: orbit for orbit in known}
    for name in names or []:
        if name not in by_name:
            raise ValueError(f"unknown group '{name}'; there are {', '.join(by_name)}")
    return [orbit for orbit in known if names is None or orbit.name in names]
