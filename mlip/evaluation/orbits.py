"""Orbits: a structure under a group, as images on which a symmetric potential must agree.

Rotations and reflections are matrices (``MatrixOrbit``), of which ``mlip.rotation_orbit`` makes
the predictions.  The other images (``ImageOrbit``) are the structure shifted, renumbered, or, for
a crystal, described by another cell; they know the way back of the forces f',

    f_i = (1/|a(i)|) sum_{k in a(i)} f'_k,        a(i) = atoms of the image that are atom i,

and energies are compared per atom, so that supercells take part.  Each orbit is a grid of T points
with weights that sum to one.
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
from mlip.evaluation.primitive_cell import primitive
from mlip.nn.rotations import Rotations

# Of translations.  A direction without a symmetry of its own: along an axis, errors may vanish by
# accident.
GENERIC = np.array([0.46, 0.73, 0.51]) / math.hypot(0.46, 0.73, 0.51)


class Image(NamedTuple):
    """One element of an orbit."""

    graph: AtomicGraph
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


class ImageOrbit(Orbit, Protocol):
    """An orbit of which each image has neighbours of its own."""

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        """T images of one structure, None where there is none."""


class MatrixOrbit:
    """An orbit under orthogonal matrices."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: np.ndarray

    def coordinates(self) -> dict[str, np.ndarray]:
        """As of every ``Orbit``."""
        raise NotImplementedError

    def matrices(self) -> np.ndarray:
        """(T, 3, 3), in the order of the grid."""
        raise NotImplementedError

    def rule(self) -> Rotations:
        """The same for ``rotation_orbit``."""
        weights = torch.from_numpy(self.weights.copy())
        return Rotations(self.name, torch.from_numpy(self.matrices()), weights, degree=0)


def about_z(angle: np.ndarray) -> np.ndarray:
    """(..., 3, 3) rotations about z by ``angle`` (...), rad."""
    c, s, o, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([c, -s, o, s, c, o, o, o, one], axis=-1).reshape(*np.shape(angle), 3, 3)


def about_y(angle: np.ndarray) -> np.ndarray:
    """(..., 3, 3) rotations about y by ``angle`` (...), rad."""
    c, s, o, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([c, o, s, o, one, o, -s, o, c], axis=-1).reshape(*np.shape(angle), 3, 3)


def rings(polar: int, azimuth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grid of the sphere: theta (polar,), phi (azimuth,) in rad and weights (polar,) of the
    rings, Gauss-Legendre in cos(theta)."""
    x, w = np.polynomial.legendre.leggauss(polar)
    return np.arccos(x[::-1]), 2 * np.pi * np.arange(azimuth) / azimuth, w[::-1] / 2


def uniform(points: int) -> np.ndarray:
    """(points,) equal weights."""
    return np.full(points, 1 / points)


class TiltAndSpin(MatrixOrbit):
    """SO(3): a turn by the spin angle about the structure's z axis, then the shortest tilt after
    which this points to (theta, phi).

    R = Rz(phi) Ry(theta) Rz(spin - phi); with a spin the map is smooth but for the south pole.

    Mean values are exact for Wigner matrices of degree up to ``min(2 polar, azimuth, spin) - 1``.
    """

    name = "rotations"
    kind = "sphere"

    def __init__(self, polar: int, azimuth: int, spin: int) -> None:
        self.shape = (polar, azimuth, spin)
        self.weights = np.repeat(rings(polar, azimuth)[2], azimuth * spin) / (azimuth * spin)

    def coordinates(self) -> dict[str, np.ndarray]:
        theta, phi, _ = rings(*self.shape[:2])
        spin = 360.0 * np.arange(self.shape[2]) / self.shape[2]
        return {"theta": np.degrees(theta), "phi": np.degrees(phi), "spin": spin}

    def matrices(self) -> np.ndarray:
        theta, phi, spin = np.radians(
            np.stack(np.meshgrid(*self.coordinates().values(), indexing="ij"))
        )
        return (about_z(phi) @ about_y(theta) @ about_z(spin - phi)).reshape(-1, 3, 3)


class MirrorPlanes(MatrixOrbit):
    """Reflections by the direction (theta, phi) of the plane's normal; n and -n are one plane, so
    half of the meridians are all."""

    name = "reflections"
    kind = "sphere"

    def __init__(self, polar: int, azimuth: int) -> None:
        if azimuth % 2:
            raise ValueError(f"azimuth must be even, got {azimuth}")
        self.shape = (polar, azimuth // 2)
        self.weights = np.repeat(rings(polar, azimuth)[2], azimuth // 2) / (azimuth // 2)

    def coordinates(self) -> dict[str, np.ndarray]:
        polar, half = self.shape
        theta, phi, _ = rings(polar, 2 * half)
        return {"theta": np.degrees(theta), "phi": np.degrees(phi[:half])}

    def matrices(self) -> np.ndarray:
        theta, phi = np.radians(np.stack(np.meshgrid(*self.coordinates().values(), indexing="ij")))
        n = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1)
        return (np.eye(3) - 2 * n[..., :, None] * n[..., None, :]).reshape(-1, 3, 3)


class InPlane(MatrixOrbit):
    """Rotations about the z axis."""

    name = "plane"
    kind = "curve"

    def __init__(self, points: int = 72) -> None:
        self.shape = (points,)
        self.weights = uniform(points)

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"angle": 360.0 * np.arange(self.shape[0]) / self.shape[0]}

    def matrices(self) -> np.ndarray:
        return about_z(np.radians(self.coordinates()["angle"]))


@dataclass(frozen=True)
class Row:
    """A number of points of equal weight."""

    points: int = 24

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.points,)

    @property
    def weights(self) -> np.ndarray:
        return uniform(self.points)


@dataclass(frozen=True)
class Translations(Row):
    """Shifts in a direction of no symmetry; crystals are wrapped back into their cell."""

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
class Permutations(Row):
    """Random orders of the atoms; the first is the order given."""

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
    "primitive": (np.zeros((3, 3), dtype=int), 0.0),  # on the atoms, too; where it is smaller
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
        return uniform(len(CELLS))

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"cell": np.array(list(CELLS))}

    def images(self, graph: AtomicGraph, cutoff: float) -> Iterator[Image | None]:
        pbc = graph.pbc[0].numpy()
        for name, (M, shift) in CELLS.items():
            if name == "primitive":
                smaller = primitive(graph, cutoff)
                yield None if smaller is None else Image(*smaller)
                continue
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
    if "field" in graph:
        totals["field"] = graph.field
    made = AtomicGraph.from_arrays(
        graph.atomic_numbers.numpy()[order],
        graph.positions.numpy()[order] if positions is None else positions,
        graph.cell[0].numpy() if cell is None else cell,
        graph.pbc[0].numpy(),
        cutoff,
        **totals,
    )
    atoms = torch.from_numpy(np.argsort(order, kind="stable").reshape(count, -1).T.copy())
    return Image(made, atoms)


def orbits(names: list[str] | None = None, grid: int = 10) -> list[MatrixOrbit | ImageOrbit]:
    """The orbits of these names, all by default, with ``grid`` rings on the sphere.

    Raises
    ------
    ValueError
        For an unknown name, or fewer than three rings.
    """
    if grid < 3:
        raise ValueError(f"the sphere needs at least 3 rings, got {grid}")
    known: list[MatrixOrbit | ImageOrbit] = [
        TiltAndSpin(grid, 2 * grid, max(3, round(0.6 * grid))),
        MirrorPlanes(grid, 2 * grid),
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
