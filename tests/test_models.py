"""The contract of every model over MODELS and their variants, in float64.

A model enters by its line in ``MODELS``; what differs between models is only whether rotations are
exact: ``model.exact_symmetry`` says whether they are promised, or else measured and printed.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, make_supercell, molecule
from numpy.random import default_rng
from scipy.spatial.transform import Rotation

from mlip.checkpoint import load, save
from mlip.data.graph import AtomicGraph
from mlip.models import MODELS, build
from mlip.nn.zbl import ZBL
from mlip.potential import Potential
from mlip.wrappers import wrap
from tests.conftest import rattled, without_zeros

CUTOFF = 4.0
SMALL: dict[str, dict[str, Any]] = {
    "facet": dict(channels=12, lmax=2, num_basis=5, hidden=16, message_channels=(6, 4)),
    "escaip": dict(hidden=12, node_hidden=16, num_heads=2, angular_channels=(3, 2, 1), num_basis=5),
    "gaunt": dict(channels=8, lmax=2, num_basis=5, hidden=12, message_channels=(5, 3)),
    "mace": dict(channels=4, radial_hidden=(8,), elements=(1, 6, 7, 8, 11, 14, 17, 29)),
    "transip": dict(
        hidden=20, num_layers=2, num_heads=2, head_width=4, edge_functions=6, latent=(2, 1)
    ),
    "ponita": dict(channels=8, message_channels=4, hidden=8, num_basis=5),
    "ponita_published": dict(channels=6, num_layers=2, orientations=8, basis_hidden=8, widening=2),
    "environment": dict(hidden=16, edge_hidden=8, num_heads=2, num_basis=5),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, SMALL.get(name, {})) for name in MODELS},
    "facet-mlp": ("facet", {**SMALL["facet"], "grid": "mlp"}),
    "facet-quartic": ("facet", {**SMALL["facet"], "stretch": 0.0, "quartic": True}),
    "facet-deep": (
        "facet",
        {**SMALL["facet"], "lmax": 3, "num_layers": 3, "message_channels": (5, 4, 3)},
    ),
    "gaunt-pairs": (
        "gaunt",
        {**SMALL["gaunt"], "lmax": 3, "order": 2, "factors": 2, "message_channels": (5, 4, 3)},
    ),
    "gaunt-deep": (
        "gaunt",
        {**SMALL["gaunt"], "num_layers": 3, "factors": 3, "antisymmetric": True},
    ),
    "mace-scalar": (
        "mace",
        {**SMALL["mace"], "lmax": 0, "correlation": 2, "max_ell": 2, "reduced": True}
        | {"first_layer": "species"},
    ),
    "mace-nequip": (
        "mace",
        {**SMALL["mace"], "lmax": 2, "max_ell": 2, "correlation": 1, "gate": True},
    ),
    "transip-irreps": ("transip", {**SMALL["transip"], "tokens": "irreps"}),
    "escaip-vectors": ("escaip", {**SMALL["escaip"], "angular": "vectors", "num_layers": 1}),
    "ponita-gelu": ("ponita", {**SMALL["ponita"], "orientations": 12, "pointwise": "gelu"}),
    "ponita-positions": ("ponita", {**SMALL["ponita"], "orientations": 0}),
    "escaip-soft-knn": ("escaip", {**SMALL["escaip"], "graph": "soft_knn", "max_neighbors": 5}),
    "facet-field": ("facet", {**SMALL["facet"], "field": (0.3, -0.2, 0.5)}),
    "escaip-field": ("escaip", {**SMALL["escaip"], "field": (0.3, -0.2, 0.5)}),
    "environment-local": ("environment", SMALL["environment"]),
    "transip-local": ("transip", SMALL["transip"]),
    "escaip-local": ("escaip", {**SMALL["escaip"], "angular": "vectors", "num_layers": 1}),
}
WRAPPED: dict[str, dict[str, Any]] = {
    name: {"name": "frame_averaging"} for name in VARIANTS if name.endswith("-local")
}
TORCH_F64 = dict(dtype=torch.float64)


def sheared(atoms: Atoms) -> Atoms:
    atoms.set_cell(atoms.cell[:] @ [[1, 0.12, 0], [0, 1, 0.2], [0.1, 0, 1]], scale_atoms=True)
    return atoms


def left_handed(atoms: Atoms) -> Atoms:
    atoms.set_cell(atoms.cell[[1, 0, 2]], scale_atoms=False)
    return atoms


def two_fragments() -> Atoms:
    far = molecule("NH3")
    far.translate([60.0, 0, 0])
    return rattled(molecule("H2O") + far)


STRUCTURES = {
    "molecule": lambda: rattled(molecule("CH3CH2OH")),
    "slab": lambda: rattled(fcc111("Cu", (2, 2, 2), vacuum=6.0)),
    "sheared": lambda: rattled(sheared(bulk("NaCl", "rocksalt", a=5.5, cubic=True))),
    "left_handed": lambda: rattled(left_handed(bulk("Si", cubic=True))),
    "one_atom_cell": lambda: bulk("Cu"),  # all its neighbours are its own images
    "fragments": two_fragments,
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def potential(variant: str) -> Potential:
    return make(variant)


def make(variant: str, seed: int = 0) -> Potential:
    """Random weights, also where the initialisation has zeros, so that no term is untested."""
    torch.manual_seed(seed)
    name, hyperparameters = VARIANTS[variant]
    if "avg_num_neighbors" in MODELS[name][1].model_fields:
        hyperparameters = {"avg_num_neighbors": 12.0, **hyperparameters}
    model = build(name, cutoff=CUTOFF, **hyperparameters)
    if variant in WRAPPED:
        model = wrap(model, **WRAPPED[variant])
    without_zeros(model, 0.1)
    e0 = torch.linspace(-3, 3, 119, **TORCH_F64)
    return Potential(model, e0, scale=2.0).double().eval()


def graph(atoms: Atoms) -> AtomicGraph:
    return AtomicGraph.from_atoms(atoms, CUTOFF)


def evaluate(potential: Potential, atoms: Atoms) -> dict[str, torch.Tensor]:
    return potential(graph(atoms), stress=True)


def close(a: Any, b: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_forces_are_minus_the_gradient(potential: Potential, structure: str) -> None:
    atoms = STRUCTURES[structure]()
    forces = evaluate(potential, atoms)["forces"]
    rng, h = default_rng(1), 2e-5
    for _ in range(3):  # along random directions: every component of every atom takes part
        d = rng.normal(size=atoms.positions.shape)
        plus, minus = atoms.copy(), atoms.copy()
        plus.positions += h * d
        minus.positions -= h * d
        slope = (evaluate(potential, plus)["energy"] - evaluate(potential, minus)["energy"]) / (
            2 * h
        )
        close(-(forces * torch.from_numpy(d)).sum(), slope[0], 1e-6)


@pytest.mark.parametrize("structure", ["sheared", "left_handed", "one_atom_cell"])
def test_stress_is_the_strain_derivative(potential: Potential, structure: str) -> None:
    atoms = STRUCTURES[structure]()
    stress = evaluate(potential, atoms)["stress"][0]
    h = 1e-4
    for a in range(3):
        for b in range(a, 3):
            eps = np.zeros((3, 3))
            eps[a, b] += h / 2
            eps[b, a] += h / 2
            energies = []
            for sign in (1, -1):
                strained = atoms.copy()
                strained.set_cell(atoms.cell[:] @ (np.eye(3) + sign * eps), scale_atoms=True)
                energies.append(evaluate(potential, strained)["energy"][0])
            close(stress[a, b], (energies[0] - energies[1]) / (2 * h) / atoms.get_volume(), 1e-7)
    close(stress, stress.T, 1e-14)


def test_no_stress_without_three_periodic_directions(potential: Potential) -> None:
    for name in ("molecule", "slab", "fragments"):
        assert evaluate(potential, STRUCTURES[name]())["stress"].isnan().all()


def test_batch_equals_singles(potential: Potential) -> None:
    structures = [build() for build in STRUCTURES.values()]
    batch = potential(AtomicGraph.collate([graph(a) for a in structures]), stress=True)
    singles = [evaluate(potential, a) for a in structures]
    for key in ("energy", "node_energy", "forces", "stress", "features"):
        close(batch[key], torch.cat([s[key] for s in singles]), 1e-10)


def test_no_gradient_between_structures(potential: Potential) -> None:
    graphs = [graph(STRUCTURES[name]()) for name in ("molecule", "sheared")]
    batch = AtomicGraph.collate(graphs)
    batch.positions.requires_grad_()
    energy = potential.train()(batch)["energy"]
    (gradient,) = torch.autograd.grad(energy[0], batch.positions)
    n = len(graphs[0].positions)
    assert gradient[:n].any() and not gradient[n:].any()


def test_permutation(potential: Potential) -> None:
    atoms = STRUCTURES["sheared"]()
    order = default_rng(0).permutation(len(atoms))
    a, b = evaluate(potential, atoms), evaluate(potential, atoms[order])
    for key in ("node_energy", "forces"):
        close(b[key], a[key][order], 1e-10)


def test_translation_and_wrapping(potential: Potential) -> None:
    atoms = STRUCTURES["sheared"]()
    moved = atoms.copy()
    moved.translate([3.3, -71.0, 12.7])
    moved.positions += default_rng(0).integers(-3, 4, (len(atoms), 3)) @ atoms.cell[:]
    a, b = evaluate(potential, atoms), evaluate(potential, moved)
    for key in ("energy", "forces", "stress"):
        close(b[key], a[key], 1e-9)


def test_supercell_and_other_cells_of_one_crystal(potential: Potential) -> None:
    atoms = rattled(bulk("NaCl", "rocksalt", a=5.5))
    a = evaluate(potential, atoms)
    for P in (
        np.diag([2, 1, 3]),
        [[1, 1, 0], [0, 1, 0], [0, 0, 1]],
        [[2, 1, 0], [0, 1, 1], [1, 0, 1]],
    ):
        big = make_supercell(atoms, P)
        b = evaluate(potential, big)
        close(b["energy"][0] / len(big), a["energy"][0] / len(atoms), 1e-10)
        close(b["stress"], a["stress"], 1e-10)


def test_far_fragments_add_up(potential: Potential) -> None:
    atoms = two_fragments()
    whole = evaluate(potential, atoms)
    parts = [evaluate(potential, atoms[:3]), evaluate(potential, atoms[3:])]
    close(whole["energy"][0], parts[0]["energy"][0] + parts[1]["energy"][0], 1e-10)
    close(whole["forces"], torch.cat([p["forces"] for p in parts]), 1e-10)


def test_receptive_field_is_honest(potential: Potential) -> None:
    chain = Atoms("C12", positions=[[2.1 * k, 0.3 * (k % 2), 0] for k in range(12)])
    reach = potential.model.receptive_field
    a = evaluate(potential, chain)["node_energy"][0]
    far = int(reach // 2.1) + 2
    chain.positions[far:, 1] += 0.4
    close(evaluate(potential, chain)["node_energy"][0], a, 1e-13)


def test_isolated_atom_has_its_reference_energy(potential: Potential) -> None:
    out = evaluate(potential, Atoms("O"))
    close(out["energy"], potential.e0[[8]], 1e-12)
    assert not out["forces"].any()


def test_smooth_through_the_cutoff(potential: Potential) -> None:
    """Energy, force and its slope on a dimer, and on an atom that nears a molecule."""
    for start in (Atoms("CO", positions=np.zeros((2, 3))), molecule("H2O") + Atoms("C")):
        x = CUTOFF + np.arange(-20, 21) * 1e-4
        energy, force = [], []
        for r in x:
            atoms = start.copy()
            atoms.positions[-1] = atoms.positions[0] + [r / np.sqrt(2), 0, r / np.sqrt(2)]
            out = evaluate(potential, atoms)
            energy.append(out["energy"].item())
            force.append(out["forces"][-1, 0].item())
        for values in (energy, force):
            fine, coarse = (np.abs(np.diff(values[::n], 2)).max() for n in (1, 2))
            assert fine < 1e-8
            # With half the step: a quarter where it is smooth, one half at a kink, all at a jump.
            assert fine < 0.3 * coarse or fine < 1e-12
    dimer = Atoms("CO", positions=[[0, 0, 0], [0, 0, CUTOFF + 1e-6]])
    out = evaluate(potential, dimer)
    close(out["energy"], potential.e0[[6]] + potential.e0[[8]], 1e-12)
    assert not out["forces"].any()


@pytest.mark.parametrize("improper", [False, True])
@pytest.mark.parametrize("structure", ["molecule", "sheared", "slab"])
def test_rotation_and_reflection(
    potential: Potential, variant: str, structure: str, improper: bool, record_property: Any
) -> None:
    R = torch.from_numpy(Rotation.random(random_state=3).as_matrix()) * (-1 if improper else 1)
    g = graph(STRUCTURES[structure]())
    a, b = potential(g, stress=True), potential(g.rotated(R), stress=True)
    errors = {
        "energy": (b["energy"] - a["energy"]).abs().max().item(),
        "forces": (b["forces"] - a["forces"] @ R.T).abs().max().item(),
    }
    if structure == "sheared":
        errors["stress"] = (b["stress"] - R @ a["stress"] @ R.T).abs().max().item()
    if not potential.model.exact_symmetry:
        for key, value in errors.items():
            record_property(f"{variant} {structure} {key}", value)
        print(variant, structure, errors, "largest force", a["forces"].abs().max().item())
    else:
        assert max(errors.values()) < 1e-8, errors


def test_net_force_is_zero(potential: Potential) -> None:
    for build_structure in STRUCTURES.values():
        assert evaluate(potential, build_structure())["forces"].sum(0).abs().max() < 1e-10


def test_net_torque_is_zero(potential: Potential) -> None:
    if not potential.model.exact_symmetry:
        pytest.skip("a learned symmetry leaves a torque")
    atoms = STRUCTURES["molecule"]()
    torque = np.cross(atoms.positions, evaluate(potential, atoms)["forces"].numpy()).sum(0)
    assert np.abs(torque).max() < 1e-9


@pytest.mark.parametrize("structure", [*STRUCTURES, "perfect"])
def test_double_backward_is_finite(potential: Potential, structure: str) -> None:
    """Also at perfectly symmetric sites, where square roots like to divide by zero."""
    atoms = bulk("Cu", cubic=True) if structure == "perfect" else STRUCTURES[structure]()
    out = potential.train()(graph(atoms), stress=True)
    loss = out["forces"].square().sum() + out["energy"].square().sum()
    if structure == "perfect":
        loss = loss + out["stress"].square().sum()
    loss.backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_parameter_gradient_of_the_force_loss(potential: Potential) -> None:
    """Double backward against finite differences of the loss along a random direction."""
    g = graph(STRUCTURES["molecule"]())
    parameters = list(potential.train().parameters())
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in parameters]

    def loss() -> torch.Tensor:
        return potential(g)["forces"].square().sum()

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((d * v).sum() for d, v in zip(gradients, direction, strict=True) if d is not None)
    values, h = [], 1e-5
    for sign in (1, -1):
        moved = copy.deepcopy(potential)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), direction, strict=True):
                p.add_(v, alpha=sign * h)
        values.append(moved(g)["forces"].square().sum().item())
    assert abs((values[0] - values[1]) / (2 * h) - slope) < 1e-5 * max(1.0, abs(float(slope)))


def test_float32_agrees(potential: Potential) -> None:
    single = copy.deepcopy(potential).float()
    for name in ("molecule", "sheared"):
        a, b = (evaluate(p, STRUCTURES[name]()) for p in (potential, single))
        size = a["forces"].abs().max().item()
        close(b["energy"], a["energy"], 2e-5 * max(1.0, size) * len(a["forces"]))
        close(b["forces"], a["forces"], 1e-4 * max(1.0, size))


def test_visiting_float32_loses_no_constant(variant: str) -> None:
    """float64 -> float32 -> float64 rounds weights, nothing else: the symmetry stays exact."""
    potential = make(variant).float().double()
    if not potential.model.exact_symmetry:
        pytest.skip("rotations are not exact")
    R = torch.from_numpy(Rotation.random(random_state=5).as_matrix())
    g = graph(STRUCTURES["molecule"]())
    close(potential(g.rotated(R))["energy"], potential(g)["energy"], 1e-10)
    assert potential.e0[8] == torch.linspace(-3, 3, 119, **TORCH_F64)[8]


def test_the_default_dtype_at_building_leaves_no_trace(variant: str) -> None:
    potential = make(variant)
    torch.set_default_dtype(torch.float64)
    try:
        other = make(variant)
    finally:
        torch.set_default_dtype(torch.float32)
    other.load_state_dict(potential.state_dict())
    a, b = (evaluate(p, STRUCTURES["sheared"]()) for p in (potential, other))
    close(b["energy"], a["energy"], 1e-12 * float(a["energy"].abs()))
    close(b["forces"], a["forces"], 1e-11)


def test_nothing_given_is_changed(potential: Potential) -> None:
    g = graph(STRUCTURES["sheared"]())
    before = copy.deepcopy(g)
    potential(g, stress=True)
    assert set(g.keys()) == set(before.keys())
    for key in before.keys():
        value = g[key]
        assert torch.equal(value, before[key]) if torch.is_tensor(value) else value == before[key]
    assert not g.positions.requires_grad


def test_works_under_no_grad_and_inference_mode(potential: Potential) -> None:
    g = graph(STRUCTURES["molecule"]())
    a = potential(g)
    with torch.no_grad():
        close(potential(g)["forces"], a["forces"], 0)
    assert not a["forces"].requires_grad


def test_checkpoint_round_trip_to_the_bit(potential: Potential, tmp_path: Any) -> None:
    potential.repulsion = ZBL()
    save(potential, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    g = graph(STRUCTURES["sheared"]())
    a, b = potential(g, stress=True), again(g, stress=True)
    for key in ("energy", "forces", "stress"):
        assert torch.equal(a[key], b[key])


def test_one_step_lowers_the_loss(potential: Potential) -> None:
    g = graph(STRUCTURES["molecule"]())
    torch.manual_seed(0)
    target = torch.randn_like(g.positions)
    optimizer = torch.optim.SGD(potential.train().parameters(), lr=1e-7)
    losses = []
    for _ in range(2):
        loss = (potential(g)["forces"] - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
