"""Figures of orbit errors for papers, PNG or PDF, without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlip.evaluation.nero import QUANTITIES, UNITS, Nero, OrbitErrors, aggregate
from mlip.evaluation.orbits import Orbit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FINE = 90  # rows of a drawn sphere
COLOURS = ("#c8500a", "#1f6fb4", "#0b8a63", "#a3478f", "#9a7400", "#5a5f6b")  # those of the page
DECADES = 6  # of a logarithmic colour scale, at most
ROUND_OFF = 0.05  # meV; a linear scale that ended below would make patterns of round-off
FLOOR = 1e-12  # where a deviation of zero is drawn
WORDS = {"energy": "energy", "forces": "force"}
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
    nero: Nero,
    path: str | Path,
    orbit: str = "rotations",
    sample: int | None = None,
    reference: str = "consensus",
    log: bool = False,
) -> None:
    """Whole-sphere maps (Mollweide), one row for each quantity and one column for each model.

    Parameters
    ----------
    path : PNG or PDF
    orbit : "rotations" or "reflections"
    sample : one sample; by default the root mean square over all
    reference : "consensus" or "label", as of ``OrbitErrors.errors``
    log : logarithmic colours, which show the round-off of an exact model beside the errors of
        another; linear ones from zero show where on the sphere a model errs
    """
    chosen = next(o for o in nero.orbits if o.name == orbit)
    figure = _figure(3.1 * len(nero.models) + 0.6, 2.1 * len(QUANTITIES))
    grid = figure.add_gridspec(len(QUANTITIES), len(nero.models))
    for row, quantity in enumerate(QUANTITIES):
        maps = {
            name: sphere_map(chosen, _values(results[orbit], quantity, sample, reference))
            for name, results in nero.models.items()
        }
        norm = _norm(np.stack(list(maps.values())), log)
        axes = []
        for column, (name, values) in enumerate(maps.items()):
            axis: Any = figure.add_subplot(grid[row, column], projection="mollweide")
            drawn = _draw(axis, chosen, values, norm)
            if row == 0:
                axis.set_title(name, fontsize="medium", parse_math=False)
            axes.append(axis)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.85, pad=0.02)
        bar.set_label(f"{WORDS[quantity]} error / {UNITS[quantity]}")
    figure.savefig(path, dpi=200)


def _draw(axis: Any, orbit: Orbit, values: np.ndarray, norm: Any) -> Any:
    smooth = interpolated(values, np.radians(orbit.coordinates()["theta"]))
    drawn = axis.pcolormesh(
        np.linspace(-np.pi, np.pi, 2 * FINE + 1),
        np.linspace(np.pi / 2, -np.pi / 2, FINE + 1),
        smooth,
        norm=norm,
        cmap="viridis",
        rasterized=True,
    )
    axis.grid(color="white", alpha=0.25, lw=0.4)
    axis.set_xticklabels([])
    axis.set_yticklabels([])
    return drawn


def interpolated(values: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """(polar, azimuth) on rings at ``theta`` -> (FINE, 2 FINE), uniform from longitude -pi, by a
    spline through all points; no new extremes."""
    from scipy.interpolate import RectBivariateSpline

    azimuth = values.shape[1]
    # Beyond a pole a meridian goes on half a turn further; around, it closes.
    over = np.roll(values, azimuth // 2, axis=1)
    rows = np.concatenate([over[1::-1], values, over[:-3:-1]])
    nodes = np.concatenate([-theta[1::-1], theta, 2 * np.pi - theta[:-3:-1]])
    columns = np.arange(-azimuth, 2 * azimuth)
    spline = RectBivariateSpline(nodes, columns * 2 * np.pi / azimuth, np.tile(rows, 3))
    fine_theta = (np.arange(FINE) + 0.5) * np.pi / FINE
    fine_phi = (np.arange(2 * FINE) + 0.5) * np.pi / FINE - np.pi
    return np.clip(spline(fine_theta, fine_phi), values.min(), values.max())


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
    figure = _figure(3.4 * len(shown), 2.8 * len(QUANTITIES))
    rows = figure.subplots(len(QUANTITIES), len(shown), sharey="row", squeeze=False)
    for quantity, axes in zip(QUANTITIES, rows, strict=True):
        for axis, orbit in zip(axes, shown, strict=True):
            (x,) = orbit.coordinates().values()
            named = x.dtype.kind == "U"
            place = np.arange(len(x)) if named else x
            for k, (name, results) in enumerate(nero.models.items()):
                y = _values(results[orbit.name], quantity, sample, "consensus")
                axis.plot(
                    place,
                    np.where(y > 0, y, FLOOR),
                    "-" if orbit.kind == "curve" else "o",
                    color=COLOURS[k % len(COLOURS)],
                    ms=3,
                    lw=1.2,
                    label=name,
                )
            axis.set_yscale("log")
            if named:
                axis.set_xticks(place, x, rotation=60, ha="right", fontsize="x-small")
            axis.set_xlabel(TITLES[orbit.name])
        axes[0].set_ylabel(f"{WORDS[quantity]} deviation / {UNITS[quantity]}")
    for text in rows[0, 0].legend(fontsize="small").get_texts():
        text.set_parse_math(False)  # names come from files
    figure.savefig(path, dpi=200)


def _values(result: OrbitErrors, quantity: str, sample: int | None, reference: str) -> np.ndarray:
    errors = result.errors(quantity, reference)
    return aggregate(errors) if sample is None else errors[sample]


def _norm(values: np.ndarray, log: bool) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    high = float(np.nanmax(values))
    if not log:
        return Normalize(0.0, max(high, ROUND_OFF))
    high = max(high, FLOOR)
    return LogNorm(
        max(min(float(np.nanmin(values)), high / 3), high * 10.0**-DECADES), high, clip=True
    )


def _figure(width: float, height: float) -> Figure:
    # Figure and canvas by hand: pyplot would keep global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
