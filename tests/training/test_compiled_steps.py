"""Laws of compiled steps: they are the steps of the plain model, whatever the sizes, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch.testing import assert_close

import mlip.compiled
from mlip.backends import BackendError
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential
from mlip.training.compiled_steps import compiled_steps
from mlip.training.config import TrainConfig
from mlip.training.run import train
from mlip.training.trainer import LAST
from tests.conftest import rattled, without_zeros
from tests.training.conftest import log_without_times, tensors, train_in_parts

TINY: dict[str, dict[str, Any]] = {
    "facet": {"channels": 4, "lmax": 2, "hidden": 4, "message_channels": (3, 2), "quartic": True},
    "gaunt": {"channels": 4, "lmax": 2, "hidden": 4, "message_channels": (3, 2)},
    "ponita": {"channels": 8, "message_channels": 4, "num_layers": 1},
    "escaip": {"hidden": 12, "node_hidden": 20, "num_heads": 2, "num_basis": 4}
    | {"angular_channels": (3, 1), "density_channels": 5},
    "transip": {"hidden": 24, "latent": (3, 1), "num_heads": 2, "tokens": "irreps"},
    # 12 tokens of a width of its own: no size of the example may be taken for one of the model.
    "transip, plain tokens": {"hidden": 60, "latent": (12, 4), "num_heads": 2, "num_layers": 1},
    "facet, smallest": {"channels": 4, "lmax": 1, "hidden": 4, "message_channels": (2,)}
    | {"num_layers": 1, "num_basis": 3},
    "mace": {"channels": 3, "elements": (1, 6, 8, 14), "radial_hidden": (5,), "max_ell": 1}
    | {"num_basis": 4, "readout_hidden": 7, "gate": True, "reduced": True}
    | {"first_layer": "species"},
    "environment": {"hidden": 12, "edge_hidden": 20, "num_rounds": 1},
}
CUTOFF = 3.5


def potential(name: str, dtype: torch.dtype = torch.float64) -> Potential:
    torch.manual_seed(0)
    model = build(name.partition(",")[0], cutoff=CUTOFF, **TINY[name])
    without_zeros(model, 0.3)
    return Potential(model, torch.zeros(119), scale=2.0).to(dtype).train()


def batch(*frames: Atoms) -> AtomicGraph:
    return AtomicGraph.collate([AtomicGraph.from_atoms(atoms, CUTOFF) for atoms in frames])


WATER, SILICON = rattled(molecule("H2O")), rattled(bulk("Si", cubic=True))
ETHANOL = rattled(molecule("CH3CH2OH"))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are run as they are traced, operation by operation."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)


def slopes(potential: Potential, owner: Potential, graph: AtomicGraph) -> list[torch.Tensor]:
    out = potential(graph, stress=True)
    periodic = ~out["stress"].isnan()
    loss = out["energy"].square().sum() + out["forces"].square().sum()
    loss = loss + 100 * out["stress"][periodic].square().sum()
    weights = list(owner.parameters())
    return list(torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_the_plain_model(name: str) -> None:
    plain = potential(name)
    fast = compiled_steps(plain, batch(WATER, SILICON))
    for graph in (batch(ETHANOL), batch(SILICON, WATER, ETHANOL), batch(Atoms("O"), WATER)):
        right, found = (slopes(p, plain, graph) for p in (plain, fast))
        for a, b in zip(right, found, strict=True):
            assert_close(b, a, rtol=1e-9, atol=1e-10)
    with torch.no_grad():  # the weights are arguments of the program, not part of it
        next(plain.parameters()).mul_(2)
    assert_close(fast(graph)["forces"], plain(graph)["forces"], rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_by_the_compiler() -> None:
    plain = potential("facet, smallest", torch.float32)
    fast = compiled_steps(plain, batch(WATER, SILICON))
    graph = batch(ETHANOL, WATER)
    for a, b in zip(*(slopes(p, plain, graph) for p in (plain, fast)), strict=True):
        assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-6)


@pytest.mark.usefixtures("traced")
def test_another_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, right = potential("facet"), mlip.compiled.traced_for_training
    new = Potential(build("facet", cutoff=CUTOFF, **TINY["facet"]), plain.e0).double().train()
    assert not new(batch(WATER))["forces"].any()  # of a new model all energies are zero

    def made(change: Callable[..., Any]) -> Callable[..., Any]:
        return lambda model: lambda *inputs: change(*right(model)(*inputs))

    def constant(energy: torch.Tensor, features: torch.Tensor, g: torch.Tensor) -> Any:
        return energy, features, g.detach()

    for change, words in (
        (lambda energy, features, g: (energy, features, 1.001 * g), "forces .* differ by"),
        (constant, "gradients .* differ by"),
    ):
        monkeypatch.setattr(mlip.compiled, "traced_for_training", made(change))
        for each in (plain, new):
            before = [p.detach().clone() for p in each.parameters()]
            with pytest.raises(BackendError, match=rf"{words} .*set runtime.compile: false"):
                compiled_steps(each, batch(WATER, SILICON))
            assert all(map(torch.equal, each.parameters(), before))


def test_what_cannot_be_compiled_says_so_before_the_training(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for model, words in (
        ({"name": "ponita_published", "channels": 4}, "not PonitaPublished"),
        ({"name": "ponita", "random_grid": True}, "turned at random"),
    ):
        with pytest.raises(BackendError, match=rf"{words}.*; set runtime.compile: false"):
            train(configure(model=model, runtime={"compile": True}))
    monkeypatch.setattr("mlip.backends.which", lambda _: None)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler"):
        train(configure(runtime={"compile": True}))


@pytest.mark.usefixtures("traced")
def test_a_training_is_the_same_and_goes_on(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole, parts = (
        configure(name, runtime={"compile": name != "plain"}, resume="auto")
        for name in ("plain", "whole", "parts")
    )
    for config in (plain, whole):
        train(config)
    train_in_parts(parts, monkeypatch, (3,))

    def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
        return tensors(Path(config.run_dir) / LAST)

    assert weights(plain).keys() == weights(whole).keys()
    for key, value in weights(plain).items():
        assert_close(weights(whole)[key], value, rtol=1e-6, atol=1e-8, equal_nan=True)
        assert_close(weights(parts)[key], weights(whole)[key], rtol=0, atol=0, equal_nan=True)
    assert log_without_times(whole) == log_without_times(parts)
