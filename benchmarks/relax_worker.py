"""Steps of cell relaxation in ASE with another package, for ``relax_many.py``.

    python relax_worker.py PEER STRUCTURES.xyz STEPS THREADS

FIRE and FrechetCellFilter, one structure after the other; prints structure-steps per second.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.optimize import FIRE
from peers import PEERS


def main() -> None:
    peer, _, size = sys.argv[1].partition("-")
    frames, steps = read(sys.argv[2], ":"), int(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    calculators = {}
    taken, seconds = 0, 0.0
    for atoms in frames:
        symbols = sorted(set(atoms.get_chemical_symbols()))
        key = "".join(symbols)
        if key not in calculators:
            calculators[key] = PEERS[peer](size, symbols, "float32")
            warm = atoms.copy()
            warm.calc = calculators[key]
            warm.get_forces()
            warm.get_stress()
        atoms.calc = calculators[key]
        optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
        begin = time.perf_counter()
        optimizer.run(fmax=0.0, steps=steps)
        seconds += time.perf_counter() - begin
        taken += optimizer.nsteps
    print("RESULT " + json.dumps({"structure_steps_per_second": taken / seconds}))


if __name__ == "__main__":
    main()
