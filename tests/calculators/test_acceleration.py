"""Accelerated calculators give the numbers of the plain model, and conservative forces."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch.testing import assert_close

import mlip.backends
from mlip.backends import (
    BACKENDS,
    BackendError,
    Compile,
    accelerated,
    automatic,
    has_program,
    missing_work,
    probe_structures,
)
from mlip.calculators import EqCalculator
from mlip.calculators.chunks import BoundedPotential, in_pieces, pieces, slots
from mlip.calculators.memory import LiveBytes
from mlip.compiled import Compiled
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.models import build
from mlip.potential import Potential
from tests.conftest import without_zeros

COMPILE = torch.compile
CASES = [
    ("mace", "splines", torch.float32),
    ("mace", "splines", torch.float64),
    ("facet", "trace", torch.float32),
    ("gaunt", "trace", torch.float64),
    ("ponita", "trace", torch.float32),
    ("transip", "trace", torch.float64),
    ("escaip", "trace", torch.float64),
    ("mace", ("splines", "trace"), torch.float64),
    ("environment", "trace", torch.float32),
]
Way = str | tuple[str, ...]


class Trace(Compile):
    """What ``compile`` does but for the compiler, which takes a minute."""

    name = "trace"

    def obstacle(self, device: torch.device) -> str | None:
        return None


@pytest.fixture(autouse=True, scope="module")
def trace() -> Iterator[None]:
    """The back end ``trace``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "trace", Trace())
        patch.setattr(torch, "compile", lambda program, **_: program)
        yield


def potential(name: str, dtype: torch.dtype = torch.float64) -> Potential:
    """A small random model in which no weight is zero."""
    torch.manual_seed(0)
    sizes = {
        "mace": {"channels": 4, "elements": (1, 6, 8), "radial_hidden": (8, 8), "num_basis": 5}
        | {"correlation": 2, "max_ell": 2},
        "facet": {"channels": 4, "lmax": 1, "hidden": 4, "num_basis": 4}
        | {"message_channels": (3, 2)},
        "gaunt": {"channels": 4, "lmax": 1, "hidden": 4, "num_basis": 4, "num_layers": 1}
        | {"message_channels": (3, 2)},
        "ponita": {"channels": 8, "message_channels": 4, "num_layers": 1},
        "escaip": {"hidden": 12, "node_hidden": 20, "num_heads": 2, "num_basis": 4}
        | {"angular_channels": (3, 1), "density_channels": 5},
        "transip": {"hidden": 24, "latent": (3, 1), "num_heads": 2, "num_layers": 1}
        | {"tokens": "irreps"},
        "environment": {"hidden": 12, "edge_hidden": 20, "num_rounds": 1},
        "ponita_published": {"channels": 4},
    }
    scale = {} if name == "transip" else {"avg_num_neighbors": 8.0}
    model = build(name, cutoff=4.0, **scale, **sizes[name])
    without_zeros(model, 0.3)
    e0 = torch.full((119,), torch.nan)
    e0[[1, 6, 8]] = torch.tensor([-13.0, -1030.0, -2040.0])
    return Potential(model, e0, scale=2.0).to(dtype).eval().requires_grad_(False)


@cache
def fast(name: str, way: Way, dtype: torch.dtype = torch.float64) -> Potential:
    """The accelerated one."""
    return accelerated(potential(name, dtype), way)


def crystal(length: int = 1) -> Atoms:
    atoms = bulk("C", cubic=True) * (1, 1, length)
    atoms.rattle(0.05, seed=0)
    return atoms


@pytest.mark.parametrize(("name", "way", "dtype"), CASES)
def test_energies_forces_and_stress_are_those_of_the_plain_model(
    name: str, way: Way, dtype: torch.dtype
) -> None:
    single = dtype == torch.float32
    exact = potential(name)
    for atoms in (crystal(), molecule("CH3COOH")):
        graph = AtomicGraph.from_atoms(atoms, exact.cutoff)
        a, b = (p(graph, stress=True) for p in (exact, fast(name, way, dtype)))
        assert (a["node_energy"] - b["node_energy"]).abs().max() < (1e-6 if single else 1e-10)
        assert (a["forces"] - b["forces"]).abs().max() < (1e-4 if single else 1e-9)
        if atoms.pbc.all():
            assert (a["stress"] - b["stress"]).abs().max() < (1e-6 if single else 1e-10)
        assert a["forces"].abs().max() > 1e-3


