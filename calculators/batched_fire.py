"""FIRE for many structures at once: the arrays of all are joined, and a step is one for all.

    v <- (1 - a) v + a |v| f / |f|   where f . v > 0, else 0;     v <- v + dt f;     q <- q + dt v

with dt and a of each structure of its own, which grow and shrink as in ``ase.optimize.FIRE``
(Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006)): the steps are the same.  Coordinates q are
those of ``LogStrainFilter``: x (A, 3) and u = n eps (M, 3, 3), n the number of atoms; an atom is at
r = x F and the cell is C0 F with F = exp(eps).  Where the cell is fixed u = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.geometry import complete_cell

from mlip.calculators.log_strain_filter import force_on_strain, of_axes
from mlip.calculators.relax_result import RUNAWAY, check_cell_relaxation, check_volume
from mlip.calculators.structure_arrays import Problems, StructureArrays, problems_of

# As in ase.optimize.FIRE.
DT, DT_MAX, DT_GROWS, DT_SHRINKS = 0.1, 1.0, 1.1, 0.5
A, A_SHRINKS, PATIENCE = 0.1, 0.99, 5
MAX_STEP = 0.2  # length of the step of all coordinates of a structure, angstrom


@dataclass(frozen=True)
class FireBatch(StructureArrays):
    """M structures on their way, A atoms together; a step makes another one."""

    OF_ATOMS: ClassVar[frozenset[str]] = frozenset(
        ("numbers", "free", "positions", "forces", "x", "x_force", "x_velocity")
    )

    pbc: np.ndarray  # (M, 3)
    start: np.ndarray  # (M, 3, 3) C0, angstrom
    cell: np.ndarray  # (M, 3, 3)
    lattice: np.ndarray  # (M, 3, 3) the cell with non-periodic directions completed
    u: np.ndarray  # (M, 3, 3) n eps
    u_velocity: np.ndarray  # (M, 3, 3)
    dt: np.ndarray  # (M,)
    a: np.ndarray  # (M,)
    downhill: np.ndarray  # (M,) steps since f . v was negative; -1 before the first
    steps: np.ndarray  # (M,)
    energy: np.ndarray  # (M,) eV, NaN before the first evaluation
    stress: np.ndarray  # (M, 3, 3) eV/angstrom^3, NaN without a periodic cell
    u_force: np.ndarray  # (M, 3, 3) eV/angstrom
    fmax: np.ndarray  # (M,) the largest force on an atom or a row of u
    numbers: np.ndarray  # (A,)
    free: np.ndarray  # (A,) bool, not held by a constraint
    positions: np.ndarray  # (A, 3) angstrom
    forces: np.ndarray  # (A, 3) eV/angstrom
    x: np.ndarray  # (A, 3) angstrom
    x_force: np.ndarray  # (A, 3)
    x_velocity: np.ndarray  # (A, 3)

    @classmethod
    def of(cls, atoms: Atoms) -> Self:
        """One structure that has not moved yet."""
        free = np.ones(len(atoms), dtype=bool)
        for constraint in atoms.constraints:
            free[constraint.get_indices()] = False
        r, cell, pbc = atoms.get_positions(), np.array(atoms.cell)[None], np.array(atoms.pbc)
        nowhere, unknown = np.zeros_like(r), np.full_like(r, np.nan)
        return cls(
            sizes=np.array([len(atoms)]),
            pbc=pbc[None],
            start=cell,
            cell=cell,
            lattice=complete_cell(cell[0] * pbc[:, None])[None],
            u=np.zeros_like(cell),
            u_velocity=np.zeros_like(cell),
            u_force=np.zeros_like(cell),
            dt=np.array([DT]),
            a=np.array([A]),
            downhill=np.array([-1]),
            steps=np.array([0]),
            energy=np.array([np.nan]),
            stress=np.full_like(cell, np.nan),
            fmax=np.array([np.nan]),
            numbers=atoms.get_atomic_numbers(),
            free=free,
            positions=r,
            forces=unknown,
            x=r,
            x_force=unknown,
            x_velocity=nowhere,
        )

    @classmethod
    def empty(cls) -> Self:
        """No structure."""
        return cls.of(Atoms("H")).kept(np.array([False]))

    def atoms(self, k: int) -> Atoms:
        """The geometry of structure ``k``."""
        rows = self.rows(k)
        return Atoms(self.numbers[rows], self.positions[rows], cell=self.cell[k], pbc=self.pbc[k])

    @property
    def crystals(self) -> np.ndarray:
        """(M,) which have a stress."""
        return np.asarray(self.pbc.all(axis=1))

    @property
    def volume(self) -> np.ndarray:
        """(M,) angstrom^3 of the completed cell."""
        return np.abs(np.linalg.det(self.lattice))


def only_fixed_atoms(atoms: Atoms) -> bool:
    """Whether the structure has no constraints but those known here."""
    return all(type(constraint) is FixAtoms for constraint in atoms.constraints)


class FixedCells:
    """Atoms move, cells do not."""

    def check(self, atoms: Atoms) -> None:
        """Every structure will do."""

    def runaways(self, batch: FireBatch) -> Problems:
        """Nothing runs away."""
        return {}

    def with_forces(self, batch: FireBatch) -> FireBatch:
        """With forces on the coordinates after an evaluation."""
        return _with_forces(batch, batch.forces * batch.free[:, None], np.zeros_like(batch.u))

    def moved(self, batch: FireBatch, x: np.ndarray, u: np.ndarray) -> FireBatch:
        """The structures at other coordinates."""
        return replace(batch, x=x, u=u, positions=x)


class StrainedCells:
    """Cells move, too.

    Parameters
    ----------
    pressure : float, eV/angstrom^3
    """

    def __init__(self, pressure: float) -> None:
        self.pressure = pressure

    def check(self, atoms: Atoms) -> None:
        """ValueError where there is no cell."""
        check_cell_relaxation(atoms)

    def runaways(self, batch: FireBatch) -> Problems:
        """Structures whose volume has become another one."""
        before, now = np.abs(np.linalg.det(batch.start)), batch.volume
        far = ~((now < RUNAWAY * before) & (before < RUNAWAY * now))
        return problems_of(
            lambda k: check_volume(before[k], now[k], batch.steps[k]), np.flatnonzero(far).tolist()
        )

    def with_forces(self, batch: FireBatch) -> FireBatch:
        """With forces on the coordinates after an evaluation."""
        n = batch.sizes[:, None, None]
        logs, Q = np.linalg.eigh(batch.u / n)
        f = _times(batch.forces * batch.free[:, None], of_axes(np.exp(logs), Q), batch)
        W = -batch.volume[:, None, None] * (batch.stress + self.pressure * np.eye(3))
        return _with_forces(batch, f, force_on_strain(W, logs, Q) / n)

    def moved(self, batch: FireBatch, x: np.ndarray, u: np.ndarray) -> FireBatch:
        """The structures at other coordinates."""
        # One that is not a number would stop all; positions tell of it, too.
        u = np.nan_to_num((u + u.transpose(0, 2, 1)) / 2)
        logs, Q = np.linalg.eigh(u / batch.sizes[:, None, None])
        F = of_axes(np.exp(logs), Q)
        cell = batch.start @ F
        return replace(batch, x=x, u=u, positions=_times(x, F, batch), cell=cell, lattice=cell)


def _with_forces(batch: FireBatch, f: np.ndarray, g: np.ndarray) -> FireBatch:
    on_atoms = batch.maxima(np.einsum("kc,kc->k", f, f))
    on_rows = np.einsum("mab,mab->ma", g, g).max(axis=1)
    fmax = np.sqrt(np.maximum(on_atoms, on_rows))
    return replace(batch, x_force=f, u_force=g, fmax=fmax)


def _times(vectors: np.ndarray, matrices: np.ndarray, batch: FireBatch) -> np.ndarray:
    """(A, 3) times (M, 3, 3)."""
    return (vectors[:, None] @ matrices[batch.owner])[:, 0]


@np.errstate(over="ignore", invalid="ignore")
def fire_step(batch: FireBatch, cells: FixedCells | StrainedCells) -> FireBatch:
    """The structures after one step."""

    def dot(x: np.ndarray, u: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        return batch.sums(np.einsum("kc,kc->k", x, y)) + np.einsum("mab,mab->m", u, w)

    def scaled(c: np.ndarray, x: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return c[batch.owner, None] * x, c[:, None, None] * u

    f, g, v, w = batch.x_force, batch.u_force, batch.x_velocity, batch.u_velocity
    down = dot(f, g, v, w) > 0
    ratio = np.sqrt(dot(v, w, v, w) / np.where(down, dot(f, g, f, g), 1.0))
    longer = down & (batch.downhill > PATIENCE)
    dt = np.where(longer, np.minimum(DT_GROWS * batch.dt, DT_MAX), batch.dt)
    dt = np.where(down | (batch.downhill < 0), dt, DT_SHRINKS * dt)
    v, w = scaled(np.where(down, 1 - batch.a, 0.0), v, w)
    fv, gw = scaled(np.where(down, batch.a * ratio, 0.0) + dt, f, g)
    v, w = v + fv, w + gw
    length = dt * np.sqrt(dot(v, w, v, w))
    dx, du = scaled(dt * np.minimum(1.0, MAX_STEP / np.maximum(length, MAX_STEP)), v, w)
    return replace(
        cells.moved(batch, batch.x + dx, batch.u + du),
        x_velocity=v,
        u_velocity=w,
        dt=dt,
        a=np.where(down, np.where(longer, A_SHRINKS * batch.a, batch.a), A),
        downhill=np.where(down, batch.downhill + 1, 0),
        steps=batch.steps + 1,
    )
