"""Errors of a potential: MAE and RMSE of energy per atom, forces and stress, streamed over batches.

Sums of |x| and x^2 and counts are kept in float64 for each ``config_type``, ``group`` and element,
so the result does not depend on how the structures were divided into batches or over processes.
Units inside: eV, eV/angstrom, eV/angstrom^3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mlip.data.graph import AtomicGraph

QUANTITIES = ("energy", "forces", "stress")
UNITS = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
SYMBOLS = {"energy": "E", "forces": "F", "stress": "S"}

MAX_ROWS = 12  # of the values of ``group`` in a table; there may be as many as structures

Errors = dict[str, dict[str, float]]  # quantity -> {"mae", "rmse", "count"}, in eV and angstrom
Kinds = Mapping[str, Mapping[str, Errors]]  # kind of group -> name -> errors


class ErrorSums:
    """Running sums of errors.

    Parameters
    ----------
    names : of groups; a batch says by number which structure is of which
    """

    def __init__(self, names: Sequence[str] = ("all",), device: torch.device | str = "cpu") -> None:
        self.names = tuple(names)
        # (quantity, group, [sum |x|, sum x^2, count])
        self.sums = torch.zeros(3, len(self.names), 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        graph: AtomicGraph,
        out: Mapping[str, Tensor],
        types: Tensor | None = None,
        *,
        of_atoms: bool = False,
    ) -> None:
        """Add the errors of a batch.

        Parameters
        ----------
        types : (G,) int64 numbers of groups, 0 by default
        of_atoms : they are numbers of the atoms' groups, (N,); then only forces count
        """
        device = self.sums.device
        if types is None:
            types = torch.zeros(graph.num_structures, dtype=torch.int64, device=device)
        for k, quantity in enumerate(QUANTITIES):
            if quantity not in out or quantity not in graph or (of_atoms and quantity != "forces"):
                continue
            error = out[quantity].detach().double() - graph[quantity]
            owner = types
            mask = ~graph[quantity].isnan()
            if quantity == "energy":
                error = error / graph.ptr.diff()
            elif quantity == "forces":
                owner = types if of_atoms else types.index_select(0, graph.batch)
            else:
                mask = mask & ~graph.volume.isnan()[:, None, None]
            error = torch.where(mask, error, 0).reshape(len(owner), -1)
            count = mask.reshape(len(owner), -1).sum(1)
            rows = torch.stack([error.abs().sum(1), error.square().sum(1), count.double()], dim=1)
            self.sums[k].index_add_(0, owner, rows)

    def total(self) -> Errors:
        """Errors over all structures."""
        return _errors(self.sums.sum(dim=1).tolist())

    def by_type(self) -> dict[str, Errors]:
        """Errors of each group."""
        sums = self.sums.transpose(0, 1).tolist()
        return {name: _errors(rows) for name, rows in zip(self.names, sums, strict=True)}


def _errors(rows: Sequence[Sequence[float]]) -> Errors:
    found: Errors = {}
    for quantity, (absolute, square, count) in zip(QUANTITIES, rows, strict=True):
        if count:
            rmse = math.sqrt(square / count) if square >= 0 else math.nan
            found[quantity] = {"mae": absolute / count, "rmse": rmse, "count": count}
    return found


def line(errors: Errors) -> str:
    """``E 1.20/1.80 meV/atom  F 25.1/38.0 meV/Å``: MAE/RMSE of what was labelled."""
    return "  ".join(
        f"{SYMBOLS[q]} {_milli(e['mae'])}/{_milli(e['rmse'])} {UNITS[q]}" for q, e in errors.items()
    )


def table(rows: Mapping[str, Errors], title: str = "") -> str:
    """Plain text: one row for each entry, MAE and RMSE in the units of the field."""
    present = [q for q in QUANTITIES if any(q in errors for errors in rows.values())]
    head = [title, "labels"]
    units = ["", ""]
    for q in present:
        head += [f"{q} MAE", "RMSE"]
        units += [UNITS[q], UNITS[q]]
    lines = [head, units]
    for name, errors in rows.items():
        counts = "/".join(f"{int(errors[q]['count']) if q in errors else 0}" for q in present)
        cells = [name or "(none)", counts]
        for q in present:
            cells += [_milli(errors[q][k]) if q in errors else "-" for k in ("mae", "rmse")]
        lines.append(cells)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    text = [
        cells[0].ljust(widths[0])
        + "".join(c.rjust(w + 2) for c, w in zip(cells[1:], widths[1:], strict=True))
        for cells in lines
    ]
    text.insert(2, "-" * len(text[0]))
    return "\n".join(text)


def grouped_table(total: Errors, kinds: Kinds, title: str = "") -> str:
    """``table`` of config types, groups and elements, and below it the worst of each kind.

    A kind of one member has no row, ``group`` of more than ``MAX_ROWS`` neither; the worst ones are
    always named.
    """
    rows: dict[str, Errors] = {}
    for kind, errors in kinds.items():
        if 1 < len(errors) and (kind != "group" or len(errors) <= MAX_ROWS):
            prefix = "" if kind == "config_type" else f"{kind} "
            rows |= {prefix + name: e for name, e in errors.items()}
    return "\n".join([table({**rows, "all": total}, title), *worst_lines(kinds)])


def worst_lines(kinds: Kinds) -> list[str]:
    """``worst forces MAE: config_type melt 40.2, element H 51.0 meV/Å`` for each quantity."""
    lines = []
    for q in QUANTITIES:
        found = []
        for kind, errors in kinds.items():
            mae = {name: e[q]["mae"] for name, e in errors.items() if q in e}
            if mae and (len(errors) > 1 or kind == "element"):
                name = max(mae, key=lambda n: mae[n])
                found.append(f"{kind} {name or '(none)'} {_milli(mae[name])}")
        if found:
            lines.append(f"worst {q} MAE: {', '.join(found)} {UNITS[q]}")
    return lines


def flat(errors: Errors, prefix: str = "") -> dict[str, float]:
    """``{"valid_energy_mae": ...}``, in eV and angstrom."""
    return {f"{prefix}{q}_{k}": e[k] for q, e in errors.items() for k in ("mae", "rmse")}


def _milli(value: float) -> str:
    """Three to four digits of 1000 x value."""
    value *= 1000
    if not math.isfinite(value):
        return "nan"
    return (
        f"{value:.0f}"
        if value >= 1000
        else f"{value:.{1 if value >= 100 else 2 if value >= 1 else 3}f}"
    )