@pytest.mark.parametrize(("name", "way", "dtype"), CASES[1::2])
def test_its_forces_are_the_gradient_of_its_energy(name: str, way: Way, dtype: torch.dtype) -> None:
    model = fast(name, way, dtype)
    for graph in probe_structures(model):
        forces = model(graph)["forces"]
        for atom, axis in ((0, 0), (13, 1), (26, 2)):
            energies = []
            for step in (1e-4, -1e-4):
                moved = graph.positions.clone()
                moved[atom, axis] += step
                energies.append(model(graph.replace(positions=moved))["energy"].item())
            assert abs(forces[atom, axis] + (energies[0] - energies[1]) / 2e-4) < 1e-6


def test_the_work_of_the_forces_tells_whether_they_are_a_gradient() -> None:
    plain = potential("mace")
    probe = probe_structures(plain)[0]
    assert missing_work(plain, probe) < 1e-8

    class Swirl(torch.nn.Module):
        """Other forces with the right energy."""

        config = plain.model.config

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, graph: AtomicGraph) -> NodeOutput:
            out = plain.model(graph)
            return NodeOutput(out.energy, forces=graph.positions.roll(1, dims=1))

    assert missing_work(plain.with_model(Swirl()), probe) > 1e-3


@pytest.mark.parametrize(
    ("name", "way"), [("mace", "splines"), ("facet", "trace"), ("mace", ("splines", "trace"))]
)
def test_second_derivatives_are_those_of_the_plain_model(name: str, way: Way) -> None:
    graph = AtomicGraph.from_atoms(molecule("H2O"), 4.0)
    rows = []
    for model in (potential(name), fast(name, way, torch.float64)):
        twin = copy.copy(model)
        twin.training = True  # as the calculator asks for second derivatives
        positions = graph.positions.clone().requires_grad_()
        force = twin(graph.replace(positions=positions))["forces"][0, 1]
        rows += torch.autograd.grad(force, positions)
    assert_close(rows[1], rows[0], atol=1e-7 * float(rows[0].abs().max()), rtol=0)


def test_what_pays_is_chosen_and_nothing_is_stored() -> None:
    plain = potential("mace")
    assert automatic(plain) == ["splines"]
    before = {key: value.clone() for key, value in plain.model.state_dict().items()}
    calc = EqCalculator(plain, accelerate="auto")
    assert type(calc.potentials[0].model.basis).__name__ == "Spline"
    assert has_program(calc.potentials[0].model)  # for which "auto" compiles later
    assert all(torch.equal(value, before[key]) for key, value in plain.model.state_dict().items())
    assert (
        EqCalculator(plain).potentials[0].model.state_dict().keys()
        == plain.model.state_dict().keys()
    )


