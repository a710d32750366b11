"""Positions and cell as one set of coordinates of an optimizer: fractional-like positions and the
logarithm of the strain.

The cell C = C0 F with F = exp(eps), eps symmetric, so that the crystal never turns; an atom is at
r = x F.  With the virial W = -V (sigma + p) the forces on x and on eps are

    f F    and    Q ( D * Q^T sym(W F^-1) Q ) Q^T,      D_ab = (e^l_a - e^l_b) / (l_a - l_b)

where eps = Q diag(l) Q^T (the derivative of a function of a symmetric matrix, Daleckii and Krein);
computed as D_ab = e^(l_a + l_b)/2 sinh(h) / h with h = (l_a - l_b) / 2, exact for equal l, too.
ASE's FrechetCellFilter has the same minima with a general F, and takes ten milliseconds a step for
logarithms of general matrices: more than a small model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.filters import Filter


def of_axes(values: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """(..., 3, 3) symmetric matrices of eigenvalues (..., 3) and eigenvectors Q (..., 3, 3)."""
    return (Q * values[..., None, :]) @ np.swapaxes(Q, -1, -2)


def force_on_strain(W: np.ndarray, logs: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """(..., 3, 3) eV, the force on eps = Q diag(logs) Q^T of a virial W (..., 3, 3)."""
    Q_T = np.swapaxes(Q, -1, -2)
    G = W @ of_axes(np.exp(-logs), Q)
    half = (logs[..., :, None] - logs[..., None, :]) / 2
    sinhc = np.where(half == 0, 1.0, np.sinh(half) / np.where(half == 0, 1.0, half))
    D = np.exp((logs[..., :, None] + logs[..., None, :]) / 2) * sinhc
    return Q @ (D * (Q_T @ (G + np.swapaxes(G, -1, -2)) @ Q) / 2) @ Q_T


class LogStrainFilter(Filter):
    """For ASE's optimizers.

    Parameters
    ----------
    atoms : periodic in three directions
    pressure : float, eV/angstrom^3; the energy becomes the enthalpy E + p V
    """

    def __init__(self, atoms: Atoms, pressure: float = 0.0) -> None:
        super().__init__(atoms, indices=range(len(atoms)))
        self.pressure = pressure
        self.start = np.array(atoms.cell)
        # One unit of strain counts as a move of every atom by one angstrom, as in ASE's filters.
        self.unit = float(len(atoms))

    def __len__(self) -> int:
        return len(self.atoms) + 3

    def _deformation(self) -> np.ndarray:
        F: np.ndarray = np.linalg.solve(self.start, self.atoms.cell.array)
        return F

    def get_positions(self) -> np.ndarray:
        """(N + 3, 3): x, then the rows of eps times N."""
        F = self._deformation()
        stretch, Q = np.linalg.eigh((F + F.T) / 2)
        x = np.linalg.solve(F.T, self.atoms.positions.T).T
        return np.concatenate([x, self.unit * of_axes(np.log(stretch), Q)])

    def set_positions(self, positions: np.ndarray, **options: Any) -> None:
        """Move atoms and cell; constraints of the atoms act on both."""
        eps = positions[-3:] / self.unit
        logs, Q = np.linalg.eigh((eps + eps.T) / 2)
        self.atoms.set_cell(self.start @ of_axes(np.exp(logs), Q), scale_atoms=True)
        self.atoms.set_positions(positions[:-3] @ self._deformation(), **options)

    def get_forces(self, **options: Any) -> np.ndarray:
        """(N + 3, 3), eV/angstrom and eV / N."""
        F = self._deformation()
        stretch, Q = np.linalg.eigh((F + F.T) / 2)
        stress = self.atoms.get_stress(voigt=False, **options)
        W = -self.atoms.get_volume() * (stress + self.pressure * np.eye(3))
        on_atoms = self.atoms.get_forces(**options) @ F.T
        return np.concatenate([on_atoms, force_on_strain(W, np.log(stretch), Q) / self.unit])

    def get_potential_energy(self, **options: Any) -> float:
        """The enthalpy, eV."""
        energy = self.atoms.get_potential_energy(**options)
        return float(energy + self.pressure * self.atoms.get_volume())
