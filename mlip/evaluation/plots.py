"""Parity and learning-curve plots, PNG, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlip.evaluation.metrics import QUANTITIES, UNITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARITY_UNITS = {"energy": "eV/atom", "forces": "eV/Å", "stress": "eV/Å³"}
MAX_DRAWN = 20_000  # points of one set and quantity

Pair = tuple[np.ndarray, np.ndarray]  # labels, predictions


def parity_plot(sets: Mapping[str, Mapping[str, Pair]], path: str | Path) -> None:
    """Predictions against labels, one panel for each quantity.

    Parameters
    ----------
    sets : name of a data set -> quantity -> (labels, predictions), in eV and angstrom
    path : PNG file
    """
    present = [q for q in QUANTITIES if any(q in pairs for pairs in sets.values())]
    figure, axes = _panels(len(present))
    for axis, quantity in zip(axes, present, strict=True):
        low, high = np.inf, -np.inf
        for name, pairs in sets.items():
            if quantity not in pairs:
                continue
            label, prediction = pairs[quantity]
            error = np.abs(prediction - label)
            step = max(1, -(-len(label) // MAX_DRAWN))
            axis.plot(
                label[::step],
                prediction[::step],
                ".",
                ms=3,
                alpha=0.5,
                label=f"{name}: MAE {1000 * error.mean():.3g} {UNITS[quantity]}",
            )
            low = min(low, label.min(), prediction.min())
            high = max(high, label.max(), prediction.max())
        axis.plot([low, high], [low, high], "k-", lw=0.5)
        axis.set_xlabel(f"reference {quantity} / {PARITY_UNITS[quantity]}")
        axis.set_ylabel(f"predicted {quantity} / {PARITY_UNITS[quantity]}")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def learning_curve(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Errors of training and validation over epochs, from the rows of ``log.jsonl``."""
    present = [q for q in QUANTITIES if any(f"valid_{q}_mae" in row for row in rows)]
    figure, axes = _panels(len(present) + 1)
    series = [("loss", ("train_loss", "valid_loss"), 1.0)]
    series += [(q, (f"train_{q}_mae", f"valid_{q}_mae"), 1000.0) for q in present]
    for axis, (quantity, keys, factor) in zip(axes, series, strict=True):
        for key, style in zip(keys, ("-", "o-"), strict=True):
            points = [
                (row["epoch"], factor * row[key]) for row in rows if row.get(key) not in (None, 0)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), style, ms=2, lw=1, label=key.split("_")[0])
                axis.set_yscale("log")
        unit = f" MAE / {UNITS[quantity]}" if quantity in UNITS else ""
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{quantity}{unit}")
        if axis.lines:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _panels(number: int) -> tuple[Figure, list[Any]]:
    # Figure and canvas by hand: pyplot would keep global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * max(1, number), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, max(1, number), k + 1) for k in range(number)]