def test_what_the_check_refuses_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BackendError("the numbers differ")

    monkeypatch.setattr("mlip.backends.check", refuse)
    with pytest.warns(UserWarning, match="not accelerated: the numbers differ"):
        calc = EqCalculator(potential("mace"), accelerate="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(calc.evaluate([molecule("H2O")])[0]["forces"]).max() > 0
    with pytest.raises(BackendError, match="the numbers differ"):
        EqCalculator(potential("mace"), accelerate="splines")


def test_where_it_does_not_pay_it_is_refused(random_facet: object) -> None:
    plain = Potential(random_facet(), potential("mace").e0).eval()  # type: ignore[operator]
    assert automatic(plain) == ["analytic"]
    EqCalculator(plain, accelerate=["auto"])
    with pytest.raises(BackendError, match=r"splines are for MACE; .* Facet are cheap"):
        EqCalculator(plain, accelerate=["splines"])


def test_auto_compiles_when_it_has_been_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlip.calculators.chunks.PATIENCE", 2)
    calc = EqCalculator(potential("gaunt"), accelerate="auto")
    plain = EqCalculator(potential("gaunt"))
    atoms = molecule("H2O")
    for step in range(4):
        atoms.positions[0, 0] += 0.01
        if step == 2:
            with pytest.warns(UserWarning, match="compiling the model after"):
                calc.calculate(atoms)
        else:
            calc.calculate(atoms)
        plain.calculate(atoms)
        assert (type(calc._bounded[0].potential.model) is Compiled) == (step >= 2)
        assert_close(calc.results["forces"], plain.results["forces"], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:symmetrize", "ignore:compiling the model")
def test_auto_waits_for_the_model_in_a_mean_over_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlip.calculators.chunks.PATIENCE", 1)
    options = {"symmetrize": "tetrahedral"}
    calc = EqCalculator(potential("transip"), accelerate="auto", **options)
    plain = EqCalculator(potential("transip"), **options)
    atoms = molecule("H2O")
    for _ in range(3):
        atoms.rattle(0.01)
        for each in (calc, plain):
            each.calculate(atoms)
        for key in ("forces", "forces_spread", "energies"):
            assert_close(calc.results[key], plain.results[key], atol=1e-9, rtol=0)
    assert type(calc._bounded[0].potential.model) is Compiled


def test_auto_compiles_once_for_all_twins_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def slow(plain: Potential) -> Potential:
        called.append(plain)
        time.sleep(0.5)
        return plain

    monkeypatch.setattr("mlip.calculators.chunks.PATIENCE", 3)
    monkeypatch.setattr("mlip.calculators.chunks.eventually", slow)
    calc = EqCalculator(potential("facet"), accelerate="auto")

    def steps(twin: EqCalculator) -> int:
        return sum(len(twin.evaluate([molecule("H2O")])) for _ in range(4))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(steps, [calc.twin() for _ in range(4)])) == 16
    assert len(called) == 1


def test_what_was_compiled_is_copied_and_pickled_without_its_program() -> None:
    calc = EqCalculator(potential("facet"), accelerate="trace")
    atoms = molecule("H2O")
    calc.calculate(atoms)
    model = calc.potentials[0].model
    assert model._program is not None and list(model.children()) == [model.model]
    assert copy.deepcopy(calc).potentials[0].model._program is None
    other = pickle.loads(pickle.dumps(calc))
    other.calculate(atoms)
    assert_close(other.results["forces"], calc.results["forces"])


@pytest.mark.parametrize("name", ["ponita_published", "facet"])
def test_auto_leaves_what_is_no_program_or_written_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlip.calculators.chunks.PATIENCE", 0)
    calc = EqCalculator(potential(name), accelerate="auto")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compiling")
        calc.calculate(molecule("H2O"))
    assert type(calc._bounded[0].potential.model) is type(calc.potentials[0].model)


def test_auto_goes_on_when_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("mlip.calculators.chunks.PATIENCE", 0)
    monkeypatch.setattr(mlip.backends, "compiled", fail)
    calc = EqCalculator(potential("gaunt"), accelerate="auto")
    failed = pytest.warns(UserWarning, match="'compile' failed: RuntimeError: no such instruction")
    with pytest.warns(UserWarning, match="compiling the model after"), failed:
        calc.calculate(molecule("H2O"))
    assert abs(calc.results["forces"]).max() > 0


def test_one_program_serves_all_sizes() -> None:
    plain, model = potential("facet"), fast("facet", "trace")
    program = model.model._program
    alone = Atoms("OH", positions=[[0, 0, 0], [30, 0, 0]])
    for atoms in (molecule("H2O"), alone, alone[:1], bulk("C", cubic=True) * (2, 1, 1)):
        graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
        a, b = plain(graph, stress=True), model(graph, stress=True)
        for key in a:
            assert_close(a[key], b[key], atol=1e-10, rtol=1e-10, equal_nan=True)
    assert model.model._program is program
    other = copy.deepcopy(model)
    other.model._program = program
    assert other.float().model._program is None  # it holds the weights, and goes with them


def test_the_compiler_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever sizes come and go, equal ones and those of 0 and 1 included."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: dynamo(program))
    dynamo = partial(COMPILE, backend="eager", dynamic=True, fullgraph=True)
    plain = potential("facet")
    model = accelerated(plain, Trace())
    row = Atoms("C8", [[1.3 * k, 0, 0] for k in range(8)])
    frames = [Atoms("O"), bulk("C"), bulk("C", cubic=True) * 2, molecule("CH3COOH")]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for atoms in [*frames, *(row[:n] for n in range(2, 8))]:
            graph = AtomicGraph.from_atoms(atoms, plain.cutoff)
            assert_close(model(graph)["forces"], plain(graph)["forces"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("alone", ["plain", "auto"])
def test_what_stands_alone(alone: str) -> None:
    with pytest.raises(ValueError, match=f"'{alone}' stands alone"):
        EqCalculator(potential("facet"), accelerate=[alone, "trace"])


def test_descriptors_of_a_compiled_model_are_invariants() -> None:
    graph = AtomicGraph.from_atoms(molecule("H2O"), 4.0)
    invariants = [
        p.invariants(p(graph)["features"]) for p in (potential("transip"), fast("transip", "trace"))
    ]
    assert_close(invariants[1], invariants[0])
    assert invariants[0].shape[1] < 24  # a vector counts once


def test_pieces_of_a_compiled_model_are_right_and_those_of_the_plain_one() -> None:
    """Gradients of some atoms' energies are not what the program gives."""
    plain, model = potential("facet"), fast("facet", "trace")
    graph = AtomicGraph.from_atoms(crystal(8), plain.cutoff)
    parts = pieces(graph, 2, slots(graph) / 1.2)
    assert len(parts) > 1
    whole = plain(graph)["forces"]
    assert_close(in_pieces(model, graph, parts, stress=False)["forces"], whole, atol=1e-10, rtol=0)
    peaks = []
    for each in (plain, model):
        bounded = BoundedPotential(each, max_memory=1.0)
        with pytest.warns(UserWarning, match=r"in \d pieces"), LiveBytes() as live:
            bounded(graph)
        peaks.append(live.peak)
    assert peaks[1] < 1.05 * peaks[0]  # the prediction is the plain model's


def test_memory_of_a_compiled_model_is_predicted_without_its_program() -> None:
    plain, model = potential("facet"), fast("facet", "trace")
    graph = AtomicGraph.from_atoms(crystal(8), plain.cutoff)

    def program(*_: torch.Tensor) -> None:
        raise AssertionError("programs of torch.compile raise when tensors are watched")

    model = model.with_model(Compiled(model.model.model, lambda _: program))
    assert BoundedPotential(model).count(graph) == BoundedPotential(plain).count(graph) > 0


def test_a_mean_over_rotations_compiles_its_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(model: object) -> object:
        made.append(model)
        return original(model)

    original = mlip.backends.compiled
    monkeypatch.setattr(mlip.backends, "compiled", counted)
    atoms = molecule("H2O")
    atoms.calc = EqCalculator(potential("transip"), accelerate="trace", symmetrize="tetrahedral")
    for k in range(3):
        atoms.rattle(0.01, seed=k)
        atoms.calc.get_property("forces_spread", atoms)
    assert len(made) == 1
    model = fast("facet", "trace", torch.float32).model
    model(with_vectors(atoms, torch.float32))
    program = model._program
    assert model.float().to("cpu")._program is program is not None  # nothing has changed
    assert model.double()._program is None


def with_vectors(atoms: Atoms, dtype: torch.dtype) -> AtomicGraph:
    graph = AtomicGraph.from_atoms(atoms, 4.0)
    return graph.replace(vectors=graph.edge_vectors().to(dtype))


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"compile is for .* and TransIP, not Ponita"):
        accelerated(potential("ponita_published"), "compile")
    with_field = potential("facet")
    with_field.model = build("facet", channels=4, field="given").double()
    with pytest.raises(BackendError, match="no external field"):
        accelerated(with_field, "compile")
    direct = potential("transip")
    direct.model = build("transip", direct_forces=True).double()
    with pytest.raises(BackendError, match="whose forces are gradients"):
        accelerated(direct, "compile")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("internal error\nof the compiler")

    monkeypatch.setattr(mlip.backends, "compiled", broken)
    with pytest.raises(BackendError, match=r"'trace' failed: RuntimeError: internal error$"):
        accelerated(potential("facet"), "trace")
    monkeypatch.setattr("mlip.backends.which", lambda _: None)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler"):
        accelerated(potential("facet"), "compile")
