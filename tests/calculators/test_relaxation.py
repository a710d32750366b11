"""Relaxation: minima, pressure, symmetry, and structures that fail among others that do not."""

from __future__ import annotations

import gc
import sys
import weakref

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixInternals, Hookean
from ase.io import read, write

from mlip.calculators import EqCalculator, relax, relax_many
from mlip.calculators.chunks import BoundedPotential
from mlip.calculators.relaxation import OPTIMIZERS


def copper(rattle: float = 0.1) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(rattle, seed=0)
    return atoms


def test_every_optimizer_finds_the_same_minimum(toy) -> None:
    found = {}
    for optimizer in OPTIMIZERS:
        (result,) = relax(bulk("Cu", a=3.4), toy, cell=True, fmax=1e-4, optimizer=optimizer)
        assert result.status == "converged", optimizer
        assert result.fmax < 1e-4 and abs(result.stress).max() < 1e-5
        assert abs(result.atoms.get_forces()).max() < 1e-4
        found[optimizer] = (result.energy, result.atoms.cell.volume)
    energies, volumes = np.array(list(found.values())).T
    np.testing.assert_allclose(energies, energies[0], atol=1e-6)
    np.testing.assert_allclose(volumes, volumes[0], rtol=1e-3)


def test_pressure_is_reached_and_is_the_slope_of_the_energy(toy) -> None:
    settings = {"cell": True, "fmax": 1e-5, "optimizer": "LBFGS"}
    volumes, energies = [], []
    for pressure in (4.0, 5.0, 6.0):
        (result,) = relax(copper(), toy, pressure=pressure, **settings)
        assert result.converged
        expected = [-pressure * units.GPa] * 3 + [0] * 3
        np.testing.assert_allclose(result.stress, expected, atol=1e-5)
        volumes.append(result.atoms.cell.volume)
        energies.append(result.energy)
    assert volumes[0] > volumes[1] > volumes[2]
    slope = -(energies[2] - energies[0]) / (volumes[2] - volumes[0])
    assert slope == pytest.approx(5.0 * units.GPa, rel=1e-2)


def test_the_input_is_not_altered_and_constraints_come_back(potential) -> None:
    atoms = copper()
    atoms.set_constraint(FixAtoms([0, 1]))
    atoms.calc = EMT()
    before = atoms.copy()
    (result,) = relax(atoms, potential, max_steps=5)
    assert atoms == before and isinstance(atoms.calc, EMT)
    np.testing.assert_array_equal(result.atoms.positions[:2], atoms.positions[:2])
    assert result.steps == 0 or not np.array_equal(result.atoms.positions, atoms.positions)
    (kept,) = result.atoms.constraints
    assert isinstance(kept, FixAtoms)


def test_symmetry_is_kept(toy) -> None:
    pytest.importorskip("spglib")
    atoms = bulk("Cu", "fcc", a=3.5, cubic=True)
    atoms.set_cell(np.diag([3.5, 3.5, 3.9]), scale_atoms=True)  # tetragonal
    start = atoms.copy()
    (result,) = relax(start, toy, cell=True, keep_symmetry=True, fmax=1e-3)
    assert result.converged
    assert result.spacegroup in ("I4/mmm (139)", "Fm-3m (225)")
    np.testing.assert_array_equal(start.positions, atoms.positions)
    a, b, _, *angles = result.atoms.cell.cellpar()
    assert a == pytest.approx(b, abs=1e-8) and np.allclose(angles, 90, atol=1e-8)
    assert not result.atoms.constraints


def test_a_molecule_has_no_space_group_to_keep(toy) -> None:
    pytest.importorskip("spglib")
    molecular, crystal = relax_many([molecule("H2O"), bulk("Cu")], toy, keep_symmetry=True)
    assert "leave it out for molecules" in molecular.error
    assert crystal.converged and crystal.spacegroup == "Fm-3m (225)"


