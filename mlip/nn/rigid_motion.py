"""Forces without a share that moves or turns a structure as a whole.

Of the forces that act on no body from outside, Newton's third law leaves sum_i F_i = 0 and, in free
space, sum_i r_i x F_i = 0.  Predicted forces break both; the nearest forces (least squares) that
keep them are

    F_i - mean F - omega x r_i,      I omega = sum_i r_i x F_i,      I = sum_i (|r_i|^2 - r_i r_i^T)

with positions r_i from the centroid.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-8  # moment of inertia, relative to the trace, about which nothing can be turned


def without_rigid_motion(forces: Tensor, positions: Tensor, batch: Tensor, free: Tensor) -> Tensor:
    """Project net force and net torque out.

    Parameters
    ----------
    forces : (N, 3)
    positions : (N, 3) angstrom
    batch : (N,) structure of each atom
    free : (G,) bool, structures without periodic directions; of the others only the net force goes

    Returns
    -------
    Tensor
        (N, 3) float64
    """
    F, r = forces.double(), positions.detach().double()
    num_atoms = torch.bincount(batch, minlength=len(free)).clamp(min=1)[:, None]

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(free), *x.shape[1:]).index_add(0, batch, x)

    F = F - (total(F) / num_atoms).index_select(0, batch)
    r = r - (total(r) / num_atoms).index_select(0, batch)
    torque = total(torch.linalg.cross(r, F)) * free[:, None]
    eye = torch.eye(3, dtype=r.dtype, device=r.device)
    inertia = total(r.square().sum(dim=1)[:, None, None] * eye - r[:, :, None] * r[:, None, :])
    # I / (I^2 + small^2) in place of 1 / I: a linear molecule has no moment about its axis, and
    # nothing jumps when it becomes straight.  The tiny number serves single atoms.
    small = (SMALLEST * inertia.diagonal(dim1=1, dim2=2).sum(dim=1)).square() + 1e-30
    omega = torch.linalg.solve(
        inertia @ inertia + small[:, None, None] * eye, inertia @ torque[:, :, None]
    )[:, :, 0]
    return F - torch.linalg.cross(omega.index_select(0, batch), r)
