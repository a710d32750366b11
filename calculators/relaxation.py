"""Relaxation of structures: positions alone, or with the cell under pressure and with the symmetry
kept.

Thin over ASE: its optimizers, ``FrechetCellFilter`` for the cell, ``FixSymmetry`` for the space
group.  A structure that fails says why, and the others are finished.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch
from ase.optimize.fire2 import FIRE2

from mlip.calculators.eq_calculator import EqCalculator

OPTIMIZERS: dict[str, Any] = {
    "FIRE": FIRE,
    "FIRE2": FIRE2,
    "BFGS": BFGS,
    "LBFGS": LBFGS,
    "BFGSLineSearch": BFGSLineSearch,
}
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


def relax(
    structures: Atoms | str | os.PathLike[str] | Iterable[Atoms | str | os.PathLike[str]],
    model: Any,
    *,
    cell: bool = False,
    pressure: float = 0.0,
    keep_symmetry: bool = False,
    fmax: float = 0.01,
    max_steps: int = 500,
    optimizer: str = "FIRE",
    symprec: float = 0.01,
    on_step: Callable[[str, int, float], None] | None = None,
    **calculator_options: Any,
) -> list[RelaxResult]:
    """Relax structures to a local minimum of the energy, or of the enthalpy at a pressure.

    Parameters
    ----------
    structures : Atoms, file, or several of these
        All frames of a file are relaxed.  The Atoms given are not altered; their constraints are
        respected.
    model : whatever ``EqCalculator`` takes, or any ASE calculator
    cell : bool
        Relax the cell too; needs three periodic directions.
    pressure : float, GPa
        External pressure on the cell.
    keep_symmetry : bool
        Keep the space group found within ``symprec``; needs spglib.
    fmax : float, eV/angstrom
        Converged when no force is larger.
    max_steps : int
    optimizer : FIRE, FIRE2, BFGS, LBFGS or BFGSLineSearch
    symprec : float, angstrom
        Tolerance of the space group kept or reported.
    on_step : called with name, step and largest force
    calculator_options : device, dtype and the like, for ``EqCalculator``

    Returns
    -------
    list of RelaxResult, one for each structure, in order

    Raises
    ------
    ValueError
        For settings that make no sense.  What is wrong with one structure is said in its result.
    """
    by_name = {name.lower(): driver for name, driver in OPTIMIZERS.items()}
    if optimizer.lower() not in by_name:
        raise ValueError(f"unknown optimizer '{optimizer}'; there are {', '.join(OPTIMIZERS)}")
    if pressure != 0.0 and not cell:
        raise ValueError(f"pressure = {pressure} GPa acts on the cell; set cell=True")
    if not (fmax > 0 and max_steps >= 0):
        raise ValueError(
            f"fmax = {fmax}, max_steps = {max_steps}; give fmax > 0 and max_steps >= 0"
        )
    if keep_symmetry:
        _require_spglib()
    calculator = as_calculator(model, **calculator_options)
    results = []
    for name, atoms, error in _named(structures):
        result = RelaxResult(name, None if atoms is None else _bare(atoms), error=error)
        results.append(result)
        if atoms is None:
            continue
        try:
            moving = _bare(atoms)
            moving.calc = calculator
            _relax_one(
                result, moving, by_name[optimizer.lower()], cell, pressure, keep_symmetry, fmax,
                max_steps, symprec, on_step,
            )  # fmt: skip
        except Exception as problem:  # whatever it is, the other structures go on
            result.error = str(problem) or type(problem).__name__
        result.spacegroup = spacegroup(result.atoms, symprec)
    return results


def _relax_one(
    result: RelaxResult,
    atoms: Atoms,
    driver: Any,
    cell: bool,
    pressure: float,
    keep_symmetry: bool,
    fmax: float,
    max_steps: int,
    symprec: float,
    on_step: Callable[[str, int, float], None] | None,
) -> None:
    constraints = list(atoms.constraints)
    if cell and not atoms.pbc.all():
        raise ValueError(
            f"the cell cannot be relaxed with pbc = {atoms.pbc.tolist()}; "
            f"give a cell that is periodic in three directions, or fix it"
        )
    atoms.get_potential_energy()  # what is wrong with it comes before its symmetry
    if keep_symmetry:
        from ase.constraints import FixSymmetry

        atoms.set_constraint([*constraints, FixSymmetry(atoms, symprec=symprec)])
    volume = abs(atoms.cell.volume)
    target = FrechetCellFilter(atoms, scalar_pressure=pressure * units.GPa) if cell else atoms
    optimizer = driver(target, logfile=None)

    def record() -> None:
        forces = target.get_forces()
        if cell and not 1 / RUNAWAY < abs(atoms.cell.volume) / volume < RUNAWAY:
            raise ValueError(
                f"the volume went from {volume:.4g} to {abs(atoms.cell.volume):.4g} angstrom^3 in "
                f"{optimizer.nsteps} steps; the model does not hold this crystal together"
            )
        result.steps = optimizer.nsteps
        result.fmax = float(np.sqrt((forces**2).sum(axis=1).max()))
        result.energy = float(atoms.get_potential_energy())
        result.stress = atoms.get_stress(apply_constraint=False) if atoms.pbc.all() else None
        result.atoms = frozen(atoms, constraints)
        if on_step is not None:
            on_step(result.name, result.steps, result.fmax)

    optimizer.attach(record)
    record()
    result.converged = bool(optimizer.run(fmax=fmax, steps=max_steps))


def as_calculator(model: Any, **options: Any) -> BaseCalculator:
    """An ASE calculator as it is; anything else goes to ``EqCalculator``."""
    if isinstance(model, BaseCalculator):
        if options:
            raise TypeError(
                f"{', '.join(options)}: options of EqCalculator, but a calculator was given"
            )
        return model
    return EqCalculator(model, **options)


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


def last_frame(path: str) -> Atoms:
    """The structure in a file, of several the last."""
    atoms = read(path)
    assert isinstance(atoms, Atoms)  # read() gives a list only if asked for one
    return atoms


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


def _named(structures: Any) -> Iterable[tuple[str, Atoms | None, str | None]]:
    """Each structure with a name and, if it could not be read, the reason."""
    if isinstance(structures, Atoms | str | os.PathLike):
        structures = [structures]
    for k, item in enumerate(structures):
        if isinstance(item, Atoms):
            yield str(item.info.get("name", f"{item.get_chemical_formula()} #{k}")), item, None
            continue
        path = os.fspath(item)
        try:
            frames = read(path, index=None if "@" in os.path.basename(path) else ":")
        except Exception as problem:  # readers of foreign formats raise anything
            yield path, None, f"cannot be read ({type(problem).__name__}: {problem})"
            continue
        frames = frames if isinstance(frames, list) else [frames]
        if not frames:
            yield path, None, "no structure in this file"
        for number, atoms in enumerate(frames):
            yield (path if len(frames) == 1 else f"{path}@{number}"), atoms, None


def _bare(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.calc = None
    return copy


def _require_spglib() -> None:
    try:
        import spglib  # noqa: F401
    except ImportError:
        raise ValueError("keep_symmetry needs spglib: pip install 'eqmlip[symmetry]'") from None
