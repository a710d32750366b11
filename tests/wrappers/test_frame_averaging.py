"""Averages over frames are exactly invariant, conservative, and smooth where they say so."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from torch import Tensor

from mlip import checkpoint
from mlip.calculators import EqCalculator
from mlip.data.graph import AtomicGraph
from mlip.data.hdf5 import HDF5Writer
from mlip.models import build
from mlip.nn.rotations import random_rotations
from mlip.potential import Potential
from mlip.training.config import parse_training, to_yaml
from mlip.training.run import make_potential, prepare_data, train
from mlip.wrappers import unwrapped, wrap
from mlip.wrappers.frame_averaging import FrameAveraging
from mlip.wrappers.local_frames import step
from mlip.wrappers.principal_axes import Eigen
from mlip.wrappers.rotation_averaging import RotationAveraging
from tests.conftest import without_zeros

Make = Callable[..., Potential]
CUTOFF = 4.0
SMALL: dict[str, dict[str, Any]] = {
    "environment": dict(hidden=12, edge_hidden=8, num_heads=2, num_basis=4),
    "transip": dict(
        hidden=20, num_layers=2, num_heads=2, head_width=4, edge_functions=6, latent=(2, 1)
    ),
    "escaip": dict(
        hidden=8, node_hidden=8, num_heads=2, angular_channels=(2, 1), num_basis=4,
        angular="vectors", num_layers=2,
    ),
}  # fmt: skip


def rattled(atoms: Atoms, seed: int = 0) -> Atoms:
    atoms.positions += np.random.default_rng(seed).normal(0, 0.08, atoms.positions.shape)
    return atoms


def square() -> Atoms:
    return Atoms("H4", positions=[[1, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]])


STRUCTURES = {
    "molecule": lambda: rattled(molecule("CH3CH2OH")),
    "slab": lambda: rattled(fcc111("Cu", (2, 2, 2), vacuum=6.0)),
    "crystal": lambda: rattled(bulk("Si", cubic=True)),
    # Here frames from eigenvectors do not exist.
    "diamond": lambda: bulk("Si"),
    "fcc": lambda: bulk("Cu"),
    "bcc": lambda: bulk("Cu", "bcc", a=2.9, cubic=True),
    "methane": lambda: molecule("CH4"),
    "collinear": lambda: molecule("CO2"),
    "dimer": lambda: molecule("O2"),
    "atom": lambda: Atoms("O"),
    "square": square,
}
DEGENERATE = [*STRUCTURES][3:]


def graph(atoms: Atoms) -> AtomicGraph:
    return AtomicGraph.from_atoms(atoms, CUTOFF)


def framed(potential: Potential, kind: str = "local", **options: Any) -> Potential:
    if kind == "pca":
        options["allow_nonsmooth"] = True
    return potential.with_model(wrap(potential.model, "frame_averaging", kind=kind, **options))


def backbone(name: str, **changes: Any) -> Potential:
    torch.manual_seed(0)
    model = build(name, cutoff=CUTOFF, **{**SMALL[name], **changes})
    without_zeros(model, 0.3)
    return Potential(model, torch.linspace(-2, 2, 119), scale=2.0).double().eval()


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


def assert_invariant(potential: Potential, g: AtomicGraph, improper: bool = True) -> None:
    generator = torch.Generator().manual_seed(5)
    out = potential(g, stress=True)
    for R in random_rotations(2, generator, mirrors=False).matrices:
        for Q in (R, -R) if improper else (R,):
            turned = potential(g.rotated(Q), stress=True)
            close(turned["node_energy"], out["node_energy"], 1e-10)
            close(turned["forces"] @ Q, out["forces"], 1e-10)
            close(Q.T @ turned["stress"] @ Q, out["stress"], 1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_local_frames_make_any_model_exactly_invariant(lopsided: Make, structure: str) -> None:
    assert_invariant(framed(lopsided()), graph(STRUCTURES[structure]()))


def test_so_are_messages_of_several_layers() -> None:
    batch = AtomicGraph.collate([graph(make()) for make in STRUCTURES.values()])
    generator = torch.Generator().manual_seed(1)
    (R,) = random_rotations(1, generator).matrices
    for name in SMALL:
        plain = backbone(name)
        assert_invariant(framed(plain), batch)
        # The law would hold of a model without angles, too: the backbone is none.
        assert (plain(batch.rotated(R))["forces"] @ R - plain(batch)["forces"]).abs().max() > 1e-3


def test_messages_between_views_and_single_views_are_one_formula() -> None:
    """With one layer nothing is passed on: both ways of evaluating agree."""
    potential = framed(backbone("transip", num_layers=1))
    g = AtomicGraph.collate([graph(make()) for make in STRUCTURES.values()])
    single = potential(g)
    assert not potential.model.shares
    potential.model.shares = True
    shared = potential(g)
    for key in ("node_energy", "forces", "features"):
        close(shared[key], single[key], 1e-11)


def test_without_mirrors_hands_differ(lopsided: Make) -> None:
    g = graph(STRUCTURES["molecule"]())
    potential = framed(lopsided(), mirrors=False)
    assert_invariant(potential, g, improper=False)
    mirrored = potential(g.rotated(-torch.eye(3, dtype=torch.float64)))
    assert (mirrored["energy"] - potential(g)["energy"]).abs() > 1e-4
    assert not potential.model.exact_symmetry and framed(lopsided()).model.exact_symmetry


def test_angles_are_seen(lopsided: Make) -> None:
    """Two environments with the same distances from the centre have different energies."""
    energies = []
    for angle in (70, 110, 180):
        a = math.radians(angle)
        atoms = Atoms("CO2", [[0, 0, 0], [3.9, 0, 0], [3.9 * math.cos(a), 3.9 * math.sin(a), 0]])
        atoms.positions *= 1.2 / 3.9
        energies.append(framed(lopsided())(graph(atoms))["node_energy"][0].item())
    assert np.abs(np.diff(energies)).min() > 1e-3


def paths() -> dict[str, Callable[[float], Atoms]]:
    """Structures as functions of a number in [-1, 1], through every kind of degeneracy."""
    cu, methane = bulk("Cu", cubic=True), molecule("CH4")

    def bent(t: float) -> Atoms:  # through the straight line
        return Atoms("OCO", [[1.2, 0, 0], [0, 0, 0], [-1.2, 0.5 * t, 0.1 * t]])

    def off_site(t: float) -> Atoms:  # through a cubic site
        atoms = cu.copy()
        atoms.positions[0] += np.array([0.2, 0.1, 0.05]) * t
        return atoms

    def leaving(t: float) -> Atoms:  # in and out of frames and of the cutoff
        atoms = methane.copy()
        atoms.positions[1] *= 2.4 + 1.4 * t
        return atoms

    def stretched(t: float) -> Atoms:  # two principal axes exchange their places
        x, y = math.sqrt(3) / 2, 1 / 2
        atoms = Atoms("H3C", positions=[[0, 1, 0], [x, -y, 0], [-x, -y, 0], [0, 0, 0.6]])
        atoms.positions *= [1 + 0.1 * t, 1 - 0.1 * t, 1]
        return atoms

    def along_the_bond(t: float) -> Atoms:  # one neighbour passes the axis of another
        return Atoms("OHHC", [[0, 0, 0], [1, 0, 0], [1.6, t, 0.0], [-0.8, 0.3, 0.9]])

    return {f.__name__: f for f in (bent, off_site, leaving, stretched, along_the_bond)}


def roughness(potential: Potential, path: Callable[[float], Atoms], n: int) -> list[float]:
    """Of energy and forces along a path: the largest second difference for a step, relative to
    that for twice the step.  1/4 where the second derivative is bounded, 1/2 at a kink, 1 at a
    jump."""
    t = np.linspace(-1, 1, 2 * n + 1) + 0.1 / n
    batches = [
        potential(AtomicGraph.collate([graph(path(x)) for x in part]))
        for part in np.array_split(t, 20)
    ]
    energy = np.concatenate([out["energy"].numpy() for out in batches])
    forces = np.concatenate([out["forces"].numpy() for out in batches]).reshape(len(t), -1)
    return [
        float(np.abs(np.diff(x, 2, axis=0)).max() / np.abs(np.diff(x[::2], 2, axis=0)).max())
        for x in (energy, forces)
    ]


@pytest.mark.parametrize("path", paths())
def test_nothing_jumps_on_the_way_through_a_degeneracy(lopsided: Make, path: str) -> None:
    n = 60 if path == "off_site" else 400
    energy, forces = roughness(framed(lopsided()), paths()[path], n)
    assert energy < 0.27 and forces < 0.35


def test_principal_axes_jump(lopsided: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jumping = framed(lopsided(), "pca")
        energy, _ = roughness(jumping, paths()["stretched"], 400)
    assert energy > 0.9


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["local", "pca"])
def test_first_and_second_derivatives_are_finite(lopsided: Make, kind: str, structure: str) -> None:
    g = graph(STRUCTURES[structure]())
    if kind == "pca" and g.pbc.any():
        pytest.skip("molecules only")
    plain = lopsided()
    potential = framed(plain, kind).train()
    positions = g.positions.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = potential(g.replace(positions=positions))
    loss = out["forces"].square().sum() + out["energy"].square().sum()
    gradients = torch.autograd.grad(
        loss, [positions, *plain.parameters()], allow_unused=True, materialize_grads=True
    )
    assert out["forces"].isfinite().all()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("structure", [*DEGENERATE, "molecule"])
def test_forces_and_hessian_are_derivatives(lopsided: Make, structure: str) -> None:
    """Also where a site is symmetric, against central differences along a random direction."""
    potential, g = framed(lopsided()), graph(STRUCTURES[structure]())
    generator, h = torch.Generator().manual_seed(0), 1e-5
    d = torch.randn(g.positions.shape, generator=generator, dtype=torch.float64)
    plus, minus = (potential(g.replace(positions=g.positions + s * h * d)) for s in (1, -1))
    slope = (plus["energy"] - minus["energy"])[0] / (2 * h)
    close(-(potential(g)["forces"] * d).sum(), slope, 2e-6)
    positions = g.positions.clone().requires_grad_()
    forces = potential.train()(g.replace(positions=positions))["forces"]
    product = torch.zeros_like(forces)
    if forces.requires_grad and len(forces) > 1:
        (product,) = torch.autograd.grad((forces * d).sum(), positions)
    expected = (plus["forces"] - minus["forces"]) / (2 * h)
    close(product, expected, 1e-5 * max(1.0, float(expected.abs().max())))


def test_views_show_what_is_there(lopsided: Make) -> None:
    wrapper = framed(lopsided()).model
    number = {}
    for name, make in STRUCTURES.items():
        g = graph(make())
        g = g.replace(vectors=g.edge_vectors())
        views = wrapper.views(g)
        number[name] = len(views.atom) / len(g.positions)
        assert (views.weight > 0).all()
        assert torch.equal(views.atom[: len(g.positions)], torch.arange(len(g.positions)))
        # Each view has all edges of its atom, at their distances.
        assert torch.equal(g.edge_index[1][views.edge], views.atom[views.view])
        degree = torch.bincount(g.edge_index[1], minlength=len(g.positions))
        assert torch.equal(
            torch.bincount(views.view, minlength=len(views.atom)), degree[views.atom]
        )
        close(views.vectors.norm(dim=1), g.vectors.norm(dim=1)[views.edge], 1e-12)
    assert number["atom"] == 1 and number["dimer"] == 2
    # In a crystal as many frames as its point group has elements, 12 axes, and 1.
    assert number["fcc"] == 48 + 12 + 1 and number["diamond"] == 24 + 4 + 1


def test_a_collinear_neighbourhood_is_seen_as_it_is() -> None:
    """Along its own axis the model sees the molecule itself."""
    plain = backbone("environment")
    atoms = Atoms("OCSi", [[1.16, 0, 0], [0, 0, 0], [-1.36, 0, 0]])
    g = graph(atoms)
    g = g.replace(vectors=g.edge_vectors())
    views = framed(plain).model.views(g)
    axes = torch.nonzero(views.atom[3:] == 1).flatten() + 3  # of the carbon
    seen = [views.vectors[views.view == k] for k in axes]
    own = g.vectors[g.edge_index[1] == 1]
    turned = own * own.new_tensor([-1.0, 1.0, 1.0])
    assert len(seen) == 2
    close(seen[0], own, 1e-12)
    close(seen[1], turned, 1e-12)


def test_step_has_three_derivatives() -> None:
    for t0 in (0.0, 1.0):
        t = torch.tensor([t0 - 1e-7, t0 + 1e-7], dtype=torch.float64, requires_grad=True)
        x = step(t)
        for _ in range(3):
            (x,) = torch.autograd.grad(x.sum(), t, create_graph=True)
            assert x.abs().max() < 1e-3
    assert step(torch.tensor([-3.0, 0.0, 0.5, 1.0, 9.0])).tolist() == [1, 1, 0.5, 0, 0]


def test_parts_and_the_whole_are_the_same(lopsided: Make) -> None:
    plain = lopsided()
    g = AtomicGraph.collate([graph(make()) for make in STRUCTURES.values()])
    found = []
    for max_edges in (10**7, 900):
        potential = framed(plain, max_edges=max_edges).train()
        out = potential(g, stress=True)
        loss = out["forces"].square().sum() + out["energy"].square().sum()
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        found.append((out, gradients))
    (a, ga), (b, gb) = found
    for key in a:
        close(a[key], b[key], 1e-11)
    for x, y in zip(ga, gb, strict=True):
        assert x.any()
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_stochastic_frames_draw_from_the_local_ones(lopsided: Make) -> None:
    plain, g = lopsided(), graph(STRUCTURES["molecule"]())
    local, drawn = framed(plain), framed(plain, "stochastic")
    for key, value in local(g, stress=True).items():
        close(drawn(g, stress=True)[key], value, 0)  # evaluated, it is the mean itself
    drawn.train()
    torch.manual_seed(0)
    many = AtomicGraph.collate([g] * 1000)
    draws = drawn(many)["node_energy"].detach().view(1000, -1)
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert (draws.std(dim=0) > 1e-4).any()
    assert ((draws.mean(dim=0) - local(g)["node_energy"]).abs() < 5 * error + 1e-12).all()
    # Which view is drawn does not depend on the orientation.
    (R,) = random_rotations(1, torch.Generator().manual_seed(2)).matrices
    outs = []
    for x in (g, g.rotated(R)):
        torch.manual_seed(3)
        outs.append(drawn(x))
    close(outs[0]["energy"], outs[1]["energy"], 1e-10)
    close(outs[0]["forces"] @ R.T, outs[1]["forces"], 1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_stochastic_frames_train_every_model(name: str) -> None:
    potential = framed(backbone(name), "stochastic").train()
    g = AtomicGraph.collate([graph(make()) for make in STRUCTURES.values()])
    out = potential(g)
    out["forces"].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in potential.parameters() if p.grad is not None)
    close(out["forces"].sum(dim=0), torch.zeros(3, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("mirrors", [False, True])
@pytest.mark.parametrize(("kind", "rule"), [("group24", "octahedral"), ("group60", "icosahedral")])
def test_groups_are_rotation_averages(lopsided: Make, kind: str, rule: str, mirrors: bool) -> None:
    plain, g = lopsided(direct=True), graph(STRUCTURES["crystal"]())
    a = framed(plain, kind, mirrors=mirrors)(g, stress=True)
    other = RotationAveraging(plain.model, rule + ("+mirrors" if mirrors else ""))
    b = plain.with_model(other)(g, stress=True)
    for key in a:
        close(a[key], b[key], 0)


@pytest.mark.parametrize("direct", [False, True])
def test_principal_axes_make_molecules_invariant(lopsided: Make, direct: bool) -> None:
    potential = framed(lopsided(direct=direct), "pca")
    for name in ("molecule", "collinear", "dimer", "atom"):
        assert_invariant(potential, graph(STRUCTURES[name]()))
    assert potential.model.receptive_field == math.inf


def test_principal_axes_without_mirrors_see_hands(lopsided: Make) -> None:
    potential, g = framed(lopsided(), "pca", mirrors=False), graph(STRUCTURES["molecule"]())
    assert_invariant(potential, g, improper=False)
    mirrored = potential(g.rotated(-torch.eye(3, dtype=torch.float64)))
    assert (mirrored["energy"] - potential(g)["energy"]).abs() > 1e-4


def test_forces_in_principal_axes_are_derivatives(lopsided: Make) -> None:
    potential = framed(lopsided(), "pca")
    for name in ("molecule", "collinear"):
        g, h = graph(STRUCTURES[name]()), 1e-5
        generator = torch.Generator().manual_seed(0)
        d = torch.randn(g.positions.shape, generator=generator, dtype=torch.float64)
        plus, minus = (potential(g.replace(positions=g.positions + s * h * d)) for s in (1, -1))
        slope = (plus["energy"] - minus["energy"])[0] / (2 * h)
        close(-(potential(g)["forces"] * d).sum(), slope, 1e-6)


def test_principal_axes_say_where_they_end(lopsided: Make) -> None:
    potential = framed(lopsided(), "pca")
    with pytest.raises(ValueError, match="periodic structure: in cubic crystals there are none"):
        potential(graph(bulk("Si")))
    with pytest.warns(UserWarning, match="1 of 2 structures have two principal axes"):
        potential(AtomicGraph.collate([graph(STRUCTURES[x]()) for x in ("methane", "molecule")]))
    with pytest.raises(ValueError, match="allow_nonsmooth: true"):
        wrap(lopsided().model, "frame_averaging", kind="pca")


def test_eigenvectors_have_two_derivatives() -> None:
    """Against torch's own where all eigenvalues differ."""
    generator = torch.Generator().manual_seed(0)
    A, B, D = torch.randn(3, 4, 3, 3, generator=generator, dtype=torch.float64)
    C, weights = A @ A.mT, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def f(eigen: Callable[[Tensor], Any], C: Tensor) -> tuple[Tensor, Tensor]:
        values, V = eigen((C + C.mT) / 2)
        y = ((V.mT @ B @ V) * weights).square().sum() + values.exp().sum()
        (g,) = torch.autograd.grad(y, C, create_graph=True)
        (gg,) = torch.autograd.grad((g * D).sum(), C)
        return g, gg

    ours, theirs = (f(e, C.clone().requires_grad_()) for e in (Eigen.apply, torch.linalg.eigh))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_models_that_do_not_fit_are_refused(
    random_facet: Callable[..., Any], lopsided: Make
) -> None:
    with pytest.raises(ValueError, match="Facet passes messages"):
        FrameAveraging(random_facet())
    with pytest.raises(ValueError, match="direct_forces: false"):
        FrameAveraging(backbone("transip", direct_forces=True).model)
    with pytest.raises(ValueError, match="direct_forces: false"):
        framed(lopsided(direct=True))(graph(Atoms("O2", [[0, 0, 0], [0, 0, 1.1]])))
    with pytest.raises(ValueError, match="the field in it; take kind: group24"):
        FrameAveraging(build("escaip", cutoff=4.0, angular="vectors", field="given"))
    with pytest.raises(ValueError, match="'kind'"):
        wrap(lopsided().model, "frame_averaging", kind="frames")


