"""FIRE on all structures at once takes the steps of ASE's FIRE on each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixCartesian
from ase.optimize import FIRE

from mlip.calculators import EqCalculator, relax, relax_many
from mlip.calculators.batched_fire import FireBatch, FixedCells, fire_step
from mlip.calculators.batched_neighbors import BatchedNeighbors
from mlip.calculators.batched_relaxation import BatchedRelaxation
from mlip.calculators.chunks import BoundedPotential
from mlip.calculators.neighbor_cache import NeighborCache
from mlip.calculators.relax_result import RelaxSettings
from mlip.calculators.structure_checks import check_structure, doubtful


def crystals() -> list[Atoms]:
    """Of several sizes and elements, one with atoms held, one left-handed."""
    frames = [bulk("Cu", cubic=True), bulk("Si", cubic=True), bulk("Cu") * (2, 1, 1), bulk("Cu")]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.08, seed=k)
        atoms.set_cell(atoms.cell @ (np.eye(3) + 0.02 * np.eye(3)[[1, 2, 0]]), scale_atoms=True)
    frames[1].set_constraint(FixAtoms([0, 3]))
    frames[2].set_cell(frames[2].cell[[1, 0, 2]])
    return frames


def open_structures() -> list[Atoms]:
    """A molecule, an atom, and slabs with and without a cell vector across them."""
    slab, bare = fcc111("Cu", (1, 2, 2), vacuum=6.0), fcc111("Cu", (2, 1, 2))
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 2))
    frames = [molecule("CH3OH"), slab, bare, Atoms("Cu")]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=k)
    return frames


def same(a, b, tolerance: float) -> None:
    assert (a.name, a.status, a.steps) == (b.name, b.status, b.steps)
    assert abs(a.energy - b.energy) < tolerance and abs(a.fmax - b.fmax) < 100 * tolerance
    np.testing.assert_allclose(a.atoms.positions, b.atoms.positions, atol=tolerance, rtol=0)
    np.testing.assert_allclose(a.atoms.cell.array, b.atoms.cell.array, atol=tolerance, rtol=0)
    assert a.spacegroup == b.spacegroup and (a.stress is None) == (b.stress is None)
    assert [str(x) for x in a.atoms.constraints] == [str(x) for x in b.atoms.constraints]
    for name, value in a.atoms.calc.results.items():
        np.testing.assert_allclose(
            b.atoms.calc.results[name], value, atol=100 * tolerance, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("max_atoms", [9, 1000])
@pytest.mark.parametrize(("cell", "pressure"), [(False, 0.0), (True, 0.0), (True, 5.0)])
def test_the_steps_are_those_of_ase(potential, cell: bool, pressure: float, max_atoms) -> None:
    frames = crystals() if cell else crystals() + open_structures()
    calc = EqCalculator(potential)
    for max_steps in (2, 25):
        settings = {"cell": cell, "pressure": pressure, "fmax": 1e-3, "max_steps": max_steps}
        together = relax_many(frames, calc, max_atoms=max_atoms, **settings)
        for a, b in zip(relax(frames, calc, **settings), together, strict=True):
            same(a, b, 1e-9)


def test_long_trajectories_and_minima(toy) -> None:
    steps: dict[str, list] = {"relax": [], "relax_many": []}
    found = {}
    for function in (relax, relax_many):
        rows = steps[function.__name__]
        found[function.__name__] = function(
            crystals(), toy, cell=True, fmax=1e-4, on_step=lambda *row, rows=rows: rows.append(row)
        )
    for a, b in zip(found["relax"], found["relax_many"], strict=True):
        assert a.converged
        same(a, b, 1e-8)
    one_by_one, together = sorted(steps["relax"]), sorted(steps["relax_many"])
    assert [row[:2] for row in one_by_one] == [row[:2] for row in together]
    assert max(row[1] for row in together) > 60
    forces = np.array([[row[2] for row in rows] for rows in (one_by_one, together)])
    np.testing.assert_allclose(forces[1], forces[0], atol=1e-8)


def test_fire_of_one_is_that_of_ase() -> None:
    """Uphill steps and large forces included."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.3, seed=0)
    batch, cells = FireBatch.of(atoms), FixedCells()
    atoms.calc = EMT()
    optimizer = FIRE(atoms, logfile=None)
    shrunk = 0
    for _ in range(80):
        batch.forces[:] = atoms.get_forces()
        before = optimizer.dt
        optimizer.step()
        shrunk += optimizer.dt < before
        batch = fire_step(cells.with_forces(batch), cells)
        np.testing.assert_allclose(batch.positions, atoms.positions, atol=1e-9)
        assert (batch.dt[0], batch.a[0]) == pytest.approx((optimizer.dt, optimizer.a))
        assert batch.downhill[0] == optimizer.Nsteps
    assert shrunk > 1


