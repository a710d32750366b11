"""Small trained potentials that come with the package: ``EqCalculator("silicon")``."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def find(model: str | Path) -> Path:
    """The file of a model given by its path or its name; an existing path goes first.

    Raises
    ------
    FileNotFoundError
        Neither; the text lists the names that there are.
    """
    path = Path(model)
    if path.exists():
        return path
    if str(model) in names():
        return FOLDER / f"{model}.safetensors"
    shipped = ", ".join(names()) or "none"
    raise FileNotFoundError(
        f"{model}: no such model file, nor a model of the package (there are: {shipped})"
    )
