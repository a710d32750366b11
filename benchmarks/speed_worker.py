"""One package of ``speed.py``: reads the name of a system, answers with seconds per step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from peers import PEERS

STEPS = {"molecule": 10, "Si8": 10, "Si64": 5, "Si216": 3}  # others: one


def system(name: str) -> Atoms:
    if name == "molecule":  # 27 atoms, C, H, N, O, about the neighbours of 3BPA
        atoms = molecule("C6H6") + molecule("CH3CH2NH2") + molecule("H2O") + molecule("CO")
        for k, start in enumerate((12, 22, 25)):
            atoms.positions[start:] += [1.1, 0.6 * (-1) ** k, 2.6]
        return atoms
    n = round((int(name[2:]) / 8) ** (1 / 3))
    return bulk("Si", cubic=True) * (n, n, n)


def mlip_calculator(name: str, dtype: str) -> Calculator:
    """A model file, or a model of this package with random weights: ``name`` or ``name:size``."""
    from mlip.calculators.eq_calculator import EqCalculator
    from mlip.models import build
    from mlip.potential import Potential
    from mlip.training.sizes import SIZES

    if Path(name).is_file():
        return EqCalculator(name, device="cpu", dtype=dtype)
    kind, _, size = name.partition(":")
    model = build(kind, **{"cutoff": 5.0, **SIZES[kind][size or "medium"]})
    return EqCalculator(Potential(model, torch.zeros(119)), device="cpu", dtype=dtype)


def resident(field: str) -> float:
    """MiB of the process: VmRSS now, or VmHWM, the peak since ``forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def timed_steps(
    atoms: Atoms,
    number: int,
    rng: np.random.Generator,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], float]:
    """Seconds of energy, forces and stress, positions moving, and the peak of memory in MiB."""
    seconds = []
    start = atoms.positions.copy()
    forget_peak()
    before = resident("VmRSS")
    for step in range(number + 1):
        atoms.positions = start + rng.normal(0, 0.02, start.shape)
        begin = clock()
        atoms.get_potential_energy()
        atoms.get_forces()
        if atoms.pbc.all():
            atoms.get_stress()
        if step:  # the first warms up
            seconds.append(clock() - begin)
    return seconds, resident("VmHWM") - before


def main() -> None:
    package, threads, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    peer, _, size = package.partition("-")
    torch.set_num_threads(threads)
    calculators: dict[str, Calculator] = {}
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        name = line.strip()
        atoms = system(name)
        if name not in calculators:
            if peer in PEERS:
                symbols = sorted(set(atoms.get_chemical_symbols()))
                calculators[name] = PEERS[peer](size, symbols, dtype)
            else:
                calculators[name] = mlip_calculator(package, dtype)
            one = Atoms("Si", cell=[3, 3, 3], pbc=True) if name != "molecule" else atoms[:2]
            one.calc = calculators[name]
            one.get_forces()  # libraries and kernels are loaded now, too
        atoms.calc = calculators[name]
        seconds, peak = timed_steps(atoms, STEPS.get(name, 1), rng)
        answer = {"seconds": seconds, "peak_MiB": peak}
        print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