@pytest.mark.filterwarnings("ignore:symmetrize")  # of an exact model
@pytest.mark.parametrize(
    "options",
    [
        {"symmetrize": "tetrahedral"},
        {"energy_units_to_eV": 27.2, "length_units_to_A": 1.1},
        {"skin": 0.0},
        {"max_memory": "1MB"},
        {"committee": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_calculator(toy, random_facet, options: dict) -> None:
    models = [toy]
    if options.get("committee"):
        models.append(toy.with_model(random_facet().double()))  # with another cutoff
    options = {key: value for key, value in options.items() if key != "committee"}
    calc = EqCalculator(models, **options)
    settings = {"cell": True, "max_steps": 5}
    frames = crystals()
    for a, b in zip(relax(frames, calc, **settings), relax_many(frames, calc, **settings)):  # noqa: B905
        same(a, b, 1e-9)


def test_inputs_from_info(lopsided) -> None:
    frames = [molecule("H2O"), molecule("CH4"), bulk("Cu")]
    for charge, atoms in enumerate(frames):
        atoms.info["charge"] = charge
    settings = {"max_steps": 5}
    one_by_one = relax(frames, lopsided(), **settings)
    for a, b in zip(one_by_one, relax_many(frames, lopsided(), **settings), strict=True):
        same(a, b, 1e-9)


def test_other_constraints_find_their_way(toy) -> None:
    frames = crystals()
    frames[3].set_constraint(FixCartesian([0], mask=(True, False, False)))
    for a, b in zip(relax(frames, toy), relax_many(frames, toy), strict=True):
        same(a, b, 1e-7)


def test_who_fails_underway_keeps_the_last_good_geometry(toy, monkeypatch) -> None:
    original = BoundedPotential.__call__
    calls = 0

    def broken(self, graph, *, stress=False):
        nonlocal calls
        calls += 1
        out = original(self, graph, stress=stress)
        if calls > 3:  # silicon, the only one with so many atoms
            out["energy"][graph.ptr.diff() == 8] = np.nan
        return out

    monkeypatch.setattr(BoundedPotential, "__call__", broken)
    results = relax_many(crystals(), toy, cell=True, fmax=0.02)
    assert [r.converged for r in results] == [True, False, True, True]
    failed = results[1]
    assert "no finite energy" in failed.error and "Si8" in failed.error
    monkeypatch.undo()
    (expected,) = relax(crystals()[1], toy, cell=True, max_steps=2)
    assert failed.steps == 2
    np.testing.assert_allclose(failed.atoms.positions, expected.atoms.positions, atol=1e-9)
    assert failed.energy == pytest.approx(expected.energy, abs=1e-9)


def test_a_crystal_that_flies_apart_leaves_the_others_alone(toy) -> None:
    single = bulk("Cu", a=9.0, cubic=True)  # nothing holds it against the tension
    results = relax_many([bulk("Cu", a=3.4), single], toy, cell=True, pressure=-3.0)
    assert results[0].converged and "volume" in results[1].error
    assert results[1].steps > 0 and np.isfinite(results[1].energy)


def test_forces_beyond_numbers_stop_no_other(toy, monkeypatch) -> None:
    original = EqCalculator.evaluate_graphs

    def huge(self, graphs, stress):
        energy, forces, stress = original(self, graphs, stress)
        if len(forces) == 12:
            forces[:4] *= 1e200
        return energy, forces, stress

    monkeypatch.setattr(EqCalculator, "evaluate_graphs", huge)
    with np.errstate(over="ignore"):
        first, second = relax_many(crystals()[:2], toy, cell=True, fmax=0.05)
    assert "not finite" in first.error and second.converged


def test_a_callback_that_fails_is_a_problem_of_its_structure(toy) -> None:
    def on_step(name: str, step: int, fmax: float) -> None:
        if name.startswith("Si") and step == 2:
            raise RuntimeError("enough")

    results = relax_many(crystals(), toy, fmax=0.05, on_step=on_step)
    assert [r.error for r in results] == [None, "enough", None, None]
    assert results[1].steps == 2 and np.isfinite(results[1].energy)


def test_batches_are_kept_full_and_not_too_large(toy, monkeypatch) -> None:
    sizes = []
    original = BatchedRelaxation.advance

    def advance(self):
        sizes.append(self.num_atoms)
        original(self)

    monkeypatch.setattr(BatchedRelaxation, "advance", advance)
    frames = [bulk("Cu", a=a) for a in np.linspace(3.4, 3.9, 12)] + [bulk("Cu") * 2]
    assert all(r.converged for r in relax_many(iter(frames), toy, max_atoms=4, fmax=0.01))
    assert max(sizes) == 8 and sizes.count(4) > len(sizes) / 2  # eight: one that is larger


def test_lists_are_those_of_each_structure_alone() -> None:
    """The same edges to the bit, and lists made anew in the same steps."""
    rng = np.random.default_rng(0)
    frames = crystals() + open_structures()[:1]
    caches = [NeighborCache(4.5, 0.5) for _ in frames]
    together = BatchedNeighbors(4.5, 0.5, caches[0].device)
    together.admit(len(frames))
    together.keep(np.arange(len(frames)) != 1)
    del frames[1], caches[1]
    for _ in range(25):
        for atoms in frames:
            atoms.positions += rng.normal(scale=0.03, size=atoms.positions.shape)
            if atoms.pbc.any():
                F = np.eye(3) + rng.normal(scale=0.01, size=(3, 3))
                atoms.set_cell(atoms.cell @ F, scale_atoms=True)
        batch = FireBatch.joined([FireBatch.of(atoms) for atoms in frames])
        assert not together.update(batch, batch.positions, batch.lattice, batch.pbc)
        positions, lattice = (torch.from_numpy(x) for x in (batch.positions, batch.lattice))
        found = together.edges(positions, lattice)
        alone = [c.edges(a.positions, a.cell.array, a.pbc) for c, a in zip(caches, frames)]  # noqa: B905
        first = batch.first.tolist()
        index = [x.edge_index + n for x, n in zip(alone, first, strict=True)]
        assert torch.equal(found.edge_index, torch.cat(index, dim=1))
        assert torch.equal(found.lengths, torch.cat([x.lengths for x in alone]))
        assert together.num_builds == sum(cache.num_builds for cache in caches)
    assert together.num_builds < 25 * len(frames) / 2


def test_what_is_wrong_is_doubtful() -> None:
    """Every geometry that is refused is looked at, and hardly any that is not."""
    good = [*crystals(), *open_structures(), bulk("Cu", a=2.2), Atoms("Cu300", np.eye(300, 3))]
    bad = [bulk("Cu") for _ in range(6)]
    bad[0].positions[0, 0] = np.nan
    bad[1].positions[0, 2] = 1e10
    bad[2].cell[1, 1] = np.inf
    bad[3].cell[2] = bad[3].cell[0] + 1e-5
    bad[4].cell[1] *= 1e-3
    bad[5].cell[:] = np.eye(3) / 5
    batch = FireBatch.joined([FireBatch.of(atoms) for atoms in good + bad])
    found = doubtful(batch.positions, batch.first, batch.lattice, batch.pbc)
    assert found.tolist() == [False] * len(good) + [True] * len(bad)
    for atoms in bad:
        with pytest.raises(ValueError):
            check_structure(atoms, np.ones(119, dtype=bool))


def test_only_fire_is_batched(toy) -> None:
    calc, atoms = EqCalculator(toy), bulk("Cu")
    for optimizer, keep_symmetry, taken in (
        ("FIRE", False, True), ("fire", False, True), ("FIRE", True, False), ("BFGS", False, False)
    ):  # fmt: skip
        settings = RelaxSettings(False, 0.0, keep_symmetry, 0.01, 10, optimizer, 0.01, None)
        assert BatchedRelaxation(calc, settings).takes(atoms) == taken
