"""Forces on positions and strain are derivatives of the enthalpy; coordinates go back and forth."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from mlip.calculators import EqCalculator
from mlip.calculators.log_strain_filter import LogStrainFilter


@pytest.fixture
def crystal(toy) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.calc = EqCalculator(toy, dtype="float64")
    return atoms


STRAINS = [
    np.zeros((3, 3)),
    np.diag([0.05, 0.05, -0.02]),  # two of the logarithms are equal
    np.array([[0.05, 0.03, -0.02], [0.03, -0.04, 0.01], [-0.02, 0.01, 0.02]]),
]


@pytest.mark.parametrize("eps", STRAINS)
@pytest.mark.parametrize("pressure", [0.0, 0.05])
def test_forces_are_derivatives(crystal: Atoms, eps: np.ndarray, pressure: float) -> None:
    target = LogStrainFilter(crystal, pressure)
    x = target.get_positions()
    x[-3:] = len(crystal) * eps
    target.set_positions(x)
    np.testing.assert_allclose(target.get_positions(), x, rtol=0, atol=1e-12)
    rng = np.random.default_rng(0)
    step = rng.normal(size=x.shape)
    step[-3:] += step[-3:].T.copy()  # the strain is symmetric
    energies = []
    for h in (1e-5, -1e-5):
        target.set_positions(x + h * step)
        energies.append(target.get_potential_energy())
    target.set_positions(x)
    work = -(energies[0] - energies[1]) / 2e-5
    assert work == pytest.approx((target.get_forces() * step).sum(), abs=1e-6)


def test_the_minimum_is_that_of_the_filter_of_ase(crystal: Atoms) -> None:
    other = crystal.copy()
    other.calc = crystal.calc.twin()
    for target in (LogStrainFilter(crystal), FrechetCellFilter(other)):
        assert BFGS(target, logfile=None).run(fmax=1e-5, steps=200)
    assert crystal.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=1e-8)
    assert crystal.get_volume() == pytest.approx(other.get_volume(), rel=1e-5)


def test_the_crystal_does_not_turn(crystal: Atoms) -> None:
    start = np.array(crystal.cell)
    BFGS(LogStrainFilter(crystal), logfile=None).run(fmax=1e-3, steps=100)
    F = np.linalg.solve(start, np.array(crystal.cell))
    np.testing.assert_allclose(F, F.T, rtol=0, atol=1e-12)
