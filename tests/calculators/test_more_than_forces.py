"""Second derivatives, descriptors, committees and models in other units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError

from mlip.calculators import EqCalculator, hessian
from mlip.calculators.chunks import BoundedPotential, slots
from mlip.compiled import Compiled, Laid, Program
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential
from mlip.training.soft_equivariance import project
from tests.conftest import without_zeros


def silicon() -> Atoms:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.08, seed=0)
    return atoms


def test_hessian(potential) -> None:
    atoms = silicon()[:5]
    calc = EqCalculator(potential)
    H = calc.get_hessian(atoms)
    assert H.shape == (15, 5, 3)
    np.testing.assert_allclose(calc.get_hessian(atoms, method="finite"), H, atol=1e-4)
    matrix = H.reshape(15, 15)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(H.sum(axis=1), 0, atol=1e-9)  # no force under translation
    assert (EqCalculator(potential).get_hessian(Atoms("Si")) == 0).all()


def with_field() -> Potential:
    model = build("facet", cutoff=4.0, channels=4, lmax=2, hidden=8, num_basis=4, field="given")
    without_zeros(model, 0.3)
    return Potential(model, torch.zeros(119)).double().eval()


def untraced(model: torch.nn.Module) -> Program:
    """What a program computes, without the seconds that tracing takes."""

    def program(Z, v, neighbors):
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            out = model(Laid(Z, v, neighbors))
            (g,) = torch.autograd.grad(out.energy.sum(), v)
        return out.energy.detach(), out.features.detach(), g

    return program


@pytest.mark.filterwarnings("ignore:symmetrize")  # of an exact model
@pytest.mark.parametrize("case", ["plain", "committee", "mean", "program", "charge", "field"])
def test_rows_together_are_rows_one_by_one(monkeypatch, lopsided, random_facet, case: str) -> None:
    facet = Potential(random_facet(), torch.zeros(119), scale=3.0).double().eval()
    calc = EqCalculator(
        {
            "committee": committee(facet),
            "program": facet.with_model(Compiled(facet.model, ready=untraced)),
            "charge": lopsided(),
            "field": with_field(),
        }.get(case, facet),
        symmetrize="tetrahedral" if case == "mean" else None,
    )
    atoms = silicon()[:4]
    atoms.info = {"charge": 1.0, "field": [0.1, 0.2, -0.3]}
    together = calc.get_hessian(atoms, method="autograd")
    assert abs(together).max() > 1e-3
    monkeypatch.setattr(hessian, "COPIES", 1)
    one_by_one = calc.get_hessian(atoms, method="autograd")
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=1e-10)


def test_rows_together_keep_to_the_memory(random_facet) -> None:
    potential = Potential(random_facet(), torch.zeros(119)).double().eval()
    graph = AtomicGraph.from_atoms(silicon(), potential.cutoff)

    def copies(memory: float | None) -> int:
        return hessian.copies_at_once(potential, BoundedPotential(potential, memory), graph)

    bytes_of_one = hessian.MEMORY * slots(graph) * BoundedPotential(potential).count(graph)
    assert copies(None) == copies(100 * bytes_of_one) == 8  # of 24 rows, at most 10 at a time
    assert copies(4.5 * bytes_of_one) == 4
    assert copies(1e3) == 1


class Direct(torch.nn.Module):
    """Predicts forces of its own."""

    receptive_field = 5.0

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, graph):
        with torch.no_grad():
            _, i = graph.edge_index
            pull = graph.vectors / (1 + graph.vectors.square().sum(-1, keepdim=True)) ** 3
            forces = graph.vectors.new_zeros(len(graph.positions), 3).index_add(0, i, pull)
        return self.inner(graph)._replace(forces=forces)


def test_hessian_of_direct_forces_by_differences(toy) -> None:
    calc = EqCalculator(Potential(Direct(toy.model), toy.e0).double())
    atoms = silicon()[:3]
    H = calc.get_hessian(atoms)
    assert np.isfinite(H).all() and abs(H).max() > 0.01
    np.testing.assert_array_equal(H, calc.get_hessian(atoms, method="finite"))
    with pytest.raises(RuntimeError, match="no derivative; take method='finite'"):
        calc.get_hessian(atoms, method="autograd")
    assert (calc.get_hessian(Atoms("Si"), method="autograd") == 0).all()  # without neighbours


def test_descriptors_are_invariant(potential) -> None:
    calc, atoms = EqCalculator(potential), silicon()
    before = calc.get_descriptors(atoms)
    atoms.rotate(33, (1, 2, 3), rotate_cell=True)
    atoms.translate((1, 2, 3))
    assert before.shape[0] == 8
    np.testing.assert_allclose(calc.get_descriptors(atoms), before, atol=1e-10)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(calc.get_descriptors(atoms[order]), before[order], atol=1e-10)


def test_descriptors_of_latents_with_directions_are_invariant() -> None:
    """TransIP's latents hold vectors and tensors; with projected weights they turn exactly."""
    torch.manual_seed(0)
    model = build(
        "transip", cutoff=4.0, hidden=20, num_layers=1, num_heads=2, head_width=4,
        edge_functions=9, latent=(2, 1), tokens="irreps",
    )  # fmt: skip
    without_zeros(model, 0.3)
    potential = Potential(model, torch.zeros(119)).double()
    project(potential)
    calc, atoms = EqCalculator(potential), molecule("CH3CH2OH")
    before = calc.get_descriptors(atoms)
    assert before.shape == (9, 12) and np.ptp(before[:, 9:], axis=0).min() > 1e-4
    atoms.rotate(33, (1, 2, 3))
    np.testing.assert_allclose(calc.get_descriptors(atoms), before, atol=1e-10)


