"""Direct forces, of the models that predict them beside the energy for pre-training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from numpy.random import default_rng
from scipy.spatial.transform import Rotation

from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential
from mlip.training.soft_equivariance import project
from tests.conftest import rattled, without_zeros

ESCAIP: dict[str, Any] = dict(
    hidden=12, node_hidden=16, num_heads=2, angular_channels=(3, 2, 1), num_basis=5
)
TRANSIP: dict[str, Any] = dict(
    hidden=20, num_layers=2, num_heads=2, head_width=4, edge_functions=9, latent=(2, 1)
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "escaip": ("escaip", ESCAIP),
    "escaip-vectors": ("escaip", {**ESCAIP, "angular": "vectors"}),
    "transip": ("transip", TRANSIP),
    "transip-projected": ("transip", {**TRANSIP, "tokens": "irreps"}),
}
EXACT = {"escaip", "transip-projected"}
ETHANOL, SALT = rattled(molecule("CH3CH2OH")), rattled(bulk("NaCl", "rocksalt", a=5.5, cubic=True))
SLAB, WATER = rattled(fcc111("Cu", (2, 2, 2), vacuum=6.0)), rattled(molecule("H2O"))


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(variant: str) -> Potential:
    torch.manual_seed(0)
    name, hyperparameters = VARIANTS[variant]
    model = build(name, cutoff=4.0, direct_forces=True, **hyperparameters)
    without_zeros(model, 0.1)
    potential = Potential(model, torch.zeros(119), scale=2.0).double().eval()
    if variant.endswith("projected"):
        project(potential)
    return potential


def graph(*structures: Atoms) -> AtomicGraph:
    return AtomicGraph.collate([AtomicGraph.from_atoms(a, 4.0) for a in structures])


def close(a: Any, b: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=tolerance, equal_nan=True
    )


def test_direct_forces_neither_move_nor_turn(variant: str) -> None:
    out = make(variant)(graph(ETHANOL, SALT, WATER, Atoms("O")))
    for atoms, F in zip((ETHANOL, SALT, WATER), out["forces"].split([9, 8, 3, 1]), strict=False):
        assert F.abs().max() > 1e-3
        assert F.sum(dim=0).abs().max() < 1e-12
        if not atoms.pbc.any():
            assert np.abs(np.cross(atoms.positions, F).sum(axis=0)).max() < 1e-12
    assert not out["forces"][-1].any()


def test_direct_forces_keep_the_other_symmetries(variant: str) -> None:
    potential = make(variant)
    structures = [ETHANOL, SALT, SLAB]
    batch = potential(graph(*structures), stress=True)
    singles = [potential(graph(a), stress=True) for a in structures]
    for key in ("energy", "forces", "stress"):
        close(batch[key], torch.cat([s[key] for s in singles]), 1e-10)
    order = default_rng(0).permutation(len(SALT))
    close(potential(graph(SALT[order]))["forces"], singles[1]["forces"][order], 1e-10)
    moved = SALT.copy()
    moved.translate([3.0, -50.0, 8.0])
    close(potential(graph(moved))["forces"], singles[1]["forces"], 1e-10)


def test_direct_forces_turn_with_the_structure_where_promised(variant: str) -> None:
    potential = make(variant)
    assert potential.model.exact_symmetry == (variant == "escaip")  # projected: of the weights
    for g in (graph(ETHANOL), graph(SALT)):
        for sign in (1, -1):
            R = sign * torch.from_numpy(Rotation.random(random_state=3).as_matrix())
            error = potential(g.rotated(R))["forces"] - potential(g)["forces"] @ R.T
            exact = error.abs().max() < 1e-10
            assert exact == (variant in EXACT)


def test_direct_forces_are_smooth_through_the_cutoff(variant: str) -> None:
    potential, forces = make(variant), []
    for r in 4.0 + np.arange(-20, 21) * 1e-4:
        atoms = molecule("H2O") + Atoms("C")
        atoms.positions[-1] = atoms.positions[0] + [r / np.sqrt(2), 0, r / np.sqrt(2)]
        forces.append(potential(graph(atoms))["forces"].numpy())
    fine, coarse = (np.abs(np.diff(forces[::n], 2, axis=0)).max() for n in (1, 2))
    assert fine < 1e-8 and fine < 0.3 * coarse


def test_direct_forces_can_be_trained_and_give_stress(variant: str) -> None:
    potential, g = make(variant).train(), graph(ETHANOL, SALT)
    target = torch.randn(g.positions.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    optimizer = torch.optim.Adam(potential.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        out = potential(g, stress=True)
        loss = (out["forces"] - target).square().mean() + out["energy"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert out["stress"][0].isnan().all() and out["stress"][1].isfinite().all()
    assert out["stress"][1].any()
