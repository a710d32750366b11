"""Small trained potentials that come with the package: ``EqCalculator("silicon")``."""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def find(model: str | Path) -> Path:
    """The file of a model given by its path or its name; an existing path goes first.

    Names are looked up in any case.

    Raises
    ------
    FileNotFoundError
        Neither; the text lists the names that there are, and the nearest.
    """
    path = Path(model)
    if path.exists():
        return path
    by_name = {name.lower(): name for name in names()}
    wanted = str(model).lower()
    if wanted in by_name:
        return FOLDER / f"{by_name[wanted]}.safetensors"
    shipped = ", ".join(by_name.values()) or "none"
    close = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.5)
    hint = f"; did you mean '{by_name[close[0]]}'?" if close else ""
    raise FileNotFoundError(
        f"{model}: no such model file, nor a model of the package (there are: {shipped}){hint}"
    )