def committee(potential: Potential) -> list[Potential]:
    members = []
    for k in range(3):
        member = copy.deepcopy(potential)
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.mul_(1 + 0.02 * k)
        members.append(member)
    return members


def test_committee(potential) -> None:
    members, atoms = committee(potential), silicon()
    calc = EqCalculator(members)
    single = [EqCalculator(member) for member in members]
    for name in ("energy", "forces", "stress"):
        stack = np.array([one.get_property(name, atoms) for one in single])
        np.testing.assert_allclose(calc.get_property(name, atoms), stack.mean(0), atol=1e-12)
        np.testing.assert_allclose(
            calc.get_property(f"{name}_var", atoms), stack.var(0), atol=1e-12
        )
        np.testing.assert_array_equal(calc.get_property(f"{name}_comm", atoms), stack)
        assert {name, f"{name}_var", f"{name}_comm"} <= set(calc.implemented_properties)
    assert type(calc.get_potential_energy(atoms)) is float
    assert calc.results["energy_var"] > 0
    hessians = [one.get_hessian(atoms[:2]) for one in single]
    np.testing.assert_allclose(calc.get_hessian(atoms[:2]), np.mean(hessians, 0), atol=1e-12)
    assert len(calc.get_descriptors(atoms)) == 3
    with pytest.raises(PropertyNotImplementedError, match="stress_var"):
        calc.get_property("stress_var", molecule("H2O"))


def test_units_of_the_model(potential) -> None:
    atoms = silicon()
    plain = EqCalculator(potential)
    scaled = atoms.copy()
    scaled.set_cell(atoms.cell[:] * 0.5, scale_atoms=True)
    other = EqCalculator(potential, energy_units_to_eV=27.2, length_units_to_A=0.5)
    np.testing.assert_allclose(
        other.get_potential_energy(scaled), 27.2 * plain.get_potential_energy(atoms), rtol=1e-12
    )
    np.testing.assert_allclose(
        other.get_forces(scaled), 27.2 / 0.5 * plain.get_forces(atoms), atol=1e-10
    )
    np.testing.assert_allclose(
        other.get_stress(scaled), 27.2 / 0.125 * plain.get_stress(atoms), atol=1e-10
    )
