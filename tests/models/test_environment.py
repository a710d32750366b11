"""Environment sees an atom's own edges, all of them, with their directions, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.models.environment import Environment
from mlip.nn.rotations import random_rotations
from mlip.potential import Potential
from tests.conftest import without_zeros

CUTOFF = 4.0


def make(**options: Any) -> Potential:
    torch.manual_seed(0)
    sizes = {"hidden": 16, "edge_hidden": 8, "num_heads": 2, "num_basis": 5, **options}
    model = build("environment", cutoff=CUTOFF, **sizes)
    without_zeros(model, 0.3)
    return Potential(model, torch.zeros(119)).double().eval()


def graph(atoms: Atoms) -> AtomicGraph:
    return AtomicGraph.from_atoms(atoms, CUTOFF)


def test_no_messages_between_atoms() -> None:
    """The derivative of an atom's energy by the edges of another one is zero."""
    potential = make()
    g = graph(molecule("CH3CH2OH"))
    vectors = g.edge_vectors().requires_grad_()
    energy = potential.model(g.replace(vectors=vectors)).energy
    (gradient,) = torch.autograd.grad(energy[2], vectors)
    own = g.edge_index[1] == 2
    assert gradient[own].any(dim=1).all() and not gradient[~own].any()


def test_directions_and_elements_count() -> None:
    """A rotation, an angle, and an exchange of two neighbours' elements change the energy."""
    potential = make()
    near = [[1.1, 0, 0], [0, 1.3, 0]]

    def energy(second: list[float], symbols: str = "CNO") -> float:
        atoms = Atoms(symbols, [[0, 0, 0], near[0], second])
        return float(potential(graph(atoms))["node_energy"][0])

    reference = energy(near[1])
    assert abs(energy([0, 0, 1.3]) - reference) > 1e-4  # the same molecule, rotated
    assert abs(energy([0.6, 1.153, 0]) - reference) > 1e-4  # another angle
    assert abs(energy(near[1], "CON") - reference) > 1e-4


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_rounds_of_attention(rounds: int) -> None:
    potential = make(num_rounds=rounds)
    assert isinstance(potential.model, Environment) and len(potential.model.rounds) == rounds
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=0)
    g = graph(atoms)
    # The fused kernel of evaluation and the plain products of training agree.
    a, b = potential(g), potential.train()(g)
    torch.testing.assert_close(a["forces"], b["forces"], rtol=0, atol=1e-12)
    (R,) = random_rotations(1, torch.Generator().manual_seed(0)).matrices
    assert (potential(g.rotated(R))["energy"] - b["energy"]).abs() > 1e-4


def test_untrained_it_gives_the_reference_energies() -> None:
    model = build("environment", cutoff=CUTOFF)
    potential = Potential(model, torch.linspace(-1, 1, 119)).double().eval()
    g = graph(molecule("H2O"))
    assert potential(g)["energy"].item() == pytest.approx(potential.e0[[8, 1, 1]].sum().item())


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(ValueError, match="edge_hidden=10 cannot be shared by num_heads=4"):
        build("environment", edge_hidden=10)
