"""Errors do not depend on batches; predictions and tables say what the model says."""

from __future__ import annotations

import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import chemical_symbols
from typer.testing import CliRunner

from mlip import checkpoint
from mlip.cli import app
from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.data.hdf5 import HDF5Writer
from mlip.evaluation.evaluate import Pairs, evaluate, evaluate_file, evaluate_files
from mlip.evaluation.metrics import ErrorSums, line, table
from mlip.evaluation.plots import learning_curve, parity_plot
from mlip.models import build
from mlip.potential import Potential
from tests.conftest import without_zeros


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crystals and molecules, labels missing here and there, and an isolated atom."""
    path = tmp_path_factory.mktemp("data") / "mixed.h5"
    rng = np.random.default_rng(0)
    with HDF5Writer(path) as file:
        for k in range(11):
            atoms = bulk("Cu", cubic=True) * (1 + k % 2, 1, 1) if k % 3 else molecule("CH3OH")
            atoms.rattle(0.05, seed=k)
            periodic = bool(atoms.pbc.all())
            file.append(
                atoms.numbers,
                atoms.positions,
                np.array(atoms.cell),
                atoms.pbc,
                energy=None if k == 4 else rng.normal(),
                forces=None if k in (1, 3) else rng.normal(size=(len(atoms), 3)),
                stress=rng.normal(size=(3, 3)) if periodic and k != 5 else None,
                config_type="crystal" if periodic else "",
            )
        none = (np.zeros((3, 3)), np.zeros(3, dtype=bool))
        file.append(
            np.array([1]), np.zeros((1, 3)), *none, energy=-13.6, config_type="IsolatedAtom"
        )
    return path


def same(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> None:
    assert a.keys() == b.keys()
    for quantity, values in a.items():
        assert b[quantity] == pytest.approx(values, abs=1e-10)


def test_errors_do_not_depend_on_batches(data: Path, potential: Potential) -> None:
    dataset = HDF5Dataset(data, potential.cutoff)
    sums = [evaluate(potential, dataset, batch_size=n) for n in (1, 3, 8)]
    sums.append(evaluate(potential, dataset, batch_size=100, max_atoms=9))
    for other in sums[1:]:
        same(sums[0].total(), other.total())
        for name, errors in sums[0].by_type().items():
            same(errors, other.by_type()[name])
    parts = [evaluate(potential, dataset.subset(range(r, 12, 2))) for r in range(2)]
    merged = ErrorSums()
    merged.sums = sum(p.sums.sum(dim=1, keepdim=True) for p in parts)
    same(sums[0].total(), merged.total())


def test_errors_are_those_of_numpy(data: Path, toy: Potential) -> None:
    dataset = HDF5Dataset(data, toy.cutoff)
    error: dict[str, list[np.ndarray]] = {"energy": [], "forces": [], "stress": []}
    for k in range(len(dataset)):
        graph = AtomicGraph.collate([dataset[k]])
        out = toy(graph, stress=True)
        n = len(graph.positions)
        for q, found in error.items():
            e = (out[q] - graph[q]).numpy().ravel() / (n if q == "energy" else 1)
            found.append(e[~np.isnan(e)])
    total = evaluate(toy, dataset).total()
    for q, found in error.items():
        e = np.concatenate(found)
        assert total[q]["count"] == len(e)
        assert total[q]["mae"] == pytest.approx(np.abs(e).mean(), abs=1e-10)
        assert total[q]["rmse"] == pytest.approx(np.sqrt((e**2).mean()), abs=1e-10)


def test_the_worst_groups_are_named(data: Path, toy: Potential, tmp_path: Path) -> None:
    report = evaluate_file(toy, data)
    errors: dict[str, list[float]] = {}
    dataset = HDF5Dataset(data, toy.cutoff)
    for k in range(11):
        graph = dataset[k]
        forces = (toy(graph)["forces"] - graph.forces).abs().mean(dim=1).tolist()
        for z, error in zip(graph.atomic_numbers.tolist(), forces, strict=True):
            if not np.isnan(error):
                errors.setdefault(chemical_symbols[z], []).append(error)
    found = {name: e["forces"]["mae"] for name, e in report.kinds["element"].items()}
    assert found == pytest.approx({name: np.mean(e) for name, e in errors.items()}, abs=1e-10)
    worst = max(found, key=lambda name: found[name])
    lines = [line for line in report.text().splitlines() if line.startswith("worst")]
    assert len(lines) == 3 and f"element {worst} " in lines[1]
    assert lines[0].startswith("worst energy MAE: config_type ") and "element" not in lines[0]
    for name in errors:
        assert f"element {name} " in report.text()


def test_one_element_and_no_types_still_have_a_worst(toy: Potential, tmp_path: Path) -> None:
    with HDF5Writer(tmp_path / "a.h5") as file:
        for k in range(3):
            atoms = bulk("Cu", cubic=True)
            arrays = (atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc)
            file.append(*arrays, forces=np.full((4, 3), 0.1), group=f"run{k}")
    text = evaluate_file(toy, tmp_path / "a.h5").text()
    assert "worst forces MAE: group run" in text and ", element Cu 100" in text
    assert "\ngroup run0 " in text and "\nelement Cu" not in text


def test_evaluation_restores_the_mode(data: Path, toy: Potential) -> None:
    dataset = HDF5Dataset(data, toy.cutoff)
    toy.train()
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    evaluate(toy, dataset, batch_size=2, stop=stop)
    assert toy.training
    assert len(asked) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    e0 = torch.full((119,), torch.nan, dtype=torch.float64)
    e0[[1, 6, 8, 29]] = 0.0
    net = build("facet", cutoff=4.0, channels=8, num_layers=1, lmax=2, hidden=8)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    checkpoint.save(Potential(net, e0).double(), path)
    return path


def test_predictions_are_readable_and_right(model: Path, data: Path, tmp_path: Path) -> None:
    (report,) = evaluate_files(model, [data], tmp_path / "out")
    assert report.num_structures == 11  # the isolated atom tells nothing
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"predictions.extxyz", "parity.png", "errors.txt"}
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")
    frames = ase.io.read(tmp_path / "out" / "predictions.extxyz", ":")
    potential = checkpoint.load(model)
    dataset = HDF5Dataset(data, potential.cutoff)
    errors = []
    for k, atoms in enumerate(frames):
        assert isinstance(atoms, Atoms)
        stored = dataset.structure(k)
        assert np.allclose(atoms.positions, stored.positions, atol=1e-9)
        assert np.allclose(atoms.cell, stored.cell[0], atol=0)
        assert (atoms.pbc == stored.pbc[0]).all()
        assert (atoms.numbers == stored.atomic_numbers).all()
        out = potential(AtomicGraph.from_atoms(atoms, potential.cutoff), stress=True)
        assert atoms.info["MLIP_energy"] == pytest.approx(float(out["energy"]), abs=1e-7)
        assert np.allclose(atoms.arrays["MLIP_forces"], out["forces"], atol=1e-7)
        assert ("MLIP_stress" in atoms.info) == bool(atoms.pbc.all())
        if atoms.pbc.all():
            assert np.allclose(atoms.info["MLIP_stress"], out["stress"].flatten(), atol=1e-7)
        assert ("REF_energy" in atoms.info) == (k != 4)
        assert ("REF_forces" in atoms.arrays) == (k not in (1, 3))
        if "REF_energy" in atoms.info:
            errors.append(abs(atoms.info["MLIP_energy"] - atoms.info["REF_energy"]) / len(atoms))
    assert report.total["energy"]["mae"] == pytest.approx(np.mean(errors), abs=1e-7)
    assert "crystal" in report.text()


def test_a_learned_symmetry_is_averaged_where_asked_for(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build("environment", cutoff=4.0, hidden=16, edge_hidden=8, num_heads=2, num_basis=4)
    without_zeros(net, 0.3)
    checkpoint.save(Potential(net, torch.zeros(119).double()).double(), tmp_path / "m.safetensors")
    command = ["eval", str(tmp_path / "m.safetensors"), str(data)]
    plain, mean = (
        CliRunner().invoke(app, [*command, *more], catch_exceptions=False).output
        for more in ([], ["--symmetrize", "octahedral"])
    )
    before, after = (
        float(re.search(r"symmetry error .* E (\S+) meV/atom", text)[1])  # type: ignore[index]
        for text in (plain, mean)
    )
    assert after < before / 10


def test_evaluation_without_a_folder_writes_nothing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate_files(model, [data])
    assert not list(tmp_path.iterdir())


def test_unknown_elements_and_options_are_named(model: Path, tmp_path: Path) -> None:
    gold = bulk("Au")
    with HDF5Writer(tmp_path / "gold.h5") as file:
        file.append(gold.numbers, gold.positions, np.array(gold.cell), gold.pbc, energy=0.0)
    with pytest.raises(
        ValueError, match=r"gold\.h5: frame 0 contains Au; the potential knows H, C"
    ):
        evaluate_file(checkpoint.load(model), tmp_path / "gold.h5")
    with pytest.raises(ValueError, match="float16"):
        evaluate_files(model, [tmp_path / "gold.h5"], dtype="float16")
    for device in ("foo", *(() if torch.cuda.is_available() else ("cuda", "cuda:1"))):
        with pytest.raises(ValueError, match=rf"device '{device}'.*cpu"):
            evaluate_files(model, [tmp_path / "gold.h5"], device=device)
    with pytest.raises(ValueError, match="same name"):
        evaluate_files(model, ["a/x.h5", "b/x.h5"])


def test_lines_and_tables_have_units() -> None:
    errors = {
        "energy": {"mae": 0.00123, "rmse": 0.002, "count": 3.0},
        "forces": {"mae": 0.0251, "rmse": 1.5, "count": 9.0},
    }
    assert line(errors) == "E 1.23/2.00 meV/atom  F 25.10/1500 meV/Å"
    text = table({"a": errors, "b": {"energy": errors["energy"]}}, title="set")
    assert "meV/atom" in text
    assert "stress" not in text
    assert text.splitlines()[-1].split() == ["b", "3/0", "1.23", "2.00", "-", "-"]
    assert len({len(row) for row in text.splitlines()}) == 1


def test_plots_of_odd_data(tmp_path: Path) -> None:
    one = np.array([1.0])
    parity_plot({"x": {"energy": (one, one)}}, tmp_path / "p.png")
    rows = [
        {"epoch": 1, "train_loss": 1.0, "valid_loss": None},
        {"epoch": 2, "train_loss": 0.5, "valid_loss": 0.4, "valid_energy_mae": 0.0},
    ]
    learning_curve(rows, tmp_path / "l.png")
    assert all((tmp_path / n).read_bytes().startswith(b"\x89PNG") for n in ("p.png", "l.png"))
    assert Pairs().arrays() == {}