def test_symmetry_without_spglib_names_the_remedy(toy, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "spglib", None)
    with pytest.raises(ValueError, match="pip install"):
        relax(copper(), toy, keep_symmetry=True)


def test_failures_are_reported_and_the_rest_finished(toy, tmp_path) -> None:
    write(tmp_path / "two.xyz", [copper(0.05), copper(0.02)])
    (tmp_path / "bad.cif").write_text("this is no crystal")
    crushed = copper()
    crushed.positions[1] = crushed.positions[0]
    molecular = molecule("CH3OH")
    structures = [
        bulk("Au"), tmp_path / "two.xyz", crushed, tmp_path / "bad.cif", tmp_path / "no.cif",
        molecular, copper(),
    ]  # fmt: skip
    results = relax(structures, toy, cell=True, fmax=0.05)
    reasons = ["Au", None, None, "overlap", "cannot be read", "no.cif", "pbc", None]
    assert len(results) == len(reasons)
    for result, reason in zip(results, reasons, strict=True):
        if reason is None:
            assert result.status == "converged"
        else:
            assert result.status.startswith("failed: ") and not result.converged
            assert reason in result.error or reason in result.name
    assert results[1].name.endswith("two.xyz@0")


def test_a_crystal_that_flies_apart_is_a_failure(toy) -> None:
    results = relax([copper(), copper()], toy, cell=True, pressure=-50.0, optimizer="BFGS")
    for result in results:
        assert not result.converged and result.error is not None
        assert "volume" in result.error and result.atoms is not None


def test_steps_that_do_not_suffice(toy) -> None:
    (result,) = relax(copper(), toy, fmax=1e-6, max_steps=3)
    assert result.status == "not converged" and result.steps == 3
    (result,) = relax(copper(), toy, fmax=1e-6, max_steps=0)
    assert result.steps == 0 and np.isfinite(result.energy)


def test_any_ase_calculator_will_do() -> None:
    (result,) = relax(copper(), EMT(), fmax=0.01)
    assert result.converged
    with pytest.raises(TypeError, match="device"):
        relax(copper(), EMT(), device="cpu")


def test_results_survive_a_file(toy, tmp_path) -> None:
    (result,) = relax(copper(), toy, fmax=0.05)
    write(tmp_path / "out.xyz", result.atoms)
    back = read(tmp_path / "out.xyz")
    assert back.get_potential_energy() == pytest.approx(result.energy, abs=1e-6)
    assert abs(back.get_forces()).max() < 0.05


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizer": "Newton"}, "FIRE, FIRE2"),
        ({"pressure": 1.0}, "cell=True"),
        ({"fmax": 0.0}, "fmax"),
        ({"max_steps": -1}, "max_steps"),
    ],
)
def test_settings_that_make_no_sense(toy, settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        relax(copper(), toy, **settings)


def test_constraints_hold(potential) -> None:
    calc = EqCalculator(potential)
    atoms = molecule("CH3CH2OH")
    bond = atoms.get_distance(0, 1)
    atoms.set_constraint(FixInternals(bonds=[[bond + 0.05, [0, 1]]]))
    (result,) = relax(atoms, calc, max_steps=10)
    assert result.error is None
    assert result.atoms.get_distance(0, 1) == pytest.approx(bond + 0.05, abs=1e-6)
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 3.5]])
    atoms.set_constraint(Hookean(0, 1, k=500.0, rt=2.0))
    (result,) = relax(atoms, calc, fmax=1e-3)
    assert result.converged and result.atoms.get_distance(0, 1) < 2.1


