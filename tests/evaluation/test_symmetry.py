"""Orbits, the parts of the error, spectra and cell choices, on a model without any symmetry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from numpy.random import default_rng

from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.data.hdf5 import HDF5Writer
from mlip.evaluation.cell_choices import cell_choices
from mlip.evaluation.evaluate import evaluate_file
from mlip.evaluation.primitive_cell import primitive
from mlip.evaluation.symmetry import (
    SymmetryError,
    SymmetryReport,
    decompose,
    sampled_symmetry_errors,
    spectrum,
    symmetry_errors,
)
from mlip.nn.rotations import rotations
from mlip.potential import Potential
from mlip.rotation_orbit import mean, rotation_orbit

Make = Callable[..., Potential]
F64 = torch.float64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crystals and molecules with random labels, some of them missing."""
    path = tmp_path_factory.mktemp("data") / "mixed.h5"
    rng = default_rng(0)
    with HDF5Writer(path) as file:
        for k in range(7):
            atoms = bulk("Cu", cubic=True) if k % 3 else molecule("CH3OH")
            atoms.rattle(0.1, seed=k)
            forces = rng.normal(0, 0.3, size=(len(atoms), 3))
            file.append(
                atoms.numbers,
                atoms.positions,
                np.array(atoms.cell),
                atoms.pbc,
                energy=None if k == 4 else rng.normal(),
                forces=None if k == 2 else forces,
                stress=0.1 * rng.normal(size=(3, 3)) if k % 3 and k != 5 else None,
            )
    return path


def graphs(path: Path) -> Iterator[AtomicGraph]:
    dataset = HDF5Dataset(path, 4.0)
    return (dataset[k] for k in range(len(dataset)))


def test_the_error_is_that_of_the_consensus_and_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 4, 3, generator=generator, dtype=F64)
    labels = torch.randn(4, 3, generator=generator, dtype=F64)
    weights = torch.rand(50, generator=generator, dtype=F64)
    weights /= weights.sum()
    parts = decompose(values, labels, weights)
    torch.testing.assert_close(parts.mse, parts.consensus + parts.variance, rtol=1e-12, atol=0)
    assert ((parts.symmetry_share > 0) & (parts.symmetry_share < 1)).all()


def test_the_mean_keeps_the_digits_of_large_energies() -> None:
    values = torch.full((24, 1), -1.23456789e6 / 3, dtype=F64)
    assert torch.equal(mean(values, torch.full((24,), 1 / 24, dtype=F64)), values[0])


def test_reports_are_those_of_single_copies(lopsided: Make, data: Path) -> None:
    """Against a loop over structures and rotations that shares no code with the batches."""
    potential, rule = lopsided(), rotations("gauss-2", mirrors=True)
    report = symmetry_errors(potential, graphs(data), rule, stress=True)
    V: dict[str, list[float]] = {"energy": [], "forces": [], "stress": []}
    mse: dict[str, list[float]] = {q: [] for q in V}
    labelled: dict[str, list[float]] = {q: [] for q in V}
    largest = dict.fromkeys(V, 0.0)
    for graph in graphs(data):
        copies: dict[str, list[np.ndarray]] = {q: [] for q in V}
        n = len(graph.positions)
        for R in rule.matrices:
            out = potential(graph.rotated(R), stress=True)
            copies["energy"].append(out["energy"].numpy() / n)
            copies["forces"].append(out["forces"].numpy() @ R.numpy())
            copies["stress"].append(R.numpy().T @ out["stress"].numpy() @ R.numpy())
        for q, rows in copies.items():
            x = np.array(rows)
            if np.isnan(x).any():
                continue
            w = rule.weights.numpy()
            z = np.tensordot(w, x, 1)
            v = np.tensordot(w, (x - z) ** 2, 1)
            label = graph[q].numpy() / (n if q == "energy" else 1)
            known = ~np.isnan(label)
            V[q] += v.ravel().tolist()
            largest[q] = max(largest[q], np.abs(x - z).max())
            mse[q] += np.tensordot(w, (x - label) ** 2, 1)[known].tolist()
            labelled[q] += v[known].tolist()
    assert report.structures == 7
    for q, error in report.errors.items():
        assert error.rms == pytest.approx(math.sqrt(np.mean(V[q])), rel=1e-9)
        assert error.largest == pytest.approx(largest[q], rel=1e-9)
        assert error.mse == pytest.approx(np.mean(mse[q]), rel=1e-9)
        assert error.share == pytest.approx(np.sum(labelled[q]) / np.sum(mse[q]), rel=1e-9)
        assert error.rms > 1e-4


