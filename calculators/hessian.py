"""Second derivatives of the energy: by automatic differentiation, or by differences of forces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from ase import Atoms

from mlip.calculators.shield import shielded

if TYPE_CHECKING:
    from mlip.calculators.eq_calculator import EqCalculator


def hessian(
    calculator: EqCalculator, atoms: Atoms, method: str = "auto", displacement: float = 1e-3
) -> np.ndarray:
    """(3N, N, 3), eV/angstrom^2, symmetric; arguments as of ``EqCalculator.get_hessian``."""
    if method not in ("auto", "autograd", "finite"):
        raise ValueError(f"method = '{method}'; give 'auto', 'autograd' or 'finite'")
    by_autograd = method == "autograd"
    if method == "auto":
        by_autograd = _twice_differentiable(calculator, atoms)
    if by_autograd:
        matrix = _by_autograd(calculator, atoms) * calculator.hessian_unit
    else:
        matrix = _by_differences(calculator, atoms, displacement)
    return ((matrix + matrix.T) / 2).reshape(3 * len(atoms), len(atoms), 3)


def _twice_differentiable(calculator: EqCalculator, atoms: Atoms) -> bool:
    """Whether forces are derivatives of the energy that can be differentiated again."""
    with shielded(calculator.device), torch.enable_grad():
        for forces, positions in calculator.differentiable_forces(atoms):
            if not forces.requires_grad:
                return False
            try:
                torch.autograd.grad(forces[0, 0], positions, allow_unused=True)
            except RuntimeError:  # an operation of the model has no second derivative
                return False
    return True


def _by_autograd(calculator: EqCalculator, atoms: Atoms) -> np.ndarray:
    n = 3 * len(atoms)
    members = []
    with shielded(calculator.device), torch.enable_grad():
        for forces, positions in calculator.differentiable_forces(atoms):
            rows = positions.new_zeros(n, n)
            if forces.requires_grad:  # not so without any neighbours
                for k, force in enumerate(forces.flatten()):
                    (row,) = torch.autograd.grad(
                        force,
                        positions,
                        retain_graph=True,
                        materialize_grads=True,
                        allow_unused=True,
                    )
                    rows[k] = -row.flatten()
            members.append(rows.detach().cpu().numpy())
    mean: np.ndarray = np.mean(members, axis=0)
    return mean


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
