"""Recorded programs compute what the model does, whatever sizes come and go."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mlip.backends import BackendError, CudaGraph, accelerated, check, probe_structures, recorded
from mlip.calculators import EqCalculator
from mlip.compiled import Compiled, Laid, Program, example, padded, uncompiled
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential
from mlip.recorded import Recorded, Results, rounded

MODELS = ["environment", "escaip", "facet", "gaunt", "mace", "ponita", "transip"]
SMALL = {
    "mace": {"channels": 3, "radial_hidden": (5,), "lmax": 0, "max_ell": 1, "correlation": 2},
    "environment": {"hidden": 12, "edge_hidden": 20, "num_rounds": 1},
}


class Tape:
    """A recording as a processor can make it: runs the program on the places of the inputs."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, program: Program, inputs: Results) -> tuple[Callable[[], None], Results]:
        self.sizes.append(tuple(inputs[2].shape))
        results = program(*inputs)

        def replay() -> None:
            for place, value in zip(results, program(*inputs), strict=True):
                place.copy_(value)

        return replay, results


def potential(name: str) -> Potential:
    torch.manual_seed(0)
    model = build(name, cutoff=4.0, **SMALL.get(name, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Potential(model, torch.zeros(119)).double().eval()


def structures() -> list[Atoms]:
    frames = [molecule("CH3CH2OH"), bulk("Si", cubic=True), Atoms("H"), bulk("Cu") * (2, 2, 1)]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=seed)
    return frames


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_for_sizes_that_come_and_go(name: str) -> None:
    plain, tape = potential(name), Tape()
    program = Recorded(uncompiled(plain.model), 4.0, tape)
    fast = plain.with_model(Compiled(plain.model, lambda _: program)).eval()
    for _ in range(3):
        for atoms in structures():
            graph = AtomicGraph.from_atoms(atoms, 4.0)
            expected, found = plain(graph, stress=True), fast(graph, stress=True)
            for key in ("energy", "forces", "node_energy", "features", "stress"):
                torch.testing.assert_close(
                    found[key], expected[key], atol=1e-11, rtol=1e-11, equal_nan=True
                )
    assert len(tape.sizes) == 4  # a recording each, when it comes for the second time
    check(plain, fast, "recorded", probe_structures(plain))


def test_results_stay_when_the_program_runs_again() -> None:
    plain = potential("facet")
    program = Recorded(uncompiled(plain.model), 4.0, Tape())
    inputs = [padded(with_vectors(atoms), plain.model)[:3] for atoms in structures()[:2]]
    for _ in range(2):
        first = program(*inputs[0])
    kept = [x.clone() for x in first]
    other = (inputs[0][0], inputs[0][1] * 1.01, inputs[0][2])
    program(*other)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def with_vectors(atoms: Atoms) -> AtomicGraph:
    graph = AtomicGraph.from_atoms(atoms, 4.0)
    return graph.replace(vectors=graph.edge_vectors())


def test_few_recordings_are_made_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tape = potential("facet"), Tape()
    operations = uncompiled(plain.model)
    program = Recorded(operations, 4.0, tape)
    _, v, _ = example(plain.model)

    def run(N: int, K: int) -> None:
        Z = torch.ones(N, dtype=torch.int64)
        program(Z, v[:1, :1].expand(N, K, 3), torch.zeros(N, K, dtype=torch.int64))

    for N in range(2, 80):
        run(N, 5)
    assert len(set(tape.sizes)) == len(tape.sizes) < 30
    before = len(tape.sizes)
    for N in (500, 700, 900, 1100, 1500):
        run(N, 5)
    assert len(tape.sizes) == before  # each came once
    monkeypatch.setattr("mlip.recorded.RECORDINGS", 3)
    program = Recorded(operations, 4.0, tape)
    for N in (2, 3, 4, 5, 6, 2):
        run(N, 7)
        run(N, 7)
    assert set(program._recordings) == {(5, 7), (6, 7), (2, 7)}


def test_large_systems_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlip.recorded.LARGE", 10)
    plain, tape = potential("facet"), Tape()
    Recorded(uncompiled(plain.model), 4.0, tape)(*example(plain.model))
    assert not tape.sizes


def test_sizes_are_rounded_up_by_a_quarter_at_most() -> None:
    for n in range(1, 5000):
        assert n <= rounded(n) <= n * 5 / 4
    assert [rounded(n + 1) - 1 for n in (8, 64, 216, 512, 1000)] == [8, 64, 224, 512, 1024]


def test_a_processor_is_refused() -> None:
    with pytest.raises(BackendError, match="kernels of a GPU"):
        accelerated(potential("facet"), "cudagraph")


def test_models_without_a_program_are_refused() -> None:
    with pytest.raises(BackendError, match=r"cudagraph is for EScAIP.*not PonitaPublished"):
        CudaGraph().convert(build("ponita_published", cutoff=4.0), ())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_host_is_in_a_program(name: str) -> None:
    """A recording cannot contain what comes from the host: on another device, all does."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen = set()

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = tree_leaves((args, kwargs, out))
            seen.update(x.device.type for x in leaves if isinstance(x, torch.Tensor))
            return out

    model = potential(name).model.to("meta")
    Z, v, neighbors = example(model)

    def program(Z: torch.Tensor, v: torch.Tensor, neighbors: torch.Tensor) -> None:
        v = v.detach().requires_grad_()
        torch.autograd.grad(model(Laid(Z, v, neighbors)).energy.sum(), v)

    # Where sizes are no symbols, MACE counts the atoms of each element.
    given = uncompiled(model) if name == "mace" else program
    with Devices():
        given(Z, v, neighbors)
    assert seen == {"meta"}


def test_the_calculator_can_be_copied_with_it() -> None:
    convert = CudaGraph().convert
    fast = convert(potential("facet").model, (14,))
    again = pickle.loads(pickle.dumps(fast))
    assert again.ready.func is recorded
    assert isinstance(convert(Compiled(fast.model), (14,)), Compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name: str) -> None:
    plain = EqCalculator(potential(name), device="cuda")
    fast = EqCalculator(potential(name), device="cuda", accelerate="cudagraph")
    for atoms in structures() * 2:
        plain.calculate(atoms)
        fast.calculate(atoms)
        np.testing.assert_allclose(fast.results["forces"], plain.results["forces"], atol=1e-9)
        np.testing.assert_allclose(fast.results["energy"], plain.results["energy"], atol=1e-9)
