"""What an ASE user may rely on, for a toy potential and for Facet."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.fd import FiniteDifferenceCalculator
from ase.calculators.mixing import LinearCombinationCalculator, MixedCalculator, SumCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import read, write

from mlip.calculators import EqCalculator
from mlip.checkpoint import save
from mlip.potential import Potential


def silicon() -> Atoms:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.08, seed=0)
    return atoms


def count_calls(calc: EqCalculator) -> list[int]:
    calls: list[int] = []
    for member in calc.potentials:
        member.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_one_model_call_for_energy_forces_and_stress(potential) -> None:
    atoms = silicon()
    atoms.calc = EqCalculator(potential)
    calls = count_calls(atoms.calc)
    atoms.get_stress()
    atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_potential_energies()
    assert len(calls) == 1
    atoms.positions[0, 0] += 1e-9
    atoms.get_forces()
    assert len(calls) == 2
    atoms.set_initial_magnetic_moments([1.0] * 8)  # nothing that the model sees
    atoms.get_forces()
    assert len(calls) == 2


def test_types_and_shapes(potential) -> None:
    atoms = silicon()
    atoms.calc = EqCalculator(potential)
    assert type(atoms.get_potential_energy()) is float
    forces, stress = atoms.get_forces(), atoms.get_stress()
    assert forces.dtype == stress.dtype == np.float64
    assert forces.shape == (8, 3) and stress.shape == (6,)
    assert forces.flags.c_contiguous and stress.flags.c_contiguous
    assert atoms.get_potential_energies().shape == (8,)


def test_energies_add_up(potential) -> None:
    atoms = silicon()
    atoms.calc = EqCalculator(potential)
    energy = atoms.get_potential_energy()
    assert atoms.get_potential_energies().sum() == pytest.approx(energy, abs=1e-10)
    assert atoms.get_potential_energy(force_consistent=True) == energy
    reference = float(potential.e0[14]) * 8
    assert atoms.calc.results["node_energy"].sum() + reference == pytest.approx(energy, abs=1e-10)


def test_results_handed_out_are_copies(potential) -> None:
    atoms = silicon()
    calc = atoms.calc = EqCalculator(potential)
    for get in (atoms.get_forces, atoms.get_stress, atoms.get_potential_energies):
        kept = get().copy()
        given = get()
        given[:] = 7.0
        np.testing.assert_array_equal(get(), kept)
    old = atoms.get_forces()
    atoms.rattle(0.1, seed=2)
    new = atoms.get_forces()
    assert not np.array_equal(old, new)
    assert not np.shares_memory(new, calc.results["forces"])


def test_nothing_is_stale_after_any_change(potential) -> None:
    calc, atoms = EqCalculator(potential), silicon()
    atoms.calc = calc

    def move() -> None:
        atoms.positions[3] += 0.1

    def strain() -> None:
        atoms.set_cell(atoms.cell[:] * 1.02, scale_atoms=False)

    def open_up() -> None:
        atoms.pbc = (True, True, False)

    def transmute() -> None:
        atoms.numbers[2] = 29

    def shrink() -> None:
        del atoms[5]

    def swap() -> None:
        atoms.numbers[[0, 2]] = atoms.numbers[[2, 0]]

    for change in (move, strain, open_up, transmute, shrink, swap):
        before = atoms.get_potential_energy()
        change()
        expected = EqCalculator(potential)
        assert atoms.get_potential_energy() != before
        assert atoms.get_potential_energy() == expected.get_potential_energy(atoms.copy())
        np.testing.assert_array_equal(atoms.get_forces(), expected.get_forces(atoms.copy()))


def test_atoms_are_never_altered(potential) -> None:
    atoms = silicon()
    atoms.positions[0] -= 50 * atoms.cell[0]  # unwrapped
    atoms.info["charge"] = 1
    before = pickle.dumps([atoms.arrays, atoms.cell[:], atoms.pbc, atoms.info])
    atoms.calc = EqCalculator(potential)
    atoms.get_forces()
    atoms.get_stress()
    atoms.calc.get_hessian(atoms[:2])
    assert pickle.dumps([atoms.arrays, atoms.cell[:], atoms.pbc, atoms.info]) == before


@pytest.mark.parametrize("name", ["a.traj", "a.extxyz", "a.json", "a.db"])
def test_results_survive_a_file(potential, name: str, tmp_path) -> None:
    for atoms in (silicon(), molecule("CH3OH")):
        path = tmp_path / f"{len(atoms)}{name}"
        atoms.calc = EqCalculator(potential)
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        if name.endswith("db"):
            with connect(path) as db:
                db.write(atoms)
                back = db.get_atoms(id=1)
        else:
            write(path, atoms)
            back = read(path)
        assert back.get_potential_energy() == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(back.get_forces(), forces, atol=1e-6)
        if atoms.pbc.all():
            np.testing.assert_allclose(back.get_stress(), atoms.get_stress(), atol=1e-6)


class Charged(torch.nn.Module):
    """Reads charge and spin."""

    graph_inputs = ("charge", "spin")
    receptive_field = 5.0

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, graph):
        node = self.inner(graph)
        shift = (graph.charge + 0.1 * graph.spin)[graph.batch].to(node.energy.dtype)
        return node._replace(energy=node.energy + shift)


def test_charge_and_spin_in_info_count(potential) -> None:
    calc = EqCalculator(Potential(Charged(potential.model), potential.e0).eval())
    atoms = molecule("CH3OH")
    atoms.calc = calc
    n = len(atoms)
    with pytest.warns(UserWarning) as caught:
        base = atoms.get_potential_energy()
    assert sorted(str(w.message).split()[3] for w in caught) == ["charge", "spin"]
    atoms.rattle(1e-12, seed=0)
    atoms.get_potential_energy()  # warned once: a second warning would be an error here
    for info, shift in (
        ({"charge": 1}, 1.0),
        ({"charge": -1, "spin": 2}, -0.9),
        ({"total_charge": 2, "total_spin": 3}, 2.2),
        ({"charge": np.int64(0), "spin": np.float32(1)}, 0.0),
    ):
        atoms.info = dict(info)
        assert atoms.get_potential_energy() == pytest.approx(base + n * shift, abs=1e-8)
    atoms.info = {"charge": "positive"}
    with pytest.raises(ValueError, match="charge"):
        atoms.get_potential_energy()
    named = EqCalculator(calc.potentials[0], info_keys={"charge": "q", "total_spin": "m"})
    atoms.info = {"q": 3, "m": 1, "charge": 8}
    assert named.get_potential_energy(atoms) == pytest.approx(base + 3 * n, abs=1e-8)


def test_charge_in_info_is_not_looked_at_by_models_without_it(potential) -> None:
    atoms = molecule("CH3OH")
    atoms.calc = EqCalculator(potential)
    calls = count_calls(atoms.calc)
    atoms.get_potential_energy()
    atoms.info["charge"] = "nonsense"
    atoms.get_potential_energy()
    assert len(calls) == 1


def test_ase_calculators_around_ours(toy) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=3)
    ours, emt = EqCalculator(toy), EMT()
    E = ours.get_potential_energy(atoms), emt.get_potential_energy(atoms)
    F = ours.get_forces(atoms), emt.get_forces(atoms)
    S = ours.get_stress(atoms), emt.get_stress(atoms)
    for calc, a, b in (
        (SumCalculator([ours, emt]), 1.0, 1.0),
        (LinearCombinationCalculator([ours, emt], [2.0, -1.0]), 2.0, -1.0),
        (MixedCalculator(ours, emt, 0.3, 0.7), 0.3, 0.7),
    ):
        assert calc.get_potential_energy(atoms) == pytest.approx(a * E[0] + b * E[1], abs=1e-10)
        np.testing.assert_allclose(calc.get_forces(atoms), a * F[0] + b * F[1], atol=1e-10)
        np.testing.assert_allclose(calc.get_stress(atoms), a * S[0] + b * S[1], atol=1e-10)
    water = molecule("H2O")  # no stress there
    both = SumCalculator([EqCalculator(toy), EqCalculator(toy)])
    assert both.get_potential_energy(water) == 2 * ours.get_potential_energy(water)


def test_finite_difference_calculator(potential) -> None:
    atoms = silicon()[:4]
    calc = EqCalculator(potential)
    numeric = FiniteDifferenceCalculator(calc, eps_disp=1e-4, eps_strain=1e-4)
    np.testing.assert_allclose(numeric.get_forces(atoms), calc.get_forces(atoms), atol=1e-6)
    np.testing.assert_allclose(numeric.get_stress(atoms), calc.get_stress(atoms), atol=1e-7)


def test_copies_have_lives_of_their_own(potential) -> None:
    atoms = silicon()
    atoms.calc = calc = EqCalculator(potential)
    energy = atoms.get_potential_energy()
    for twin in (copy.deepcopy(calc), pickle.loads(pickle.dumps(calc))):
        assert twin.get_potential_energy(atoms.copy()) == energy
        twin.get_potential_energy(molecule("H2O"))
        assert atoms.get_potential_energy() == energy
        with torch.no_grad():
            for parameter in twin.potentials[0].parameters():
                parameter.zero_()
        fresh = silicon()
        fresh.calc = calc
        assert fresh.get_potential_energy() == energy
    assert copy.deepcopy(atoms).get_potential_energy() == energy


def test_the_callers_potential_may_go_on_learning(potential) -> None:
    calc, atoms = EqCalculator(potential), silicon()
    energy = calc.get_potential_energy(atoms)
    assert all(p.requires_grad for p in potential.parameters())
    potential.train().float()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(1.0)
    assert EqCalculator(calc.potentials[0]).get_potential_energy(atoms) == energy
    atoms.rattle(1e-3, seed=1)
    assert calc.get_potential_energy(atoms) == pytest.approx(energy, abs=1.0)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_process_pools(random_facet, start: str) -> None:
    e0 = torch.zeros(119, dtype=torch.float64)
    calc = EqCalculator(Potential(random_facet(), e0).double())
    systems = [silicon()[:n] for n in (3, 5, 8)]
    expected = [calc.get_potential_energy(atoms) for atoms in systems]
    # A child that hangs after fork would wait for ever: the time limit turns it into a failure.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
            jobs = pool.map(_evaluate_elsewhere, [(calc, a) for a in systems], timeout=60)
            assert list(jobs) == expected


def _evaluate_elsewhere(job: tuple[EqCalculator, Atoms]) -> float:
    return job[0].get_potential_energy(job[1])


def test_threads_share_a_calculator(potential) -> None:
    calc = EqCalculator(potential)
    systems = [silicon()[:n] for n in range(2, 8)]
    expected = [EqCalculator(potential).get_forces(atoms) for atoms in systems]
    failures: list[int] = []

    def work(k: int) -> None:
        atoms = systems[k]
        atoms.calc = calc
        for _ in range(10):
            if not np.array_equal(atoms.get_forces(), expected[k]):
                failures.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(systems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_contexts_of_the_caller_change_nothing(potential, context) -> None:
    atoms = silicon()
    outside = EqCalculator(potential)
    expected, hessian = outside.get_forces(atoms), outside.get_hessian(atoms[:2])
    with context():
        inside = EqCalculator(potential)
        np.testing.assert_array_equal(inside.get_forces(atoms), expected)
        np.testing.assert_array_equal(outside.get_forces(atoms.copy()), expected)
        np.testing.assert_array_equal(inside.get_hessian(atoms[:2]), hessian)
        with pytest.warns(UserWarning, match="symmetrize"):
            mean = EqCalculator(potential, accelerate="plain", symmetrize="octahedral")
        np.testing.assert_allclose(mean.get_forces(atoms), expected, atol=1e-5)
        kept = EqCalculator(potential, accelerate="plain")
        kept.checked_graphs(atoms)
    np.testing.assert_allclose(kept.get_forces(atoms), expected, atol=1e-5)
    atoms.rattle(0.01, seed=1)
    np.testing.assert_array_equal(inside.get_forces(atoms), outside.get_forces(atoms))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_default_dtypes(potential, dtype: torch.dtype) -> None:
    atoms = silicon()
    expected = EqCalculator(potential).get_forces(atoms)
    torch.set_default_dtype(dtype)
    try:
        np.testing.assert_array_equal(EqCalculator(potential).get_forces(atoms), expected)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_outside_is_touched(potential) -> None:
    def outside() -> list:
        return [
            torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(), dict(os.environ), torch.is_grad_enabled(),  # noqa: NPY002
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled, np.geterr(), list(warnings.filters),
        ]  # fmt: skip

    before = outside()
    calc = EqCalculator(potential, dtype="float32")
    calc.get_stress(silicon())
    calc.get_hessian(silicon()[:2])
    assert outside() == before


GOOD = silicon()


def broken(**changes) -> Atoms:
    atoms = silicon()
    for name, value in changes.items():
        setattr(atoms, name, value)
    return atoms


def with_position(k: int, value) -> Atoms:
    atoms = silicon()
    atoms.positions[k] = value
    return atoms


BAD = [
    (Atoms(), "no atoms"),
    (broken(numbers=[14] * 7 + [92]), r"U \(atom 7\)"),
    (broken(numbers=[14] * 7 + [0]), r"X \(atom 7\)"),
    (with_position(3, np.nan), r"atom 3 \(Si\)"),
    (with_position(3, [np.inf, 0, 0]), r"atom 3 \(Si\)"),
    (with_position(3, [1e12, 0, 0]), r"atom 3 \(Si\) .* lost to rounding"),
    (with_position(3, GOOD.positions[5]), r"overlap"),
    (with_position(3, GOOD.positions[5] + 0.05), r"atom [35] \(Si\) and atom [35] \(Si\)"),
    (with_position(3, GOOD.positions[5] + GOOD.cell[0]), "overlap"),
    (broken(cell=np.zeros((3, 3))), r"lattice vector 0"),
    (broken(cell=[5, 5, 0]), r"pbc\[2\] = False"),
    (broken(cell=[[5, 0, 0], [0, 5, 0], [5, 5, 0]]), "singular"),
    (broken(cell=[[5, 0, 0], [0, 5, 0], [0, np.nan, 5]]), "cell"),
    (broken(cell=[0.2, 0.2, 0.2]), "overlap"),
    (broken(cell=[5, 5, 1e-9]), "lattice vector 2"),
    (Atoms("Si", cell=[0.05, 9, 9], pbc=True), "lattice vector 0"),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(BAD)))
def test_bad_structures_are_refused_with_the_reason(potential, k: int) -> None:
    bad, reason = BAD[k]
    calc, good = EqCalculator(potential), silicon()
    good.calc = calc
    energy = good.get_potential_energy()
    for get in (calc.get_potential_energy, calc.get_forces, calc.get_hessian, calc.get_descriptors):
        with pytest.raises(ValueError, match=reason):
            get(bad.copy())
    assert good.get_potential_energy() == energy
    with pytest.raises(ValueError, match=reason):  # and again: no result of a failure is kept
        calc.get_property("energy", bad)


@pytest.mark.parametrize(
    "atoms",
    [
        Atoms("Si"),
        Atoms("Si", cell=[2.2, 2.2, 2.2], pbc=True),
        Atoms("SiH", positions=[[0, 0, 0], [0, 0, 0.2]]),
        Atoms("SiH", positions=[[0, 0, 0], [0, 0, 1e5]]),
        Atoms("Si2", positions=[[1e4, 0, 0], [1e4, 0, 2.3]]),
        fcc111("Cu", (1, 1, 2), vacuum=None),  # a zero third vector, periodic in two directions
        Atoms(
            "Si2",
            positions=[[0, 0, 0], [1, 1, 1]],
            cell=[[3, 0, 0], [9, 3, 0], [20, 7, 3]],
            pbc=True,
        ),
    ],
    ids=["atom", "dense", "close", "far", "away", "slab", "sheared"],
)
def test_odd_but_good_structures_give_numbers(potential, atoms: Atoms) -> None:
    calc = EqCalculator(potential)
    assert np.isfinite(calc.get_potential_energy(atoms))
    assert np.isfinite(calc.get_forces(atoms)).all()
    if len(atoms) == 1 and not atoms.pbc.any():
        assert calc.get_potential_energy(atoms) == float(potential.e0[atoms.numbers[0]])
        assert (calc.get_forces(atoms) == 0).all()


def test_broken_weights_are_no_numbers(potential) -> None:
    with torch.no_grad():
        next(potential.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="finite"):
        EqCalculator(potential).get_potential_energy(silicon())


@pytest.mark.parametrize("name", ["magmom", "dipole", "charges", "stresses", "energy_var"])
def test_properties_that_are_lacking(potential, name: str) -> None:
    with pytest.raises(PropertyNotImplementedError, match=name):
        EqCalculator(potential).get_property(name, silicon())


@pytest.mark.parametrize("pbc", [False, (True, True, False), (False, True, True)])
def test_no_stress_without_a_volume(potential, pbc) -> None:
    calc, atoms = EqCalculator(potential), silicon()
    atoms.pbc = pbc
    atoms.calc = calc
    atoms.get_forces()
    assert "stress" not in calc.results
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        atoms.get_stress()
    assert calc.get_property("stress", atoms, allow_calculation=False) is None


def test_a_calculator_that_grew_equals_a_fresh_one(potential) -> None:
    calc = EqCalculator(potential)
    large = bulk("Si", cubic=True) * (3, 3, 3)
    large.rattle(0.1, seed=0)
    for atoms in (large[:2], large[:200], large[:2], large, large[:3]):
        other = EqCalculator(potential)
        assert calc.get_potential_energy(atoms) == other.get_potential_energy(atoms)
        np.testing.assert_array_equal(calc.get_forces(atoms), other.get_forces(atoms))


def test_the_skin_changes_nothing(potential) -> None:
    calcs = [EqCalculator(potential, skin=skin) for skin in (0.0, 0.2, 1.5)]
    atoms = silicon() * (2, 1, 1)
    for step in range(8):
        atoms.rattle(0.03, seed=step)
        atoms.set_cell(atoms.cell[:] * (1 + 0.002 * step), scale_atoms=True)
        results = [
            (c.get_potential_energy(atoms), c.get_forces(atoms), c.get_stress(atoms)) for c in calcs
        ]
        for other in results[1:]:
            assert other[0] == results[0][0]
            np.testing.assert_array_equal(other[1], results[0][1])
            np.testing.assert_array_equal(other[2], results[0][2])
    (cache,) = calcs[-1]._caches.values()
    assert cache.num_builds < 8


def test_float32_is_close(potential) -> None:
    atoms = silicon()
    single, double = EqCalculator(potential, dtype="float32"), EqCalculator(potential)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    np.testing.assert_allclose(single.get_forces(atoms), double.get_forces(atoms), atol=1e-3)
    assert single.get_forces(atoms).dtype == np.float64


def test_exported_properties_and_single_points(potential) -> None:
    atoms = silicon()
    atoms.calc = EqCalculator(potential)
    forces = atoms.get_forces()
    exported = dict(atoms.calc.export_properties())
    np.testing.assert_array_equal(exported["forces"], forces)
    names = ("energy", "forces", "stress", "free_energy", "energies")
    frozen = SinglePointCalculator(atoms, **{name: atoms.calc.results[name] for name in names})
    np.testing.assert_array_equal(frozen.get_forces(atoms), forces)


def test_no_memory_is_kept_over_many_calls(toy) -> None:
    import gc

    calc, atoms = EqCalculator(toy), silicon()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for step in range(3):
        atoms.rattle(0.01, seed=step)
        calc.get_forces(atoms)
    before = tensors()
    for step in range(20):
        atoms.rattle(0.01, seed=step)
        calc.get_forces(atoms)
    assert tensors() <= before


def test_stored_models(random_facet, tmp_path) -> None:
    e0 = torch.zeros(119, dtype=torch.float64)
    for k in range(2):
        save(Potential(random_facet(seed=k), e0), tmp_path / f"{k}.safetensors")
    atoms = silicon()
    one = EqCalculator(tmp_path / "0.safetensors", device="cpu")
    assert one.dtype == torch.float32
    assert (
        EqCalculator(str(tmp_path / "0.safetensors"), default_dtype="float64").dtype
        == torch.float64
    )
    two = EqCalculator(model_paths=str(tmp_path / "*.safetensors"), default_dtype="")
    assert len(two.potentials) == 2
    members = two.get_property("energy_comm", atoms)
    assert members[0] == one.get_potential_energy(atoms) != members[1]


SCRIPT = """
import multiprocessing, socket, sys

def refuse(*arguments):
    raise RuntimeError("a socket was used")

for name in ("connect", "bind", "sendto"):
    setattr(socket.socket, name, refuse)
import torch
from ase.build import bulk
from mlip.calculators import EqCalculator
from mlip.models import build
from mlip.potential import Potential

torch.set_num_threads(2)
model = build("facet", cutoff=4.0, channels=64, num_layers=1, lmax=2)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
calc = EqCalculator(Potential(model, torch.zeros(119)))
atoms = bulk("Si", cubic=True) * 2
energy = calc.get_potential_energy(atoms)  # threads have started

def work():
    atoms.positions += 1e-7
    same = abs(calc.get_potential_energy(atoms) - energy) < 1e-3
    sys.exit(0 if same and torch.get_num_threads() == 2 else 3)

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(60)
if child.is_alive():
    child.kill()
    sys.exit("the child hangs")
sys.exit(child.exitcode)
"""


def test_a_fork_after_threads_have_run_and_no_network() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
