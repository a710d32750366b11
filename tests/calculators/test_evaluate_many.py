"""Many structures at a time give what each gives alone."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mlip.calculators import EqCalculator, neighbor_cache
from mlip.data.neighbors import neighbor_list


def structures() -> list[Atoms]:
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    cluster = Atoms("Cu3", [[0, 0, 0], [2.3, 0, 0], [0.4, 2.5, 0.3]])
    slab = bulk("Cu", cubic=True)
    slab.pbc = [True, True, False]
    return [crystal, cluster, Atoms("Cu"), slab, bulk("Cu")]


@pytest.mark.filterwarnings("ignore:symmetrize")  # of an exact model
@pytest.mark.parametrize("options", [{}, {"symmetrize": "tetrahedral"}])
@pytest.mark.parametrize("max_atoms", [1, 7, 1000])
def test_as_one_by_one(toy, options: dict, max_atoms: int) -> None:
    calc = EqCalculator(toy, dtype="float64", **options)
    together = calc.evaluate(structures(), max_atoms=max_atoms)
    assert calc.results == {}  # of this calculator's own structure
    for atoms, results in zip(structures(), together, strict=True):
        calc.calculate(atoms)
        assert results.keys() == calc.results.keys()
        assert ("stress" in results) == bool(atoms.pbc.all())
        for key, value in calc.results.items():
            np.testing.assert_allclose(results[key], value, rtol=0, atol=1e-10, err_msg=key)


def test_displaced_copies_share_a_list_of_neighbours(monkeypatch, toy) -> None:
    made = []

    def counted(*arguments):
        made.append(arguments)
        return neighbor_list(*arguments)

    monkeypatch.setattr(neighbor_cache, "neighbor_list", counted)
    frames = []
    for k in range(4):
        frames.append(bulk("Cu", cubic=True))
        frames[-1].positions[k] += 0.02
    calc = EqCalculator(toy, dtype="float64")
    together = calc.evaluate(frames, max_atoms=8)
    assert len(made) == 1
    for atoms, results in zip(frames, together, strict=True):
        calc.calculate(atoms)
        np.testing.assert_allclose(results["forces"], calc.results["forces"], atol=1e-10)


def test_committee(toy) -> None:
    calc = EqCalculator([toy, toy])
    for results in calc.evaluate(structures()):
        assert results["forces_comm"].shape == (2, *results["forces"].shape)
        assert results["energy_var"] == pytest.approx(0, abs=1e-20)


def test_what_is_wrong_is_said_with_the_number(toy) -> None:
    calc = EqCalculator(toy)
    broken = molecule("H2O")
    broken.positions[1] = np.nan
    with pytest.raises(ValueError, match="structure 5: position of atom 1"):
        calc.evaluate([*structures(), broken])
    assert calc.evaluate([]) == []
    with pytest.raises(TypeError, match="structure 1 is str, not Atoms; read files"):
        calc.evaluate([structures()[0], "file.cif"])


def test_one_alone_is_a_list_of_one(toy) -> None:
    calc, atoms = EqCalculator(toy), structures()[0]
    (alone,) = calc.evaluate(atoms)
    assert alone["energy"] == calc.evaluate([atoms])[0]["energy"]


def test_huge_and_tiny_ones_in_one_batch(toy) -> None:
    """Neighbourhoods of very different sizes share a batch without a trace."""
    calc = EqCalculator(toy, dtype="float64")
    frames = [
        bulk("Cu") * (6, 6, 6),
        Atoms("H"),
        bulk("Cu", a=2.2),
        Atoms("OH", [[0] * 3, [9] * 3]),
    ]
    for atoms, results in zip(frames, calc.evaluate(frames, max_atoms=1000), strict=True):
        calc.calculate(atoms)
        np.testing.assert_allclose(results["forces"], calc.results["forces"], atol=1e-10)


def test_a_twin_has_results_of_its_own(toy) -> None:
    calc = EqCalculator(toy)
    first, second = structures()[0], structures()[4]
    first.calc, second.calc = calc, calc.twin()
    energies = first.get_potential_energy(), second.get_potential_energy()
    assert first.calc.results["energy"] == energies[0] != energies[1]
    assert second.calc.potentials is calc.potentials
