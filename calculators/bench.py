"""How fast a model is on this machine, what memory it takes, and how large a system fits.

Structures grow from a small one to the largest that a time limit allows; positions change at every
step, as in molecular dynamics, and energy, forces and stress are computed through the calculator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2
from ase.data import chemical_symbols, reference_states

from mlip.calculators.chunks import SHARE
from mlip.calculators.eq_calculator import EqCalculator
from mlip.calculators.memory import PeakMemory, available_memory

CRYSTALS = ("diamond", "fcc", "bcc", "hcp", "sc")
MOVE = 0.02  # angstrom, of each coordinate between two steps


@dataclass
class Timing:
    """Cost of a step for one structure; medians.

    ``neighbors`` is the share of the time outside the model, that is for neighbours and checks;
    ``peak`` in MiB is above the loaded model, NaN where the machine does not say.
    """

    name: str
    num_atoms: int
    num_edges: int
    milliseconds: float
    neighbors: float
    peak: float

    @property
    def atoms_per_second(self) -> float:
        return 1e3 * self.num_atoms / self.milliseconds

    def nanoseconds_per_day(self, timestep: float) -> float:
        """Of molecular dynamics with ``timestep`` in fs."""
        return 86_400e3 / self.milliseconds * timestep * 1e-6


def bench(
    model: Any,
    structure: Atoms | None = None,
    *,
    seconds: float = 5.0,
    max_atoms: int = 4096,
    on_timing: Callable[[Timing], None] | None = None,
    **calculator_options: Any,
) -> list[Timing]:
    """Time a model on structures of growing size.

    Parameters
    ----------
    model : whatever ``EqCalculator`` takes, or one of these
    structure : Atoms, optional
        It and its supercells; else a crystal or a molecule of elements that the model knows.
    seconds : float
        No structure is tried whose step would take longer.
    max_atoms : int
        No larger structure is tried.
    on_timing : called with each result
    calculator_options : device, dtype and the like
    """
    if isinstance(model, EqCalculator):
        calculator = model
    else:
        calculator = EqCalculator(model, **calculator_options)
    timings: list[Timing] = []
    unit = structure if structure is not None else example(calculator)
    for name, atoms in growing(unit):
        if timings:
            expected = timings[-1].milliseconds * len(atoms) / timings[-1].num_atoms
            if len(atoms) > max_atoms or expected > 1e3 * seconds:
                break
        timings.append(measure(calculator, name, atoms))
        if on_timing is not None:
            on_timing(timings[-1])
    return timings


def measure(calculator: EqCalculator, name: str, atoms: Atoms, budget: float = 1.0) -> Timing:
    """Time steps of one structure for about ``budget`` seconds, three at least."""
    rng = np.random.default_rng(0)
    atoms = atoms.copy()
    start = atoms.positions.copy()
    peak = PeakMemory(calculator.device)
    total: list[float] = []
    outside: list[float] = []
    calculator.calculate(atoms)  # the first warms up
    while len(total) < 3 or sum(total) < budget:
        atoms.positions = start + rng.normal(0, MOVE, start.shape)
        begin = time.perf_counter()
        calculator.calculate(atoms)
        total.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        graphs = calculator.checked_graphs(atoms)
        outside.append(time.perf_counter() - begin)
    milliseconds = 1e3 * statistics.median(total)
    share = 1e3 * statistics.median(outside) / milliseconds
    edges = max(graph.edge_index.shape[1] for graph in graphs.values())
    return Timing(name, len(atoms), edges, milliseconds, share, peak.read())


def largest_system(timings: list[Timing], device: torch.device) -> int | None:
    """Atoms that are evaluated as a whole with the memory that is free, if what they take grows
    from the last two sizes on as between them; None where the machine does not say."""
    if len(timings) < 2:
        return None
    a, b = timings[-2:]
    slope = (b.peak - a.peak) / (b.num_atoms - a.num_atoms)
    free = available_memory(device) / 2**20
    if not (slope > 0 and np.isfinite(slope) and np.isfinite(free)):
        return None
    return int(SHARE * free / slope)


def example(calculator: EqCalculator) -> Atoms:
    """A structure of elements that the calculator knows: a molecule if it knows carbon and
    hydrogen, else a crystal."""
    elements = set(calculator.potentials[0].elements)
    if {1, 6} <= elements:
        known = [molecule(name) for name in g2.names]
        return max((m for m in known if set(m.numbers) <= elements), key=len)
    for number in sorted(elements):
        state = reference_states[number]
        if state is not None and state["symmetry"] in CRYSTALS:
            cubic = state["symmetry"] not in ("hcp",)
            return bulk(chemical_symbols[number], cubic=cubic)
    raise ValueError("no example structure for the elements of this model; give a structure")


def growing(unit: Atoms) -> Iterator[tuple[str, Atoms]]:
    """The structure, and supercells of n x n x n; for molecules so many copies on a grid."""
    unit = unit.copy()
    axes = [0, 1, 2] if not unit.pbc.any() else np.flatnonzero(~unit.cell.any(axis=1)).tolist()
    if axes:
        unit.center(vacuum=1.5, axis=axes)
    for n in (1, 2, 3, 5, 8, 12, 18, 27):
        large = unit.repeat(n) if n > 1 else unit
        yield large.get_chemical_formula(), large
