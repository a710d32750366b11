"""What a data set says before any model: reference energies, neighbours, forces.

Reference energies E0 shift the energy of a structure by sum_i E0[Z_i].  They come from frames of
isolated atoms, from a table, or from the least-squares fit of E_k = sum_Z n_kZ E0[Z], which has
many solutions where compositions do not vary independently (in water, only 2 E0[H] + E0[O] is
known): then the one of smallest norm is taken, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from mlip.data.dataset import HDF5Dataset

if TYPE_CHECKING:
    from rich.table import Table

NUM_Z = 119
NEIGHBOR_FRAMES = (
    10_000  # a mean over this many structures is exact enough; larger sets are sampled evenly
)
READ_BLOCK = 4096

E0Choice = Literal["isolated", "least_squares"] | Mapping[str, float] | None


@dataclass(frozen=True)
class Statistics:
    """Numbers of a data set; arrays are indexed by atomic number, with NaN for absent elements.

    Isolated-atom frames count for ``e0`` only.
    """

    e0: Tensor  # (119,) float64, eV
    avg_num_neighbors: float
    rms_force: float  # eV/angstrom, per component; NaN without forces
    e0_source: str  # "isolated", "table" or "least squares", or a mixture of these
    num_structures: int
    num_isolated: int
    num_atoms: Tensor  # (119,) int64 atoms of each element
    num_frames: Tensor  # (119,) int64 structures in which the element occurs
    rms_force_of: Tensor  # (119,) eV/angstrom
    neighbors_of: Tensor  # (119,) mean number of neighbours
    max_force: float  # largest |component|, eV/angstrom
    energy_mean: float  # eV per atom, E0 taken off
    energy_std: float  # eV per atom, E0 taken off
    num_labels: Mapping[str, int]  # structures with "energy", "forces", "stress"
    warnings: tuple[str, ...] = field(default=())

    @property
    def elements(self) -> list[int]:
        """Atomic numbers in the data set, ascending."""
        return torch.nonzero(self.num_frames).flatten().tolist()


def compute_statistics(dataset: HDF5Dataset, e0: E0Choice = None) -> Statistics:
    """Read the data set once and compute its statistics.

    Parameters
    ----------
    dataset : structures, isolated atoms included
    e0 : where reference energies come from
        ``"isolated"`` the frames of isolated atoms, ``"least_squares"`` a fit, a table {symbol:
        eV}; None takes isolated atoms where there are any and fits the rest.

    Raises
    ------
    ValueError
        If an element has no reference energy under the given choice, or if nothing is labelled.
    """
    if len(dataset) == 0:
        raise ValueError(f"{dataset.path}: no structures")
    isolated = dataset.isolated
    atoms = np.zeros(NUM_Z, dtype=np.int64)
    frames = np.zeros(NUM_Z, dtype=np.int64)
    force_sum, force_count = np.zeros(NUM_Z), np.zeros(NUM_Z)
    max_force = 0.0
    labels = {"energy": 0, "forces": 0, "stress": 0}
    references: dict[int, list[float]] = {}
    # Structures with an energy, by composition: memory grows with the number of compositions only.
    known_compositions: dict[bytes, int] = {}
    member: list[int] = []
    energies: list[float] = []
    for start in range(0, len(dataset), READ_BLOCK):
        stop = min(start + READ_BLOCK, len(dataset))
        for k, s in zip(range(start, stop), _structures(dataset, start, stop), strict=True):
            z = s.atomic_numbers
            if z.min() < 1 or z.max() > 118:
                raise ValueError(
                    f"{dataset.path}: frame {dataset.indices[k]}: an atomic number is outside "
                    f"1..118"
                )
            energy = np.nan if s.energy is None else float(s.energy[0])
            if isolated[k]:
                frames[z[0]] += 1
                if not np.isnan(energy):
                    references.setdefault(int(z[0]), []).append(energy)
                continue
            count = np.bincount(z, minlength=NUM_Z)
            atoms += count
            frames += count > 0
            if not np.isnan(energy):
                labels["energy"] += 1
                name = count.astype(np.int64).tobytes()
                member.append(known_compositions.setdefault(name, len(known_compositions)))
                energies.append(energy)
            if s.forces is not None and not np.isnan(s.forces).all():
                labels["forces"] += 1
                known = ~np.isnan(s.forces).any(axis=1)
                force_sum += np.bincount(
                    z[known], weights=(s.forces[known] ** 2).sum(axis=1), minlength=NUM_Z
                )
                force_count += 3 * np.bincount(z[known], minlength=NUM_Z)
                max_force = max(max_force, float(np.abs(s.forces[known]).max(initial=0.0)))
            if s.stress is not None and not np.isnan(s.stress).all():
                labels["stress"] += 1

    elements = np.flatnonzero(frames)
    notes: list[str] = []
    unique = np.frombuffer(b"".join(known_compositions), dtype=np.int64).reshape(-1, NUM_Z)
    counts = unique[:, elements].astype(np.float64)[member]  # (m, num_elements)
    totals = np.array(energies, dtype=np.float64)
    table, source = _reference_energies(dataset, e0, elements, references, counts, totals, notes)
    for note in notes:
        warnings.warn(note, stacklevel=2)

    per_atom = (totals - counts @ table) / counts.sum(axis=1) if len(totals) else np.zeros(0)
    full = np.full(NUM_Z, np.nan)
    full[elements] = table
    neighbors, neighbors_of = _mean_neighbors(dataset, np.flatnonzero(~isolated))
    with np.errstate(invalid="ignore", divide="ignore"):
        rms_of = np.sqrt(force_sum / force_count)
        rms = float(np.sqrt(force_sum.sum() / force_count.sum()))
    return Statistics(
        e0=torch.from_numpy(full),
        avg_num_neighbors=neighbors,
        rms_force=rms,
        e0_source=source,
        num_structures=len(dataset),
        num_isolated=int(isolated.sum()),
        num_atoms=torch.from_numpy(atoms),
        num_frames=torch.from_numpy(frames),
        rms_force_of=torch.from_numpy(rms_of),
        neighbors_of=torch.from_numpy(neighbors_of),
        max_force=max_force if labels["forces"] else float("nan"),
        energy_mean=float(per_atom.mean()) if len(per_atom) else float("nan"),
        energy_std=float(per_atom.std()) if len(per_atom) else float("nan"),
        num_labels=labels,
        warnings=tuple(notes),
    )


def fit_e0(counts: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Least-squares reference energies of minimum norm, each structure weighted by 1/N^2.

    Parameters
    ----------
    counts : (m, n) atoms of each of n elements
    energies : (m,) eV

    Returns
    -------
    e0 : (n,) eV
    ambiguous : groups of columns whose energies cannot be told apart
    """
    size = counts.sum(axis=1, keepdims=True)
    x, y = counts / size, energies / size[:, 0]
    # Many structures share a composition: their mean, weighted by sqrt of their number, has the
    # same solution.
    unique, member = np.unique(x, axis=0, return_inverse=True)
    member = member.reshape(-1)
    repeats = np.bincount(member)
    # Subtract the first guess of one energy per atom before summing, or digits of large total
    # energies are lost.
    middle = y.mean()
    weight = np.sqrt(repeats)
    a = unique * weight[:, None]
    b = np.bincount(member, weights=y - middle) / repeats * weight
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    rank = int((s > s[0] * 1e-9 * max(a.shape)).sum())
    v = vt[:rank].T
    solution = (
        v @ ((u.T[:rank] @ b) / s[:rank]) + middle
    )  # all rows of x sum to 1, so the shift is a solution
    solution = v @ (v.T @ solution)  # back to the row space: minimum norm
    free = np.eye(counts.shape[1]) - v @ v.T  # projector onto what the data do not determine
    ambiguous: list[list[int]] = []
    left = set(np.flatnonzero(np.abs(free).max(axis=1) > 1e-6).tolist())
    while left:
        group, todo = set(), {min(left)}
        while todo:
            k = todo.pop()
            group.add(k)
            todo |= {j for j in np.flatnonzero(np.abs(free[k]) > 1e-6).tolist() if j not in group}
        ambiguous.append(sorted(group))
        left -= group
    return solution, ambiguous


