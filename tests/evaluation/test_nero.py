"""Orbits: exact symmetry is constant on them, broken symmetry is measured; file and page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.io import write
from typer.testing import CliRunner

from mlip.checkpoint import save
from mlip.cli import app
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.data.hdf5 import HDF5Writer
from mlip.evaluation.nero import (
    Nero,
    Sample,
    aggregate,
    consensus,
    embed,
    measure,
    predictions,
    read_samples,
    summary,
)
from mlip.evaluation.nero_file import read_nero, write_nero
from mlip.evaluation.nero_page import embedded_json, page, page_data
from mlip.evaluation.nero_plots import FINE, curve_figure, interpolated, sphere_figure, sphere_map
from mlip.evaluation.nero_report import display_names, nero_report, write_report
from mlip.evaluation.orbits import CELLS, TiltAndSpin, orbits
from mlip.models import build
from mlip.potential import Potential

HOSTILE = "@STYLE@ </script><img src=x onerror=alert(1)> & \u2028 <!-- \"' $x_1^2"


class Tilted(torch.nn.Module):
    """E = sum over edges of z^2 and of the number of the neighbour: neither rotations nor
    permutations are exact."""

    def __init__(self, order: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(cutoff=5.0)
        self.order = torch.nn.Parameter(torch.tensor(order))
        self.receptive_field = 5.0
        self.exact_symmetry = False

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        j, i = graph.edge_index
        number = (j - graph.ptr[graph.batch[j]]).to(graph.vectors.dtype)
        energy = graph.vectors[:, 2] ** 2 + self.order * number * graph.vectors.square().sum(1)
        return NodeOutput(torch.zeros(len(graph.positions)).to(energy).index_add(0, i, energy))


def tilted(order: float = 0.0) -> Potential:
    return Potential(Tilted(order), torch.zeros(119)).double().eval()


def sample(atoms: Atoms, name: str = "one", **labels: Any) -> Sample:
    return Sample(name, atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc, **labels)


def structures() -> dict[str, Atoms]:
    slab = fcc111("Cu", (2, 2, 2), vacuum=4.0)
    slab.pbc = (True, True, False)
    found = {
        "molecule": molecule("CH3CH2OH"),
        "crystal": bulk("Cu", cubic=True),
        "primitive": bulk("Si"),
        "slab": slab,
    }
    for k, atoms in enumerate(found.values()):
        atoms.rattle(0.08, seed=k)
    found["one atom"] = bulk("Cu")
    found["supercell"] = found["primitive"] * (2, 1, 1)
    return found


@pytest.mark.parametrize(
    "kind", ["molecule", "crystal", "primitive", "slab", "one atom", "supercell"]
)
def test_exact_symmetry_is_constant_on_every_orbit(potential: Potential, kind: str) -> None:
    s = sample(structures()[kind])
    for orbit in orbits(grid=3):
        energies, forces = predictions(potential, s, orbit)
        there = ~np.isnan(energies)
        assert there.all() or orbit.name == "cells"
        if not there.any():
            assert kind == "molecule"
            continue
        assert np.ptp(energies[there]) < 1e-9
        assert np.ptp(forces[there], axis=0).max() < 1e-9
    cells = predictions(potential, s, orbits(["cells"])[0])[0]
    known = {name for name, e in zip(CELLS, cells, strict=True) if not np.isnan(e)}
    lacking = {"molecule": set(CELLS), "slab": {"c - b", "a + 2c", "1 x 1 x 2"}}
    smaller = set() if kind == "supercell" else {"primitive"}
    assert known == set(CELLS) - lacking.get(kind, set()) - smaller


def test_rotations_integrate_as_the_group_does() -> None:
    orbit = TiltAndSpin(4, 8, 4)
    R = orbit.matrices()
    w = orbit.weights
    assert w.sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(np.einsum("t,tij->ij", w, R), 0, atol=1e-14)
    eye = np.eye(3)
    exact = np.einsum("ik,jl->ijkl", eye, eye) / 3
    np.testing.assert_allclose(np.einsum("t,tij,tkl->ijkl", w, R, R), exact, atol=1e-14)
    np.testing.assert_allclose(R[:, :, 2].reshape(4, 8, 4, 3)[1, 2, 3], R[4 * 10, :, 2], atol=1e-14)


def test_spread_of_a_tilted_dimer_is_the_integral() -> None:
    # E = 2 z^2 on the orbit of a dimer of length r: <E> = 2 r^2/3, Var E = 4 r^4 (1/5 - 1/9).
    # F = -4 z e_z brought back: <F> = -4 r/3 along the bond, |F|^2 = 16 z^2,
    # so V = 16 r^2 (1/3 - 1/9).
    r = 1.3
    s = sample(Atoms("H2", [[0, 0, 0], [0.0, 0.6 * r, 0.8 * r]]), energy=2 * (r**2 / 3 + 0.5))
    result = measure({"m": tilted()}, [s], [TiltAndSpin(4, 8, 5)]).models["m"]["rotations"]
    spread = 1000 * np.sqrt(4 * r**4 * (1 / 5 - 1 / 9)) / 2
    assert result.rmse("energy", "consensus")[0] == pytest.approx(spread, rel=1e-12)
    assert result.energy_offset[0] == pytest.approx(-500, rel=1e-12)
    assert result.rmse("energy")[0] == pytest.approx(np.hypot(spread, 500), rel=1e-12)
    share = spread**2 / (spread**2 + 500**2)
    assert result.symmetry_share("energy") == pytest.approx(share, rel=1e-12)
    forces = 1000 * np.sqrt(16 * r**2 * (1 / 3 - 1 / 9) / 3)
    assert result.rmse("forces", "consensus")[0] == pytest.approx(forces, rel=1e-12)


def test_error_is_that_of_the_consensus_plus_the_variance() -> None:
    rng = np.random.default_rng(0)
    atoms = structures()["molecule"]
    labels = rng.normal(size=(len(atoms), 3))
    s = sample(atoms, forces=labels, energy=1.0)
    orbit = TiltAndSpin(3, 6, 3)
    _, forces = predictions(tilted(), s, orbit)
    mean = np.tensordot(orbit.weights, forces, axes=1)
    np.testing.assert_allclose(consensus(forces, orbit.weights), mean, atol=1e-13)
    result = measure({"m": tilted()}, [s], [orbit]).models["m"]["rotations"]
    bias = 1e6 * np.mean((mean - labels) ** 2)
    variance = result.rmse("forces", "consensus")[0] ** 2
    assert result.rmse("forces")[0] ** 2 == pytest.approx(bias + variance, rel=1e-12)


def test_broken_order_of_atoms_is_seen_only_where_atoms_are_renumbered() -> None:
    s = sample(structures()["molecule"])
    potential = Potential(Tilted(0.3), torch.zeros(119)).double()
    result = measure({"m": potential}, [s], orbits(grid=3)).models["m"]
    assert result["permutations"].rmse("energy", "consensus")[0] > 1
    assert result["translations"].rmse("energy", "consensus")[0] < 1e-6
    assert potential.training, "its mode is restored"
    assert result["permutations"].energy[0, 0] != 0  # the given order is one of them


def test_batches_do_not_change_the_orbit() -> None:
    s = sample(structures()["slab"])
    for orbit in orbits(grid=3):
        one = predictions(tilted(), s, orbit, max_edges=1)
        many = predictions(tilted(), s, orbit, max_edges=10**6)
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


def test_charge_and_spin_grow_with_the_supercell() -> None:
    s = sample(bulk("Cu"), charge=1.0, spin=2.0)
    (orbit,) = orbits(["cells"])
    images = orbit.images(s.graph(5.0), 5.0)
    by_name = dict(zip(CELLS, images, strict=True))
    found = by_name["2 x 2 x 1, shifted"]
    assert found is not None and found.graph.charge.item() == 4 and found.graph.spin.item() == 5


@pytest.fixture(scope="module")
def mixed() -> Nero:
    """Two models on three samples: all labels, some forces, none; hostile names."""
    rng = np.random.default_rng(1)
    samples = []
    for k in range(3):
        atoms = molecule("CH3OH") if k < 2 else bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=k)
        forces = rng.normal(size=(len(atoms), 3))
        if k == 1:
            forces[2:] = np.nan
        samples.append(
            sample(
                atoms,
                f"{k} {HOSTILE}",
                energy=-5.0 if k == 0 else np.nan,
                forces=None if k == 2 else forces,
            )
        )
    models = {"plain": tilted(), HOSTILE: tilted(0.01)}
    return measure(models, samples, orbits(grid=4), source=f"x{HOSTILE}.h5")


def test_missing_labels_fall_back_to_the_consensus_and_say_so(mixed: Nero) -> None:
    for name, result in mixed.models["plain"].items():
        if name == "cells":  # the third sample alone has this orbit, and it has no labels
            continue
        assert result.labelled("energy").tolist() == [True, False, False]
        assert result.labelled("forces").tolist() == [True, True, False]
        for quantity in ("energy", "forces"):
            label, own = (result.errors(quantity, r) for r in ("label", "consensus"))
            known = result.labelled(quantity)
            np.testing.assert_array_equal(label[~known], own[~known])
            assert (np.nan_to_num(label[known]) >= 0).all()
    rotations = mixed.models["plain"]["rotations"]
    assert not np.allclose(rotations.errors("forces")[1], rotations.forces[1])
    _, forces = predictions(tilted(), mixed.samples[1], mixed.orbits[0])
    some = mixed.samples[1].forces
    assert some is not None
    error = 1000 * np.sqrt(np.mean((forces[:, :2] - some[:2]) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(rotations.errors("forces")[1], error, rtol=1e-12)
    assert np.isnan(mixed.models["plain"]["cells"].energy[:2]).all()
    # The cell of the third is the primitive one already.
    known = [name != "primitive" for name in CELLS]
    assert np.isfinite(mixed.models["plain"]["cells"].energy[2]).tolist() == known
    unlabelled = mixed.samples[2:]
    bare = measure({"m": tilted()}, unlabelled, mixed.orbits)
    assert "no labels" in summary(bare) and "no labels" not in summary(mixed).split("cells")[0]


def test_aggregate_is_the_root_mean_square_of_what_is_there() -> None:
    errors = np.array([[3.0, np.nan, np.nan], [4.0, 2.0, np.nan]])
    np.testing.assert_allclose(aggregate(errors), [np.sqrt(12.5), 2.0, np.nan])


def test_map_of_samples_keeps_their_distances() -> None:
    rng = np.random.default_rng(2)
    weights = rng.uniform(size=7)
    weights /= weights.sum()
    errors = 5 + rng.normal(size=(6, 2)) @ rng.normal(size=(2, 7))  # a plane
    points, explained = embed(errors, weights)
    for a in range(6):
        for b in range(6):
            distance = np.sqrt(weights @ (errors[a] - errors[b]) ** 2)
            assert np.linalg.norm(points[a] - points[b]) == pytest.approx(distance, abs=1e-12)
    assert explained.sum() == pytest.approx(1) and explained[0] >= explained[1]
    size = np.sqrt(errors**2 @ weights)
    assert np.corrcoef(points[:, 0], size)[0, 1] > 0
    alone, none = embed(errors[:1], weights)
    assert not alone.any() and not none.any()


def test_drawn_spheres_pass_through_smooth_functions() -> None:
    orbit = TiltAndSpin(8, 16, 3)
    theta, phi = (np.radians(orbit.coordinates()[key]) for key in ("theta", "phi"))

    def function(t: np.ndarray, p: np.ndarray) -> np.ndarray:
        x, y, z = np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)
        return 2 + x - 0.5 * y * z + z

    fine = interpolated(function(theta[:, None], phi), theta)
    t, p = (np.arange(FINE) + 0.5) * np.pi / FINE, (np.arange(2 * FINE) + 0.5) * np.pi / FINE
    inside = slice(10, -10)  # no new extremes: the poles are cut to the outermost rings' values
    exact = function(t[:, None], p - np.pi)
    np.testing.assert_allclose(fine[inside], exact[inside], atol=0.02)
    assert np.abs(fine - exact).max() < 0.1


def test_mirror_planes_are_drawn_at_both_normals(mixed: Nero) -> None:
    orbit = next(o for o in mixed.orbits if o.name == "reflections")
    half = orbit.shape[1]
    drawn = sphere_map(orbit, mixed.models["plain"]["reflections"].forces[0])
    np.testing.assert_array_equal(drawn, np.roll(drawn[::-1], half, axis=1))


def test_file_round_trip(mixed: Nero, tmp_path: Path) -> None:
    path = tmp_path / "nero.h5"
    write_nero(mixed, path)
    samples, models = read_nero(path)
    assert list(models) == list(mixed.models)
    for name, results in mixed.models.items():
        assert set(models[name]) == set(results)
        for key, result in results.items():
            for array in ("weights", "energy", "energy_offset", "forces", "forces_label"):
                np.testing.assert_array_equal(
                    getattr(models[name][key], array), getattr(result, array)
                )
    for a, b in zip(samples, mixed.samples, strict=True):
        assert a.name == b.name
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.energy, b.energy)
        assert (a.forces is None) == (b.forces is None)
    with pytest.raises(ValueError, match="not a file of orbit errors"):
        other = tmp_path / "other.h5"
        with HDF5Writer(other) as file:
            file.append([1], [[0, 0, 0]], np.zeros((3, 3)), np.zeros(3, bool))
        read_nero(other)


def test_page_needs_no_network_and_no_name_leaves_its_place(mixed: Nero) -> None:
    text = page(mixed)
    assert not re.search(r"https?://|<img|<link|url\(|@import|src=[\"']", text, re.I)
    assert len(re.findall("</script", text, re.I)) == 2 and len(re.findall("<script", text)) == 2
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found is not None

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(found[1], parse_constant=refuse)
    assert data == json.loads(json.dumps(page_data(mixed)))
    assert [m["name"] for m in data["models"]] == ["plain", HOSTILE]
    assert data["samples"][2]["name"] == f"2 {HOSTILE}" and data["source"] == f"x{HOSTILE}.h5"
    assert not set("<>&\u2028") & set(embedded_json(HOSTILE))


def test_scripts_put_names_on_the_page_as_text_only() -> None:
    folder = Path(sys.modules["mlip.evaluation.nero_page"].__file__ or "").parent / "page"
    scripts = "".join(path.read_text() for path in folder.glob("*.js"))
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
    ):
        assert word not in scripts


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_page_draws_itself_in_a_browser(mixed: Nero, tmp_path: Path) -> None:
    write_report(mixed, tmp_path, figures=False)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
         f"file://{tmp_path / 'nero.html'}#orbit=cells&reference=label"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count('<article class="card">') == 2
    body = done.stdout.partition('<table id="table">')[2]
    assert body.partition("</table>")[0].count("<tr>") == 3, "the last thing drawn"
    assert "1 of 3 samples have no force labels" in done.stdout


def test_figures_for_papers(mixed: Nero, tmp_path: Path) -> None:
    sphere_figure(mixed, tmp_path / "a.png", sample=1)
    sphere_figure(mixed, tmp_path / "l.png", sample=1, log=True)
    assert (tmp_path / "l.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    sphere_figure(mixed, tmp_path / "b.pdf", "reflections")
    curve_figure(mixed, tmp_path / "c.pdf")
    for name, start in (("a.png", b"\x89PNG"), ("b.pdf", b"%PDF"), ("c.pdf", b"%PDF")):
        assert (tmp_path / name).read_bytes().startswith(start)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown group 'turns'"):
        orbits(["turns"])
    with pytest.raises(ValueError, match="3 rings"):
        orbits(grid=2)
    with pytest.raises(ValueError, match="no structures"):
        measure({"m": tilted()}, [], orbits())
    silent = Potential(Tilted(), torch.full((119,), torch.nan)).double()
    silent.e0[29] = 0.0
    with pytest.raises(
        ValueError, match=r"one contains C, H, O; the model m knows Cu|contains H, C"
    ):
        measure({"m": silent}, [sample(structures()["molecule"])], orbits(grid=3))
    write(tmp_path / "one.xyz", Atoms("H"))
    with pytest.raises(ValueError, match="no structures of more than one atom"):
        read_samples(tmp_path / "one.xyz", 3)
    with pytest.raises(ValueError, match="at least 1"):
        read_samples(tmp_path / "one.xyz", 0)
    with pytest.raises(ValueError, match="names: 1 for 2 models; name each once"):
        nero_report(["a", "b"], tmp_path / "one.xyz", tmp_path / "out", names=["a"])


def test_models_of_the_same_name_are_told_apart() -> None:
    paths = [Path("runs/a/best.safetensors"), Path("runs/b/best.safetensors")]
    assert display_names(paths) == ["a/best", "b/best"]
    assert display_names(paths[:1]) == ["best"]


def test_command_from_models_and_files_to_the_page(tmp_path: Path) -> None:
    model = build("facet", cutoff=4.0, channels=4, num_layers=1, lmax=1, hidden=4)
    save(Potential(model, torch.zeros(119)), tmp_path / "m.safetensors")
    frames = [molecule("H2O"), molecule("CH3OH"), Atoms("H"), bulk("Cu", cubic=True)]
    write(tmp_path / "some.xyz", frames)
    with HDF5Writer(tmp_path / "some.h5") as file:
        for atoms in frames:
            file.append(
                atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc, energy=1.0
            )
    more = {"some.xyz": ["--no-figures"], "some.h5": ["--group", "rotations", "--group", "cells"]}
    for count, (data, options) in zip((3, 2), more.items(), strict=True):
        out = tmp_path / data.replace(".", "_")
        two = [str(tmp_path / "m.safetensors")] * 2
        named = ["--name", "one", "--name", "two", "--grid", "3", "--samples", str(count)]
        done = CliRunner().invoke(
            app, ["nero", *two, str(tmp_path / data), "--out", str(out), *named, *options]
        )
        assert done.exit_code == 0, done.output
        assert "two" in done.output and "nero.html" in done.output and "no labels" in done.output
        samples, models = read_nero(out / "nero.h5")
        assert len(samples) == count and list(models) == ["one", "two"]
        made = {"nero.h5", "nero.html", "nero.txt"}
        if count == 2:
            made |= {f"{n}.{suffix}" for n in ("rotations", "curves") for suffix in ("png", "pdf")}
        assert {path.name for path in out.iterdir()} == made
    alone = CliRunner().invoke(app, ["nero", "silicon", "--out", str(tmp_path / "x")])
    assert "give at least one model" in str(alone.exception)
