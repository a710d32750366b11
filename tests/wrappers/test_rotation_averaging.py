"""The mean over a group is a conservative potential, exactly invariant under it, for any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk, fcc111, molecule

from mlip import checkpoint
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.nn.irreps import rotate_irreps
from mlip.nn.rotations import random_rotations, rotations
from mlip.potential import Potential
from mlip.rotation_orbit import rotation_orbit
from mlip.wrappers import unwrapped, wrap
from mlip.wrappers.rotation_averaging import RotationAveraging, RotationAveragingConfig
from tests.conftest import without_zeros

Make = Callable[..., Potential]


def silicon(seed: int = 0) -> AtomicGraph:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.15, seed=seed)
    return AtomicGraph.from_atoms(atoms, 4.0)


def mixed() -> AtomicGraph:
    """A batch of a crystal, a molecule and a slab, with charges."""
    alcohol, slab = molecule("CH3OH"), fcc111("Cu", (1, 1, 2), vacuum=6.0)
    graphs = [silicon(), *(AtomicGraph.from_atoms(a, 4.0) for a in (alcohol, slab))]
    charges = (0.0, 1.0, -2.0)
    return AtomicGraph.collate(
        [
            graph.replace(charge=torch.tensor([q], dtype=torch.float64))
            for graph, q in zip(graphs, charges, strict=True)
        ]
    )


def averaged(potential: Potential, rule: str, **options: Any) -> Potential:
    mirrors = rule.endswith("+mirrors")
    options = RotationAveragingConfig(
        rotations=rule.removesuffix("+mirrors"), mirrors=mirrors, **options
    )
    return potential.with_model(RotationAveraging(potential.model, options))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("rule", ["tetrahedral", "octahedral", "icosahedral", "octahedral+mirrors"])
@pytest.mark.parametrize("direct", [False, True])
def test_means_over_groups_are_exactly_invariant(lopsided: Make, rule: str, direct: bool) -> None:
    plain = lopsided(direct=direct)
    potential = averaged(plain, rule)
    graph = mixed()
    out, broken = potential(graph, stress=True), plain(graph, stress=True)
    for R in potential.model.rotations.matrices[[3, -1]]:
        turned, wrong = (p(graph.rotated(R), stress=True) for p in (potential, plain))
        close(turned["energy"], out["energy"], 1e-10)
        close(turned["node_energy"], out["node_energy"], 1e-10)
        close(turned["features"], out["features"], 1e-10)
        close(turned["forces"] @ R, out["forces"], 1e-10)
        close(R.T @ turned["stress"] @ R, out["stress"], 1e-10)
        assert (wrong["energy"] - broken["energy"]).abs().max() > 1e-3
        assert (wrong["forces"] @ R - broken["forces"]).abs().max() > 1e-3


def test_under_other_rotations_the_error_falls_with_the_degree(lopsided: Make) -> None:
    potential, graph = lopsided(), silicon()
    others = random_rotations(6, torch.Generator().manual_seed(0))
    spread = [
        float(rotation_orbit(p, graph, others).forces_spread().square().mean().sqrt())
        for p in (potential, *(averaged(potential, f"gauss-{n}") for n in (1, 3, 5, 7)))
    ]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.05 * spread[0]


@pytest.mark.parametrize("max_edges", [10**6, 500])
def test_forces_and_stress_are_derivatives(lopsided: Make, max_edges: int) -> None:
    potential = averaged(lopsided(), "tetrahedral", max_edges=max_edges)
    graph, h = silicon(), 1e-5
    out = potential(graph, stress=True)
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(graph.positions.shape, generator=generator, dtype=torch.float64)
    energies = [potential(graph.replace(positions=graph.positions + s * h * d)) for s in (1, -1)]
    slope = (energies[0]["energy"] - energies[1]["energy"]) / (2 * h)
    close(-(out["forces"] * d).sum(), slope[0], 1e-6)
    strain = torch.randn(1, 3, 3, generator=generator, dtype=torch.float64)
    energies = [potential(graph.strained(s * h * strain)) for s in (1, -1)]
    slope = (energies[0]["energy"] - energies[1]["energy"]) / (2 * h)
    close((out["stress"] * strain).sum() * graph.volume[0], slope[0], 1e-6)


@pytest.mark.parametrize("direct", [False, True])
def test_chunks_and_the_orbit_give_the_same(lopsided: Make, direct: bool) -> None:
    plain, graph = lopsided(direct=direct), mixed()
    whole, parts = (averaged(plain, "octahedral", max_edges=n) for n in (10**6, 700))
    assert graph.edge_index.shape[1] < 700 < 24 * graph.edge_index.shape[1] < 10**6
    a, b = (p(graph, stress=True) for p in (whole, parts))
    orbit = rotation_orbit(plain, graph, rotations("octahedral"), stress=True, max_edges=700)
    for key, value in orbit.consensus().items():
        close(a[key], b[key], 1e-12)
        close(a[key], value, 1e-12)
    gradients = []
    for potential in (whole, parts):
        potential.train()
        out = potential(graph)
        loss = out["forces"].square().sum() + out["energy"].square().sum()
        gradients.append(torch.autograd.grad(loss, list(plain.parameters())))
    for x, y in zip(*gradients, strict=True):
        assert x.any()
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_a_model_with_exact_symmetry_stays_as_it_is(
    random_facet: Callable[..., torch.nn.Module],
) -> None:
    torch.manual_seed(0)
    plain = Potential(random_facet(), torch.zeros(119), scale=3.0).double().eval()
    graph = silicon()
    a, b = plain(graph, stress=True), averaged(plain, "icosahedral+mirrors")(graph, stress=True)
    for key in a:
        close(a[key], b[key], 1e-10)
    orbit = rotation_orbit(plain, graph, rotations("octahedral", True))
    assert orbit.energy_spread().max() < 1e-10
    assert orbit.forces_spread().max() < 1e-10


def test_a_structure_without_neighbours(lopsided: Make) -> None:
    potential = averaged(lopsided(), "octahedral")
    out = potential(AtomicGraph.from_atoms(molecule("O"), 4.0))
    assert not out["forces"].any()
    assert out["energy"].isfinite().all()


def small_escaip() -> Potential:
    torch.manual_seed(0)
    model = build(
        "escaip", cutoff=4.0, hidden=8, node_hidden=8, num_heads=2, num_layers=1,
        angular_channels=(2, 1), num_basis=4, angular="vectors", avg_num_neighbors=10.0,
    )  # fmt: skip
    without_zeros(model, 0.1)
    return Potential(model, torch.linspace(-2, 2, 119)).double().eval()


def test_features_with_directions_turn_with_the_structure() -> None:
    torch.manual_seed(0)
    model = build(
        "transip", cutoff=4.0, hidden=32, num_layers=1, num_heads=2, head_width=4, latent=(4, 2)
    )
    without_zeros(model, 0.1)
    plain = Potential(model, torch.linspace(-2, 2, 119)).double().eval()
    potential = averaged(plain, "octahedral+mirrors")
    atoms = molecule("CH3OH")
    there = AtomicGraph.from_atoms(atoms, 4.0)
    R = potential.model.rotations.matrices[-5]  # a rotoreflection of the cube
    atoms.positions = atoms.positions @ R.numpy().T
    here = AtomicGraph.from_atoms(atoms, 4.0)
    assert potential.model.latent_irreps == model.latent_irreps
    for p, exact in ((potential, True), (plain, False)):
        f, g = (p(graph)["features"].detach() for graph in (there, here))
        expected = rotate_irreps(f, model.latent_irreps, R.expand(len(f), 3, 3))
        assert torch.allclose(g, expected, rtol=0, atol=1e-10) == exact
        assert torch.allclose(p.invariants(f), p.invariants(g), rtol=0, atol=1e-10) == exact


def test_wrappers_are_saved_and_shown(tmp_path: Path) -> None:
    plain = small_escaip()
    potential = averaged(plain, "octahedral+mirrors", max_edges=2000)
    checkpoint.save(potential, tmp_path / "mean.safetensors")
    loaded = checkpoint.load(tmp_path / "mean.safetensors")
    model, wrappers = unwrapped(loaded.model)
    entry = {"rotations": "octahedral", "mirrors": True, "max_edges": 2000}
    assert wrappers == [{"name": "rotation_averaging", **entry}]
    assert type(model) is type(plain.model)
    graph = silicon()
    a, b = potential(graph, stress=True), loaded(graph, stress=True)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    card = checkpoint.describe(tmp_path / "mean.safetensors")
    options = "max_edges 2000, mirrors True, rotations octahedral"
    assert f"escaip in rotation_averaging ({options})" in card
    # Taken out of the wrapper it is saved as a plain model again.
    checkpoint.save(loaded.with_model(model), tmp_path / "plain.safetensors")
    assert "wrappers" not in checkpoint.read_metadata(tmp_path / "plain.safetensors")
    assert torch.equal(
        checkpoint.load(tmp_path / "plain.safetensors")(graph)["energy"], plain(graph)["energy"]
    )


@pytest.mark.parametrize(
    ("wrappers", "answer"),
    [
        ("rotation_averaging", "not a list"),
        ([{"name": "exec"}], "unknown wrapper"),
        ([{"rotations": "octahedral"}], "no name"),
        ([{"name": "rotation_averaging", "model": "x"}], "names a model"),
        ([{"name": "rotation_averaging", "rotation": "octahedral"}], "did you mean"),
        ([{"name": "rotation_averaging", "rotations": "gauss-9999"}], "unknown rotations"),
        ([{"name": "rotation_averaging"}] * 5, "at most 4"),
    ],
)
def test_files_with_strange_wrappers_are_refused(
    wrappers: Any, answer: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(averaged(small_escaip(), "tetrahedral"), path)
    tensors, metadata = checkpoint.read_tensors(path)
    checkpoint.write_tensors(path, tensors, {**metadata, "wrappers": wrappers})
    with pytest.raises(checkpoint.CheckpointError, match=answer):
        checkpoint.load(path)


def test_options_are_checked(lopsided: Make) -> None:
    model = lopsided().model
    assert wrap(model, "rotation_averaging", rotations="icosahedral").exact_symmetry is False
    assert RotationAveraging(model, "octahedral+mirrors").options.mirrors
    with pytest.raises(ValueError, match="only 'mirrors'"):
        RotationAveraging(model, "octahedral+shifts")
    with pytest.raises(ValueError, match="unknown rotations"):
        RotationAveraging(model, "cubic")
    with pytest.raises(TypeError, match="'octahedral' for 24 or"):
        RotationAveraging(model, 24)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown wrapper"):
        wrap(model, "averaging")
    with pytest.raises(ValueError, match="training mode"):
        rotation_orbit(lopsided().train(), silicon(), rotations("octahedral"))