@pytest.mark.parametrize("kind", ["local", "stochastic", "pca", "group24"])
def test_files_keep_the_frames(kind: str, tmp_path: Path) -> None:
    potential = framed(backbone("environment"), kind, width=0.7)
    checkpoint.save(potential, tmp_path / "model.safetensors")
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    _, (entry,) = unwrapped(loaded.model)
    assert (entry["name"], entry["kind"], entry["width"]) == ("frame_averaging", kind, 0.7)
    atoms = STRUCTURES["molecule"]()
    atoms.calc = EqCalculator(tmp_path / "model.safetensors", dtype="float64")
    out = potential(graph(atoms))
    assert atoms.get_potential_energy() == pytest.approx(out["energy"].item(), abs=1e-12)
    tensors, metadata = checkpoint.read_tensors(tmp_path / "model.safetensors")
    metadata["wrappers"][0]["kind"] = "__import__('os')"
    checkpoint.write_tensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(checkpoint.CheckpointError, match="kind"):
        checkpoint.load(tmp_path / "model.safetensors")


def write_methanol(path: Path) -> Path:
    """A few shaken molecules with the labels of effective medium theory."""
    with HDF5Writer(path) as file:
        for seed in range(12):
            atoms = rattled(molecule("CH3OH"), seed)
            atoms.calc = EMT()
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            cell = np.array(atoms.cell)
            file.append(
                atoms.numbers, atoms.positions, cell, atoms.pbc, energy=energy, forces=forces
            )
    return path


