"""Molecular dynamics over ASE's drivers, with trajectory, log, exact restart and a guard against
explosions.

``nve``         velocity Verlet
``langevin``    Langevin thermostat
``nose-hoover`` Nose-Hoover chain
``npt``         Martyna-Tobias-Klein barostat with Nose-Hoover chains, volume alone or all of the
cell

Momenta start from the Maxwell-Boltzmann distribution at the temperature unless the structure brings
its own.  The state beside the trajectory is written with every frame; a run continued from it gives
the same numbers as one that was never interrupted.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.io import write
from ase.io.trajectory import Trajectory
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet

from mlip.calculators.md_state import read_state, restore_atoms, restore_dynamics, save_state
from mlip.calculators.relax_result import frozen
from mlip.calculators.relaxation import as_calculator, last_frame

ENSEMBLES = ("nve", "langevin", "nose-hoover", "npt")
COLUMNS = (
    "step", "time_ps", "temperature_K", "potential_eV", "kinetic_eV", "total_eV", "conserved_eV",
    "fmax_eV_per_A", "volume_A3", "pressure_GPa",
)  # fmt: skip


class SimulationError(ValueError):
    """A run that had to stop: at which step, why, and where its last good state is."""


@dataclass
class MDResult:
    """The last structure, and the columns of the log as arrays (this part of the run only)."""

    atoms: Atoms
    steps: int
    log: dict[str, np.ndarray]


def run_md(
    atoms: Atoms | str | os.PathLike[str],
    model: Any,
    *,
    ensemble: str = "langevin",
    temperature: float | None = 300.0,
    pressure: float = 0.0,
    timestep: float = 1.0,
    steps: int = 1000,
    friction: float = 0.01,
    thermostat_time: float = 100.0,
    barostat_time: float = 1000.0,
    whole_cell: bool = False,
    trajectory: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    interval: int = 10,
    restart: bool | str | os.PathLike[str] = False,
    seed: int = 0,
    max_force: float = 1000.0,
    max_temperature: float | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **calculator_options: Any,
) -> MDResult:
    """Run molecular dynamics.

    Parameters
    ----------
    atoms : Atoms or file
        Not altered.  Its momenta are kept if it has any.
    model : whatever ``EqCalculator`` takes, or any ASE calculator
    ensemble : "nve", "langevin", "nose-hoover" or "npt"
    temperature : float, K
        Of the thermostat, and of the first momenta; None in ``nve`` starts at rest.
    pressure : float, GPa, of ``npt``
    timestep : float, fs
    steps : int
        Length of the whole run, counting those before a restart.
    friction : float, 1/fs, of ``langevin``
    thermostat_time, barostat_time : float, fs, of the Nose-Hoover chains
    whole_cell : bool
        ``npt``: let all of the cell change, not only its volume.
    trajectory : file
        A frame every ``interval`` steps; ASE's binary format if it ends in .traj, else extxyz.
    log : CSV file with a line every ``interval`` steps
    restart : bool or file
        Continue from the state that an earlier run left beside its trajectory
        (``<trajectory>.state.npz``), or from this file.
    seed : int, of momenta and thermostat; runs with one seed are identical
    max_force : float, eV/angstrom; the run stops beyond it
    max_temperature : float, K
        The run stops beyond it; 10 times the temperature plus 3000 K if None.
    on_step : called after every step with its number and the number of steps
    calculator_options : device, dtype and the like, for ``EqCalculator``

    Raises
    ------
    SimulationError
        Forces or temperature exploded; trajectory and state hold what was good.
    ValueError, OSError
        For settings, structures and files that cannot be used.
    """
    moving = atoms.copy() if isinstance(atoms, Atoms) else last_frame(os.fspath(atoms))
    _check_settings(moving, ensemble, temperature, timestep, steps, interval)
    moving.calc = as_calculator(model, **calculator_options)
    generator = np.random.default_rng(seed)
    state = _state_file(trajectory, restart)
    facts: dict[str, Any] = {
        "ensemble": ensemble, "temperature": temperature, "pressure": pressure,
        "timestep": timestep, "friction": friction, "thermostat_time": thermostat_time,
        "barostat_time": barostat_time, "whole_cell": whole_cell,
    }  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    past: dict[str, Any] = {}
    if restart:
        assert state is not None
        arrays, past = read_state(state)
        for key, value in facts.items():
            if past.get(key) != value:
                raise ValueError(
                    f"{state}: the earlier run had {key} = {past.get(key)}, not {value}; "
                    f"give the same settings, or start a new run from its last frame"
                )
        restore_atoms(moving, arrays, state)
    elif not moving.has("momenta") and temperature:
        _thermalize(moving, temperature, generator)
        if ensemble != "langevin" and len(moving) > 1:
            Stationary(moving)
    moving.get_forces()  # complaints about structure and model come before any file is touched

    dynamics = _driver(moving, facts, generator)
    if restart:
        restore_dynamics(dynamics, arrays, past)
        generator.bit_generator.state = past["random"]
    recorder = _Recorder(trajectory, log, past)
    if max_temperature is None:
        max_temperature = 10 * (temperature or moving.get_temperature()) + 3000

    def observe() -> None:
        step = dynamics.nsteps
        _guard(moving, step, timestep, max_force, max_temperature, state)
        fresh = step > past.get("step", -1)
        if fresh and (step % interval == 0 or step == steps):
            recorder.record(dynamics, timestep)
            if state is not None:
                save_state(state, dynamics, generator, facts | recorder.lengths())
        if on_step is not None:
            on_step(step, steps)

    dynamics.attach(observe)
    try:
        dynamics.run(max(steps - dynamics.nsteps, 0))
    except SimulationError:
        raise
    except ValueError as problem:  # of the calculator: atoms overlap, numbers are not finite
        reason = _stopped(dynamics.nsteps + 1, timestep, str(problem), state)
        raise SimulationError(reason) from None
    finally:
        recorder.close()
    return MDResult(frozen(moving), dynamics.nsteps, recorder.table())


def _check_settings(
    atoms: Atoms,
    ensemble: str,
    temperature: float | None,
    timestep: float,
    steps: int,
    interval: int,
) -> None:
    if ensemble not in ENSEMBLES:
        raise ValueError(f"unknown ensemble '{ensemble}'; there are {', '.join(ENSEMBLES)}")
    if ensemble != "nve" and not (temperature is not None and temperature > 0):
        raise ValueError(
            f"temperature = {temperature}: the ensemble '{ensemble}' needs one above 0 K"
        )
    if temperature is not None and not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature = {temperature} K; give a number >= 0")
    if not (np.isfinite(timestep) and timestep > 0):
        raise ValueError(f"timestep = {timestep} fs; give a number above 0")
    if steps < 0 or interval < 1:
        raise ValueError(
            f"steps = {steps}, interval = {interval}; give steps >= 0 and interval >= 1"
        )
    if ensemble == "npt" and not atoms.pbc.all():
        raise ValueError(f"'npt' needs three periodic directions, pbc is {atoms.pbc.tolist()}")
    if ensemble in ("npt", "nose-hoover") and atoms.constraints:
        raise ValueError(
            f"the driver of '{ensemble}' cannot hold constraints; use 'langevin' or 'nve'"
        )


def _driver(atoms: Atoms, facts: dict[str, Any], generator: np.random.Generator) -> Any:
    dt, T = facts["timestep"] * units.fs, facts["temperature"]
    if facts["ensemble"] == "nve":
        return VelocityVerlet(atoms, dt)
    if facts["ensemble"] == "langevin":
        return Langevin(
            atoms,
            dt,
            temperature_K=T,
            friction=facts["friction"] / units.fs,
            fixcm=False,
            rng=generator,
        )
    chains = {"temperature_K": T, "tdamp": facts["thermostat_time"] * units.fs}
    try:
        from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
    except ImportError:
        raise ValueError(f"'{facts['ensemble']}' needs ase >= 3.26: pip install -U ase") from None
    if facts["ensemble"] == "nose-hoover":
        return NoseHooverChainNVT(atoms, dt, **chains)
    driver = MTKNPT if facts["whole_cell"] else IsotropicMTKNPT
    chains["pdamp"] = facts["barostat_time"] * units.fs
    return driver(atoms, dt, pressure_au=facts["pressure"] * units.GPa, **chains)


def _thermalize(atoms: Atoms, temperature: float, generator: np.random.Generator) -> None:
    """Maxwell-Boltzmann momenta (ASE's function for it changed its name in 3.29)."""
    masses = atoms.get_masses()[:, None]
    thermal = generator.standard_normal((len(atoms), 3)) * np.sqrt(masses * units.kB * temperature)
    atoms.set_momenta(thermal)


def _state_file(
    trajectory: str | os.PathLike[str] | None, restart: bool | str | os.PathLike[str]
) -> Path | None:
    if not isinstance(restart, bool):
        return Path(restart)
    if trajectory is not None:
        return Path(f"{os.fspath(trajectory)}.state.npz")
    if restart:
        raise ValueError("restart needs the trajectory of the earlier run, or its state file")
    return None


def _stopped(step: int, timestep: float, reason: str, state: Path | None) -> str:
    where = f"; the last good state is in {state}" if state is not None and state.exists() else ""
    return f"stopped at step {step} ({step * timestep / 1000:.4g} ps): {reason}{where}"


def _guard(
    atoms: Atoms, step: int, timestep: float, max_force: float, hottest: float, state: Path | None
) -> None:
    forces = np.sqrt((atoms.get_forces() ** 2).sum(axis=1))
    temperature = atoms.get_temperature()
    reason = None
    if not forces.max() <= max_force:  # also when it is NaN
        k = int(np.argmax(np.nan_to_num(forces, nan=np.inf)))
        reason = (
            f"the force on atom {k} ({atoms.symbols[k]}) is {forces[k]:.3g} eV/angstrom, above "
            f"{max_force:g}; the model does not hold the structure together here, or the time "
            f"step of {timestep:g} fs is too long"
        )
    elif not temperature <= hottest:
        reason = (
            f"the temperature is {temperature:.4g} K, above {hottest:.4g} K; the time step of "
            f"{timestep:g} fs is too long, or the structure started far from its minimum"
        )
    if reason is not None:
        raise SimulationError(_stopped(step, timestep, reason, state))


class _Recorder:
    """Trajectory and log; after a restart, both are first cut to what the state knows of."""

    def __init__(self, trajectory: Any, log: Any, past: dict[str, Any]) -> None:
        self.rows: list[list[float]] = []
        self.trajectory = None if trajectory is None else Path(trajectory)
        self.log = None if log is None else Path(log)
        self.binary = None
        for file, key in ((self.trajectory, "trajectory"), (self.log, "log")):
            if file is None:
                continue
            if not past:
                file.unlink(missing_ok=True)
            elif key == "trajectory" and file.suffix == ".traj":
                _cut_binary(file, past.get("frames", 0))
            elif file.exists() and past.get(key) is not None:
                os.truncate(file, past[key])
        self.frames = int(past.get("frames", 0))
        if self.trajectory is not None and self.trajectory.suffix == ".traj":
            self.binary = Trajectory(self.trajectory, "a" if past else "w")
        self.stream = None
        if self.log is not None:
            empty = not self.log.exists() or self.log.stat().st_size == 0
            self.stream = open(self.log, "a", newline="", encoding="utf-8")
            self.writer = csv.writer(self.stream, lineterminator="\n")
            if empty:
                self.writer.writerow(COLUMNS)

    def record(self, dynamics: Any, timestep: float) -> None:
        atoms, step = dynamics.atoms, dynamics.nsteps
        potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
        conserved = getattr(dynamics, "get_conserved_energy", lambda: np.nan)()
        if isinstance(dynamics, VelocityVerlet):
            conserved = potential + kinetic
        periodic = atoms.pbc.all()
        pressure = (
            -atoms.get_stress(include_ideal_gas=True)[:3].mean() / units.GPa if periodic else np.nan
        )
        volume = atoms.get_volume() if periodic else np.nan
        fmax = np.sqrt((atoms.get_forces() ** 2).sum(axis=1).max())
        row = [
            step, step * timestep / 1000, atoms.get_temperature(), potential, kinetic,
            potential + kinetic, conserved, fmax, volume, pressure,
        ]  # fmt: skip
        self.rows.append([float(value) for value in row])
        if self.stream is not None:
            self.writer.writerow([step, *(repr(float(value)) for value in row[1:])])
            self.stream.flush()
        if self.trajectory is not None:
            frame = frozen(atoms)
            frame.info |= {"step": step, "time_ps": step * timestep / 1000}
            if self.binary is not None:
                self.binary.write(frame)
            else:
                write(self.trajectory, frame, format="extxyz", append=True)
            self.frames += 1

    def lengths(self) -> dict[str, Any]:
        """How long the files are now."""
        size = None
        if self.trajectory is not None and self.binary is None:
            size = self.trajectory.stat().st_size
        return {
            "trajectory": size,
            "frames": self.frames,
            "log": None if self.log is None else self.log.stat().st_size,
        }

    def table(self) -> dict[str, np.ndarray]:
        columns = np.array(self.rows).reshape(-1, len(COLUMNS)).T
        return dict(zip(COLUMNS, columns, strict=True))

    def close(self) -> None:
        for stream in (self.stream, self.binary):
            if stream is not None:
                stream.close()


def _cut_binary(file: Path, frames: int) -> None:
    """Keep the first frames of one of ASE's .traj files."""
    if not file.exists():
        return
    with Trajectory(file) as old:
        if len(old) <= frames:
            return
        kept = [old[k] for k in range(frames)]
    temporary = file.with_name(file.name + ".tmp")
    with Trajectory(temporary, "w") as new:
        for frame in kept:
            new.write(frame)
    os.replace(temporary, file)
