"""NERO: Non-Equivariance Revealed on Orbits (Xu et al., arXiv:2305.19889), for potentials.

A potential is evaluated on the whole orbit of a structure instead of one pose.  With z_g the
prediction for the image g, brought back to the structure's own pose, and weights w_g of sum one:

    consensus  z = sum_g w_g z_g,        V = sum_g w_g |z_g - z|^2
    MSE = sum_g w_g |z_g - label|^2 = |z - label|^2 + V

V is the part of the error that is broken symmetry and nothing else; it needs no labels.  Energies
are compared per atom in meV/atom, forces by the root of the mean square over the atoms' components
in meV/angstrom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mlip.data.graph import AtomicGraph
from mlip.evaluation.orbits import Image, ImageOrbit, MatrixOrbit
from mlip.potential import Potential
from mlip.rotation_orbit import rotation_orbit

if TYPE_CHECKING:
    from ase import Atoms

QUANTITIES = ("energy", "forces")
UNITS = {"energy": "meV/atom", "forces": "meV/Å"}
MAX_EDGES = 20_000  # of a batch of images; larger ones are no faster on a CPU
MILLI = 1000.0


@dataclass(frozen=True)
class Sample:
    """A structure of which the orbit is taken; absent labels are NaN."""

    name: str
    atomic_numbers: np.ndarray  # (N,)
    positions: np.ndarray  # (N, 3) angstrom
    cell: np.ndarray  # (3, 3) angstrom, rows
    pbc: np.ndarray  # (3,) bool
    energy: float = math.nan  # eV
    forces: np.ndarray | None = None  # (N, 3) eV/angstrom
    charge: float | None = None
    spin: float | None = None
    field: np.ndarray | None = None  # (3,) external vector

    def graph(self, cutoff: float) -> AtomicGraph:
        """With neighbours, without labels."""
        fields = {"charge": self.charge, "spin": self.spin, "field": self.field}
        given = {
            k: torch.as_tensor(np.asarray(v, dtype=np.float64))[None]
            for k, v in fields.items()
            if v is not None
        }
        return AtomicGraph.from_arrays(
            self.atomic_numbers, self.positions, self.cell, self.pbc, cutoff, **given
        )


@dataclass(frozen=True)
class OrbitErrors:
    """Errors of one potential over one orbit, S samples by T images; NaN where there is no
    image."""

    weights: np.ndarray  # (T,)
    energy: np.ndarray  # (S, T) deviation from the consensus, signed, meV/atom
    energy_offset: np.ndarray  # (S,) consensus minus label, meV/atom; NaN without a label
    forces: np.ndarray  # (S, T) RMSE from the consensus, meV/angstrom
    forces_label: np.ndarray  # (S, T) RMSE from the labels, meV/angstrom; NaN without labels

    def labelled(self, quantity: str) -> np.ndarray:
        """(S,) bool: which samples have labels of this quantity."""
        if quantity == "energy":
            return ~np.isnan(self.energy_offset)
        return ~np.isnan(self.forces_label).all(axis=1)

    def errors(self, quantity: str, reference: str = "label") -> np.ndarray:
        """Absolute errors (S, T) in meV/atom or meV/angstrom.

        Parameters
        ----------
        quantity : "energy" or "forces"
        reference : "consensus", or "label": samples without labels are then compared with their
            consensus; ``labelled`` says which these are
        """
        if quantity not in QUANTITIES or reference not in ("label", "consensus"):
            raise ValueError(f"no errors of {quantity!r} against {reference!r}")
        if quantity == "energy":
            offset = np.nan_to_num(self.energy_offset) if reference == "label" else 0.0
            return np.abs(self.energy + np.broadcast_to(offset, len(self.energy))[:, None])
        if reference == "consensus":
            return self.forces
        return np.where(self.labelled("forces")[:, None], self.forces_label, self.forces)

    def rmse(self, quantity: str, reference: str = "label") -> np.ndarray:
        """(S,) root of the weighted mean square over the orbit; NaN where the orbit is empty."""
        squares = self.errors(quantity, reference) ** 2
        there = ~np.isnan(squares)
        total = there @ self.weights
        mean = np.where(there, squares, 0.0) @ self.weights / np.where(total > 0, total, 1.0)
        return np.where(total > 0, np.sqrt(mean), np.nan)

    def symmetry_share(self, quantity: str) -> float:
        """V / MSE over the labelled samples: what part of the loss is broken symmetry; NaN without
        any."""
        which = self.labelled(quantity) & ~np.isnan(self.rmse(quantity))
        if not which.any():
            return math.nan
        mse = np.mean(self.rmse(quantity, "label")[which] ** 2)
        return float(np.mean(self.rmse(quantity, "consensus")[which] ** 2) / mse) if mse else 0.0


@dataclass(frozen=True)
class Nero:
    """Orbits of several models on the same samples: model -> orbit -> errors."""

    samples: list[Sample]
    orbits: list[MatrixOrbit | ImageOrbit]
    models: dict[str, dict[str, OrbitErrors]]
    source: str = ""


def measure(
    potentials: Mapping[str, Potential],
    samples: Sequence[Sample],
    orbits: Sequence[MatrixOrbit | ImageOrbit],
    *,
    source: str = "",
    max_edges: int = MAX_EDGES,
    progress: Callable[[str, int], None] = lambda model, sample: None,
) -> Nero:
    """Evaluate potentials on the orbits of samples.

    Parameters
    ----------
    potentials : display name -> potential, used where it is, in evaluation mode
    samples, orbits : what is evaluated
    source : where the samples come from, for titles
    max_edges : of a batch of images; the result does not depend on it
    progress : called with the model's name and the number of each sample when it is done

    Raises
    ------
    ValueError
        For no samples, or an element that a potential does not know.
    """
    if not samples:
        raise ValueError("there are no structures to take the orbits of")
    models = {}
    for name, potential in potentials.items():
        for sample in samples:
            _check_elements(name, potential, sample)
        rows: dict[str, list[tuple[np.ndarray, float, np.ndarray, np.ndarray]]] = {
            orbit.name: [] for orbit in orbits
        }
        for number, sample in enumerate(samples):
            for orbit in orbits:
                energies, forces = predictions(potential, sample, orbit, max_edges)
                rows[orbit.name].append(_compare(energies, forces, orbit.weights, sample))
            progress(name, number)
        models[name] = {
            orbit.name: OrbitErrors(
                orbit.weights, *(np.array(x) for x in zip(*rows[orbit.name], strict=True))
            )
            for orbit in orbits
        }
    return Nero(list(samples), list(orbits), models, source)


def predictions(
    potential: Potential,
    sample: Sample,
    orbit: MatrixOrbit | ImageOrbit,
    max_edges: int = MAX_EDGES,
) -> tuple[np.ndarray, np.ndarray]:
    """Energies per atom (T,) eV and forces (T, N, 3) eV/angstrom in the structure's own pose; NaN
    where the orbit has no image."""
    graph = sample.graph(potential.cutoff).to(potential.e0.device)
    training = potential.training
    potential.eval()
    try:
        if isinstance(orbit, MatrixOrbit):
            turned = rotation_orbit(potential, graph, orbit.rule(), max_edges=max_edges)
            per_atom = turned.energy[:, 0] / len(graph.positions)
            return per_atom.cpu().numpy(), turned.forces.cpu().numpy()
        return _of_images(potential, sample, orbit, max_edges)
    finally:
        potential.train(training)


def _of_images(
    potential: Potential, sample: Sample, orbit: ImageOrbit, max_edges: int
) -> tuple[np.ndarray, np.ndarray]:
    energies = np.full(math.prod(orbit.shape), np.nan)
    forces = np.full((len(energies), len(sample.atomic_numbers), 3), np.nan)
    images = orbit.images(sample.graph(potential.cutoff), potential.cutoff)
    for batch in _batches(enumerate(images), max_edges):
        graph = AtomicGraph.collate([image.graph for _, image in batch])
        out = potential(graph.to(potential.e0.device))
        energy, force = out["energy"].cpu(), out["forces"].cpu()
        for g, (k, image) in enumerate(batch):
            a, b = int(graph.ptr[g]), int(graph.ptr[g + 1])
            energies[k] = float(energy[g]) / (b - a)
            forces[k] = force[a:b][image.atoms].mean(dim=0).numpy()
    return energies, forces


def _batches(
    images: Iterable[tuple[int, Image | None]], max_edges: int
) -> Iterator[list[tuple[int, Image]]]:
    batch: list[tuple[int, Image]] = []
    edges = 0
    for k, image in images:
        if image is None:
            continue
        size = image.graph.edge_index.shape[1]
        if batch and edges + size > max_edges:
            yield batch
            batch, edges = [], 0
        batch.append((k, image))
        edges += size
    if batch:
        yield batch


def consensus(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over the first axis, of the images that there are."""
    there = ~np.isnan(values.reshape(len(values), -1)).any(axis=1)
    if not there.any():
        return np.full(values.shape[1:], np.nan)
    w = np.where(there, weights, 0.0)
    return np.asarray(np.tensordot(w[there] / w.sum(), values[there], axes=1))