def test_errors_are_written_without_powers_of_ten() -> None:
    errors = {"energy": SymmetryError(8.1e-5, 0, 0, 0), "forces": SymmetryError(0.144, 0, 0, 0)}
    assert SymmetryReport(errors, 1, "").line() == "E 0.081 meV/atom  F 140 meV/Å"


def test_random_copies_are_unbiased(lopsided: Make, data: Path) -> None:
    potential = lopsided()
    exact = symmetry_errors(potential, graphs(data), rotations("gauss-6", mirrors=True)).errors
    squares = {q: 0.0 for q in exact}
    number = 40
    for seed in range(number):
        found = symmetry_errors(potential, graphs(data), 2, seed=seed).errors
        for q, error in found.items():
            squares[q] += error.rms**2 / number
    for q, error in exact.items():  # 40 x 7 pairs; without K / (K - 1) it would be half of it
        assert squares[q] == pytest.approx(error.rms**2, rel=0.2)


def test_exact_symmetry_is_measured_as_rounding(toy: Potential, data: Path) -> None:
    dataset = HDF5Dataset(data, toy.cutoff)
    report = sampled_symmetry_errors(toy, dataset, structures=3, stress=True)
    assert report.structures == 3
    assert all(error.largest < 1e-10 for error in report.errors.values())
    assert set(report.flat("valid_")) >= {"valid_symmetry_forces_rms"}
    assert toy(AtomicGraph.from_atoms(molecule("CH3OH"), toy.cutoff))["forces"].abs().max() > 0.01


def test_the_mode_is_restored_and_the_graph_untouched(lopsided: Make, data: Path) -> None:
    potential = lopsided().train()
    graph = next(graphs(data))
    before = {
        key: value.clone() for key, value in graph.to_dict().items() if torch.is_tensor(value)
    }
    symmetry_errors(potential, [graph], 2)
    assert potential.training
    for key, value in before.items():
        torch.testing.assert_close(graph[key], value, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="no spread"):
        symmetry_errors(potential, [graph], 1)


def test_eval_prints_the_symmetry_error(lopsided: Make, data: Path, tmp_path: Path) -> None:
    report = evaluate_file(lopsided(), data, tmp_path, plots=False)
    text = (tmp_path / "errors.txt").read_text()
    rms = 1000 * report.symmetry.errors["forces"].rms
    assert f"F {rms:.2g} meV/Å" in text
    assert "symmetry error (RMS over 8 random rotations and reflections of 7 structures)" in text
    assert "of the squared error E " in text


def test_the_spectrum_of_exact_symmetry(toy: Potential) -> None:
    graph = AtomicGraph.from_atoms(bulk("Cu", cubic=True), toy.cutoff)
    moved = graph.positions + 0.1 * torch.from_numpy(default_rng(0).normal(size=(4, 3)))
    found = spectrum(toy, graph.replace(positions=moved), 2, stress=True)
    for spectral in found.values():
        assert sum(spectral.forbidden.values()) < 1e-12 * spectral.total
        assert abs(spectral.rest) < 1e-12 * spectral.total
    out = toy(graph.replace(positions=moved), stress=True)
    forces, stress = out["forces"], out["stress"][0]
    assert found["forces"].power[1, -1] == pytest.approx(float(forces.square().mean()), rel=1e-9)
    isotropic = float(stress.trace()) ** 2 / 3 / 9
    assert found["stress"].power[0, 1] == pytest.approx(isotropic, rel=1e-9)
    assert found["energy"].power[0, 1] == pytest.approx(float(out["energy"][0] / 4) ** 2, rel=1e-9)