def settings(train: str = "train.h5", **more: Any) -> dict[str, Any]:
    return {
        "data": {"train": train, "valid_fraction": 0.3},
        "model": {"name": "environment", **SMALL["environment"], "cutoff": CUTOFF},
        "schedule": {"max_epochs": 2},
        "runtime": {"tune_allocator": False, "device": "cpu"},
        "logging": {"plots": False},
        **more,
    }


def test_one_switch_in_the_configuration(tmp_path: Path) -> None:
    """Bare, then from its weights with frames; the calculator reads both files."""
    data = str(write_methanol(tmp_path / "train.h5"))
    bare = train(parse_training(settings(data, run_dir=str(tmp_path / "bare"))))
    more = {"wrapper": {"name": "frame_averaging"}, "init_from": str(bare)}
    path = train(parse_training(settings(data, run_dir=str(tmp_path / "framed"), **more)))
    spread = {}
    for name, file in {"bare": bare, "framed": path}.items():
        calc = EqCalculator(file, dtype="float64")
        energies = []
        for angle in (0, 40):
            atoms = rattled(molecule("CH3OH"))
            atoms.rotate(angle, (1, 2, 3))
            atoms.calc = calc
            energies.append(atoms.get_potential_energy())
        spread[name] = abs(energies[1] - energies[0])
    assert spread["framed"] < 1e-9 < 1e-6 < spread["bare"]


