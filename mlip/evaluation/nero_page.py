"""Orbit errors as one HTML page that opens without a network: styles, scripts and data inside.

The parts lie in ``page/``: a skeleton, a style sheet, and scripts that are joined in order.
Arrays are float32 in base64.  Whatever comes from files (names, titles) is JSON in which no markup
can end the script element, and the scripts put it on the page as text only.
"""

from __future__ import annotations

import base64
import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from ase.formula import Formula

from mlip.evaluation.nero import QUANTITIES, UNITS, Nero, OrbitErrors, Sample, embed
from mlip.evaluation.nero_file import ARRAYS, grid_of
from mlip.tensorfile import write_bytes

SCRIPTS = ("numbers.js", "charts.js", "sphere.js", "structure.js", "main.js")
# Characters with a meaning in HTML, or that end a line in JavaScript.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def write_page(nero: Nero, path: str | Path) -> None:
    """Write the page; the file is the old one or the new one, never half of it."""
    write_bytes(path, page(nero).encode())


def page(nero: Nero) -> str:
    """The HTML text of the page."""
    folder = files("mlip.evaluation") / "page"
    parts = {
        "@TITLE@": html.escape(f"NERO: {nero.source}"),
        "@STYLE@": (folder / "page.css").read_text(encoding="utf-8"),
        "@SCRIPT@": "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "@DATA@": embedded_json(page_data(nero)),
    }
    text = (folder / "page.html").read_text(encoding="utf-8")
    # In one pass: a mark inside a part stays what it is.
    return re.sub("|".join(parts), lambda match: parts[match[0]], text)


def embedded_json(value: Any) -> str:
    """JSON that may stand inside a script element: it has no ``<``, ``>`` or ``&``."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(ESCAPES)


def page_data(nero: Nero) -> dict[str, Any]:
    """All that the scripts read, as plain values."""
    from matplotlib import colormaps

    table = np.round(255 * colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]).astype(int)
    elements = sorted({int(z) for s in nero.samples for z in s.atomic_numbers})
    return {
        "source": nero.source,
        "units": UNITS,
        "colours": "".join(f"{r:02x}{g:02x}{b:02x}" for r, g, b in table),
        "elements": {z: _element(z) for z in elements},
        "samples": [_sample(s) for s in nero.samples],
        "orbits": {orbit.name: grid_of(orbit) for orbit in nero.orbits},
        "models": [
            {
                "name": name,
                "orbits": {key: _packed(result) for key, result in results.items()},
                "maps": _maps(results[nero.orbits[0].name]),
            }
            for name, results in nero.models.items()
        ],
    }


def _maps(result: OrbitErrors) -> dict[str, Any]:
    """Two-dimensional maps of the samples, by quantity and reference."""
    maps = {}
    for quantity in QUANTITIES:
        for reference in ("label", "consensus"):
            points, explained = embed(result.errors(quantity, reference), result.weights)
            # Five digits are more than a pixel.
            maps[f"{quantity} {reference}"] = {
                "points": [[float(f"{x:.5g}") for x in point] for point in points],
                "explained": explained.round(4).tolist(),
            }
    return maps


def _packed(result: OrbitErrors) -> dict[str, Any]:
    packed = {key: _base64(getattr(result, key)) for key in ARRAYS}
    return {"T": len(result.weights), **packed}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def _sample(sample: Sample) -> dict[str, Any]:
    symbols = [chemical_symbols[z] for z in sample.atomic_numbers]
    return {
        "name": sample.name,
        "formula": Formula.from_list(symbols).format("hill"),
        "numbers": sample.atomic_numbers.tolist(),
        "positions": _base64(sample.positions),
        "cell": sample.cell.tolist(),
        "pbc": np.asarray(sample.pbc, dtype=bool).tolist(),
    }


def _element(z: int) -> dict[str, Any]:
    colour = 255 * jmol_colors[z]
    return {
        "radius": float(covalent_radii[z]),
        "colour": _hex(colour),
        "dark": _hex(0.45 * colour),
    }


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{round(c):02x}" for c in colour)
