"""Arrays of many structures, joined along their first dimension, and what is wrong with some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

Problems = dict[int, Exception]  # of structures, by their numbers


def problems_of(check: Callable[[int], object], numbers: Iterable[int]) -> Problems:
    """What is said against which structures; ``check`` takes the number of one, and raises."""
    problems: Problems = {}
    for k in numbers:
        try:
            check(k)
        except Exception as problem:  # whatever it is, the other structures go on
            problems[k] = problem
    return problems


@dataclass(frozen=True)
class StructureArrays:
    """Arrays of M structures with A atoms together, one structure after the other.

    Subclasses add arrays (M, ...), and (A, ...) under the names in ``OF_ATOMS``.
    """

    OF_ATOMS: ClassVar[frozenset[str]] = frozenset()

    sizes: np.ndarray  # (M,) atoms of each structure, none without

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The structures of all of them."""
        names = [field.name for field in fields(cls)]
        return cls(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})

    def kept(self, which: np.ndarray) -> Self:
        """Some of the structures, ``which`` (M,) bool."""
        atoms, names = which[self.owner], [field.name for field in fields(self)]
        rows = {name: atoms if name in self.OF_ATOMS else which for name in names}
        return replace(self, **{name: getattr(self, name)[rows[name]] for name in names})

    @cached_property
    def owner(self) -> np.ndarray:
        """(A,) structure of each atom."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @cached_property
    def first(self) -> np.ndarray:
        """(M,) the first atom of each structure."""
        return np.cumsum(self.sizes) - self.sizes

    def rows(self, k: int) -> slice:
        """Atoms of structure ``k``."""
        return slice(self.first[k], self.first[k] + self.sizes[k])

    def sums(self, of_atoms: np.ndarray) -> np.ndarray:
        """(M, ...) over the atoms of each structure."""
        return np.add.reduceat(of_atoms, self.first, axis=0)

    def maxima(self, of_atoms: np.ndarray) -> np.ndarray:
        """(M, ...) of the atoms of each structure."""
        return np.maximum.reduceat(of_atoms, self.first, axis=0)