def test_frames_around_an_exact_model_are_said_to_be_pointless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(write_methanol(tmp_path / "train.h5"))
    model = {"name": "ponita", "channels": 4, "message_channels": 2, "cutoff": CUTOFF}
    wrapper = {"name": "frame_averaging", "kind": "group24"}
    config = parse_training(settings(data, model=model, wrapper=wrapper))
    for exact, pointwise in ((True, "product"), (False, "gelu")):
        changed = {"pointwise": pointwise}
        config = config.model_copy(update={"model": config.model.model_copy(update=changed)})
        caplog.clear()
        make_potential(config, prepare_data(config))
        assert ("exact for ponita by construction; frame_averaging" in caplog.text) == exact


def test_the_section_is_checked() -> None:
    config = parse_training(settings(wrapper="frame_averaging"))
    assert config.wrapper is not None and config.wrapper.model_dump()["kind"] == "local"
    assert "  kind: local  #" in to_yaml(config)
    for section, answer in {
        "frames": "unknown wrapper 'frames'; there are rotation_averaging, frame_averaging",
        7: "'wrapper.name' is required",
    }.items():
        with pytest.raises(ValueError, match=answer):
            parse_training(settings(wrapper=section))
    with pytest.raises(ValueError, match=r"did you mean 'wrapper\.width'"):
        parse_training(settings(wrapper={"name": "frame_averaging", "widht": 1}))
    with pytest.raises(ValueError, match="allow_nonsmooth: true"):
        parse_training(settings(wrapper={"name": "frame_averaging", "kind": "pca"}))
