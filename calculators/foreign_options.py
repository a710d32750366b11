"""Options of calculators: names that other packages use, and answers to misspelt ones."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

MODEL_ALIASES = ("model_paths", "model_path", "models", "checkpoint")
# Options of other packages' calculators that have no meaning here; they change nothing.
FOREIGN = (
    "arrays_keys", "charges_key", "compile_mode", "enable_cueq", "enable_flash", "enable_oeq",
    "fullgraph", "head", "modal", "model_type", "task_name",
)  # fmt: skip
SIMILAR = {"compile_mode": "compile", "enable_cueq": "cuequivariance"}  # accelerations


def take_alias(options: dict[str, Any], aliases: Sequence[str], name: str, value: Any) -> Any:
    """The value given under ``name`` or one of its other names, which is taken out of
    ``options``."""
    for alias in aliases:
        if alias in options:
            other = options.pop(alias)
            if value is not None and other is not None:
                raise TypeError(f"'{alias}' is another name of '{name}'; give one of them")
            value = other if value is None else value
    return value


def refuse_unknown(options: dict[str, Any]) -> None:
    """TypeError with the nearest name for a misspelt option, a warning for one of other
    packages."""
    names = (
        "model", "device", "dtype", "skin", "energy_units_to_eV", "length_units_to_A", "info_keys",
        "field", "symmetrize", "accelerate", "program", "max_memory", "default_dtype",
        "use_device", "atoms", "directory", "label", *MODEL_ALIASES,
    )  # fmt: skip
    for key, value in options.items():
        if key not in FOREIGN:
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
            if key == "compile":
                close = ["accelerate"]
            hint = f", did you mean '{close[0]}'?" if close else f"; there are {', '.join(names)}"
            raise TypeError(f"EqCalculator: unknown option '{key}'{hint}")
        if value:
            hint = f"; there is accelerate='{SIMILAR[key]}'" if key in SIMILAR else ""
            warnings.warn(
                f"EqCalculator: '{key}' has no meaning for these models, ignored{hint}",
                stacklevel=3,
            )
