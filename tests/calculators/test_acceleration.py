"""Accelerated calculators give the numbers of the plain model, and conservative forces."""

from __future__ import annotations

import warnings

import pytest
import torch
from ase.build import bulk, molecule

from mlip.backends import BackendError, accelerated, automatic, missing_work, probe_structures
from mlip.calculators import EqCalculator
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.models import build
from mlip.potential import Potential

ACCELERATIONS = [("mace", "splines")]


def potential(name: str, dtype: torch.dtype = torch.float64) -> Potential:
    """A small random model in which no weight is zero."""
    torch.manual_seed(0)
    sizes = {
        "mace": {"channels": 4, "elements": (1, 6, 8), "radial_hidden": (8, 8), "num_basis": 5}
        | {"correlation": 2, "max_ell": 2}
    }
    model = build(name, cutoff=4.0, avg_num_neighbors=8.0, **sizes[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    e0 = torch.full((119,), torch.nan)
    e0[[1, 6, 8]] = torch.tensor([-13.0, -1030.0, -2040.0])
    return Potential(model, e0, scale=2.0).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize(("name", "way"), ACCELERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_energies_forces_and_stress_are_those_of_the_plain_model(
    name: str, way: str, dtype: str
) -> None:
    exact = EqCalculator(potential(name), dtype="float64")
    fast = EqCalculator(potential(name), dtype=dtype, accelerate=way)
    energy, force = (1e-6, 1e-4) if dtype == "float32" else (1e-10, 1e-9)
    diamond = bulk("C", cubic=True)
    diamond.rattle(0.05, seed=0)
    for atoms in (diamond, molecule("CH3COOH")):
        a, b = (calc.evaluate([atoms])[0] for calc in (exact, fast))
        assert abs(a["energy"] - b["energy"]) < energy * len(atoms)
        assert abs(a["forces"] - b["forces"]).max() < force
        if "stress" in a:
            assert abs(a["stress"] - b["stress"]).max() < force / 100
        assert abs(a["forces"]).max() > 0.01


@pytest.mark.parametrize(("name", "way"), ACCELERATIONS)
def test_its_forces_are_the_gradient_of_its_energy(name: str, way: str) -> None:
    fast = accelerated(potential(name), way)
    for probe in probe_structures(fast):
        graph = probe.replace(positions=probe.positions.clone())
        forces = fast(graph)["forces"]
        for atom, axis in ((0, 0), (13, 1), (26, 2)):
            energies = []
            for step in (1e-4, -1e-4):
                moved = graph.positions.clone()
                moved[atom, axis] += step
                energies.append(fast(graph.replace(positions=moved))["energy"].item())
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


def test_second_derivatives_are_those_of_the_plain_model() -> None:
    atoms = molecule("H2O")
    a, b = (
        EqCalculator(potential("mace"), dtype="float64", accelerate=way).get_hessian(
            atoms, method="autograd"
        )
        for way in (None, "splines")
    )
    assert abs(a - b).max() < 1e-7 * abs(a).max()


def test_what_pays_is_chosen_and_nothing_is_stored() -> None:
    plain = potential("mace")
    assert automatic(plain) == ["splines"]
    before = {key: value.clone() for key, value in plain.model.state_dict().items()}
    calc = EqCalculator(plain, accelerate="auto")
    assert type(calc.potentials[0].model.basis).__name__ == "Spline"
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
    assert automatic(plain) == []
    EqCalculator(plain, accelerate="auto")
    with pytest.raises(BackendError, match=r"splines are for MACE; .* Facet are cheap"):
        EqCalculator(plain, accelerate=["splines"])
