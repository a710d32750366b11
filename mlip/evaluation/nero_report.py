"""What ``mlip nero`` does: models and structures in, page, figures, arrays and a table out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mlip.evaluation.nero import Nero, measure, read_samples, summary
from mlip.evaluation.orbits import orbits

FIGURES = ("png", "pdf")


def nero_report(
    models: Sequence[str | Path],
    data: str | Path,
    out: str | Path,
    *,
    names: Sequence[str] = (),
    samples: int = 16,
    grid: int = 10,
    groups: Sequence[str] | None = None,
    figures: bool = True,
    device: str = "auto",
    dtype: str = "",
    progress: Callable[[str, int], None] = lambda model, sample: None,
) -> Nero:
    """Orbits of models on structures; ``out`` gets nero.html, nero.h5, nero.txt and figures.

    Parameters
    ----------
    models : files or names of shipped models
    data : data file, or structures that ASE reads
    out : folder, made if it is absent
    names : what the models are called, in their order; by default their files' names
    samples : how many structures, evenly spaced over the file
    grid : rings of the sphere
    groups : names of orbits; all by default
    progress : called with a model's name and the number of a sample when it is done

    Raises
    ------
    ValueError
        For names that do not match, or what models and data do not agree on.
    """
    from mlip.checkpoint import load
    from mlip.pretrained import find

    if dtype not in ("", "float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got '{dtype}'")
    if names and len(names) != len(models):
        raise ValueError(
            f"names: {len(names)} for {len(models)} models; name each once, in their order, or none"
        )
    paths = [find(model) for model in models]
    called = list(names) or display_names(paths)
    if len(set(called)) < len(called):
        raise ValueError(f"two models have the same name: {', '.join(called)}")
    chosen = orbits(None if groups is None else list(groups), grid)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype) if dtype else None
    potentials = {
        name: load(path, device=device, dtype=kind)
        for name, path in zip(called, paths, strict=True)
    }
    structures = read_samples(data, samples)
    result = measure(potentials, structures, chosen, source=Path(data).name, progress=progress)
    write_report(result, out, figures=figures)
    return result


def write_report(nero: Nero, out: str | Path, *, figures: bool = True) -> None:
    """Page, arrays, table and figures into the folder ``out``."""
    from mlip.evaluation.nero_file import write_nero
    from mlip.evaluation.nero_page import write_page
    from mlip.evaluation.nero_plots import curve_figure, sphere_figure

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_nero(nero, folder / "nero.h5")
    write_page(nero, folder / "nero.html")
    (folder / "nero.txt").write_text(summary(nero) + "\n", encoding="utf-8")
    for suffix in FIGURES if figures else ():
        for orbit in nero.orbits:
            if orbit.kind == "sphere":
                sphere_figure(nero, folder / f"{orbit.name}.{suffix}", orbit.name)
        curve_figure(nero, folder / f"curves.{suffix}")


def display_names(paths: Sequence[Path]) -> list[str]:
    """Names of files; with as many of their folders as it takes to tell them apart."""
    depth = 1
    most = max(len(path.parts) for path in paths)
    while True:
        named = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(named)) == len(named) or depth >= most:
            return named
        depth += 1
