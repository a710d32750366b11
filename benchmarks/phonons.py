"""Phonons of silicon with a model whose symmetry is learned: how far degenerate branches split.

    python benchmarks/phonons.py MODEL --out results/phonons.json --plot ../docs/images/phonons.png

The crystal stands along the axes, then turned at random; the model is taken as it is, and averaged
over the rotations named by ``--rules``.  Force constants are central differences in a 4 x 4 x 4
supercell of the primitive cell; nothing is symmetrised but their order of indices.  Splittings are
those of modes that the space group makes degenerate, in THz.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.phonons import Phonons
from ase.units import _e, _hplanck
from scipy.spatial.transform import Rotation

from mlip.calculators.eq_calculator import EqCalculator

THZ = 1e-12 * _e / _hplanck  # THz of 1 eV
# Modes that belong together, by rising frequency.
DEGENERATE = {
    "G": [[3, 4, 5]],
    "X": [[0, 1], [2, 3], [4, 5]],
    "L": [[0, 1], [4, 5]],
}
PATH, POINTS = "GXWKGL", 120


def relaxed(model: str) -> Atoms:
    """The primitive cell at the minimum of the octahedrally averaged model, which stays cubic."""
    atoms = bulk("Si", a=5.47)
    atoms.calc = EqCalculator(model, dtype="float64", symmetrize="octahedral")
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=200)
    return atoms


def phonons(atoms: Atoms, calculator: EqCalculator) -> Phonons:
    with tempfile.TemporaryDirectory() as folder:
        result = Phonons(atoms, calculator, supercell=(4, 4, 4), delta=0.01, name=f"{folder}/run")
        result.run()
        result.read(acoustic=True)
    return result


def special_points(atoms: Atoms) -> dict[str, np.ndarray]:
    return atoms.cell.bandpath(PATH, npoints=2).special_points


def splittings(result: Phonons, points: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest difference within degenerate modes at each point, THz."""
    found = {}
    for name, groups in DEGENERATE.items():
        omega = THZ * result.band_structure([points[name]], verbose=False)[0]
        found[name] = max(float(np.ptp(omega[group])) for group in groups)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rules", nargs="*", default=["octahedral", "icosahedral"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    upright = relaxed(a.model)
    turned = upright.copy()
    R = Rotation.random(rng=np.random.default_rng(0)).as_matrix()
    turned.set_cell(upright.cell[:] @ R.T, scale_atoms=True)
    points = special_points(upright)
    path = upright.cell.bandpath(PATH, npoints=POINTS)
    x, ticks, labels = path.get_linear_kpoint_axis()

    rules = [None, *a.rules]
    rows = []
    figure, axes = plt.subplots(1, len(rules), figsize=(4 * len(rules), 3.6), sharey=True)
    for axis, rule in zip(np.atleast_1d(axes), rules, strict=True):
        calculator = EqCalculator(a.model, dtype="float64", symmetrize=rule)
        for name, atoms, style in (("turned", turned, "C1"), ("along the axes", upright, "C0")):
            result = phonons(atoms, calculator)
            row = {"rule": rule or "none", "crystal": name, **splittings(result, points)}
            row["highest"] = THZ * float(
                result.band_structure([points["G"]], verbose=False)[0].max()
            )
            rows.append(row)
            print(json.dumps(row), flush=True)
            omega = THZ * result.band_structure(path.kpts, verbose=False)
            axis.plot(x, omega, style, lw=0.8, label=[name] + [None] * (omega.shape[1] - 1))
        axis.set_xticks(ticks, [label.replace("G", "Γ") for label in labels])
        axis.set(title=rule or "as trained", xlim=(x[0], x[-1]))
        axis.axhline(0, color="0.7", lw=0.5)
        for tick in ticks:
            axis.axvline(tick, color="0.85", lw=0.5)
    np.atleast_1d(axes)[0].set_ylabel("frequency (THz)")
    np.atleast_1d(axes)[0].legend(frameon=False, loc="upper right", fontsize=8)
    a_cubic = float((4 * upright.get_volume()) ** (1 / 3))
    a.out.write_text(
        json.dumps({"lattice_constant": a_cubic, "splittings_THz": rows}, indent=1) + "\n"
    )
    if a.plot:
        figure.tight_layout()
        figure.savefig(a.plot, dpi=150)


if __name__ == "__main__":
    main()