def require_elements(statistics: Statistics, dataset: HDF5Dataset) -> None:
    """Raise ValueError naming the elements of ``dataset`` that ``statistics`` (of the training set)
    lacks."""
    known = set(statistics.elements)
    for k in range(len(dataset)):
        s = dataset.structure(k)
        if missing := sorted({int(z) for z in np.unique(s.atomic_numbers)} - known):
            names = ", ".join(chemical_symbols[z] for z in missing)
            raise ValueError(
                f"{dataset.path}: frame {dataset.indices[k]} contains {names}, which the training "
                f"set lacks; add "
                "training structures with it or take the frame out"
            )


def format_statistics(statistics: Statistics) -> Table:
    """Table for the terminal, one line per element."""
    from rich.table import Table

    s = statistics
    table = Table(
        title=f"{s.num_structures} structures ({s.num_isolated} isolated atoms), "
        f"{int(s.num_atoms.sum())} atoms",
        caption=f"E0: {s.e0_source}; energy per atom beyond E0 {s.energy_mean:.4f} +- "
        f"{s.energy_std:.4f} eV; "
        f"labels: {', '.join(f'{n} {name}' for name, n in s.num_labels.items())}",
    )
    for name in ("element", "atoms", "structures", "E0 / eV", "neighbours", "RMS force / eV/Å"):
        table.add_column(name, justify="left" if name == "element" else "right")
    for z in s.elements:
        table.add_row(
            chemical_symbols[z],
            str(int(s.num_atoms[z])),
            str(int(s.num_frames[z])),
            f"{float(s.e0[z]):.4f}",
            f"{float(s.neighbors_of[z]):.1f}",
            f"{float(s.rms_force_of[z]):.4f}",
        )
    table.add_row(
        "all",
        str(int(s.num_atoms.sum())),
        str(s.num_structures),
        "",
        f"{s.avg_num_neighbors:.1f}",
        f"{s.rms_force:.4f}",
    )
    return table


