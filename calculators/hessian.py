"""Second derivatives of the energy: by automatic differentiation, or by differences of forces.

A row of the Hessian is the gradient of one component of the forces, dF_a/dr.  Copies of a structure
in one batch do not see each other, so with K copies one gradient gives K rows,

    d( sum_k F_a(k)[copy k] )/dr[copy k] = dF_a(k)/dr

and overhead is shared.  The forces are computed once for all rows.  Cost: N^2, of 3N rows that are
each about two evaluations.  (Only atoms within two receptive fields R of each other have an entry,
but that is no gain up to (4 R)^3: for R = 10 angstrom 3000 atoms of silicon, whose Hessian has
0.7 GB.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip.calculators.chunks import BoundedPotential
from mlip.calculators.rotation_spread import num_turns
from mlip.calculators.shield import shielded
from mlip.data.graph import AtomicGraph
from mlip.potential import Potential

if TYPE_CHECKING:
    from mlip.calculators.eq_calculator import EqCalculator


ATOMS = 256  # of a batch of copies; the tensors of more leave the caches
COPIES = 10  # the forces of one more cost as much as the overhead that it saves
MEMORY = 2.5  # of a gradient of the forces, where an evaluation takes 1; at most 2.4 in all models


def hessian(
    calculator: EqCalculator, atoms: Atoms, method: str = "auto", displacement: float = 1e-3
) -> np.ndarray:
    """(3N, N, 3), eV/angstrom^2, symmetric; arguments as of ``EqCalculator.get_hessian``."""
    if method not in ("auto", "autograd", "finite"):
        raise ValueError(f"method = '{method}'; give 'auto', 'autograd' or 'finite'")
    matrix = None
    if method != "finite":
        try:
            matrix = _by_autograd(calculator, atoms) * calculator.hessian_unit
        except RuntimeError:  # an operation of the model has no second derivative
            if method == "autograd":
                raise
    if matrix is None:
        matrix = _by_differences(calculator, atoms, displacement)
    return ((matrix + matrix.T) / 2).reshape(3 * len(atoms), len(atoms), 3)


def copies_at_once(potential: Potential, bounded: BoundedPotential, graph: AtomicGraph) -> int:
    """How many copies of a structure share a gradient."""
    turns = num_turns(potential)
    N = len(graph.positions)
    most = bounded.copies(graph, min(COPIES, max(1, ATOMS // (turns * N))), MEMORY * turns)
    return math.ceil(3 * N / math.ceil(3 * N / most))  # the last gradient is of as many


def _by_autograd(calculator: EqCalculator, atoms: Atoms) -> np.ndarray:
    """(3N, 3N), mean over the members, in the model's units."""
    with shielded(calculator.device), torch.enable_grad():
        members = [
            _rows(forces, positions, len(atoms)).cpu().numpy()
            for forces, positions in calculator.differentiable_forces(atoms)
        ]
    mean: np.ndarray = np.mean(members, axis=0)
    return mean


def _rows(forces: Tensor, positions: Tensor, num_atoms: int) -> Tensor:
    """-dF/dr (3N, 3N) of the forces on K copies (K N, 3)."""
    n = 3 * num_atoms
    F = forces.reshape(-1, n)  # (K, 3N)
    rows = positions.new_zeros(n, n)
    if not forces.requires_grad:  # without any neighbours
        return rows
    for first in range(0, n, len(F)):
        block = F[:, first : first + len(F)]
        (g,) = torch.autograd.grad(
            block.diagonal().sum(),  # of each copy another component
            positions,
            retain_graph=first + len(F) < n,
            materialize_grads=True,
            allow_unused=True,
        )
        rows[first : first + len(F)] = -g.view(-1, n)[: block.shape[1]]
    return rows


def _by_differences(calculator: EqCalculator, atoms: Atoms, h: float) -> np.ndarray:
    frames = []
    for k in range(3 * len(atoms)):
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[k // 3, k % 3] += sign * h
            frames.append(moved)
    forces = np.array([results["forces"] for results in calculator.evaluate(frames)])
    pairs = forces.reshape(-1, 2, 3 * len(atoms))
    difference: np.ndarray = pairs[:, 0] - pairs[:, 1]
    return -difference / (2 * h)