@pytest.mark.parametrize(("optimizer", "cell"), [("FIRE", True), ("BFGS", True), ("LBFGS", False)])
def test_many_at_a_time_take_the_same_steps(toy, cell: bool, optimizer: str) -> None:
    structures = [copper(rattle) for rattle in (0.02, 0.1, 0.15)]
    structures[1].set_constraint(FixAtoms([0]))
    structures.append(bulk("Cu", a=3.5))
    settings = {"cell": cell, "fmax": 0.01, "optimizer": optimizer, "max_steps": 60}
    one_by_one = relax(structures, toy, **settings)
    # Five atoms: a batch has one structure or two, and the order of evaluations differs.
    together = relax_many(structures, toy, max_atoms=5, **settings)
    for a, b in zip(one_by_one, together, strict=True):
        assert a.name == b.name and a.status == b.status and a.steps == b.steps
        assert abs(a.energy - b.energy) < 1e-8
        assert abs(a.atoms.positions - b.atoms.positions).max() < 1e-7
        assert abs(np.array(a.atoms.cell) - np.array(b.atoms.cell)).max() < 1e-7


def test_one_bad_structure_among_many_stops_no_other(toy, tmp_path) -> None:
    overlap = copper()
    overlap.positions[1] = overlap.positions[0]
    strange = bulk("Fe")
    results = relax_many([copper(), overlap, "nowhere.cif", strange, copper()], toy, fmax=0.05)
    assert [r.converged for r in results] == [True, False, False, False, True]
    assert "overlap" in results[1].error and "Fe" in results[3].error
    assert "cannot be read" in results[2].error
    with pytest.raises(TypeError, match="use relax"):
        relax_many(copper(), EMT())
    with pytest.raises(ValueError, match="max_atoms = 0"):
        relax_many(copper(), toy, max_atoms=0)


def test_what_is_no_structure_stops_no_other(toy) -> None:
    nowhere = copper()
    nowhere.positions[0] = np.nan  # on which spglib would end the process
    nothing = Atoms(cell=[3, 3, 3], pbc=True)
    structures = [nowhere, 3, nothing, molecule("H2O"), Atoms("Cu", pbc=True), bulk("Cu")]
    for results in (
        relax(structures, toy, cell=True),
        relax_many(iter(structures), toy, cell=True),
        relax_many(structures, toy, cell=True, optimizer="LBFGS", max_atoms=1),
    ):
        assert [r.converged for r in results] == [False] * 5 + [True]
        for result, reason in zip(
            results, ("not finite", "but int", "no atoms", "pbc", "cell"), strict=False
        ):
            assert reason in result.error
    assert relax_many([], toy) == []


@pytest.mark.parametrize("optimizer", ["FIRE", "LBFGS"])
def test_a_failure_of_the_machine_is_that_of_its_structure(toy, monkeypatch, optimizer) -> None:
    large = bulk("Cu", cubic=True) * (1, 1, 2)
    original = BoundedPotential.__call__

    def narrow(self, graph, *, stress=False):
        if (graph.ptr.diff() == 8).any():
            raise RuntimeError("out of memory")
        return original(self, graph, stress=stress)

    monkeypatch.setattr(BoundedPotential, "__call__", narrow)
    results = relax_many([copper(), large, copper()], toy, fmax=0.05, optimizer=optimizer)
    assert [r.error for r in results] == [None, "out of memory", None]
    assert results[0].converged and results[2].converged


@pytest.mark.parametrize(("optimizer", "twins"), [("FIRE", 0), ("LBFGS", 3)])
def test_what_is_finished_keeps_nothing_but_its_result(
    toy, monkeypatch, optimizer: str, twins: int
) -> None:
    """Neighbour lists and matrices of optimizers of thousands of structures would add up."""
    alive = weakref.WeakSet()
    original = EqCalculator.twin

    def twin(self):
        made = original(self)
        alive.add(made)
        return made

    most = 0

    def count(*_) -> None:
        nonlocal most
        gc.collect()
        most = max(most, len(alive))

    monkeypatch.setattr(EqCalculator, "twin", twin)
    frames = (bulk("Cu", a=a) for a in np.linspace(3.4, 3.6, 8))
    settings = {"optimizer": optimizer, "fmax": 0.05, "max_steps": 2, "on_step": count}
    results = relax_many(frames, toy, max_atoms=2, **settings)
    assert len(results) == 8 and most <= twins
