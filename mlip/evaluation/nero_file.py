"""Orbit errors as an HDF5 file, schema "mlip-nero-1"; S samples of A atoms in all, T images.

    /samples/   ptr (S+1,), atomic_numbers (A,), positions (A, 3), cell (S, 3, 3), pbc (S, 3),
                energy (S,), forces (A, 3), charge (S,), spin (S,), field (S, 3), name (S,)
                text; NaN = missing
    /orbits/ORBIT/   weights (T,) and one array for each axis of the grid; attributes kind, shape
    /models/NUMBER/ORBIT/   energy (S, T), energy_offset (S,), forces (S, T), forces_label (S, T)
                            as in ``OrbitErrors``; attribute name of /models/NUMBER
    attributes: schema, source, units, created_by

Angles are degrees, lengths angstrom, labels eV and eV/angstrom, errors meV/atom and meV/angstrom.
"""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import mlip
from mlip.evaluation.nero import Nero, OrbitErrors, Sample
from mlip.evaluation.orbits import Orbit
from mlip.tensorfile import write_bytes

SCHEMA = "mlip-nero-1"
ARRAYS = ("energy", "energy_offset", "forces", "forces_label")


def write_nero(nero: Nero, path: str | Path) -> None:
    """Write all arrays; the file is the old one or the new one, never half of it.

    Raises
    ------
    OSError
        Not written; the text names the file.
    """
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.attrs["schema"] = SCHEMA
        file.attrs["source"] = nero.source
        file.attrs["units"] = "errors meV/atom, meV/angstrom; labels eV, eV/angstrom; degrees"
        file.attrs["created_by"] = f"mlip {mlip.__version__}"
        _write_samples(file.create_group("samples"), nero.samples)
        orbits = file.create_group("orbits", track_order=True)
        for orbit in nero.orbits:
            group = orbits.create_group(orbit.name)
            group.attrs["kind"] = orbit.kind
            group.attrs["shape"] = orbit.shape
            group["weights"] = orbit.weights
            for key, values in orbit.coordinates().items():
                group[key] = values.astype("S") if values.dtype.kind == "U" else values
        for number, (name, results) in enumerate(nero.models.items()):
            group = file.create_group(f"models/{number}")
            group.attrs["name"] = name
            for key, result in results.items():
                for array in ARRAYS:
                    group[f"{key}/{array}"] = getattr(result, array)
    write_bytes(path, memory.getvalue())


def _write_samples(group: h5py.Group, samples: list[Sample]) -> None:
    sizes = [len(s.atomic_numbers) for s in samples]
    group["ptr"] = np.concatenate([[0], np.cumsum(sizes)])
    group["atomic_numbers"] = np.concatenate([s.atomic_numbers for s in samples])
    group["positions"] = np.concatenate([s.positions for s in samples])
    group["cell"] = np.stack([s.cell for s in samples])
    group["pbc"] = np.stack([s.pbc for s in samples]).astype(bool)
    group["energy"] = [s.energy for s in samples]
    missing = [np.full((n, 3), np.nan) for n in sizes]
    group["forces"] = np.concatenate(
        [m if s.forces is None else s.forces for s, m in zip(samples, missing, strict=True)]
    )
    for key, shape in (("charge", ()), ("spin", ()), ("field", (3,))):
        given = [getattr(s, key) for s in samples]
        group[key] = [np.full(shape, np.nan) if value is None else value for value in given]
    group.create_dataset("name", data=[s.name for s in samples], dtype=h5py.string_dtype())


def read_nero(path: str | Path) -> tuple[list[Sample], dict[str, dict[str, OrbitErrors]]]:
    """Samples and errors (model -> orbit -> errors) of a file of ``write_nero``.

    Raises
    ------
    ValueError
        If it is not of schema "mlip-nero-1".
    OSError
        If it cannot be read.
    """
    with h5py.File(path, "r") as file:
        if file.attrs.get("schema") != SCHEMA:
            raise ValueError(f"{path}: not a file of orbit errors (schema '{SCHEMA}')")
        weights = {name: group["weights"][()] for name, group in file["orbits"].items()}
        models = {
            str(group.attrs["name"]): {
                key: OrbitErrors(weights[key], *(group[key][array][()] for array in ARRAYS))
                for key in weights
                if key in group
            }
            for _, group in sorted(file["models"].items(), key=lambda item: int(item[0]))
        }
        return _read_samples(file["samples"]), models


def _read_samples(group: h5py.Group) -> list[Sample]:
    ptr = group["ptr"][()].tolist()
    columns: dict[str, Any] = {key: group[key][()] for key in group if key != "ptr"}
    samples = []
    for k, (a, b) in enumerate(itertools.pairwise(ptr)):
        forces = columns["forces"][a:b]
        charge, spin = float(columns["charge"][k]), float(columns["spin"][k])
        field = columns["field"][k] if "field" in columns else np.full(3, np.nan)
        samples.append(
            Sample(
                name=columns["name"][k].decode(),
                atomic_numbers=columns["atomic_numbers"][a:b],
                positions=columns["positions"][a:b],
                cell=columns["cell"][k],
                pbc=columns["pbc"][k],
                energy=float(columns["energy"][k]),
                forces=None if np.isnan(forces).all() else forces,
                charge=None if math.isnan(charge) else charge,
                spin=None if math.isnan(spin) else spin,
                field=None if np.isnan(field).any() else field,
            )
        )
    return samples


def grid_of(orbit: Orbit) -> dict[str, Any]:
    """An orbit as plain values: name, kind, shape, weights, axes."""
    axes = {key: values.tolist() for key, values in orbit.coordinates().items()}
    return {
        "name": orbit.name,
        "kind": orbit.kind,
        "shape": list(orbit.shape),
        "weights": orbit.weights.tolist(),
        "axes": axes,
    }
