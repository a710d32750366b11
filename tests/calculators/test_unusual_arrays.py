"""Arrays of other dtypes and layouts, as programs leave them, mean the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk

from mlip.calculators import EqCalculator


@pytest.fixture
def expected(potential):
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.positions[:] = atoms.positions.astype(np.float32)  # numbers that both dtypes have
    calc = EqCalculator(potential)
    return atoms, calc.get_potential_energy(atoms), calc.get_forces(atoms)


LAYOUTS = {
    "float32": lambda x: x.astype(np.float32),
    "column by column": np.asfortranarray,
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "a slice": lambda x: np.repeat(x, 2, axis=0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_positions_does_not_matter(potential, expected, layout):
    atoms, energy, forces = expected
    atoms.arrays["positions"] = LAYOUTS[layout](atoms.positions)
    calc = EqCalculator(potential)
    assert calc.get_potential_energy(atoms) == energy
    np.testing.assert_array_equal(calc.get_forces(atoms), forces)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_the_dtype_of_atomic_numbers_does_not_matter(potential, expected, dtype):
    atoms, energy, _ = expected
    atoms.arrays["numbers"] = atoms.numbers.astype(dtype)
    assert EqCalculator(potential).get_potential_energy(atoms) == energy


def test_a_jump_to_where_digits_end_is_refused_with_a_list_of_neighbours_at_hand(
    potential, expected
):
    atoms, _, _ = expected
    calc = EqCalculator(potential)
    calc.get_forces(atoms)
    atoms.positions += 1e15  # a common translation needs no new list
    with pytest.raises(ValueError, match="lost to rounding"):
        calc.get_forces(atoms)
