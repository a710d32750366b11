"""Differentiable choice of the nearest neighbours, seen from both ends of an edge.

    rank_ij = sum_k f_ik s((r_ij - r_ik) / 0.2),      u_ij = 0.1 log( sum exp(10 x) ),
    x in { rank_ij / n, rank_ji / n, r_ij / r_c },    log f_ij = -u^2 / (1 - u^2),  u < 1

E. Qu and A. Krishnapriyan, EScAIP (arXiv:2410.24169), as they released it, with one addition:
candidates count with an envelope f_ik, for otherwise ranks would jump when one enters the cutoff.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.nn.attention import ABSENT

WIDTH = 0.2  # angstrom, over which two neighbours swap ranks
SHARPNESS = 0.1  # of the smooth maximum


def soft_ranks(r: Tensor, fade: Tensor) -> Tensor:
    """Number of nearer neighbours, (n, K) -> (n, K), each weighted with ``fade`` (n, K)."""
    nearer = torch.sigmoid((r[:, :, None] - r[:, None, :]) / WIDTH)
    return (nearer @ fade[:, :, None])[..., 0]


def log_soft_knn(rank: Tensor, reverse_rank: Tensor, x: Tensor, num_neighbors: int) -> Tensor:
    """Logarithm of the weight of each edge, ``ABSENT`` of those that are not chosen.

    ``rank`` of j among the neighbours of i, ``reverse_rank`` of i among those of j, ``x`` = r /
    cutoff; all of one shape.
    """
    terms = torch.stack([rank / num_neighbors, reverse_rank / num_neighbors, x])
    u2 = (SHARPNESS * torch.logsumexp(terms / SHARPNESS, dim=0)).square()
    inside = u2 / (1 - u2).clamp(min=1e-12) < -ABSENT
    inside = inside & (u2 < 1)
    y = torch.where(inside, u2, 0)  # both branches of the second where must be finite
    return torch.where(inside, -y / (1 - y), ABSENT)
