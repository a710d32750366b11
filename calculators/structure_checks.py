"""Refuse structures that no potential can answer for, with the atom and the reason."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.geometry import complete_cell
from torch import Tensor

from mlip.data.neighbors import FAR

OVERLAP = 0.1  # angstrom; closer atoms are a mistake of the input
FLAT = 1e-3  # angstrom; least distance between lattice planes
CROWDED = (
    100.0  # atoms per angstrom^3; a lower bound on their overlap, known before any list is made
)


def check_structure(atoms: Atoms, known: np.ndarray) -> None:
    """Raise ValueError unless elements are known and the geometry is a geometry.

    Parameters
    ----------
    atoms : structure
    known : (119,) bool, elements of the potential by atomic number
    """
    if len(atoms) == 0:
        raise ValueError("the structure has no atoms; there is nothing to evaluate")
    check_elements(atoms.numbers, known)
    if not np.abs(atoms.positions).max() <= FAR:  # so also if it is no number
        _refuse_positions(atoms)
    cell, pbc = atoms.cell.array, atoms.pbc
    if not np.isfinite(cell).all():
        raise ValueError(f"the cell has entries that are not finite: {cell.tolist()}")
    if pbc.any():
        _check_cell(cell.tobytes(), pbc.tobytes(), len(atoms))


def _refuse_positions(atoms: Atoms) -> NoReturn:
    finite = np.isfinite(atoms.positions).all(axis=1)
    if not finite.all():
        k = int(np.argmin(finite))
        raise ValueError(f"position of {_name(atoms, k)} is {atoms.positions[k]}: not finite")
    k = int(np.argmax(np.abs(atoms.positions).max(axis=1)))
    raise ValueError(
        f"{_name(atoms, k)} is at {atoms.positions[k]}, more than {FAR:g} angstrom away: "
        f"distances are lost to rounding; move the structure to the origin"
    )


@np.errstate(over="ignore", invalid="ignore")
def doubtful(
    positions: np.ndarray, first: np.ndarray, lattice: np.ndarray, pbc: np.ndarray
) -> np.ndarray:
    """(M,) where of many structures ``check_structure`` may find the geometry wrong.

    Parameters
    ----------
    positions : (A, 3), those of structure k begin at row ``first[k]``
    lattice : (M, 3, 3), non-periodic directions of the cell completed
    pbc : (M, 3)
    """
    # Comparisons say no to what is not a number.
    near = np.minimum.reduceat((np.abs(positions) <= FAR).all(axis=1), first)
    lengths = np.sqrt(np.einsum("mab,mab->ma", lattice, lattice))
    volume = np.abs(np.linalg.det(lattice))
    open_ = lengths.min(axis=1) >= OVERLAP
    solid = volume * lengths.min(axis=1) > FLAT * lengths.prod(axis=1)  # product of two >= area
    sizes = np.diff(first, append=len(positions))
    roomy = (sizes <= CROWDED * volume) | ~pbc.all(axis=1)
    return ~(near & open_ & solid & roomy)


def check_elements(numbers: np.ndarray, known: np.ndarray) -> None:
    """Raise ValueError naming the elements, and the first atom of each, that are not known."""
    if numbers.min() >= 0 and numbers.max() < len(known) and known[numbers].all():
        return
    strange = [z for z in np.unique(numbers) if not (0 <= z < len(known) and known[z])]
    first = ", ".join(f"{_symbol(z)} (atom {int(np.argmax(numbers == z))})" for z in strange)
    have = ", ".join(_symbol(int(z)) for z in np.flatnonzero(known)) or "none"
    raise ValueError(f"the model does not know the element {first}; it knows {have}")


def check_distances(atoms: Atoms, edge_index: Tensor, lengths: Tensor) -> None:
    """Raise ValueError for atoms on top of each other; edges as of ``NeighborCache``."""
    if len(lengths) and float(lengths.min()) < OVERLAP:
        e = int(lengths.argmin())
        j, i = edge_index[:, e].tolist()
        other = "its own periodic image" if i == j else _name(atoms, j)
        raise ValueError(
            f"{_name(atoms, i)} and {other} overlap: {lengths[e]:.3g} angstrom apart; "
            f"remove one of them or check cell and units (angstrom)"
        )


@lru_cache(maxsize=64)
def _check_cell(cell_bytes: bytes, pbc_bytes: bytes, num_atoms: int) -> None:
    """A cell that stays the same is checked once."""
    cell, pbc = np.frombuffer(cell_bytes).reshape(3, 3), np.frombuffer(pbc_bytes, dtype=bool)
    lengths = np.linalg.norm(cell, axis=1)
    if (lengths[pbc] < OVERLAP).any():
        k = int(np.flatnonzero(pbc & (lengths < OVERLAP))[0])
        raise ValueError(
            f"pbc is on along lattice vector {k}, whose length is {lengths[k]:.3g} angstrom; "
            f"give a cell or set pbc[{k}] = False"
        )
    full = complete_cell(cell * pbc[:, None])
    volume = abs(np.linalg.det(full))
    areas = np.linalg.norm(np.cross(full[[1, 2, 0]], full[[2, 0, 1]]), axis=1)
    if volume <= FLAT * areas[pbc].max():
        raise ValueError(
            f"the cell is singular (volume {volume:.3g} angstrom^3): its lattice vectors "
            f"lie in a plane or on a line: {cell.tolist()}"
        )
    if pbc.all() and num_atoms > CROWDED * volume:
        raise ValueError(
            f"{num_atoms} atoms in {volume:.3g} angstrom^3 overlap; "
            f"check the cell and its unit (angstrom)"
        )


def _symbol(z: int) -> str:
    return chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"Z={z}"


def _name(atoms: Atoms, k: int) -> str:
    return f"atom {k} ({_symbol(int(atoms.numbers[k]))})"


def check_finite(atoms: Atoms, results: Mapping[str, Any]) -> None:
    """ValueError that names the first of the model's numbers that is not finite."""
    for name, value in results.items():
        if not np.isfinite(value).all():
            where = ""
            if name == "forces":
                bad = ~np.isfinite(value).reshape(len(atoms), -1).all(axis=1)
                where = f" of atom {int(np.argmax(bad))}"
            raise ValueError(
                f"the model gives no finite {name}{where} for {atoms.get_chemical_formula()}; "
                f"the structure is far from anything it has learnt, or its weights are broken"
            )
