"""Relaxations of many structures by FIRE, evaluated and moved all at once.

Structures are rows of joined arrays.  Atoms objects are made at the end only, and where something
goes wrong: a structure that fails says why, with its last good geometry, and leaves the others
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from torch import Tensor

from mlip.calculators.batched_evaluation import BatchedEvaluation
from mlip.calculators.batched_fire import (
    FireBatch,
    FixedCells,
    StrainedCells,
    fire_step,
    only_fixed_atoms,
)
from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.relax_result import RelaxResult, RelaxSettings, bare, spacegroup
from mlip.calculators.structure_arrays import Problems


class BatchedRelaxation:
    """Structures on their way, which come and go.

    Parameters
    ----------
    calculator : evaluates them
    settings : of ``relax_many``; the optimizer is FIRE
    """

    def __init__(self, calculator: EqCalculator, settings: RelaxSettings) -> None:
        self.calculator, self.settings = calculator, settings
        self.cells = StrainedCells(settings.pressure * units.GPa) if settings.cell else FixedCells()
        self.evaluation = BatchedEvaluation(calculator)
        self.num_atoms = 0  # of all structures on their way
        self.results: list[RelaxResult] = []
        # As last evaluated, and where they are now: the same structures in the same order.
        self.good = self.now = FireBatch.empty()
        self._arrivals: list[tuple[RelaxResult, FireBatch, dict[str, Tensor]]] = []

    def __len__(self) -> int:
        return len(self.results) + len(self._arrivals)

    def takes(self, atoms: Atoms) -> bool:
        """Whether a structure is moved as it should be."""
        s = self.settings
        return s.optimizer.lower() == "fire" and not s.keep_symmetry and only_fixed_atoms(atoms)

    def admit(self, result: RelaxResult, atoms: Atoms) -> None:
        """Take one more; what becomes of it will be in ``result``."""
        try:
            inputs = self.calculator.checked_inputs(atoms)
            self.cells.check(atoms)
        except Exception as problem:  # whatever it is, the other structures go on
            result.fail(problem)
            return
        self.num_atoms += len(atoms)
        self._arrivals.append((result, FireBatch.of(atoms), inputs))

    def advance(self) -> None:
        """Evaluate the present geometries, and move on those that are not finished."""
        self._let_in()
        while len(self.now) and (
            problems := self.evaluation.prepare(self.now) or self.cells.runaways(self.now)
        ):
            self._finish(problems)
        if not len(self.now):
            return
        self.now, problems = self._evaluated()
        self._finish(problems)
        self.good = self.cells.with_forces(self.now)
        self._finish(self._reported())
        s = self.settings
        ends = (self.good.fmax < s.fmax) | (self.good.steps >= s.max_steps)
        self._finish(dict.fromkeys(np.flatnonzero(ends).tolist()))
        self.now = fire_step(self.good, self.cells)

    def _let_in(self) -> None:
        if self._arrivals:
            results, batches, inputs = zip(*self._arrivals, strict=True)
            self.results += results
            self.good = FireBatch.joined([self.good, *batches])
            self.now = FireBatch.joined([self.now, *batches])
            self.evaluation.admit(inputs)
            self._arrivals = []

    def _evaluated(self) -> tuple[FireBatch, Problems]:
        try:
            return self.evaluation.evaluate(self.now)
        except Exception:  # of the model or the machine; whose it is only one alone can say
            return self._evaluated_alone()

    def _evaluated_alone(self) -> tuple[FireBatch, Problems]:
        batch, problems = self.now, {}
        energy, forces, stress = (
            np.full_like(x, np.nan) for x in (batch.energy, batch.forces, batch.stress)
        )
        for k, result in enumerate(self.results):
            atoms, twin = _placed(result, batch, k), self.calculator.twin()
            try:
                twin.calculate(atoms)
            except Exception as problem:
                problems[k] = problem
                continue
            energy[k], forces[batch.rows(k)] = twin.results["energy"], twin.results["forces"]
            if "stress" in twin.results:
                stress[k] = voigt_6_to_full_3x3_stress(twin.results["stress"])
        return replace(batch, energy=energy, forces=forces, stress=stress), problems

    def _reported(self) -> Problems:
        """Tell of all structures; what is raised by it is a problem of its structure."""
        problems: Problems = {}
        if self.settings.on_step is not None:
            for k, result in enumerate(self.results):
                try:
                    self.settings.on_step(
                        result.name, int(self.good.steps[k]), float(self.good.fmax[k])
                    )
                except Exception as problem:
                    problems[k] = problem
        return problems

    def _finish(self, ends: Mapping[int, Exception | None]) -> None:
        """Complete results, with problems or without, and make room."""
        if not ends:
            return
        for k, problem in ends.items():
            self._complete(self.results[k], k)
            if problem is not None:
                self.results[k].fail(problem)
        which = np.ones(len(self.good), dtype=bool)
        which[list(ends)] = False
        self.num_atoms -= int(self.good.sizes[~which].sum())
        self.results = [self.results[k] for k in np.flatnonzero(which)]
        self.good, self.now = self.good.kept(which), self.now.kept(which)
        self.evaluation.keep(which)

    def _complete(self, result: RelaxResult, k: int) -> None:
        """What was found at the last good geometry, if there was any."""
        good = self.good
        if np.isnan(good.energy[k]):
            return
        result.energy, result.fmax = float(good.energy[k]), float(good.fmax[k])
        result.steps = int(good.steps[k])
        result.converged = result.fmax < self.settings.fmax
        found = {"energy": result.energy, "forces": good.forces[good.rows(k)].copy()}
        if good.crystals[k]:
            result.stress = found["stress"] = full_3x3_to_voigt_6_stress(good.stress[k])
        result.atoms = atoms = _placed(result, good, k)
        atoms.calc = SinglePointCalculator(atoms, **found)
        result.spacegroup = spacegroup(atoms, self.settings.symprec)


def _placed(result: RelaxResult, batch: FireBatch, k: int) -> Atoms:
    """The atoms that came, at the geometry of structure ``k``."""
    assert result.atoms is not None
    atoms = bare(result.atoms)
    atoms.set_cell(batch.cell[k], apply_constraint=False)
    atoms.set_positions(batch.positions[batch.rows(k)], apply_constraint=False)
    return atoms
