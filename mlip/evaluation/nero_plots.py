"""Figures of orbit errors for papers, PNG or PDF, without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlip.evaluation.nero import QUANTITIES, UNITS, Nero, OrbitErrors, aggregate
from mlip.evaluation.orbits import Orbit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = 6  # of a logarithmic colour scale, at most
LOG_FROM = 30.0  # ratio of errors from which a scale is logarithmic
TITLES = {
    "plane": "rotation about z / degrees",
    "translations": "translation / Å",
    "permutations": "random order of the atoms",
    "cells": "choice of the cell",
}


def sphere_map(orbit: Orbit, errors: np.ndarray) -> np.ndarray:
    """Errors (T,) on a sphere grid as (polar, azimuth): root mean square over the spin angle;
    mirror planes at n and -n."""
    grid = errors.reshape(orbit.shape)
    if orbit.name == "rotations":
        return np.asarray(np.sqrt(np.mean(grid**2, axis=2)))
    return np.concatenate([grid, grid[::-1]], axis=1)  # the antipode: pi - theta, phi + pi


def sphere_figure(
    nero: Nero, path: str | Path, orbit: str = "rotations", sample: int | None = None
) -> None:
    """Whole-sphere maps (Mollweide), one row for each quantity and one column for each model.

    Parameters
    ----------
    path : PNG or PDF
    orbit : "rotations" or "reflections"
    sample : one sample; by default the root mean square over all
    """
    chosen = next(o for o in nero.orbits if o.name == orbit)
    figure = _figure(3.1 * len(nero.models) + 0.6, 2.1 * len(QUANTITIES))
    grid = figure.add_gridspec(len(QUANTITIES), len(nero.models))
    for row, quantity in enumerate(QUANTITIES):
        maps = {
            name: sphere_map(chosen, _values(results[orbit], quantity, sample))
            for name, results in nero.models.items()
        }
        norm = _norm(np.stack(list(maps.values())))
        axes = []
        for column, (name, values) in enumerate(maps.items()):
            axis: Any = figure.add_subplot(grid[row, column], projection="mollweide")
            drawn = _draw(axis, chosen, values, norm)
            if row == 0:
                axis.set_title(name, fontsize="medium", parse_math=False)
            axes.append(axis)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.02)
        bar.set_label(f"{'force' if quantity == 'forces' else quantity} error / {UNITS[quantity]}")
    figure.savefig(path, dpi=200)


def _draw(axis: Any, orbit: Orbit, values: np.ndarray, norm: Any) -> Any:
    azimuth = values.shape[1]
    # Cell edges midway between the nodes; the map's longitude runs from -pi to pi.
    latitude = np.pi / 2 - np.radians(orbit.coordinates()["theta"])
    rows = np.concatenate([[np.pi / 2], (latitude[1:] + latitude[:-1]) / 2, [-np.pi / 2]])
    columns = (np.arange(azimuth + 1) - azimuth / 2) * 2 * np.pi / azimuth
    drawn = axis.pcolormesh(
        columns,
        rows,
        np.roll(values, azimuth // 2, axis=1),
        norm=norm,
        cmap="viridis",
        rasterized=True,
    )
    axis.grid(color="white", alpha=0.25, lw=0.4)
    axis.set_xticks([])
    axis.set_yticks([])
    return drawn


def curve_figure(nero: Nero, path: str | Path, sample: int | None = None) -> None:
    """Errors against the consensus along the other orbits, all models together, PNG or PDF."""
    shown = [
        o
        for o in nero.orbits
        if o.kind != "sphere"
        and any(not np.isnan(m[o.name].forces).all() for m in nero.models.values())
    ]
    if not shown:
        return
    figure = _figure(3.4 * len(shown), 2.5 * len(QUANTITIES))
    for row, quantity in enumerate(QUANTITIES):
        for column, orbit in enumerate(shown):
            axis = figure.add_subplot(len(QUANTITIES), len(shown), row * len(shown) + column + 1)
            (x,) = orbit.coordinates().values()
            ticks = x if x.dtype.kind == "U" else None
            place = np.arange(len(x)) if ticks is not None else x
            style = "-" if orbit.kind == "curve" else "o"
            for name, results in nero.models.items():
                y = _values(results[orbit.name], quantity, sample, "consensus")
                axis.plot(place, np.maximum(y, 1e-12), style, ms=3, lw=1.2, label=f"{name}")
            axis.set_yscale("log")
            if ticks is not None:
                axis.set_xticks(place, ticks, rotation=60, ha="right", fontsize="x-small")
            axis.set_xlabel(TITLES[orbit.name])
            if column == 0:
                word = "force" if quantity == "forces" else quantity
                axis.set_ylabel(f"{word} deviation / {UNITS[quantity]}")
            if row == column == 0:
                for text in axis.legend(fontsize="small").get_texts():
                    text.set_parse_math(False)  # names come from files
    figure.savefig(path, dpi=200)


def _values(
    result: OrbitErrors, quantity: str, sample: int | None, reference: str = "label"
) -> np.ndarray:
    errors = result.errors(quantity, reference)
    return aggregate(errors) if sample is None else errors[sample]


def _norm(values: np.ndarray) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    high = max(float(np.nanmax(values)), 1e-12)
    low = float(np.nanmin(values))
    if high > LOG_FROM * max(low, 0.0):
        return LogNorm(max(low, high * 10.0**-DECADES), high, clip=True)
    return Normalize(0.0, high)


def _figure(width: float, height: float) -> Figure:
    # Figure and canvas by hand: pyplot would keep global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
