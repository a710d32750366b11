"""Physics that a user may rely on, through the calculator: for a toy potential and for a random
Facet.

Row numbers are those of the acceptance matrix.  What speaks of trained models only (P04, P13, P15)
is shown by the benchmarks.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, make_supercell, molecule
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.constraints import FixAtoms
from ase.data import atomic_numbers
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from scipy.spatial.transform import Rotation

from mlip.calculators import EqCalculator, relax
from mlip.potential import Potential


def triclinic() -> Atoms:
    """A rattled cell of generic shape and orientation with three elements."""
    atoms = bulk("Si", cubic=True)
    atoms.numbers[[1, 4]] = 29, 8
    F = np.array([[1.0, 0.07, -0.04], [0.02, 1.05, 0.11], [-0.06, 0.03, 0.96]])
    atoms.set_cell(atoms.cell[:] @ F, scale_atoms=True)
    atoms.rattle(0.1, seed=0)
    return atoms


def cluster() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms


@pytest.mark.parametrize("make", [triclinic, cluster])
def test_p01_forces_are_minus_the_gradient(potential, make) -> None:
    atoms = make()
    atoms.calc = EqCalculator(potential)
    numeric = calculate_numerical_forces(atoms, eps=1e-4)
    assert abs(numeric - atoms.get_forces()).max() < 1e-6
    single = EqCalculator(potential, dtype="float32").get_forces(atoms)
    assert abs(single - atoms.get_forces()).max() < 1e-3


def test_p02_stress_is_the_derivative_under_strain(potential) -> None:
    atoms = triclinic()
    atoms.calc = EqCalculator(potential)
    stress = atoms.get_stress()
    assert abs(calculate_numerical_stress(atoms, eps=1e-4) - stress).max() < 1e-7
    assert abs(stress[3:]).min() > 1e-6  # the off-diagonal ones are put to the test


def dynamics(potential: Potential, timestep: float) -> VelocityVerlet:
    atoms = copper()
    atoms.set_momenta(np.random.default_rng(0).normal(scale=1.5, size=(len(atoms), 3)))
    atoms.calc = EqCalculator(potential)
    return VelocityVerlet(atoms, timestep * units.fs)


def test_p03_the_energy_error_is_second_order_in_the_time_step(potential) -> None:
    errors = []
    for timestep in (4.0, 2.0, 1.0):
        run, energies = dynamics(potential, timestep), []
        run.attach(lambda run=run, energies=energies: energies.append(run.atoms.get_total_energy()))
        run.run(round(80 / timestep))
        errors.append(np.abs(np.array(energies) - energies[0]).max())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.25)


def test_p03_trajectories_run_backwards(potential) -> None:
    run = dynamics(potential, 2.0)
    start = run.atoms.get_positions()
    run.run(60)
    assert abs(run.atoms.positions - start).max() > 0.1
    run.atoms.set_momenta(-run.atoms.get_momenta())
    run.run(60)
    np.testing.assert_allclose(run.atoms.positions, start, atol=1e-9)


def quadrature_errors(energies, slopes, step: float) -> tuple[float, float]:
    """Largest difference of an energy step and the trapezoid of its slope; and at half the step.

    Third order in the step where force and energy agree and are smooth; a jump of the energy stays
    as large as it is.  ``energies`` and ``slopes``: at an odd number of points, ``step`` apart.
    """
    E, dE = np.asarray(energies), np.asarray(slopes)

    def largest(stride: int) -> float:
        e, de = E[::stride], dE[::stride]
        return abs(np.diff(e) - stride * step * (de[1:] + de[:-1]) / 2).max()

    return largest(2), largest(1)


def test_p05_no_work_on_a_closed_path_and_no_jump(potential) -> None:
    atoms = triclinic()
    calc = EqCalculator(potential)
    start, n = atoms.positions[2].copy(), 640
    angles = 2 * np.pi * np.arange(n + 1) / n
    # A loop of 1.6 angstrom across, in the course of which neighbours come and go.
    path = np.stack([np.cos(angles) - 1, np.sin(angles), 0.5 * np.sin(2 * angles)], axis=1) * 0.8
    tangent = np.stack([-np.sin(angles), np.cos(angles), np.cos(2 * angles)], axis=1) * 0.8
    energies, power, degrees = [], [], []
    for shift, direction in zip(path, tangent, strict=True):
        atoms.positions[2] = start + shift
        power.append(calc.get_forces(atoms)[2] @ direction)
        energies.append(calc.get_potential_energy(atoms))
        degrees.append(len(next(iter(calc._caches.values())).edges(
            atoms.positions, atoms.cell[:], atoms.pbc).lengths))  # fmt: skip
    assert len(set(degrees)) > 3
    # Trapezoids are exact for smooth periodic functions.
    assert abs(np.mean(power[:-1])) * 2 * np.pi < 1e-6
    coarse, fine = quadrature_errors(energies, -np.array(power), 2 * np.pi / n)
    assert fine < 1e-4 * np.ptp(energies) and coarse > 6 * fine


def test_p06_pressure_is_the_slope_of_the_energy_through_compression_and_tension(potential) -> None:
    atoms = triclinic()
    calc, cell = EqCalculator(potential), atoms.cell.array.copy()
    V0, volumes = atoms.get_volume(), np.linspace(0.5, 2.75, 1001)
    energies, slopes, forces = [], [], []
    for v in volumes:
        atoms.set_cell(cell * v ** (1 / 3), scale_atoms=True)
        energies.append(calc.get_potential_energy(atoms))
        slopes.append(V0 * calc.get_stress(atoms)[:3].mean())
        forces.append(calc.get_forces(atoms))
    coarse, fine = quadrature_errors(energies, slopes, volumes[1] - volumes[0])
    assert fine < 1e-4 * np.ptp(energies) and coarse > 6 * fine
    # The same for the forces: their largest change is halved with the step.
    assert abs(np.diff(forces[::2], axis=0)).max() > 1.9 * abs(np.diff(forces, axis=0)).max()


def normalized(atoms: Atoms, potential: Potential) -> tuple:
    calc = EqCalculator(potential)
    return (
        calc.get_potential_energy(atoms) / len(atoms),
        calc.get_forces(atoms),
        calc.get_stress(atoms),
    )


def test_p07_one_crystal_however_it_is_written(potential) -> None:
    atoms = triclinic()
    energy, forces, stress = normalized(atoms, potential)
    rng = np.random.default_rng(0)

    def check(other: Atoms, origin: np.ndarray) -> None:
        e, f, s = normalized(other, potential)
        assert e == pytest.approx(energy, abs=1e-10)
        np.testing.assert_allclose(f, forces[origin], atol=1e-9)
        np.testing.assert_allclose(s, stress, atol=1e-11)

    same = np.arange(8)
    unwrapped = atoms.copy()
    unwrapped.positions += rng.integers(-9, 10, size=(8, 3)) @ atoms.cell[:]
    check(unwrapped, same)
    moved = atoms.copy()
    moved.positions += (1.234, -5.6, 77.0)
    check(moved, same)
    moved.wrap()
    check(moved, same)
    order = rng.permutation(8)
    check(atoms[order], order)
    check(atoms * (2, 1, 3), np.tile(same, 6))
    for P in (
        [[1, 1, 0], [0, 1, 0], [0, 0, 1]],
        [[2, 1, 0], [1, 1, 0], [3, -1, 1]],
        -np.eye(3, dtype=int),
    ):
        other = atoms.copy()
        other.set_cell(np.array(P) @ atoms.cell[:])  # sheared, very sheared, left-handed
        check(other, same)
    P = np.array([[1, 1, 0], [-1, 1, 0], [0, 1, 2]])
    supercell = make_supercell(atoms, P)
    scaled = (supercell.positions[:, None] - atoms.positions) @ np.linalg.inv(atoms.cell[:])
    origin = abs(scaled - scaled.round()).sum(-1).argmin(1)
    check(supercell, origin)


def test_p07_a_primitive_cell_smaller_than_the_cutoff(potential) -> None:
    primitive, cubic = bulk("Cu"), bulk("Cu", cubic=True)
    energy, forces, stress = normalized(primitive, potential)
    e, _, s = normalized(cubic * 2, potential)
    assert e == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(s, stress, atol=1e-11)
    assert abs(forces).max() < 1e-12


@pytest.mark.parametrize(
    "pair", itertools.combinations_with_replacement(("H", "C", "O", "Si", "Cu"), 2), ids="".join
)
def test_p08_dimers_fade_smoothly_at_the_cutoff(potential, pair: tuple[str, str]) -> None:
    calc = EqCalculator(potential)
    apart = float(potential.e0[[atomic_numbers[s] for s in pair]].sum())
    rc = calc.cutoff
    r = np.arange(rc - 0.01, rc + 0.002, 1e-3)
    energies, forces = [], []
    for distance in r:
        dimer = Atoms(pair, positions=[[0, 0, 0], [0, distance * 0.6, distance * 0.8]])
        energies.append(calc.get_potential_energy(dimer) - apart)
        forces.append(np.linalg.norm(calc.get_forces(dimer)[0]))
    E, F = np.array(energies), np.array(forces)
    outside = r >= rc
    assert (abs(E[outside]) < 1e-9).all() and (F[outside] == 0).all()
    assert abs(np.diff(E)).max() < 1e-8 and abs(E[~outside][-1]) < 1e-8
    assert F[~outside][-1] < 1e-6 and abs(np.diff(F)).max() < 1e-3


def test_p09_fragments_add_up_and_do_not_see_each_other(potential) -> None:
    calc, a, b = EqCalculator(potential), cluster(), molecule("H2O")
    reach = potential.model.receptive_field
    b.positions += a.positions.max(0) - b.positions.min(0) + reach + 0.1
    both = a + b
    separate = calc.get_potential_energy(a) + calc.get_potential_energy(b)
    assert calc.get_potential_energy(both) == pytest.approx(separate, abs=1e-9)
    expected = np.concatenate([calc.get_forces(a), calc.get_forces(b)])
    np.testing.assert_allclose(calc.get_forces(both), expected, atol=1e-11)


def test_p09_slabs_do_not_feel_the_vacuum(potential) -> None:
    slab = fcc111("Cu", (2, 2, 2), vacuum=50.0)
    slab.rattle(0.05, seed=0)
    slab.pbc = True
    calc = EqCalculator(potential)
    energy, forces = calc.get_potential_energy(slab), calc.get_forces(slab)
    slab.pbc = (True, True, False)
    assert calc.get_potential_energy(slab) == energy
    np.testing.assert_array_equal(calc.get_forces(slab), forces)
    slab.cell[2] = 0
    assert calc.get_potential_energy(slab) == energy
    ghost = slab + Atoms("H", positions=[slab.positions.max(0) + 30.0])
    np.testing.assert_allclose(calc.get_forces(ghost)[:-1], forces, atol=1e-12)


def test_p10_second_derivatives(potential) -> None:
    atoms = triclinic()
    calc = EqCalculator(potential)
    H = calc.get_hessian(atoms)
    np.testing.assert_allclose(H.sum(axis=1), 0, atol=1e-9)
    h, numeric = 1e-4, []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[3, 1] += sign * h
        numeric.append(calc.get_forces(moved))
    np.testing.assert_allclose((numeric[1] - numeric[0]) / (2 * h), H[10], atol=1e-5)


def test_p10_a_crystal_at_its_minimum_has_no_imaginary_modes(toy) -> None:
    (result,) = relax(bulk("Cu"), toy, cell=True, fmax=1e-7, optimizer="BFGS")
    crystal = result.atoms * (3, 3, 3)
    H = EqCalculator(toy).get_hessian(crystal).reshape(81, 81)
    modes = np.linalg.eigvalsh(H)
    assert abs(modes[:3]).max() < 1e-8 and modes[3] > 0.1  # translations, then the rest


@pytest.mark.parametrize("make", [triclinic, cluster])
def test_p11_rotation_and_mirror(potential, make) -> None:
    atoms, calc = make(), EqCalculator(potential)
    energy, forces = calc.get_potential_energy(atoms), calc.get_forces(atoms)
    for k in range(4):
        R = Rotation.random(random_state=k).as_matrix() * (-1) ** k
        turned = atoms.copy()
        turned.set_cell(atoms.cell[:] @ R.T)
        turned.positions = atoms.positions @ R.T
        assert calc.get_potential_energy(turned) == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(calc.get_forces(turned), forces @ R.T, atol=1e-8)
        if atoms.pbc.all():
            stress = calc.get_property("stress", atoms)
            full = stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
            rotated = (R @ full @ R.T).ravel()[[0, 4, 8, 5, 2, 1]]
            np.testing.assert_allclose(calc.get_stress(turned), rotated, atol=1e-9)


def test_p12_rotations_in_float32(potential) -> None:
    atoms = triclinic() * (2, 2, 1)
    calc = EqCalculator(potential, dtype="float32")
    energies, forces = [], []
    for k in range(20):
        R = Rotation.random(random_state=k).as_matrix()
        turned = atoms.copy()
        turned.set_cell(atoms.cell[:] @ R.T, scale_atoms=True)
        energies.append(calc.get_potential_energy(turned))
        forces.append(calc.get_forces(turned) @ R)
    assert np.var(energies) < 1e-8
    assert abs(np.array(forces) - forces[0]).max() < 1e-4


def test_p16_single_and_double_precision_relax_to_the_same_crystal(toy) -> None:
    found = []
    for dtype, fmax in (("float32", 1e-3), ("float64", 1e-5)):
        (result,) = relax(copper(), toy, fmax=fmax, dtype=dtype, optimizer="LBFGS", max_steps=199)
        assert result.converged
        found.append(result.atoms)
    a, b = found
    assert abs(a.get_potential_energy() - b.get_potential_energy()) / 4 < 1e-4
    assert abs(a.positions - b.positions).max() < 1e-3


def test_p17_elastic_constants_from_energy_and_from_stress(toy) -> None:
    (result,) = relax(bulk("Cu", cubic=True), toy, cell=True, fmax=1e-7, optimizer="BFGS")
    crystal, calc, h = result.atoms, EqCalculator(toy), 2e-3
    V = crystal.get_volume()

    def strained(k: int, e: float) -> Atoms:
        i, j = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))[k]
        F = np.eye(3)
        F[i, j] += e / 2
        F[j, i] += e / 2
        atoms = crystal.copy()
        atoms.set_cell(crystal.cell[:] @ F, scale_atoms=True)
        return atoms

    def from_stress(k: int) -> np.ndarray:
        plus, minus = (calc.get_stress(strained(k, sign * h)) for sign in (1, -1))
        return (plus - minus) / (2 * h)

    def from_energy(k: int) -> float:
        plus, zero, minus = (
            calc.get_potential_energy(strained(k, sign * h)) for sign in (1, 0, -1)
        )
        return (plus - 2 * zero + minus) / h**2 / V

    C = np.array([from_stress(k) for k in range(6)])
    for k in (0, 1, 3):
        assert from_energy(k) == pytest.approx(C[k, k], rel=1e-2)
    assert C[0, 0] > C[0, 1] > 0 and C[3, 3] > 0  # stable
    np.testing.assert_allclose(C[0, 1], [C[0, 2], C[1, 2], C[2, 0], C[1, 0]], atol=1e-6)
    np.testing.assert_allclose(C[3, 3], [C[4, 4], C[5, 5]], atol=1e-6)


def test_a10_neb_with_shared_and_separate_calculators(toy) -> None:
    slab = bulk("Cu", cubic=True) * (2, 2, 1)
    first, last = slab.copy(), slab.copy()
    hole, jumper = slab.positions[0], slab.positions[1]
    last.positions[1] = hole
    assert np.linalg.norm(hole - jumper) < 3
    first, last = first[1:], last[1:]
    shared, barriers = EqCalculator(toy), []
    for calcs in ([shared] * 5, [EqCalculator(toy) for _ in range(5)]):
        images = [first.copy() for _ in range(4)] + [last.copy()]
        for image, calc in zip(images, calcs, strict=True):
            image.calc = calc
            image.set_constraint(FixAtoms([14]))
        band = NEB(images, allow_shared_calculator=calcs[0] is calcs[1], method="improvedtangent")
        band.interpolate()
        FIRE(band, logfile=None).run(fmax=0.1, steps=30)
        barriers.append(max(image.get_potential_energy() for image in images[1:-1]))
    assert barriers[0] == pytest.approx(barriers[1], abs=1e-10)


def test_a13_symmetric_structures_stay_symmetric_by_themselves(potential) -> None:
    atoms = bulk("Si", a=5.3)
    atoms.calc = EqCalculator(potential)
    assert abs(atoms.get_forces()).max() < 1e-10
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=5)
    np.testing.assert_allclose(atoms.get_scaled_positions()[1], 0.25, atol=1e-9)


def test_c01_cost_follows_the_atoms_not_the_box(potential) -> None:
    import time

    calc = EqCalculator(potential)

    def seconds(box: float) -> float:
        rng = np.random.default_rng(0)
        atoms = Atoms("H30", positions=rng.uniform(0, box, (30, 3)), cell=[box] * 3, pbc=True)
        times = []
        for _ in range(3):
            atoms.positions += 0.3 * rng.normal(size=(30, 3))
            start = time.perf_counter()
            calc.get_potential_energy(atoms)
            times.append(time.perf_counter() - start)
        return min(times)

    near = seconds(50.0)
    assert seconds(3000.0) < 5 * near + 0.05


def test_the_laws_are_put_to_models_that_do_something(potential) -> None:
    calc = EqCalculator(potential)
    for atoms in (triclinic(), cluster(), copper()):
        assert np.abs(calc.get_forces(atoms)).max() > 0.01
        assert np.ptp(calc.get_property("node_energy", atoms)) > 1e-4
