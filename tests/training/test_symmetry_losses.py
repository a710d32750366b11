"""Laws of the symmetry terms: zero where symmetry is exact, unbiased, and saved with the run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from numpy.random import default_rng

from mlip import checkpoint
from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.data.transforms import random_rotations, rotated_each
from mlip.evaluation.evaluate import evaluate_file
from mlip.models import build
from mlip.nn.irreps import rotate_irreps
from mlip.potential import Potential
from mlip.training.config import TrainConfig
from mlip.training.log import read_rows
from mlip.training.loss import Objective
from mlip.training.run import train
from mlip.training.soft_equivariance import ProjectionTerm, project, violation
from mlip.training.symmetry_config import ConstraintConfig, ProjectionConfig, SymmetryConfig
from mlip.training.symmetry_losses import ConstraintTerm, LatentTerm, VarianceTerm, symmetry_terms
from mlip.training.trainer import BEST, LAST, STATE
from tests.conftest import without_zeros
from tests.training.conftest import (
    alone_and_in_two_processes,
    assert_same_bits,
    log_without_times,
    train_in_two_processes,
    whole_and_in_parts,
    write_copper,
)

Configure = Callable[..., TrainConfig]
TINY = dict(
    cutoff=3.6, hidden=20, num_layers=1, num_heads=2, head_width=4, edge_functions=9, latent=(2, 1)
)
ALL = SymmetryConfig.model_validate(
    {
        "latent": {"weight": 1.0},
        "pooled": {"weight": 1.0, "hidden": 8},
        "variance": {"energy": 1.0, "forces": 1.0},
        "constraint": {},
    }
)


def random_transip(seed: int = 0, **other: Any) -> Potential:
    """In which no weight is zero; float64."""
    torch.manual_seed(seed)
    model = build("transip", **{**TINY, "cutoff": 4.0, **other})
    without_zeros(model, 0.3)
    return Potential(model, torch.zeros(119)).double().train()


def batch() -> AtomicGraph:
    graphs = []
    for k, name in enumerate(("CH3CH2OH", "H2O", "NH3")):
        atoms = molecule(name)
        atoms.positions += default_rng(k).normal(0, 0.1, atoms.positions.shape)
        graphs.append(AtomicGraph.from_atoms(atoms, 4.0))
    return AtomicGraph.collate(graphs)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("name", ["latent", "pooled", "variance", "constraint"])
def test_zero_for_exact_symmetry_and_positive_for_a_learned_one(
    name: str, reflect: bool, random_facet: Callable[..., torch.nn.Module]
) -> None:
    graph = batch()
    exact = Potential(random_facet(), torch.zeros(119)).double().train()
    torch.manual_seed(0)
    escaip = build("escaip", cutoff=4.0, hidden=8, node_hidden=8, num_heads=2, angular="vectors")
    without_zeros(escaip, 0.3)
    learned = Potential(escaip, torch.zeros(119)).double().train()
    found = []
    for potential in (exact, random_transip(), learned):
        config = ALL.model_copy(update={"reflect": reflect})
        terms, weights = symmetry_terms(config, potential, graph)
        assert weights[name] == 1
        term: Any = terms[name]
        torch.manual_seed(1)
        value = term(potential, graph, potential(graph))
        value.backward()
        assert all(p.grad.isfinite().all() for p in potential.parameters() if p.grad is not None)
        found.append(float(value.detach()))
    assert abs(found[0]) < 1e-10
    assert min(found[1:]) > 1e-6


@pytest.mark.parametrize("forces", [0.0, 2.0])
@pytest.mark.parametrize("views", [2, 3])
def test_the_variance_is_unbiased(views: int, forces: float) -> None:
    """Mean of many estimates against the variance over a dense sample of the group."""
    potential = random_transip().eval()
    graph = AtomicGraph.collate([AtomicGraph.from_atoms(molecule("H2O"), 4.0)] * 50)
    torch.manual_seed(2)
    energies, turned = [], []
    for _ in range(40):
        R = random_rotations(50)
        out = potential(rotated_each(graph, R))
        energies.append(out["energy"] / 3)
        back = R.mT.index_select(0, graph.batch)
        turned.append((back @ out["forces"][:, :, None]).view(50, 9))
    dense = 3 * torch.cat(energies).var() + forces * torch.cat(turned).var(dim=0).mean()
    term = VarianceTerm(energy=3.0, forces=forces, views=views)
    values = torch.stack([term(potential, graph, {}).detach() for _ in range(40)])
    error = 1.5 * values.std() / 40**0.5  # the dense value has an error of its own
    assert abs(values.mean() - dense) < 3 * error
    # Without Bessel's correction it would be seen.
    assert abs(values.mean() * (views - 1) / views - dense) > 5 * error


def test_the_batch_counts_as_a_view_where_it_is_one() -> None:
    potential, graph = random_transip().eval(), batch()
    out = potential(graph)
    torch.manual_seed(3)
    value = VarianceTerm(energy=0.0, forces=1.0, given=True, reflect=False)(potential, graph, out)
    torch.manual_seed(3)
    R = random_rotations(3, reflect=False)
    back = R.mT.index_select(0, graph.batch)
    F = (back @ potential(rotated_each(graph, R))["forces"][:, :, None])[:, :, 0]
    assert float(value.detach()) == pytest.approx(
        float((F - out["forces"]).square().mean() / 2), rel=1e-12
    )


def test_latents_that_rotate_make_energy_and_forces_symmetric() -> None:
    """What the readouts make of latents: with the latents turned, energies stay and forces turn."""
    potential = random_transip(direct_forces=True)
    model, graph = potential.model, batch()
    h = potential(graph)["features"]
    R = random_rotations(1)[0]
    g = rotate_irreps(h, model.latent_irreps, R.expand(len(h), 3, 3))
    parts = []
    for latents in (h, g):
        s, v, t = model.sectors(latents)
        invariants = torch.cat([s, v.square().sum(-1), t.square().sum(-1)], dim=-1)
        parts.append((model.readout(invariants), model.forces(invariants)[:, None] @ v))
    assert torch.allclose(parts[0][0], parts[1][0], atol=1e-12)
    assert torch.allclose(parts[0][1] @ R.T, parts[1][1], atol=1e-12)


def test_the_dual_variable_rises_and_falls() -> None:
    potential, graph = random_transip(), batch()
    torch.manual_seed(4)
    out = potential(graph)
    for epsilon, sign in ((1e-4, 1), (1e4, -1)):
        term = ConstraintTerm(ConstraintConfig(epsilon=epsilon, rate=0.1, bounds=(0.5, 2.0)))
        course = []
        for _ in range(10):
            course.append(float(term.dual))
            loss = term(potential, graph, out)
            assert loss > 0
        steps = torch.tensor(course).log().diff() * sign
        assert (steps[:5] - 0.1).abs().max() < 1e-6
        assert float(term.dual) == (2.0 if sign > 0 else 0.5)


class Sided(torch.nn.Module):
    """Errs only for one direction of a bond."""

    scale, dtype = torch.tensor(1.0), torch.float64
    size = 10.0

    def forward(self, graph: AtomicGraph) -> dict[str, torch.Tensor]:
        bond = torch.nn.functional.normalize(graph.positions[1::2] - graph.positions[::2])
        energy = self.size * torch.relu(bond[:, 2] - 0.8)  # north: a tenth of the sphere
        return {"energy": energy, "forces": torch.zeros_like(graph.positions)}


def bonds() -> AtomicGraph:
    pair = AtomicGraph.from_atoms(Atoms("CO", positions=[[0, 0, 0], [1.1, 0, 0]]), 4.0)
    return AtomicGraph.collate([pair] * 16)


def test_rotations_are_sampled_where_they_are_hard() -> None:
    """Chains gather where the model errs."""
    graph, model = bonds(), Sided()
    shares = []
    for fresh in (1.0, 0.3):
        torch.manual_seed(5)
        term = ConstraintTerm(ConstraintConfig(fresh=fresh), reflect=False)
        for _ in range(120):
            term(model, graph, model(graph))
            R = term._proposals(torch.arange(64))
        shares.append(float((R[:, 2, 0] > 0.8).double().mean()))
        assert (term.rotations @ term.rotations.mT - torch.eye(3)).abs().max() < 1e-10
    assert shares[0] < 0.25 < shares[1]


def test_chains_move_on_while_violations_fall() -> None:
    """Halving the violation in each step is no reason to keep the rotations of the beginning."""
    graph, model, found = bonds(), Sided(), []
    for factor in (1.0, 0.5):
        torch.manual_seed(5)
        term, model.size = ConstraintTerm(ConstraintConfig(), reflect=False), 10.0
        for _ in range(30):
            term(model, graph, model(graph))
            model.size *= factor
        found.append(term.rotations)
    assert torch.equal(*found) and not torch.equal(found[0], torch.eye(3).expand(64, 3, 3))


def test_projection_makes_a_free_model_exact() -> None:
    potential, graph = random_transip(tokens="irreps", num_layers=2).eval(), batch()
    R = random_rotations(3)
    turned = rotated_each(graph, R)
    before = (potential(turned)["energy"] - potential(graph)["energy"]).abs().max()
    assert before > 1e-3 and violation(potential, "O3") > 1
    project(potential)
    once = copy.deepcopy(potential.state_dict())
    a, b = potential(graph), potential(turned)
    forces = (R.index_select(0, graph.batch) @ a["forces"][:, :, None])[:, :, 0]
    assert (b["energy"] - a["energy"]).abs().max() < 1e-12
    assert (b["forces"] - forces).abs().max() < 1e-12
    assert a["forces"].abs().max() > 1e-3
    assert violation(potential, "O3") < 1e-24
    project(potential)
    assert all(torch.allclose(once[k], v, atol=1e-15) for k, v in potential.state_dict().items())


@pytest.mark.parametrize("group", ["O2_z", "mirror_x", "inversion", "SO3"])
def test_projection_onto_a_subgroup_keeps_that_and_no_more(group: str) -> None:
    potential, graph = random_transip(tokens="irreps").eval(), batch()
    project(potential, group)
    assert violation(potential, group) < 1e-24
    E = potential(graph)["energy"]
    c, s = 0.6, 0.8
    about_z = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
    flip = torch.eye(3, dtype=torch.float64).index_fill(0, torch.tensor(0), 0.0)
    flip[0, 0] = -1
    any_proper = random_rotations(1, reflect=False)[0]
    kept = {
        "O2_z": [about_z, flip],
        "mirror_x": [flip],
        "inversion": [-torch.eye(3, dtype=torch.float64)],
        "SO3": [any_proper],
    }[group]
    for R in kept:
        assert (potential(graph.rotated(R))["energy"] - E).abs().max() < 1e-12
    if group != "SO3":
        assert (potential(graph.rotated(any_proper))["energy"] - E).abs().max() > 1e-4


def test_gradient_of_the_violation() -> None:
    potential = random_transip(tokens="irreps")
    violation(potential, "O2_z").backward()
    layer = potential.model.blocks[0].up
    W, h = layer.weight, 1e-6
    direction = torch.randn(W.shape, generator=torch.Generator().manual_seed(0)).double()
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(potential)
        with torch.no_grad():
            moved.model.blocks[0].up.weight.add_(direction, alpha=sign * h)
        values.append(float(violation(moved, "O2_z").detach()))
    slope = (values[0] - values[1]) / (2 * h)
    assert slope == pytest.approx(float((W.grad * direction).sum()), rel=1e-6)


def test_strengths_adapt_to_the_symmetry_that_is_there() -> None:
    """Weights that keep O(2) about z: only its strength stays."""
    potential, graph = random_transip(tokens="irreps"), batch()
    project(potential, "O2_z")
    config = ProjectionConfig(groups={"O3": 1.0, "O2_z": 1.0}, adapt_at=0.5, anneal=10.0)
    term = ProjectionTerm(config)
    first = term(potential, graph, {})
    assert term.strengths.tolist() == [1, 1] and first > 1
    term.progress = 0.5
    second = term(potential, graph, {})
    assert term.strengths[0] < 1e-12 and term.strengths[1] == 1
    assert second < 1e-10
    told = Objective({"p": term}, {"p": 1.0}).numbers()
    assert told["p_O3_violation"] > 1 > told["p_O2_z_violation"] and told["p_O2_z_strength"] == 1
    term.progress = 1.0
    with torch.no_grad():
        potential.model.blocks[0].up.weight.normal_()
    broken = term(potential, graph, {})
    expected = 10 * float(violation(potential, "O2_z").detach())
    assert float(broken.detach()) == pytest.approx(expected, rel=1e-9)


def test_only_declared_layers_can_be_projected(
    random_facet: Callable[..., torch.nn.Module],
) -> None:
    with pytest.raises(ValueError, match="tokens: irreps"):
        project(Potential(random_facet(), torch.zeros(119)))
    with pytest.raises(ValueError, match="tokens: irreps"):
        project(random_transip())


RUNS: dict[str, dict[str, Any]] = {
    "latents, variance, views": {
        "symmetry": {
            "latent": {},
            "pooled": {"hidden": 8},
            "variance": {"energy": 1, "forces": 1},
        },
        "data": {"augment": "rotations", "views": 2},
    },
    "constraint, projection": {
        "model": {"name": "transip", "tokens": "irreps", **TINY},
        "symmetry": {
            "constraint": {"epsilon": 1.0},
            "projection": {"groups": {"O3": 0.01, "O2_z": 0.01}, "adapt_at": 0.4, "anneal": 3},
        },
        "data": {"augment": "reflections"},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_continued_run_is_identical_to_the_bit(
    name: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"model": {"name": "transip", **TINY}, "schedule": {"max_epochs": 2}, **RUNS[name]}
    whole, parts = whole_and_in_parts(configure, monkeypatch, (2, 5), sections)
    for file in (STATE, BEST, LAST):
        assert_same_bits(whole.run_dir / file, parts.run_dir / file)
    assert log_without_times(whole) == log_without_times(parts)
    state = checkpoint.read_tensors(whole.run_dir / STATE)[0]
    own = {key for key in state if key.startswith("objective.")}
    assert ("constraint_dual" in read_rows(whole.run_dir)[0]) == name.startswith("constraint")
    assert own and not {k for k in checkpoint.read_tensors(whole.run_dir / BEST)[0] if k in own}
    other = configure("parts", **{**sections, "symmetry": {}}, resume="must")
    with pytest.raises(ValueError, match="symmetry"):
        train(other)


def test_shares_of_two_processes_add_up(configure: Configure, spawn: Any) -> None:
    """Terms without random numbers give the same run on one and on two processes."""
    sections: dict[str, Any] = {
        "model": {"name": "transip", "tokens": "irreps", **TINY},
        "data": {"valid": None, "valid_fraction": 2 / 14, "batch_size": 4},
        "schedule": {"max_epochs": 2},
        "symmetry": {"projection": {"groups": {"O3": 0.1}}},
    }
    one, two = alone_and_in_two_processes(configure, spawn, sections)
    for x, y in zip(read_rows(one.run_dir), read_rows(two.run_dir), strict=True):
        assert x["train_loss"] == pytest.approx(y["train_loss"], abs=1e-8)


def test_random_terms_run_in_two_processes(configure: Configure, spawn: Any) -> None:
    sections: dict[str, Any] = {
        "model": {"name": "transip", **TINY},
        "schedule": {"max_epochs": 1},
        "symmetry": {"constraint": {}, "pooled": {"hidden": 8}, "variance": {}},
    }
    config = configure("two", **sections)
    train_in_two_processes(config, spawn)
    state = checkpoint.read_tensors(config.run_dir / STATE)[0]
    assert (state["objective.constraint.violations"] > 0).sum() >= 7  # of both processes' chains


def test_annealed_then_projected_models_are_exact(configure: Configure, copper: Path) -> None:
    config = configure(
        model={"name": "transip", "tokens": "irreps", **TINY},
        symmetry={"projection": {"groups": {"O3": 1e-3}, "anneal": 100, "project_from": 0.6}},
    )
    potential = checkpoint.load(train(config))
    graph = batch()
    potential.e0.zero_()
    R = random_rotations(3)
    change = potential(rotated_each(graph, R))["energy"] - potential(graph)["energy"]
    assert change.abs().max() < 1e-10
    assert evaluate_file(potential, copper / "valid.h5")


@pytest.mark.parametrize(
    "model",
    [
        {"name": "transip", **TINY},
        {"name": "escaip", "cutoff": 3.6, "hidden": 8, "node_hidden": 8, "num_heads": 2},
    ],
)
def test_direct_forces_first_then_gradients(configure: Configure, model: dict[str, Any]) -> None:
    first = configure("first", model={**model, "direct_forces": True}, loss={"stress": 0})
    before = train(first)
    second = configure(
        "second",
        model=model,
        init_from=str(before),
        optimizer={"lr": 1e-30, "muon_lr": 1e-30, "weight_decay": 0},
        schedule={"max_epochs": 1},
    )
    a, b = checkpoint.load(before), checkpoint.load(train(second))
    graph = batch()
    for potential in (a, b):
        potential.e0.zero_()
    x, y = a(graph), b(graph)
    assert torch.allclose(x["energy"], y["energy"], atol=1e-10)
    assert (x["forces"] - y["forces"]).abs().max() > 1e-4
    for key, value in (("hidden", 24), ("cutoff", 3.5)):  # the latter changes no shape
        other = configure("other", model={**model, key: value}, init_from=before)
        with pytest.raises(ValueError, match=rf"another model.*{key} is \d+(\.\d+)? there"):
            train(other)
    with pytest.raises(ValueError, match="not a Facet"):
        train(configure("other", init_from=before))


def test_weights_keep_what_their_data_decided(configure: Configure, tmp_path: Path) -> None:
    """Numbers of neighbours are those of the data the weights come from, not of the new ones."""
    before = train(configure("first", schedule={"max_epochs": 1}))
    write_copper(tmp_path / "gold.h5", 3, 0, "Au")  # fewer neighbours in the cutoff
    frozen = {"optimizer": {"lr": 1e-30, "muon_lr": 1e-30, "weight_decay": 0}}
    data = {"train": str(tmp_path / "gold.h5"), "valid": str(tmp_path / "gold.h5")}
    after = configure("second", init_from=before, data=data, schedule={"max_epochs": 1}, **frozen)
    a, b = checkpoint.load(before), checkpoint.load(train(after))
    assert a.model.config == b.model.config
    graph = batch().replace(atomic_numbers=torch.full_like(batch().atomic_numbers, 79))
    assert torch.equal(a(graph)["forces"], b(graph)["forces"])
    mace = {"name": "mace", "cutoff": 3.6, "channels": 2, "lmax": 0, "radial_hidden": [4]}
    first = train(configure("third", model=mace, schedule={"max_epochs": 1}))
    with pytest.raises(ValueError, match="no weights for Au"):
        train(configure("fourth", model=mace, init_from=first, data=data))


def test_a_shift_in_reference_energies_of_elsewhere_is_fitted_anew(
    configure: Configure, copper: Path, tmp_path: Path
) -> None:
    """As imported models have it, whose isolated atoms have an energy of their own."""
    small = {"channels": 2, "lmax": 0, "radial_hidden": (4,), "readout_hidden": 2}
    mace = {"name": "mace", "cutoff": 3.6, "isolated": "learned", **small}
    own = {**mace, "elements": (29,), "avg_num_neighbors": 9.0}
    e0 = torch.full((119,), torch.nan)
    e0[29] = -50.0
    before = tmp_path / "imported.safetensors"
    checkpoint.save(Potential(build(own.pop("name"), **own), e0, 1.0), before)
    frozen = {"optimizer": {"lr": 1e-30, "muon_lr": 1e-30, "weight_decay": 0}}
    after = configure(
        "second", init_from=str(before), model=mace, schedule={"max_epochs": 1}, **frozen
    )
    potential = checkpoint.load(train(after))
    data = HDF5Dataset(copper / "train.h5", 3.6)
    graphs = [data[k] for k in range(len(data))]
    errors = [float(potential(g)["energy"] - g.energy) / len(g.positions) for g in graphs]
    assert abs(sum(errors) / len(errors)) < 0.01
    assert potential.e0[29] != -50


def test_several_views_enlarge_the_batch(configure: Configure) -> None:
    from mlip.training.run import _train_loader, prepare_data

    config = configure(data={"augment": "rotations", "views": 3, "num_workers": 1})
    data = prepare_data(config)
    graph = next(iter(_train_loader(config.data, data.train, 0, pin=False)))
    assert graph.num_structures == 12
    assert graph.frame.view(4, 3).float().std(dim=1).max() == 0
    energies, lengths = graph.energy.view(4, 3), graph.forces.norm(dim=1)
    assert (energies == energies[:, :1]).all()
    for k in range(4):
        views = [lengths[graph.batch == 3 * k + v] for v in range(3)]
        first = [graph.forces[graph.batch == 3 * k + v] for v in range(3)]
        assert torch.allclose(views[0], views[1]) and torch.allclose(views[0], views[2])
        assert not torch.allclose(first[0], first[1])
    assert data.train.transform is not None and data.valid.transform is None


def test_configuration_is_strict(configure: Configure) -> None:
    for section in (
        {"symmetry": {"latents": {}}},
        {"symmetry": {"variance": {"energy": 0, "forces": 0}}},
        {"symmetry": {"projection": {"groups": {"O4": 1.0}}}},
        {"symmetry": {"constraint": {"start": 1e9}}},
        {"data": {"views": 2}},
        {"model": {"name": "transip", "hidden": 24, "latent": [8, 0]}},
    ):
        with pytest.raises(ValueError):
            configure(**section)


def test_a_symmetry_term_lowers_the_symmetry_error() -> None:
    """Forty steps on latents alone, from the same start, against none."""
    potential, graph = random_transip(), batch()
    term = LatentTerm()
    torch.manual_seed(6)

    def error() -> float:
        with torch.no_grad():
            return sum(float(term(potential, graph, potential(graph))) for _ in range(8))

    before = error()
    optimizer = torch.optim.Adam(potential.parameters(), lr=3e-3)
    objective = Objective({"latent": term}, {"latent": 1.0})
    for _ in range(40):
        optimizer.zero_grad()
        objective(potential, graph, potential(graph)).backward()
        optimizer.step()
    assert error() < 0.5 * before
