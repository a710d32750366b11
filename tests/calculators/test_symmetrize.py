"""``EqCalculator(symmetrize=...)``: crystals keep their symmetry whatever the model does."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.stress import voigt_6_to_full_3x3_stress

from mlip.calculators import EqCalculator
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.rotations import rotations
from mlip.potential import Potential
from mlip.wrappers.rotation_averaging import RotationAveragingConfig

Make = Callable[..., Potential]
pytestmark = pytest.mark.filterwarnings("ignore:the model reads charge")


@pytest.mark.parametrize("rule", ["tetrahedral", "octahedral", "lebedev-11"])
def test_a_cubic_crystal_has_cubic_stress(lopsided: Make, rule: str) -> None:
    atoms = bulk("Si", cubic=True)
    plain, mean = EqCalculator(lopsided()), EqCalculator(lopsided(), symmetrize=rule)
    broken, stress = plain.get_stress(atoms), mean.get_stress(atoms)
    assert np.ptp(broken[:3]) > 1e-5 and np.abs(broken[3:]).max() > 1e-5
    assert np.ptp(stress[:3]) < 1e-12 and np.abs(stress[3:]).max() < 1e-12
    assert np.abs(stress[:3]).max() > 1e-5
    assert np.abs(plain.get_forces(atoms)).max() > 1e-4
    assert np.abs(mean.get_forces(atoms)).max() < 1e-10


def test_results_turn_with_the_structure(lopsided: Make) -> None:
    calc = EqCalculator(lopsided(), symmetrize="icosahedral")
    atoms = molecule("CH3OH")
    energy, forces = calc.get_potential_energy(atoms), calc.get_forces(atoms)
    spread = calc.get_property("forces_spread", atoms)
    R = rotations("icosahedral").matrices[41].numpy()
    atoms.positions = atoms.positions @ R.T
    assert calc.get_potential_energy(atoms) == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(calc.get_forces(atoms) @ R, forces, atol=1e-10)
    np.testing.assert_allclose(calc.get_property("forces_spread", atoms), spread, atol=1e-10)


def test_the_spread_is_that_of_the_copies(lopsided: Make) -> None:
    potential = lopsided()
    plain, calc = EqCalculator(potential), EqCalculator(potential, symmetrize="octahedral+mirrors")
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    energies, forces, stresses = [], [], []
    for R in rotations("octahedral", mirrors=True).matrices.numpy():
        turned = atoms.copy()
        turned.set_cell(atoms.cell @ R.T, scale_atoms=False)
        turned.positions = atoms.positions @ R.T
        energies.append(plain.get_potential_energy(turned))
        forces.append(plain.get_forces(turned) @ R)
        stresses.append(R.T @ voigt_6_to_full_3x3_stress(plain.get_stress(turned)) @ R)
    assert calc.get_potential_energy(atoms) == pytest.approx(np.mean(energies), abs=1e-10)
    np.testing.assert_allclose(calc.get_forces(atoms), np.mean(forces, axis=0), atol=1e-10)
    mean = voigt_6_to_full_3x3_stress(calc.get_stress(atoms))
    np.testing.assert_allclose(mean, np.mean(stresses, axis=0), atol=1e-10)
    assert calc.results["energy_spread"] == pytest.approx(np.std(energies), abs=1e-10)
    assert calc.results["energy_spread"] > 1e-4
    lengths = np.linalg.norm(forces - np.mean(forces, axis=0), axis=2)
    expected = np.sqrt((lengths**2).mean(axis=0))
    np.testing.assert_allclose(calc.results["forces_spread"], expected, atol=1e-10)
    assert calc.get_property("forces_spread", atoms).shape == (4,)


def test_forces_are_gradients_and_second_derivatives_agree(lopsided: Make) -> None:
    calc = EqCalculator(lopsided(), symmetrize="tetrahedral")
    atoms = molecule("H2O")
    hessian = calc.get_hessian(atoms, method="autograd")
    np.testing.assert_allclose(hessian, calc.get_hessian(atoms, method="finite"), atol=1e-5)
    assert np.abs(hessian).max() > 1e-2
    assert calc.get_descriptors(atoms).shape == (3, 6)


def test_exact_symmetry_is_not_changed(toy: Potential) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    a = EqCalculator(toy)
    with pytest.warns(UserWarning, match="24 copies give what one gives. Leave symmetrize out"):
        b = EqCalculator(toy, symmetrize="lebedev-3")
    assert b.get_potential_energy(atoms) == pytest.approx(a.get_potential_energy(atoms), abs=1e-10)
    np.testing.assert_allclose(b.get_forces(atoms), a.get_forces(atoms), atol=1e-10)
    np.testing.assert_allclose(b.get_stress(atoms), a.get_stress(atoms), atol=1e-10)
    assert b.results["energy_spread"] < 1e-10
    assert b.results["forces_spread"].max() < 1e-10
    assert "energy_spread" not in a.implemented_properties


class Bent(torch.nn.Module):
    """A model that binds, with a little of one without symmetry on top."""

    exact_symmetry = False

    def __init__(self, model: torch.nn.Module, lopsided: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.lopsided = model, lopsided
        self.config, self.receptive_field = model.config, model.receptive_field

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        return NodeOutput(self.model(graph).energy + 0.02 * self.lopsided(graph).energy)


def test_relaxation_keeps_a_cell_cubic(toy: Potential, lopsided: Make) -> None:
    potential = toy.with_model(Bent(toy.model, lopsided().model))
    shapes = []
    for symmetrize in (None, "octahedral"):
        atoms = bulk("Cu", a=3.7, cubic=True)
        atoms.calc = EqCalculator(potential, symmetrize=symmetrize)
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=40)
        lengths, angles = np.split(atoms.cell.cellpar(), 2)
        shapes.append((np.ptp(lengths), np.abs(angles - 90).max()))
    assert max(shapes[0]) > 1e-4
    assert max(shapes[1]) < 1e-9


def test_committees_and_units(lopsided: Make) -> None:
    potentials = [lopsided(seed=k) for k in range(2)]
    atoms = molecule("CH3OH")
    options = {"energy_units_to_eV": 2.0, "length_units_to_A": 1.5}
    both = EqCalculator(potentials, symmetrize="tetrahedral", **options)
    single = [EqCalculator(p, symmetrize="tetrahedral", **options) for p in potentials]
    for key in ("energy", "energy_spread", "forces", "forces_spread"):
        values = [calc.get_property(key, atoms) for calc in single]
        np.testing.assert_allclose(both.get_property(key, atoms), np.mean(values, axis=0))
    base = EqCalculator(potentials[0], symmetrize="tetrahedral")
    smaller = atoms.copy()
    smaller.positions /= 1.5
    spread = base.get_property("forces_spread", smaller)
    np.testing.assert_allclose(single[0].get_property("forces_spread", atoms), spread * 2 / 1.5)


def test_options_are_parsed(lopsided: Make) -> None:
    config = RotationAveragingConfig(rotations="octahedral", mirrors=True, max_edges=100)
    calc = EqCalculator(lopsided(), symmetrize=config)
    other = EqCalculator(lopsided(), symmetrize="octahedral+mirrors")
    atoms = molecule("H2O")
    expected = other.get_potential_energy(atoms)
    assert calc.get_potential_energy(atoms) == pytest.approx(expected, abs=1e-12)
    twin = pickle.loads(pickle.dumps(calc))
    assert twin.get_potential_energy(atoms) == calc.get_potential_energy(atoms)
    with pytest.raises(ValueError, match="unknown rotations 'cubic'"):
        EqCalculator(lopsided(), symmetrize="cubic")
    with pytest.raises(TypeError, match="did you mean 'symmetrize'"):
        EqCalculator(lopsided(), symmetrise="octahedral")