class Harmonic(torch.nn.Module):
    """Energy of one pair with known content: sum_l a_l Y_l0(v / |v|), in e3nn's y direction."""

    exact_symmetry = False

    def __init__(self, a: list[float]) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(cutoff=3.0)
        self.receptive_field = 3.0
        self.a = torch.nn.Parameter(torch.tensor(a))

    def forward(self, graph: AtomicGraph) -> object:
        from mlip.data.graph import NodeOutput

        y = (graph.vectors / graph.vectors.norm(dim=1, keepdim=True))[:, 1]
        legendre = [torch.ones_like(y), y, (3 * y**2 - 1) / 2, (5 * y**3 - 3 * y) / 2]
        pair = sum(a * math.sqrt(2 * l + 1) * legendre[l] for l, a in enumerate(self.a))
        # Only the pair seen from the atom of copper counts: odd degrees would cancel otherwise.
        from_copper = (graph.atomic_numbers[graph.edge_index[1]] == 29).to(y)
        energy = y.new_zeros(len(graph.positions))
        return NodeOutput(energy.index_add(0, graph.edge_index[1], pair * from_copper))


def test_the_spectrum_of_a_known_function() -> None:
    """A harmonic of degree l has parity (-1)^l and, normalised to mean square one, power a^2."""
    a = [0.5, -0.3, 0.2, 0.7]
    potential = Potential(Harmonic(a), torch.zeros(119)).double().eval()
    pair = molecule("CO")
    pair.numbers[:] = [29, 8]
    pair.rotate(40, (1, 2, 3))
    found = spectrum(potential, AtomicGraph.from_atoms(pair, 3.0), 3)["energy"]
    expected = {(l, (-1) ** l): x**2 / 4 for l, x in enumerate(a)}  # per atom: half of it
    for key, power in found.power.items():
        assert power == pytest.approx(expected.get(key, 0.0), abs=1e-7)  # float32 coefficients
    assert found.rest == pytest.approx(0, abs=1e-12)
    # What lies beyond lmax is left over, or, where the rule is too coarse, would be mistaken.
    less = spectrum(
        potential, AtomicGraph.from_atoms(pair, 3.0), 2, rule=rotations("gauss-6", mirrors=True)
    )["energy"]
    assert less.rest == pytest.approx(0.7**2 / 4, abs=1e-7)


def test_the_spectrum_says_what_a_group_averages_away(lopsided: Make) -> None:
    """The mean over the octahedral group keeps, of the energy's anisotropy, only degrees l > 3."""
    potential = lopsided()
    atoms = molecule("CH3OH")
    graph = AtomicGraph.from_atoms(atoms, 4.0)
    rule, octahedral = rotations("gauss-12", mirrors=True), rotations("octahedral", mirrors=True)
    found = spectrum(potential, graph, 5, rule=rule)["energy"]
    means = [
        float(potential(graph.rotated_copies(octahedral.matrices @ R))["energy"].mean())
        for R in rule.matrices[::97]
    ]
    residual = float(np.var(means)) / len(atoms) ** 2
    beyond = sum(p for (l, _), p in found.power.items() if l > 3) + found.rest
    assert residual < 2 * beyond
    assert beyond < 0.1 * (found.total - found.power[0, 1])


