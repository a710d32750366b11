"""Reference energies and the numbers of a data set."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from rich.console import Console

from mlip.data.dataset import HDF5Dataset
from mlip.data.hdf5 import HDF5Writer
from mlip.data.statistics import compute_statistics, fit_e0, format_statistics, require_elements

E0 = {1: -13.6, 6: -1029.5, 8: -2041.8}


def write(path, formulas, energy=lambda z: sum(E0[k] for k in z), isolated=(), forces=True):
    rng = np.random.default_rng(0)
    with HDF5Writer(path) as writer:
        for z in isolated:
            writer.append([z], np.zeros((1, 3)), np.zeros((3, 3)), [False] * 3, energy=E0[z])
        for z in formulas:
            n = len(z)
            positions = 1.5 * np.arange(n)[:, None] * np.array([1.0, 0, 0])
            f = rng.normal(size=(n, 3)) if forces else None
            writer.append(z, positions, np.zeros((3, 3)), [False] * 3, energy=energy(z), forces=f)
    return HDF5Dataset(path, 2.0)


def random_formulas(n=60):
    rng = np.random.default_rng(1)
    return [rng.choice([1, 6, 8], rng.integers(2, 9)).tolist() for _ in range(n)]


def test_least_squares_is_exact_on_linear_data(tmp_path):
    dataset = write(tmp_path / "a.h5", random_formulas())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = compute_statistics(dataset, "least_squares")
    for z, energy in E0.items():
        assert abs(s.e0[z].item() - energy) < 1e-8
    assert s.e0_source == "least squares" and s.elements == [1, 6, 8]
    assert s.e0.isnan().sum() == 116 and s.energy_std < 1e-8 and abs(s.energy_mean) < 1e-8


def test_water_alone_gives_the_smallest_solution_and_a_warning(tmp_path):
    dataset = write(tmp_path / "a.h5", [[1, 1, 8]] * 5 + [[1, 1, 8] * 2] * 3)
    with pytest.warns(UserWarning, match="H, O cannot be told apart"):
        s = compute_statistics(dataset)
    total = 2 * E0[1] + E0[8]
    assert abs(s.e0[1].item() - 2 * total / 5) < 1e-8 and abs(s.e0[8].item() - total / 5) < 1e-8


def test_only_the_ambiguous_elements_are_named():
    rng = np.random.default_rng(0)
    counts = np.zeros((40, 4))
    counts[:, 0] = rng.integers(1, 5, 40)
    counts[:, 1] = 2 * counts[:, 0]  # always together
    counts[:, 2:] = rng.integers(0, 5, (40, 2))
    energies = counts @ np.array([-3.0, -1.0, -7.0, -20.0])
    e0, ambiguous = fit_e0(counts, energies)
    assert ambiguous == [[0, 1]]
    np.testing.assert_allclose(e0[2:], [-7, -20], atol=1e-9)
    np.testing.assert_allclose(e0[:2], np.array([1, 2]) * (-5 / 5), atol=1e-9)


def test_isolated_atoms_are_taken_verbatim_and_left_out_of_the_rest(tmp_path):
    shifted = write(
        tmp_path / "a.h5",
        random_formulas(),
        lambda z: sum(E0[k] for k in z) - 4.0 * len(z),
        (1, 6, 8),
    )
    s = compute_statistics(shifted)
    assert [s.e0[z].item() for z in (1, 6, 8)] == [E0[z] for z in (1, 6, 8)]
    assert s.e0_source == "isolated" and s.num_isolated == 3
    assert abs(s.energy_mean + 4) < 1e-9 and s.num_labels["forces"] == 60 == s.num_labels["energy"]
    without = compute_statistics(shifted.subset(~shifted.isolated), {"H": 0.0, "C": 0.0, "O": 0.0})
    assert without.avg_num_neighbors == s.avg_num_neighbors and without.rms_force == s.rms_force


def test_missing_isolated_atoms_are_fitted_or_refused(tmp_path):
    dataset = write(tmp_path / "a.h5", random_formulas(), isolated=(1, 6))
    with pytest.warns(UserWarning, match="no isolated-atom frame for O"):
        s = compute_statistics(dataset)
    assert abs(s.e0[8].item() - E0[8]) < 1e-8
    with pytest.raises(ValueError, match="for O"):
        compute_statistics(dataset, "isolated")


def test_contradicting_isolated_atoms_are_reported(tmp_path):
    path = tmp_path / "a.h5"
    with HDF5Writer(path) as writer:
        for energy in (-1.0, -2.0):
            writer.append([2], np.zeros((1, 3)), np.zeros((3, 3)), [False] * 3, energy=energy)
    with pytest.warns(UserWarning, match="He has 2 energies"):
        assert compute_statistics(HDF5Dataset(path, 2.0)).e0[2].item() == -1.5


def test_given_table(tmp_path):
    dataset = write(tmp_path / "a.h5", random_formulas())
    s = compute_statistics(dataset, {"H": -1.0, "C": -2.0, "O": -3.0, "Fe": -9.0})
    assert s.e0[8].item() == -3.0 and s.e0[26].isnan() and s.e0_source == "table"
    with pytest.raises(ValueError, match="lacks C, O"):
        compute_statistics(dataset, {"H": -1.0})
    with pytest.raises(ValueError, match="'Xx' is no element"):
        compute_statistics(dataset, {"Xx": -1.0})
    with pytest.raises(ValueError, match="of H is not a finite"):
        compute_statistics(dataset, {"H": float("nan"), "C": 0.0, "O": 0.0})


def test_neighbours_and_forces_by_element(tmp_path):
    dataset = write(tmp_path / "a.h5", [[1, 6, 1], [8, 8]])  # chains 1.5 A apart, cutoff 2 A
    s = compute_statistics(dataset, {"H": 0.0, "C": 0.0, "O": 0.0})
    assert s.avg_num_neighbors == pytest.approx(6 / 5)
    assert s.neighbors_of[6].item() == 2 and s.neighbors_of[1].item() == 1
    forces = torch.cat([dataset[k].forces for k in range(2)])
    assert s.rms_force == pytest.approx(forces.square().mean().sqrt().item())
    assert s.rms_force_of[8].item() == pytest.approx(forces[3:].square().mean().sqrt().item())
    assert s.max_force == pytest.approx(forces.abs().max().item())
    console = Console(width=120)
    with console.capture() as text:
        console.print(format_statistics(s))
    assert "O" in text.get() and "1.2" in text.get()


def test_no_forces_is_nan_not_zero(tmp_path):
    s = compute_statistics(write(tmp_path / "a.h5", [[1, 1]], forces=False))
    assert np.isnan(s.rms_force) and np.isnan(s.max_force) and s.num_labels["forces"] == 0


def test_no_energies(tmp_path):
    dataset = write(tmp_path / "a.h5", [[1, 1]], energy=lambda z: None)
    with pytest.raises(ValueError, match="cannot be fitted"):
        compute_statistics(dataset)


def test_element_absent_from_training_is_named(tmp_path):
    train = write(tmp_path / "train.h5", [[1, 1], [1, 6]])
    s = compute_statistics(train, {"H": 0.0, "C": 0.0})
    require_elements(s, train)
    valid = write(tmp_path / "valid.h5", [[1, 6], [1, 8]])
    with pytest.raises(ValueError, match=r"valid\.h5: frame 1 contains O"):
        require_elements(s, valid)
