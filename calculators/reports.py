"""Relaxation and molecular dynamics at the terminal: tables, progress bars, files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import units
from ase.io import write
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mlip.calculators.bench import Timing, bench, largest_system
from mlip.calculators.chunks import SHARE
from mlip.calculators.dynamics import MDResult, run_md
from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.model_sources import own_potentials, parse_dtype
from mlip.calculators.relaxation import RelaxResult, last_frame, relax_many
from mlip.data.export import require_writable
from mlip.pretrained import find
from mlip.programfile import write_program


def relax_and_report(
    structures: Sequence[str], model: Any, *, out: str | None = None, **settings: Any
) -> bool:
    """``relax_many``, a table of the results, the structures in ``out``; whether all converged."""
    if out is not None:
        require_writable(Path(out))  # an ending or folder that is wrong must not cost the work
    console = _console()
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("relax", total=None)

        def show(name: str, step: int, fmax: float) -> None:
            progress.update(task, description=f"{name}: step {step}, fmax {fmax:.4f} eV/A")

        results = relax_many(structures, model, on_step=show, **settings)
    console.print(relax_table(results))
    for result in results:
        if result.error is not None:
            console.print(f"{result.name}: {result.error}", markup=False, soft_wrap=True)
    relaxed = [result.atoms for result in results if result.error is None and result.atoms]
    if out is not None and relaxed:
        write(out, relaxed)
        console.print(f"relaxed structures ({len(relaxed)}) in {out}", markup=False, soft_wrap=True)
    return all(result.converged for result in results)


def _console() -> Console:
    console = Console()
    # In a file or a pipe a table needs no folding.
    return console if console.is_terminal else Console(width=160)


def relax_table(results: Sequence[RelaxResult]) -> Table:
    """One line for each structure."""
    table = Table(box=None, header_style="bold")
    table.add_column("structure", overflow="fold")
    for name in ("E/atom\n(eV)", "fmax\n(eV/A)", "pressure\n(GPa)", "volume\n(A^3)"):
        table.add_column(name, justify="right")
    table.add_column("a b c (A)\nangles (deg)", no_wrap=True)
    table.add_column("space group")
    table.add_column("steps", justify="right")
    table.add_column("status", no_wrap=True)
    for result in results:
        table.add_row(os.path.basename(result.name), *_cells(result))
    return table


def _cells(result: RelaxResult) -> list[str]:
    status = "failed" if result.error is not None else result.status
    atoms = result.atoms
    if atoms is None or not np.isfinite(result.energy):
        return ["", "", "", "", "", result.spacegroup or "", "", status]
    periodic = atoms.pbc.all()
    lattice = atoms.cell.cellpar()
    shape = " ".join(f"{x:.4f}" for x in lattice[:3]) + "\n"
    shape += " ".join(f"{x:.2f}" for x in lattice[3:])
    pressure = None if result.stress is None else -result.stress[:3].mean() / units.GPa
    return [
        f"{result.energy / len(atoms):.5f}",
        f"{result.fmax:.4f}",
        "" if pressure is None else f"{pressure:.3f}",
        f"{abs(atoms.cell.volume):.3f}" if periodic else "",
        shape if periodic else "",
        result.spacegroup or "",
        str(result.steps),
        status,
    ]


def md_and_report(
    structure: str,
    model: Any,
    *,
    repeat: tuple[int, int, int],
    trajectory: str,
    log: str,
    overwrite: bool,
    **settings: Any,
) -> MDResult:
    """``run_md`` of the last frame of a file, with a progress bar and a summary."""
    for path in (trajectory, log):
        if os.path.exists(path) and not (overwrite or settings["restart"]):
            raise FileExistsError(
                f"{path} exists; continue it (--restart), replace it (--overwrite) "
                f"or give another name"
            )
    console = _console()
    atoms = last_frame(structure)
    if tuple(repeat) != (1, 1, 1):
        atoms = atoms.repeat(repeat)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("steps", total=settings["steps"])

        def show(step: int, steps: int) -> None:
            progress.update(task, completed=step)

        result = run_md(atoms, model, trajectory=trajectory, log=log, on_step=show, **settings)
    console.print(f"{len(atoms)} atoms, {result.steps} steps", soft_wrap=True)
    for name, label, unit in (
        ("temperature_K", "temperature", "K"),
        ("potential_eV", "potential energy", "eV"),
        ("total_eV", "total energy", "eV"),
        ("pressure_GPa", "pressure", "GPa"),
        ("volume_A3", "volume", "A^3"),
    ):
        values = result.log[name]
        if len(values) and np.isfinite(values).all():
            console.print(f"  {label:<18} {values.mean():12.4f} +- {values.std():.4f} {unit}")
    console.print(f"frames in {trajectory}, log in {log}", markup=False, soft_wrap=True)
    return result


def compile_and_report(model: str, out: str, *, dtype: str = "") -> None:
    """``write_program``, with time and size."""
    console = _console()
    begin = time.perf_counter()
    (potential,) = own_potentials([find(model)], torch.device("cpu"), parse_dtype(dtype))
    with console.status("compiling, about a minute"):
        write_program(potential, out)
    kind = f"{type(potential.model).__name__} in {str(potential.dtype)[6:]}"
    console.print(
        f"{out}: {kind}, {os.path.getsize(out) / 1e6:.2f} MB, compiled and checked in "
        f"{time.perf_counter() - begin:.0f} s\nit is code for this machine: load it with "
        f"program={out!r} beside its model",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def bench_and_report(
    model: str,
    structure: str | None = None,
    *,
    timestep: float = 1.0,
    max_atoms: int = 4096,
    **settings: Any,
) -> None:
    """``bench`` as a table, and the largest system that fits."""
    console = _console()
    calculator = EqCalculator(model, **settings)
    atoms = None if structure is None else last_frame(structure)
    with Progress(TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("timing", total=None)

        def show(timing: Timing) -> None:
            progress.update(task, description=f"timed {timing.num_atoms} atoms")

        timings = bench(calculator, atoms, max_atoms=max_atoms, on_timing=show)
    table = Table(title=f"energy, forces and stress on {calculator.device}, {calculator.dtype}")
    table.add_column("structure")
    for column in (
        "atoms", "edges", "ms/step", "atoms/s", f"ns/day at {timestep:g} fs",
        "outside the model", "peak MiB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for t in timings:
        table.add_row(
            t.name, f"{t.num_atoms}", f"{t.num_edges}", f"{t.milliseconds:.3g}",
            f"{t.atoms_per_second:,.0f}", f"{t.nanoseconds_per_day(timestep):.3g}",
            f"{t.neighbors:.0%}", f"{t.peak:.3g}",
        )  # fmt: skip
    console.print(table)
    if (fits := largest_system(timings, calculator.device)) is not None:
        console.print(
            f"about {fits:,} atoms fit into {SHARE:.0%} of the free memory; more go in pieces"
        )
