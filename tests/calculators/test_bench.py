"""The table of times: what is timed, and what follows from it; never how long it took."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase.build import bulk
from typer.testing import CliRunner

from mlip.calculators import EqCalculator
from mlip.calculators.bench import Timing, bench, example, growing, largest_system
from mlip.cli import app

CPU = torch.device("cpu")


def test_structures_grow_to_the_limit(toy) -> None:
    seen: list[Timing] = []
    timings = bench(toy, bulk("Cu", cubic=True), max_atoms=40, on_timing=seen.append)
    assert [t.num_atoms for t in timings] == [4, 32] and seen == timings
    cutoff = EqCalculator(toy).cutoff
    assert timings[1].num_edges > 0 and cutoff > 0
    assert all(t.milliseconds > 0 and t.neighbors > 0 for t in timings)
    # One structure is always timed, however large.
    assert len(bench(toy, bulk("Cu", cubic=True), max_atoms=1)) == 1


def test_copies_of_a_molecule_do_not_touch(toy) -> None:
    molecule = example(EqCalculator("ethanol"))
    assert set(molecule.numbers) <= {1, 6, 8}
    for _, atoms in growing(molecule):
        assert atoms.get_all_distances()[atoms.get_all_distances() > 0].min() > 0.9
        if len(atoms) > len(molecule):
            break
    assert set(example(EqCalculator("silicon")).get_chemical_symbols()) == {"Si"}


def test_layers_and_wires_without_a_whole_cell_grow_too(toy) -> None:
    for pbc in ((1, 1, 0), (0, 1, 0)):
        unit = bulk("Cu", cubic=True)
        unit.set_cell(unit.cell * np.array(pbc)[:, None])
        unit.pbc = pbc
        (_, (name, large)) = itertools.islice(growing(unit), 2)
        assert name == "Cu32" and (large.pbc == pbc).all()
        distances = large.get_all_distances(mic=True)
        assert distances[distances > 0].min() > 2.0


def test_what_follows_from_a_time() -> None:
    timing = Timing("Si8", 8, 224, 4.0, 0.1, 10.0)
    assert timing.atoms_per_second == pytest.approx(2000)
    # 21.6 million steps of 2 fs in a day
    assert timing.nanoseconds_per_day(2.0) == pytest.approx(43.2)


def test_largest_system_follows_the_growth_of_memory() -> None:
    small, large = Timing("a", 100, 0, 1, 0, 30.0), Timing("b", 200, 0, 1, 0, 50.0)
    fits = largest_system([small, large], CPU)
    if fits is not None:  # the machine says how much is free
        double = Timing("c", 200, 0, 1, 0, 70.0)
        half = largest_system([small, double], CPU)
        assert half is not None and 0.3 < half / fits < 0.7
    assert largest_system([small], CPU) is None
    assert largest_system([small, Timing("b", 200, 0, 1, 0, np.nan)], CPU) is None


PEAKS = """
import sys, torch
from mlip.allocator import tune_allocator
from mlip.calculators.memory import PeakMemory
if not (sys.platform.startswith("linux") and tune_allocator()):
    sys.exit()
for _ in range(2):
    peak = PeakMemory(torch.device("cpu"))
    x = torch.ones(8 * 2**20)
    del x
    assert 25 < peak.read() < 64, peak.read()
"""


def test_a_peak_is_not_made_of_what_was_freed_before() -> None:
    """Or the growth of memory would be too small, and too large a system would fit."""
    run = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_command(tmp_path) -> None:
    file = tmp_path / "si.xyz"
    bulk("Si").write(file)
    result = CliRunner().invoke(app, ["bench", "silicon", str(file), "--max-atoms", "16"])
    assert result.exit_code == 0, result.output
    assert "ms/step" in result.output and "Si16" in result.output
