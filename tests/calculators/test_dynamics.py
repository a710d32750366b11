"""Molecular dynamics: exact repetition and restart, files, and runs that explode."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.io import read

from mlip.calculators import run_md
from mlip.calculators.dynamics import COLUMNS, ENSEMBLES, SimulationError


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms


@pytest.mark.parametrize("suffix", ["xyz", "traj"])
@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_restarted_run_is_the_uninterrupted_one(
    toy, tmp_path, ensemble: str, suffix: str
) -> None:
    settings = {"ensemble": ensemble, "temperature": 500.0, "interval": 3, "seed": 7}

    def files(name: str) -> dict:
        return {"trajectory": tmp_path / f"{name}.{suffix}", "log": tmp_path / f"{name}.csv"}

    whole = run_md(copper(), toy, steps=18, **files("whole"), **settings)
    repeated = run_md(copper(), toy, steps=18, **files("again"), **settings)
    np.testing.assert_array_equal(whole.atoms.positions, repeated.atoms.positions)

    run_md(copper(), toy, steps=9, **files("part"), **settings)
    settings["seed"] = 1  # the state knows better
    part = run_md(copper(), toy, steps=18, restart=True, **files("part"), **settings)
    np.testing.assert_array_equal(part.atoms.positions, whole.atoms.positions)
    np.testing.assert_array_equal(part.atoms.get_momenta(), whole.atoms.get_momenta())
    np.testing.assert_array_equal(part.atoms.cell[:], whole.atoms.cell[:])
    assert (tmp_path / "part.csv").read_text() == (tmp_path / "whole.csv").read_text()
    frames = [read(tmp_path / f"{name}.{suffix}", ":") for name in ("part", "whole")]
    assert len(frames[0]) == len(frames[1]) == 7
    for a, b in zip(*frames, strict=True):
        assert a == b
        assert a.get_potential_energy() == b.get_potential_energy()


@pytest.mark.parametrize("suffix", ["xyz", "traj"])
def test_frames_after_the_last_state_are_taken_back(toy, tmp_path, suffix: str) -> None:
    path, log = tmp_path / f"a.{suffix}", tmp_path / "a.csv"
    settings = {"trajectory": path, "log": log, "interval": 2}
    run_md(copper(), toy, steps=4, **settings)
    state = (tmp_path / f"a.{suffix}.state.npz").read_bytes()
    run_md(copper(), toy, steps=8, restart=True, **settings)
    expected = log.read_text()
    # As after a kill between frame and state: the files are ahead of the state.
    (tmp_path / f"a.{suffix}.state.npz").write_bytes(state)
    run_md(copper(), toy, steps=8, restart=True, **settings)
    assert log.read_text() == expected
    assert len(read(path, ":")) == 5


def test_trajectory_log_and_result_agree(potential, tmp_path) -> None:
    atoms = copper()
    before = atoms.copy()
    result = run_md(
        atoms,
        potential,
        steps=10,
        interval=2,
        trajectory=tmp_path / "a.xyz",
        log=tmp_path / "a.csv",
    )
    assert atoms == before and not atoms.has("momenta")
    frames = read(tmp_path / "a.xyz", ":")
    with open(tmp_path / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert (
        [int(row["step"]) for row in rows]
        == [f.info["step"] for f in frames]
        == [0, 2, 4, 6, 8, 10]
    )
    for k, (row, frame) in enumerate(zip(rows, frames, strict=True)):
        assert float(row["potential_eV"]) == pytest.approx(frame.get_potential_energy(), abs=1e-6)
        assert float(row["temperature_K"]) == pytest.approx(frame.get_temperature(), rel=1e-5)
        assert result.log["total_eV"][k] == float(row["total_eV"])
    np.testing.assert_allclose(result.atoms.positions, frames[-1].positions, atol=1e-7)
    assert result.atoms.get_potential_energy() == float(rows[-1]["potential_eV"])


@pytest.mark.parametrize(
    ("ensemble", "whole_cell"),
    [("nve", False), ("nose-hoover", False), ("npt", False), ("npt", True)],
)
def test_what_should_be_conserved_is(toy, ensemble: str, whole_cell: bool) -> None:
    result = run_md(
        copper(), toy, ensemble=ensemble, whole_cell=whole_cell, temperature=300.0, steps=100,
        interval=1, barostat_time=300.0,
    )  # fmt: skip
    conserved = result.log["conserved_eV"]
    assert np.ptp(conserved) < 1e-3
    assert np.ptp(result.log["potential_eV"]) > 10 * np.ptp(conserved)
    assert (np.ptp(result.log["volume_A3"]) > 0) == (ensemble == "npt")


def test_langevin_reaches_its_temperature(toy) -> None:
    atoms = copper() * (2, 2, 2)
    result = run_md(atoms, toy, temperature=600.0, friction=0.1, steps=300, interval=1, seed=1)
    late = result.log["temperature_K"][100:].mean()
    assert late == pytest.approx(600.0, rel=0.15)  # 96 degrees of freedom, few correlation times


def test_momenta_of_the_input_are_kept(toy) -> None:
    atoms = copper()
    atoms.set_momenta(np.random.default_rng(0).normal(size=(4, 3)))
    start = atoms.get_kinetic_energy()
    result = run_md(atoms, toy, ensemble="nve", steps=1, interval=1)
    assert result.log["kinetic_eV"][0] == pytest.approx(start)
    still = run_md(copper(), toy, ensemble="nve", temperature=None, steps=1, interval=1)
    assert still.log["kinetic_eV"][0] == 0


def test_an_explosion_stops_with_a_message(toy, tmp_path) -> None:
    path = tmp_path / "a.xyz"
    with pytest.raises(SimulationError, match=r"step \d+.*state is in"):
        run_md(
            copper(), toy, temperature=2e5, timestep=20.0, steps=200, interval=1, trajectory=path
        )
    assert len(read(path, ":")) >= 1
    with pytest.raises(SimulationError, match=r"step 0.*force on atom"):
        run_md(copper(), toy, max_force=1e-6)
    with pytest.raises(SimulationError, match="temperature"):
        run_md(copper(), toy, max_temperature=1.0)


def test_a_bad_start_is_refused_before_any_file_is_touched(toy, tmp_path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text("precious")
    atoms = copper()
    atoms.positions[0] = np.nan
    with pytest.raises(ValueError, match="atom 0"):
        run_md(atoms, toy, trajectory=path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ensemble": "nvt"}, "langevin"),
        ({"temperature": None}, "temperature"),
        ({"temperature": -5.0}, "temperature"),
        ({"timestep": 0.0}, "timestep"),
        ({"interval": 0}, "interval"),
        ({"restart": True}, "trajectory"),
        ({"restart": "no.npz"}, "no.npz"),
    ],
)
def test_settings_that_make_no_sense(toy, settings: dict, reason: str) -> None:
    with pytest.raises((ValueError, OSError), match=reason):
        run_md(copper(), toy, **settings)


def test_npt_of_a_molecule(toy) -> None:
    with pytest.raises(ValueError, match="periodic"):
        run_md(molecule("CH3OH"), toy, ensemble="npt")


def test_restart_with_other_settings_or_atoms(toy, tmp_path) -> None:
    path = tmp_path / "a.xyz"
    run_md(copper(), toy, steps=2, trajectory=path)
    with pytest.raises(ValueError, match="temperature"):
        run_md(copper(), toy, steps=4, trajectory=path, restart=True, temperature=500.0)
    with pytest.raises(ValueError, match="other atoms"):
        run_md(bulk("Si", cubic=True), toy, steps=4, trajectory=path, restart=True)
    state = tmp_path / "a.xyz.state.npz"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"state\.npz"):
        run_md(copper(), toy, steps=4, trajectory=path, restart=True)


def test_pressure_of_npt(toy) -> None:
    atoms = copper() * (2, 2, 2)
    settings = {"ensemble": "npt", "temperature": 100.0, "steps": 400, "interval": 1}
    low = run_md(atoms, toy, pressure=0.0, barostat_time=100.0, **settings)
    high = run_md(atoms, toy, pressure=20.0, barostat_time=100.0, **settings)
    late = slice(200, None)
    assert high.log["volume_A3"][late].mean() < low.log["volume_A3"][late].mean()
    assert high.log["pressure_GPa"][late].mean() == pytest.approx(20.0, abs=4.0)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_single_atom(toy, ensemble: str) -> None:
    result = run_md(bulk("Cu"), toy, ensemble=ensemble, steps=3, interval=1)
    assert np.isfinite(result.log["total_eV"]).all()


def test_units_of_time(toy) -> None:
    atoms = Atoms("Cu", cell=[20, 20, 20], pbc=True)
    atoms.set_velocities([[0.01 / units.fs, 0, 0]])
    result = run_md(atoms, toy, ensemble="nve", timestep=2.0, steps=50)
    assert result.atoms.positions[0, 0] == pytest.approx(1.0)  # 0.01 angstrom/fs for 100 fs
    assert result.log["time_ps"][-1] == pytest.approx(0.1)
