"""Relaxation of structures: positions alone, or with the cell under pressure and with the symmetry
kept.

Thin over ASE: its optimizers, its ``FixSymmetry`` for the space group; ``LogStrainFilter`` for the
cell.  A structure that fails says why, and the others are finished.  ``relax`` takes one structure
after the other; ``relax_many`` evaluates many at a time in batches, and with FIRE moves them at
once: the same steps, and much faster for small structures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.io import read

from mlip.calculators.batched_relaxation import BatchedRelaxation
from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.relax_result import OPTIMIZERS, RelaxResult, RelaxSettings, bare
from mlip.calculators.separate_relaxation import Relaxation, SeparateRelaxations

__all__ = ["OPTIMIZERS", "RelaxResult", "as_calculator", "last_frame", "relax", "relax_many"]


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
    settings = RelaxSettings(
        cell, pressure, keep_symmetry, fmax, max_steps, optimizer, symprec, on_step
    )
    calculator = as_calculator(model, **calculator_options)
    results = []
    for result, atoms in _results(structures):
        results.append(result)
        if atoms is not None:
            run = Relaxation(result, atoms, settings)
            run.atoms.calc = calculator
            while not run.finished:
                run.advance()
            run.close()
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
    so that batches stay full.  FIRE moves all structures of a batch at once; with another
    optimizer, with ``keep_symmetry`` or with constraints other than ``FixAtoms`` each has an
    optimizer of ASE of its own.

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
    settings = RelaxSettings(
        cell, pressure, keep_symmetry, fmax, max_steps, optimizer, symprec, on_step
    )
    calculator = as_calculator(model, **calculator_options)
    if not isinstance(calculator, EqCalculator):
        raise TypeError(
            f"relax_many evaluates batches and needs an EqCalculator, not "
            f"{type(calculator).__name__}; use relax"
        )
    batched = BatchedRelaxation(calculator, settings)
    separate = SeparateRelaxations(calculator, settings)
    results = []
    for result, atoms in _results(structures):
        results.append(result)
        if atoms is None:
            continue
        while (len(batched) or len(separate)) and (
            batched.num_atoms + separate.num_atoms + len(atoms) > max_atoms
        ):
            batched.advance()
            separate.advance()
        (batched if batched.takes(atoms) else separate).admit(result, atoms)
    while len(batched) or len(separate):
        batched.advance()
        separate.advance()
    return results


def as_calculator(model: Any, **options: Any) -> BaseCalculator:
    """An ASE calculator as it is; anything else goes to ``EqCalculator``."""
    if isinstance(model, BaseCalculator):
        if options:
            raise TypeError(
                f"{', '.join(options)}: options of EqCalculator, but a calculator was given"
            )
        return model
    return EqCalculator(model, **options)


def last_frame(path: str) -> Atoms:
    """The structure in a file, of several the last."""
    atoms = read(path)
    assert isinstance(atoms, Atoms)  # read() gives a list only if asked for one
    return atoms


def _results(structures: Any) -> Iterator[tuple[RelaxResult, Atoms | None]]:
    """Each structure and where to say what becomes of it."""
    for name, atoms, error in _named(structures):
        yield RelaxResult(name, None if atoms is None else bare(atoms), error=error), atoms


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
