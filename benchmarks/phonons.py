"""Phonons of silicon with a model whose symmetry is learned: how far degenerate branches split.

    python benchmarks/phonons.py MODEL --out results/phonons.json --plot ../docs/images/phonons.png

The crystal stands along the axes, then turned at random; the model is taken as it is, and averaged
over the rotations named by ``--rules``.  Phonopy makes the force constants, central differences of
all atoms of the primitive cell in a supercell of 4 x 4 x 4, without the space group: of them only
the order of indices and the sum rule are symmetrised.  Splittings are those of modes that the space
group makes degenerate, in THz.  Needs ``pip install phonopy``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms
from scipy.spatial.transform import Rotation

from mlip.calculators.eq_calculator import EqCalculator

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


def phonons(atoms: Atoms, calculator: EqCalculator) -> Phonopy:
    cell = PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell[:],
        scaled_positions=atoms.get_scaled_positions(),
    )
    result = Phonopy(cell, 4 * np.eye(3, dtype=int), primitive_matrix=np.eye(3), is_symmetry=False)
    result.generate_displacements(distance=0.01, is_plusminus=True, is_diagonal=False)
    result.forces = [
        calculator.get_forces(
            Atoms(displaced.symbols, displaced.positions, cell=displaced.cell, pbc=True)
        )
        for displaced in result.supercells_with_displacements
    ]
    result.produce_force_constants()
    result.symmetrize_force_constants()
    return result


def frequencies(result: Phonopy, points: np.ndarray) -> np.ndarray:
    """(Q, 6) THz, imaginary ones negative, at points (Q, 3) of the reciprocal cell."""
    result.run_qpoints(points)
    return np.asarray(result.qpoints.frequencies)


def special_points(atoms: Atoms) -> dict[str, np.ndarray]:
    return atoms.cell.bandpath(PATH, npoints=2).special_points


def splittings(result: Phonopy, points: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest difference within degenerate modes at each point, THz."""
    found = {}
    for name, groups in DEGENERATE.items():
        omega = frequencies(result, points[name][None])[0]
        found[name] = max(float(np.ptp(omega[group])) for group in groups)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rules", nargs="*", default=["octahedral", "octahedral+mirrors"])
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
            row["highest"] = float(frequencies(result, points["G"][None]).max())
            rows.append(row)
            print(json.dumps(row), flush=True)
            omega = frequencies(result, path.kpts)
            axis.plot(x, omega, style, lw=0.8, label=[name] + [None] * (omega.shape[1] - 1))
        axis.set_xticks(ticks, [label.replace("G", "Γ") for label in labels])
        axis.set(title=rule or "as trained", xlim=(x[0], x[-1]))
        axis.axhline(0, color="0.7", lw=0.5)
        for tick in ticks:
            axis.axvline(tick, color="0.85", lw=0.5)
    np.atleast_1d(axes)[0].set_ylabel("frequency (THz)")
    np.atleast_1d(axes)[0].legend(frameon=False, loc="lower right", fontsize=8)
    a_cubic = float((4 * upright.get_volume()) ** (1 / 3))
    a.out.write_text(
        json.dumps({"lattice_constant": a_cubic, "splittings_THz": rows}, indent=1) + "\n"
    )
    if a.plot:
        figure.tight_layout()
        figure.savefig(a.plot, dpi=150)


if __name__ == "__main__":
    main()