def _compare(
    energies: np.ndarray, forces: np.ndarray, weights: np.ndarray, sample: Sample
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    # The mean of numbers of -1e3 eV loses digits that the differences still have.
    first = energies[np.flatnonzero(~np.isnan(energies))[:1]].sum()
    mean = consensus(energies - first, weights)
    offset = first + float(mean) - sample.energy / len(sample.atomic_numbers)
    label = np.full(forces.shape[1:], np.nan) if sample.forces is None else sample.forces
    return (
        MILLI * (energies - first - mean),
        MILLI * offset,
        MILLI * _rms(forces - consensus(forces, weights)),
        MILLI * _rms(forces - label),
    )


def _rms(x: np.ndarray) -> np.ndarray:
    """(T, N, 3) -> (T,), over the components that are not NaN; NaN where there is none."""
    there = ~np.isnan(x)
    count = there.sum(axis=(1, 2))
    mean = (np.where(there, x, 0.0) ** 2).sum(axis=(1, 2)) / np.maximum(count, 1)
    return np.where(count > 0, np.sqrt(mean), np.nan)


def aggregate(errors: np.ndarray) -> np.ndarray:
    """(S, T) -> (T,): root of the mean square over the samples that have the image."""
    there = ~np.isnan(errors)
    count = there.sum(axis=0)
    mean = np.where(there, errors**2, 0.0).sum(axis=0) / np.maximum(count, 1)
    return np.where(count > 0, np.sqrt(mean), np.nan)


def embed(errors: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the samples' orbit errors: a map in which like orbits lie together.

    Distances are those of functions on the group, with its weights.  The first component is
    turned so that errors grow along it.

    Parameters
    ----------
    errors : (S, T) of one model
    weights : (T,)

    Returns
    -------
    points : (S, 2)
    explained : (2,) shares of the variance
    """
    x = np.nan_to_num(errors) * np.sqrt(weights)
    centred = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(x), 2))
    k = min(2, len(s))
    points[:, :k] = u[:, :k] * s[:k]
    size = np.linalg.norm(x, axis=1)
    for axis in range(2):
        if points[:, axis] @ (size - size.mean()) < 0:
            points[:, axis] *= -1
    total = (s**2).sum()
    explained = np.zeros(2)
    explained[:k] = s[:k] ** 2 / total if total > 0 else 0.0
    return points, explained


def summary(nero: Nero) -> str:
    """Table: for each model and orbit the errors, and the share of them that is broken symmetry."""
    head = ("model", "orbit", "quantity", "RMSE", "symmetry", "share", "worst", "unit")
    rows = [head]
    for model, orbits in nero.models.items():
        for name, result in orbits.items():
            for q in QUANTITIES:
                spread = result.rmse(q, "consensus")
                if np.isnan(spread).all():
                    continue
                which = result.labelled(q)
                error = result.rmse(q, "label")[which]
                share = result.symmetry_share(q)
                rows.append(
                    (
                        model,
                        name,
                        q,
                        f"{_root_mean(error):.4g}" if which.any() else "no labels",
                        f"{_root_mean(spread):.4g}",
                        "" if math.isnan(share) else f"{100 * share:.3g} %",
                        f"{np.nanmax(result.errors(q, 'consensus')):.4g}",
                        UNITS[q],
                    )
                )
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k < 3 or k == 7 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _root_mean(x: np.ndarray) -> float:
    x = x[~np.isnan(x)]
    return float(np.sqrt(np.mean(x**2))) if len(x) else math.nan


def _check_elements(name: str, potential: Potential, sample: Sample) -> None:
    from ase.data import chemical_symbols

    known = set(potential.elements)
    if missing := sorted(set(sample.atomic_numbers.tolist()) - known):
        names = ", ".join(chemical_symbols[z] for z in missing)
        knows = ", ".join(chemical_symbols[z] for z in sorted(known))
        raise ValueError(f"{sample.name} contains {names}; the model {name} knows {knows}")


def read_samples(path: str | Path, number: int) -> list[Sample]:
    """``number`` structures of a data file or of any file that ASE reads, evenly spaced over it.

    Isolated atoms are left out: their orbit is one point.

    Raises
    ------
    ValueError
        For a number below one, a file without structures, or what the readers find wrong.
    """
    if number < 1:
        raise ValueError(f"the number of samples must be at least 1, got {number}")
    path = Path(path)
    found = _from_data(path, number) if path.suffix in (".h5", ".hdf5") else _from_ase(path, number)
    if not found:
        raise ValueError(f"{path}: no structures of more than one atom")
    return found


def _spaced(indices: np.ndarray, number: int) -> list[int]:
    chosen = np.unique(np.linspace(0, len(indices) - 1, min(number, len(indices))).round())
    return [int(indices[int(k)]) for k in chosen] if len(indices) else []


def _from_data(path: Path, number: int) -> list[Sample]:
    from mlip.data.dataset import HDF5Dataset

    dataset = HDF5Dataset(path, cutoff=1.0)  # no neighbours are asked of it
    samples = []
    for k in _spaced(np.flatnonzero(~dataset.isolated), number):
        s = dataset.structure(k)
        kind = str(dataset.config_types[k])
        samples.append(
            Sample(
                name=f"frame {dataset.indices[k]}" + (f", {kind}" if kind else ""),
                atomic_numbers=s.atomic_numbers.astype(np.int64),
                positions=s.positions,
                cell=s.cell[0],
                pbc=s.pbc[0],
                energy=math.nan if s.energy is None else float(s.energy[0]),
                forces=s.forces,
                charge=None if s.charge is None else float(s.charge[0]),
                spin=None if s.spin is None else float(s.spin[0]),
                field=None if s.field is None else s.field[0],
            )
        )
    return samples


def _from_ase(path: Path, number: int) -> list[Sample]:
    import ase.io

    from mlip.data.labels import LabelOptions, LabelReader

    reader = LabelReader(LabelOptions())
    frames: list[Atoms] = list(ase.io.iread(path, index=":"))
    several = np.array([k for k, atoms in enumerate(frames) if len(atoms) > 1], dtype=int)
    samples = []
    for k in _spaced(several, number):
        try:
            frame = reader.read(frames[k])
        except ValueError as error:
            raise ValueError(f"{path}: frame {k}: {error}") from None
        atoms = frame.atoms
        samples.append(
            Sample(
                name=f"frame {k}" + (f", {frame.config_type}" if frame.config_type else ""),
                atomic_numbers=atoms.numbers.astype(np.int64),
                positions=atoms.positions,
                cell=np.asarray(atoms.cell),
                pbc=atoms.pbc,
                energy=math.nan if frame.energy is None else frame.energy,
                forces=frame.forces,
                charge=frame.charge,
                spin=frame.spin,
                field=frame.field,
            )
        )
    return samples
