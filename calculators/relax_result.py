"""What is asked of a relaxation, and what becomes of a structure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch
from ase.optimize.fire2 import FIRE2

OPTIMIZERS: dict[str, Any] = {
    "FIRE": FIRE,
    "FIRE2": FIRE2,
    "BFGS": BFGS,
    "LBFGS": LBFGS,
    "BFGSLineSearch": BFGSLineSearch,
}
BY_NAME = {name.lower(): driver for name, driver in OPTIMIZERS.items()}
RUNAWAY = 5.0  # a cell whose volume changes by more than this factor is no longer the same crystal


@dataclass
class RelaxResult:
    """What became of one structure.

    ``atoms`` is a copy with energy, forces and stress attached (the last good geometry; the input
    if there was none; None if it could not be read).  ``fmax`` in eV/angstrom includes the forces
    on the cell if it was relaxed, ``stress`` (6,) in eV/angstrom^3 is None without a periodic cell.
    ``error`` is None unless the structure failed.
    """

    name: str
    atoms: Atoms | None
    converged: bool = False
    steps: int = 0
    energy: float = np.nan
    fmax: float = np.nan
    stress: np.ndarray | None = None
    spacegroup: str | None = None
    error: str | None = None

    @property
    def status(self) -> str:
        """``converged``, ``not converged`` or ``failed: reason``."""
        if self.error is not None:
            return f"failed: {self.error}"
        return "converged" if self.converged else "not converged"

    def fail(self, problem: Exception) -> None:
        """What is wrong with the structure."""
        self.error = str(problem) or type(problem).__name__
        self.converged = False


@dataclass(frozen=True)
class RelaxSettings:
    """Arguments of ``relax`` that are the same for all structures."""

    cell: bool
    pressure: float
    keep_symmetry: bool
    fmax: float
    max_steps: int
    optimizer: str
    symprec: float
    on_step: Callable[[str, int, float], None] | None

    def __post_init__(self) -> None:
        if self.optimizer.lower() not in BY_NAME:
            raise ValueError(
                f"unknown optimizer '{self.optimizer}'; there are {', '.join(OPTIMIZERS)}"
            )
        if self.pressure != 0.0 and not self.cell:
            raise ValueError(f"pressure = {self.pressure} GPa acts on the cell; set cell=True")
        if not (self.fmax > 0 and self.max_steps >= 0):
            raise ValueError(
                f"fmax = {self.fmax}, max_steps = {self.max_steps}; "
                f"give fmax > 0 and max_steps >= 0"
            )
        if self.keep_symmetry:
            _require_spglib()


def check_cell_relaxation(atoms: Atoms) -> None:
    """ValueError where there is no cell that could be relaxed."""
    if not atoms.pbc.all():
        raise ValueError(
            f"the cell cannot be relaxed with pbc = {atoms.pbc.tolist()}; "
            f"give a cell that is periodic in three directions, or fix it"
        )


def check_volume(before: float, volume: float, steps: int) -> None:
    """ValueError where the volume, angstrom^3, was another one some steps ago."""
    if not 1 / RUNAWAY < volume / before < RUNAWAY:
        raise ValueError(
            f"the volume went from {before:.4g} to {volume:.4g} angstrom^3 in {steps} steps; "
            f"the model does not hold this crystal together"
        )


def bare(atoms: Atoms) -> Atoms:
    """Copy without a calculator."""
    copy = atoms.copy()
    copy.calc = None
    return copy


def frozen(atoms: Atoms, constraints: Sequence[Any] | None = None) -> Atoms:
    """Copy that carries the present energy, forces and stress without the calculator."""
    copy = atoms.copy()
    if constraints is not None:
        copy.set_constraint(constraints)
    results = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(apply_constraint=False),
    }
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress(apply_constraint=False)
    copy.calc = SinglePointCalculator(copy, **results)
    return copy


def spacegroup(atoms: Atoms | None, symprec: float) -> str | None:
    """Symbol and number such as ``Fd-3m (227)``; None without a crystal or without spglib."""
    if atoms is None or not atoms.pbc.all():
        return None
    try:
        import spglib
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of spglib
        try:
            crystal: Any = (np.array(atoms.cell), atoms.get_scaled_positions(), atoms.numbers)
            return spglib.get_spacegroup(crystal, symprec=symprec)
        except (
            Exception
        ):  # its error classes differ between versions; a symbol is not worth a failure
            return None


def _require_spglib() -> None:
    try:
        import spglib  # noqa: F401
    except ImportError:
        raise ValueError("keep_symmetry needs spglib: pip install 'eqmlip[symmetry]'") from None
