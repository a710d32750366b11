"""A back end is used only where it gives the numbers of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from mlip.backends import (
    BACKENDS,
    BackendError,
    CuEquivariance,
    accelerated,
    probe_structures,
)
from mlip.calculators import EqCalculator
from mlip.models import build
from mlip.potential import Potential


class StandIn:
    """A back end that copies the model, and may do something to the copy."""

    name = "stand-in"

    def __init__(self, damage: Any = None, obstacle: str | None = None) -> None:
        self.damage, self.reason = damage, obstacle

    def obstacle(self, device: torch.device) -> str | None:
        return self.reason

    def convert(self, model: Any, elements: Sequence[int]) -> Any:
        model = copy.deepcopy(model)
        if self.damage is not None:
            with torch.no_grad():
                self.damage(model)
        return model


def mace(dtype: torch.dtype = torch.float64) -> Potential:
    torch.manual_seed(0)
    e0 = torch.full((119,), torch.nan)
    e0[[1, 6, 8]] = torch.tensor([-13.0, -1030.0, -2040.0])
    model = build(
        "mace",
        channels=4,
        radial_hidden=(8,),
        cutoff=4.0,
        avg_num_neighbors=4.0,
        elements=(1, 6, 8),
    )
    return Potential(model, e0, scale=2.0).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_right_one_is_taken(dtype: torch.dtype) -> None:
    plain = mace(dtype)
    fast = accelerated(plain, StandIn())
    g = probe_structures(plain)[0]
    assert fast.dtype == dtype and fast.model is not plain.model
    assert torch.equal(fast(g)["forces"], plain(g)["forces"])


def scale_all(model: Any) -> None:
    model.readouts[-1][2].weight.mul_(1 + 1e-3)


def shift_energies(model: Any) -> None:
    """Forces stay right."""
    forward = model.forward
    model.forward = lambda graph: (out := forward(graph))._replace(energy=out.energy + 0.01)


def no_number(model: Any) -> None:
    model.embed.fill_(torch.nan)


def no_forces(model: Any) -> None:
    """Energies stay right."""
    forward = model.forward
    model.forward = lambda graph: forward(graph)._replace(
        forces=torch.zeros_like(graph.vectors[:27])
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (scale_all, "energy of an atom differs"),
        (shift_energies, "energy of an atom differs"),
        (no_number, "differs by nan"),
        (no_forces, "force differs"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_one_is_refused(damage: Any, message: str, dtype: torch.dtype) -> None:
    with pytest.raises(BackendError, match=message):
        accelerated(mace(dtype), StandIn(damage))


def test_an_obstacle_is_told() -> None:
    with pytest.raises(BackendError, match="'stand-in': the moon is down"):
        accelerated(mace(), StandIn(obstacle="the moon is down"))
    with pytest.raises(ValueError, match="there is analytic, splines, compile, cudagraph"):
        accelerated(mace(), "magic")


def test_the_library_or_the_gpu_is_missing() -> None:
    installed = find_spec("cuequivariance_torch") and find_spec("cuequivariance_ops_torch")
    expected = "need a GPU" if installed else "not installed; pip install"
    with pytest.raises(BackendError, match=expected):
        accelerated(mace(), "cuequivariance")
    assert BACKENDS["cuequivariance"].obstacle(torch.device("cpu")) is not None


def test_the_calculator_refuses_it_too() -> None:
    with pytest.raises(BackendError, match="cuequivariance"):
        EqCalculator(mace(), device="cpu", accelerate="cuequivariance")


def test_it_is_for_mace_only() -> None:
    with pytest.raises(BackendError, match="for MACE, not for Facet"):
        CuEquivariance().convert(build("facet", channels=4), ())


def test_probes_have_the_elements_and_every_kind_of_number() -> None:
    plain = mace()
    cluster, crystal = probe_structures(plain)
    assert set(cluster.atomic_numbers.tolist()) == {1, 6, 8}
    out = plain(crystal, stress=True)
    assert out["stress"].isfinite().all() and out["forces"].abs().max() > 0.01
    distance = crystal.edge_vectors().norm(dim=1)
    assert 0.8 < distance.min() and distance.max() <= plain.cutoff


@pytest.mark.skipif(find_spec("cuequivariance_torch") is None, reason="needs cuequivariance-torch")
def test_its_plain_kernels_give_the_same_numbers() -> None:
    class Anywhere(CuEquivariance):
        def obstacle(self, device: torch.device) -> str | None:
            return None

    accelerated(mace(), Anywhere("naive"))  # BackendError otherwise
