"""Relaxation of structures: positions alone, or with the cell under pressure and with the symmetry
kept.

Thin over ASE: its optimizers, its ``FixSymmetry`` for the space group; ``LogStrainFilter`` for the
cell.  A structure that fails says why, and the others are finished.  ``relax`` takes one structure
after the other; ``relax_many`` moves many at a time, each by an optimizer of its own, and evaluates
them in batches: the same steps, and faster for small structures.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch
from ase.optimize.fire2 import FIRE2

from mlip.calculators.batching import batches
from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.log_strain_filter import LogStrainFilter

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
    settings = _Settings(
        cell, pressure, keep_symmetry, fmax, max_steps, optimizer, symprec, on_step
    )
    calculator = as_calculator(model, **calculator_options)
    results = []
    for name, atoms, error in _named(structures):
        run = _Relaxation(name, atoms, error, settings)
        if run.atoms is not None:
            run.atoms.calc = calculator
        while not run.finished:
            run.advance()
        results.append(run.close())
    return results


def relax_many(
    structures: Atoms | str | os.PathLike[str] | Iterable[Atoms | str | os.PathLike[str]],
    model: Any,
    *,
    max_atoms: int = 256,
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
    """``relax`` for many structures at a time, evaluated in batches.

    Structures take the same steps as in ``relax``.  One that is finished makes room for the next,
    so that batches stay full.

    Parameters
    ----------
    max_atoms : int
        Atoms in a batch at most, if it is not a single structure.
    model : whatever ``EqCalculator`` takes, or an ``EqCalculator``
    others : as of ``relax``

    Raises
    ------
    TypeError
        For a calculator that cannot evaluate several structures at once.
    ValueError
        For settings that make no sense.
    """
    if max_atoms < 1:
        raise ValueError(f"max_atoms = {max_atoms}; give a number of atoms >= 1")
    settings = _Settings(
        cell, pressure, keep_symmetry, fmax, max_steps, optimizer, symprec, on_step
    )
    calculator = as_calculator(model, **calculator_options)
    if not isinstance(calculator, EqCalculator):
        raise TypeError(
            f"relax_many evaluates batches and needs an EqCalculator, not "
            f"{type(calculator).__name__}; use relax"
        )
    waiting = _named(structures)
    runs: list[_Relaxation] = []
    active: list[_Relaxation] = []
    more = True
    while more or active:
        while more and sum(len(run.atoms) for run in active) < max_atoms:
            item = next(waiting, None)
            more = item is not None
            if item is not None:
                runs.append(_Relaxation(*item, settings))
                if not runs[-1].finished:
                    runs[-1].atoms.calc = calculator.twin()
                    active.append(runs[-1])
        for batch in batches([len(run.atoms) for run in active], max_atoms):
            _advance_together([active[k] for k in batch])
        for run in active:
            if run.finished:
                run.close()
        active = [run for run in active if not run.finished]
    return [run.result for run in runs]


def _advance_together(members: Sequence[_Relaxation]) -> None:
    """Evaluate geometries as one batch, and move on."""
    try:
        problems: Sequence[Exception | None] = EqCalculator.calculate_together(
            [run.atoms.calc for run in members], [run.atoms for run in members]
        )
    except Exception as problem:  # of the model or the machine; whose it is only one alone can say
        if len(members) > 1:
            for run in members:
                _advance_together([run])
            return
        problems = [problem]
    for run, each in zip(members, problems, strict=True):
        if each is None:
            run.advance()
        else:
            run.fail(each)


@dataclass(frozen=True)
class _Settings:
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


class _Relaxation:
    """One structure on its way, from evaluation to evaluation."""

    atoms: Any  # moves; its calculator is set from outside
    target: Any  # the atoms, or a filter that moves the cell, too

    def __init__(
        self, name: str, atoms: Atoms | None, error: str | None, settings: _Settings
    ) -> None:
        self.settings = settings
        self.result = RelaxResult(name, None if atoms is None else _bare(atoms), error=error)
        self.finished = atoms is None
        self.atoms = None if atoms is None else _bare(atoms)
        self.optimizer: Any = None
        self.steps = 0

    def advance(self) -> None:
        """Record the present geometry, and move on unless it is the end."""
        s = self.settings
        try:
            if self.optimizer is None:
                self._start()
            self._record()
            self.result.converged = self.result.fmax < s.fmax
            self.finished = self.result.converged or self.steps >= s.max_steps
            if not self.finished:
                self.optimizer.step()
                self.steps += 1
        except Exception as problem:  # whatever it is, the other structures go on
            self.fail(problem)

    def fail(self, problem: Exception) -> None:
        self.result.error = str(problem) or type(problem).__name__
        self.result.converged = False
        self.finished = True

    def close(self) -> RelaxResult:
        """The result; neighbour lists and the optimizer's memory of many runs would fill it."""
        self.atoms = self.target = self.optimizer = None
        if np.isfinite(self.result.energy):  # spglib crashes on what may not be evaluated: NaN
            self.result.spacegroup = spacegroup(self.result.atoms, self.settings.symprec)
        return self.result

    def _start(self) -> None:
        atoms, s = self.atoms, self.settings
        self.constraints = list(atoms.constraints)
        if s.cell and not atoms.pbc.all():
            raise ValueError(
                f"the cell cannot be relaxed with pbc = {atoms.pbc.tolist()}; "
                f"give a cell that is periodic in three directions, or fix it"
            )
        atoms.get_potential_energy()  # what is wrong with it comes before its symmetry
        if s.keep_symmetry:
            if atoms.cell.rank < 3:
                raise ValueError(
                    "keep_symmetry keeps the space group of a crystal, and there is no cell; "
                    "leave it out for molecules"
                )
            from ase.constraints import FixSymmetry

            atoms.set_constraint([*self.constraints, FixSymmetry(atoms, symprec=s.symprec)])
        self.volume = abs(atoms.cell.volume)
        self.target = atoms
        if s.cell:
            self.target = LogStrainFilter(atoms, s.pressure * units.GPa)
        self.optimizer = BY_NAME[s.optimizer.lower()](self.target, logfile=None)

    def _record(self) -> None:
        atoms, result = self.atoms, self.result
        volume = abs(atoms.cell.volume)
        if self.settings.cell and not 1 / RUNAWAY < volume / self.volume < RUNAWAY:
            raise ValueError(
                f"the volume went from {self.volume:.4g} to {volume:.4g} angstrom^3 in "
                f"{self.steps} steps; the model does not hold this crystal together"
            )
        forces = self.target.get_forces()
        result.steps = self.steps
        result.fmax = float(np.sqrt((forces**2).sum(axis=1).max()))
        result.energy = float(atoms.get_potential_energy())
        result.stress = atoms.get_stress(apply_constraint=False) if atoms.pbc.all() else None
        result.atoms = frozen(atoms, self.constraints)
        if self.settings.on_step is not None:
            self.settings.on_step(result.name, result.steps, result.fmax)


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


def _named(structures: Any) -> Iterator[tuple[str, Atoms | None, str | None]]:
    """Each structure with a name and, if it could not be read, the reason."""
    if isinstance(structures, Atoms | str | os.PathLike):
        structures = [structures]
    for k, item in enumerate(structures):
        if isinstance(item, Atoms):
            yield str(item.info.get("name", f"{item.get_chemical_formula()} #{k}")), item, None
            continue
        if not isinstance(item, str | os.PathLike):
            yield f"#{k}", None, f"neither Atoms nor a file, but {type(item).__name__}"
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