def _structures(dataset: HDF5Dataset, start: int, stop: int):  # type: ignore[no-untyped-def]
    frames = dataset.indices[start:stop]
    if len(frames) > 1 and (np.diff(frames) == 1).all():
        block = dataset.file.read_block(int(frames[0]), int(frames[-1]) + 1)
        return (block[k] for k in range(len(frames)))
    return (dataset.file.read(int(frame)) for frame in frames)


def _reference_energies(
    dataset: HDF5Dataset,
    choice: E0Choice,
    elements: np.ndarray,
    references: dict[int, list[float]],
    counts: np.ndarray,
    totals: np.ndarray,
    notes: list[str],
) -> tuple[np.ndarray, str]:
    """(n,) energies of ``elements`` and where they are from."""
    if isinstance(choice, Mapping):
        unknown = [symbol for symbol in choice if symbol not in atomic_numbers]
        if unknown:
            raise ValueError(
                f"E0 table: {', '.join(map(repr, unknown))} is no element; keys are chemical "
                f"symbols"
            )
        missing = [chemical_symbols[z] for z in elements if chemical_symbols[z] not in choice]
        if missing:
            raise ValueError(f"E0 table lacks {', '.join(missing)}, which {dataset.path} contains")
        table = np.array([float(choice[chemical_symbols[z]]) for z in elements])
        if not np.isfinite(table).all():
            bad = chemical_symbols[elements[int(np.flatnonzero(~np.isfinite(table))[0])]]
            raise ValueError(f"E0 table: the energy of {bad} is not a finite number")
        return table, "table"
    if choice not in (None, "isolated", "least_squares"):
        raise ValueError(
            f"e0 must be 'isolated', 'least_squares' or a table {{symbol: eV}}, got {choice!r}"
        )

    table = np.full(len(elements), np.nan)
    if choice != "least_squares":
        for column, z in enumerate(elements):
            if found := references.get(int(z)):
                table[column] = np.mean(found)
                if np.ptp(found) > 1e-3:
                    notes.append(
                        f"{dataset.path}: isolated {chemical_symbols[z]} has {len(found)} energies "
                        f"that differ by "
                        f"{np.ptp(found):.4g} eV; their mean is taken"
                    )
    fitted = np.isnan(table)
    if not fitted.any():
        return table, "isolated"
    names = ", ".join(chemical_symbols[z] for z in elements[fitted])
    example = f"data.e0={{{', '.join(f'{chemical_symbols[z]}: 0.0' for z in elements[fitted])}}}"
    if choice == "isolated":
        raise ValueError(
            f"{dataset.path}: no isolated-atom frame with an energy for {names}; add one (one "
            f"atom, no periodicity), "
            "or give a table or e0='least_squares'"
        )
    if len(totals) == 0:
        raise ValueError(
            f"{dataset.path}: no energies, so reference energies of {names} cannot be fitted; give "
            f"a table, such as {example}"
        )
    if (~fitted).any():
        notes.append(
            f"{dataset.path}: no isolated-atom frame for {names}; fitted to the other structures"
        )
    rest = totals - counts[:, ~fitted] @ table[~fitted]
    has = counts[:, fitted].sum(axis=1) > 0
    if not has.any():
        raise ValueError(
            f"{dataset.path}: no energy of a structure with {names}; give a table of reference "
            f"energies, such as {example}"
        )
    table[fitted], ambiguous = fit_e0(counts[has][:, fitted], rest[has])
    symbols = [chemical_symbols[z] for z in elements[fitted]]
    for group in ambiguous:
        if len(group) == 1:
            notes.append(
                f"{dataset.path}: the reference energy of {symbols[group[0]]} is not determined; "
                f"set to 0"
            )
        else:
            notes.append(
                f"{dataset.path}: the reference energies of {', '.join(symbols[k] for k in group)} "
                f"cannot be told apart by "
                "the compositions in the data; the solution of smallest norm is taken. Add "
                "isolated atoms or give a table"
            )
    return table, "isolated, rest least squares" if (~fitted).any() else "least squares"


def _mean_neighbors(dataset: HDF5Dataset, members: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean number of neighbours over all atoms, and by element."""
    if len(members) > NEIGHBOR_FRAMES:
        members = members[
            np.linspace(0, len(members) - 1, NEIGHBOR_FRAMES).round().astype(np.int64)
        ]
    edges, atoms = np.zeros(NUM_Z), np.zeros(NUM_Z)
    for k in members:
        graph = dataset.graph(int(k))
        z = graph.atomic_numbers.numpy()
        edges += np.bincount(z[graph.edge_index[1].numpy()], minlength=NUM_Z)
        atoms += np.bincount(z, minlength=NUM_Z)
    with np.errstate(invalid="ignore"):
        return float(edges.sum() / max(1.0, atoms.sum())), edges / atoms
