"""The state of a molecular dynamics run in a file, complete enough to go on as if nothing had
happened.

One npz file of arrays and a JSON text: positions, momenta, cell, step, variables of thermostat and
barostat, state of the random numbers, and the lengths of trajectory and log when it was written.
It is replaced as a whole.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

PARTS = ("_thermostat", "_barostat")  # where ASE's Nose-Hoover chains keep their own variables


def save_state(
    path: Path, dynamics: Any, generator: np.random.Generator, facts: dict[str, Any]
) -> None:
    """Write the state of ``dynamics`` and its random numbers; ``facts`` go along."""
    atoms = dynamics.atoms
    arrays = {
        "numbers": atoms.numbers,
        "positions": atoms.positions,
        "momenta": atoms.get_momenta(),
        "cell": np.array(atoms.cell),
        "pbc": np.array(atoms.pbc),
    }
    arrays |= {
        f"variable:{name}": np.asarray(value) for name, value in _variables(dynamics).items()
    }
    text = {**facts, "step": dynamics.nsteps, "random": generator.bit_generator.state}
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, text=np.array(json.dumps(text)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of a state file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no state of an earlier run; start without restart")
    try:
        with open(path, "rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop("text")))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a state of a molecular dynamics run ({error})") from None


def restore_atoms(atoms: Atoms, arrays: dict[str, np.ndarray], path: Path) -> None:
    """Put geometry and momenta of the state into ``atoms``."""
    if not np.array_equal(atoms.numbers, arrays["numbers"]):
        raise ValueError(f"{path}: belongs to other atoms than the structure given")
    atoms.set_cell(arrays["cell"])
    atoms.pbc = arrays["pbc"]
    atoms.arrays["positions"][:] = arrays[
        "positions"
    ]  # past constraints: they held when it was saved
    atoms.set_momenta(arrays["momenta"], apply_constraint=False)


def restore_dynamics(dynamics: Any, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Put step, thermostat and barostat of the state into ``dynamics``."""
    present = _variables(dynamics)
    for name in present:
        value = arrays[f"variable:{name}"]
        owner, _, attribute = name.rpartition(".")
        part = getattr(dynamics, owner) if owner else dynamics
        setattr(part, attribute, float(value) if value.ndim == 0 else value.copy())
    dynamics.nsteps = int(facts["step"])


def _variables(dynamics: Any) -> dict[str, Any]:
    """Floating-point attributes of a driver and of its thermostat and barostat."""
    found = {}
    for part in ("", *PARTS):
        owner = getattr(dynamics, part, None) if part else dynamics
        if owner is None:
            continue
        for name, value in vars(owner).items():
            if isinstance(value, float) or (
                isinstance(value, np.ndarray) and value.dtype.kind == "f"
            ):
                found[f"{part}.{name}" if part else name] = value
    return found
