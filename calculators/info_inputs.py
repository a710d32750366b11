"""What models read of ``atoms.info``: total charge, spin multiplicity, external field."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip.potential import Potential

KEYS = {
    "charge": ("charge", "total_charge"),  # e
    "spin": ("spin", "total_spin"),  # multiplicity
    "field": ("field", "electric_field"),  # V/angstrom
}
NEUTRAL = {"charge": 0.0, "spin": 1.0}  # what a structure is unless it says otherwise

Value = float | tuple[float, ...]


class InfoInputs:
    """Reads from structures what potentials name in the ``graph_inputs`` of their models.

    Parameters
    ----------
    potentials : that are evaluated
    keys : where ``atoms.info`` holds an input, such as ``{"charge": "q"}``
    field : external vector of structures that have none, V/angstrom
    """

    def __init__(
        self,
        potentials: Sequence[Potential],
        keys: Mapping[str, str] | None = None,
        field: Sequence[float] | None = None,
    ) -> None:
        inputs = (getattr(p.model, "graph_inputs", ()) for p in potentials)
        self.names = sorted({name for names in inputs for name in names})
        self.keys: dict[str, tuple[str, ...]] = dict(KEYS)
        for name, key in (keys or {}).items():
            short = name.removeprefix("total_")  # the names of MACE
            if short not in KEYS:
                raise ValueError(f"info_keys: no model reads '{name}'; there are {', '.join(KEYS)}")
            self.keys[short] = (key,)
        self.field = None if field is None else _value("field", field)
        self._warned: set[str] = set()

    def read(self, atoms: Atoms) -> dict[str, Value | None]:
        """Values that can be compared; None where there is none."""
        found: dict[str, Value | None] = {}
        for name in self.names:
            values = [atoms.info[key] for key in self.keys[name] if key in atoms.info]
            found[name] = _value(name, values[0]) if values else None
        return found

    def tensors(self, atoms: Atoms) -> dict[str, Tensor]:
        """Fields of a graph of one structure.

        Raises
        ------
        ValueError
            Where there is no field; a charge or spin that is missing is warned of once.
        """
        return {
            name: torch.tensor(
                [self._default(name) if value is None else value], dtype=torch.float64
            )
            for name, value in self.read(atoms).items()
        }

    def _default(self, name: str) -> Value:
        places = " or ".join(f"atoms.info['{key}']" for key in self.keys[name])
        if name == "field":
            if self.field is None:
                raise ValueError(
                    f"the model reads an external field and there is no {places}; give three "
                    "numbers there, or for all structures as EqCalculator(..., field=(0, 0, 0))"
                )
            return self.field
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"the model reads {name} and there is no {places}: taking {NEUTRAL[name]:g}",
                stacklevel=2,
            )
        return NEUTRAL[name]


def _value(name: str, value: Any) -> Value:
    shape = (3,) if name == "field" else ()
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.full(0, np.nan)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        what = "three numbers" if shape else "a number"
        raise ValueError(f"{name} in atoms.info is {value!r}; give {what}")
    return tuple(numbers.tolist()) if shape else float(numbers)