def test_wrong_rules_are_refused(toy: Potential) -> None:
    graph = AtomicGraph.from_atoms(molecule("CO"), toy.cutoff)
    with pytest.raises(ValueError, match="with mirrors"):
        spectrum(toy, graph, 1, rule=rotations("octahedral"))
    with pytest.raises(ValueError, match="degree 4"):
        spectrum(toy, graph, 2, rule=rotations("octahedral", mirrors=True))


def test_batches_of_copies_are_as_rotated_one_by_one(data: Path) -> None:
    batch = AtomicGraph.collate(list(graphs(data)))
    batch = batch.replace(vectors=batch.edge_vectors())
    rule = rotations("tetrahedral", mirrors=True)
    copies = batch.rotated_copies(rule.matrices)
    single = AtomicGraph.collate([batch.rotated(R) for R in rule.matrices])
    for key in ("positions", "cell", "vectors", "batch", "ptr", "edge_index", "pbc", "cell_shifts"):
        torch.testing.assert_close(copies[key], single[key], rtol=0, atol=1e-12)
    torch.testing.assert_close(copies.edge_vectors(), copies.vectors, rtol=0, atol=1e-12)
    assert "energy" not in copies and "forces" not in copies and "stress" not in copies


def test_no_prediction_depends_on_the_choice_of_the_cell(lopsided: Make) -> None:
    potential = lopsided()
    crystal = bulk("Si", cubic=True)
    crystal.rattle(0.1, seed=0)
    crystal = crystal * (1, 2, 1)
    found = cell_choices(potential, AtomicGraph.from_atoms(crystal, 4.0))
    assert {"primitive", "left-handed", "compact", "origin shifted", "2 x 1 x 1"} <= set(
        found.names
    )
    for deviation in found.deviations().values():
        assert deviation.max() < 1e-10
    slab = cell_choices(potential, AtomicGraph.from_atoms(fcc111("Cu", (1, 1, 3), vacuum=5.0), 4.0))
    assert "primitive" not in slab.names and "2 x 1 x 1" in slab.names
    assert slab.deviations()["forces"].max() < 1e-10


def test_a_model_that_looks_at_the_cell_is_found_out(toy: Potential) -> None:
    class Cell(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, graph: AtomicGraph) -> object:
            out = self.model(graph)
            return out._replace(energy=out.energy + 1e-3 * graph.cell[graph.batch, 0, 0])

    potential = toy.with_model(Cell(toy.model))
    found = cell_choices(potential, AtomicGraph.from_atoms(bulk("Cu", cubic=True), toy.cutoff))
    assert found.deviations()["energy"].max() > 1e-4


@pytest.mark.parametrize(
    ("crystal", "number"),
    [
        (bulk("Si", cubic=True), 2),
        (bulk("NaCl", "rocksalt", a=5.6, cubic=True) * (1, 3, 1), 2),
        (bulk("Cu", cubic=True) * (2, 2, 2), 1),
        (bulk("Ti"), 2),
    ],
)
def test_primitive_cells(crystal: object, number: int) -> None:
    graph = AtomicGraph.from_atoms(crystal, 3.0)
    found = primitive(graph, 3.0)
    if number == len(graph.positions):
        assert found is None
        return
    assert found is not None
    small, atoms = found
    N = len(graph.positions)
    assert len(small.positions) == number
    assert float(small.volume) == pytest.approx(float(graph.volume) * number / N, rel=1e-9)
    assert torch.equal(small.atomic_numbers[atoms[0]], graph.atomic_numbers)
    assert small.edge_index.shape[1] * N == graph.edge_index.shape[1] * number


def test_molecules_have_no_cells(toy: Potential) -> None:
    with pytest.raises(ValueError, match="periodic"):
        cell_choices(toy, AtomicGraph.from_atoms(molecule("CO"), toy.cutoff))


def test_the_identity_has_no_spread(lopsided: Make, data: Path) -> None:
    orbit = rotation_orbit(lopsided(), next(graphs(data)), rotations("none"))
    assert not orbit.energy_spread().any() and not orbit.forces_spread().any()
