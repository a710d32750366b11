"""Many structures in batches of a limited size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ase import Atoms


def as_frames(structures: Atoms | Iterable[Any]) -> list[Atoms]:
    """A list of them, also of one alone; TypeError for what is none."""
    frames = [structures] if isinstance(structures, Atoms) else list(structures)
    for k, atoms in enumerate(frames):
        if not isinstance(atoms, Atoms):
            raise TypeError(
                f"structure {k} is {type(atoms).__name__}, not Atoms; read files before"
            )
    return frames


def batches(sizes: Sequence[int], max_atoms: int) -> Iterator[list[int]]:
    """Consecutive numbers of structures with at most ``max_atoms`` atoms together, or single
    ones."""
    batch: list[int] = []
    atoms = 0
    for k, size in enumerate(sizes):
        if batch and atoms + size > max_atoms:
            yield batch
            batch, atoms = [], 0
        batch.append(k)
        atoms += size
    if batch:
        yield batch
