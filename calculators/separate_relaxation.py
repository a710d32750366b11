"""Structures that are relaxed by an optimizer of ASE each, evaluated one by one or in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms, units

from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.log_strain_filter import LogStrainFilter
from mlip.calculators.relax_result import (
    BY_NAME,
    RelaxResult,
    RelaxSettings,
    bare,
    check_cell_relaxation,
    check_volume,
    frozen,
    spacegroup,
)


class Relaxation:
    """One structure on its way, from evaluation to evaluation."""

    atoms: Any  # moves; its calculator is set from outside
    target: Any  # the atoms, or a filter that moves the cell, too

    def __init__(self, result: RelaxResult, atoms: Atoms, settings: RelaxSettings) -> None:
        self.result, self.settings = result, settings
        self.atoms = bare(atoms)
        self.finished = False
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
        """End with what is wrong."""
        self.result.fail(problem)
        self.finished = True

    def close(self) -> None:
        """Complete the result."""
        if np.isfinite(self.result.energy):  # spglib crashes on what may not be evaluated: NaN
            self.result.spacegroup = spacegroup(self.result.atoms, self.settings.symprec)

    def _start(self) -> None:
        atoms, s = self.atoms, self.settings
        self.constraints = list(atoms.constraints)
        if s.cell:
            check_cell_relaxation(atoms)
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
        if self.settings.cell:
            check_volume(self.volume, abs(atoms.cell.volume), self.steps)
        forces = self.target.get_forces()
        result.steps = self.steps
        result.fmax = float(np.sqrt((forces**2).sum(axis=1).max()))
        result.energy = float(atoms.get_potential_energy())
        result.stress = atoms.get_stress(apply_constraint=False) if atoms.pbc.all() else None
        result.atoms = frozen(atoms, self.constraints)
        if self.settings.on_step is not None:
            self.settings.on_step(result.name, result.steps, result.fmax)


class SeparateRelaxations:
    """Structures on their way that are evaluated together."""

    def __init__(self, calculator: EqCalculator, settings: RelaxSettings) -> None:
        self.calculator, self.settings = calculator, settings
        self._active: list[Relaxation] = []

    def __len__(self) -> int:
        return len(self._active)

    @property
    def num_atoms(self) -> int:
        """Of all structures on their way."""
        return sum(len(run.atoms) for run in self._active)

    def admit(self, result: RelaxResult, atoms: Atoms) -> None:
        """Take one more; what becomes of it will be in ``result``."""
        run = Relaxation(result, atoms, self.settings)
        run.atoms.calc = self.calculator.twin()
        self._active.append(run)

    def advance(self) -> None:
        """Evaluate the present geometries, and move on those that are not finished."""
        if self._active:
            _advance_together(self._active)
        for run in self._active:
            if run.finished:
                run.close()
        self._active = [run for run in self._active if not run.finished]


def _advance_together(members: Sequence[Relaxation]) -> None:
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
