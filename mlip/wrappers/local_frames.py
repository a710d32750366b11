"""Smooth weighted frames of an atom's neighbourhood, and the neighbourhood as each of them sees it.

A view of atom i is its neighbourhood in coordinates that turn with it.  Three kinds of views use
the directions of none, one, or two of its neighbours:

    none       r_ik -> r_ik (1, 0, 0)                                          weight  w0
    axis j     r_ik -> r_ik (cos a, sin a, 0),  a = pi (1 - cos jik) / 2       weight  w0 u_j
    pair jk    r_il -> (e1, e2, e3) . r_il,     e1 ~ r_ij,  e3 ~ r_ij x r_ik   weight  u_j v_jk

and a prediction is the mean of the predictions for the views.  Only pairs show all there is; their
weight vanishes, with two derivatives, where j, i, k come to lie on a line.  Then the axes remain,
which show a collinear neighbourhood as it is, and without neighbours the first view.  No weight and
no view ever jumps:

    u_j  = f(r_ij) s( sum_k f(r_ik) z(r_ij - r_ik) / enough )
    v_jk = F_k s( sum_l F_l z(l_k - l_l) / enough ),         F_k = f(r_ik) q(sin^2 jik)
    l_k  = r_ik + tilt cos^2 jik,     s: from 1 at 0 to 0 at 1,     z: from 0 at 0 to 1 at width

f is the envelope and q rises from 0 to 1.  So a neighbour drops out of the frames as far as there
are others that are nearer by ``width`` and can take its place; among equals those at a right angle
to j are preferred.  With mirrors each pair gives two views, one the mirror image of the other.  No
eigenvector is taken and no square root of anything that can vanish: cubic sites, collinear
molecules and isolated atoms are as good as others.

After the equivariant coordinate systems of S. Pozdnyakov and M. Ceriotti (PET, NeurIPS 2023,
arXiv:2305.19302); the weights, inner cutoffs and the views of lower order are made here.  That
unweighted frames cannot be continuous: N. Dym, H. Lawrence, J. Siegel (arXiv:2402.16077).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mlip.nn.neighborhoods import first_edges, gather_neighborhoods
from mlip.nn.radial import polynomial_envelope

ENOUGH = 0.5  # weight of nearer neighbours that makes a farther one superfluous
TILT = 2.0  # tilt / width: 60 and 120 degrees are superfluous where there are 90
COLLINEAR = (0.05, 0.5)  # sin^2 of the angle below which a pair has no weight, above which full


class Views(NamedTuple):
    """M views of N atoms; the first N are those without directions, in the order of the atoms."""

    atom: Tensor  # (M,) whose view it is
    weight: Tensor  # (M,)
    edge: Tensor  # (E',) edge that is seen, sorted by view
    view: Tensor  # (E',) in which
    vectors: Tensor  # (E', 3) as it is seen, angstrom

    def mean(self, x: Tensor, num_atoms: int, views: Tensor | None = None) -> Tensor:
        """Weighted mean (N, ...) of what was found for all views (M, ...), or for some (m,)."""
        atom = self.atom if views is None else self.atom.index_select(0, views)
        w = self.weight if views is None else self.weight.index_select(0, views)
        w = w / w.new_zeros(num_atoms).index_add(0, atom, w).index_select(0, atom)
        w = w.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
        return x.new_zeros(num_atoms, *x.shape[1:]).index_add(0, atom, w * x)

    def drawn(self, num_atoms: int) -> Views:
        """One view of each atom, drawn with the probability of its weight."""
        race = torch.rand_like(self.weight).log() / self.weight.detach()  # exponential clocks
        order = torch.argsort(race, descending=True)  # of all views, the first to ring before
        order = order[torch.argsort(self.atom[order], stable=True)]
        number = torch.bincount(self.atom, minlength=num_atoms)
        chosen = order[number.cumsum(0) - number]
        place = torch.full_like(self.atom, -1)
        place[chosen] = torch.arange(num_atoms, device=place.device)
        kept = torch.nonzero(place.index_select(0, self.view) >= 0).flatten()
        kept = kept[torch.argsort(self.edge[kept])]  # edges are sorted by atom, and so are views
        return Views(
            atom=torch.arange(num_atoms, device=place.device),
            weight=self.weight.new_ones(num_atoms),
            edge=self.edge[kept],
            view=place[self.view[kept]],
            vectors=self.vectors[kept],
        )


def step(t: Tensor) -> Tensor:
    """From 1 at t <= 0 to 0 at t >= 1, with three continuous derivatives."""
    t = t.clamp(0, 1)
    return 1 - t**4 * (35 - t * (84 - t * (70 - 20 * t)))


def needed(length: Tensor, weight: Tensor, width: float) -> Tensor:
    """The weights (n, K) of those that have not enough others before them, at less length."""
    before = 1 - step((length[:, :, None] - length[:, None, :]) / width)  # (n, K, K)
    return weight * step((before @ weight[:, :, None])[..., 0] / ENOUGH)


def local_views(
    vectors: Tensor,
    edge_index: Tensor,
    num_atoms: int,
    cutoff: float,
    *,
    width: float = 1.0,
    fallback: float = 0.1,
    mirrors: bool = True,
) -> Views:
    """The views of all atoms.

    Parameters
    ----------
    vectors : (E, 3) edges sorted by centre, angstrom
    edge_index : (2, E)
    num_atoms : N
    cutoff : angstrom
    width : angstrom; by which others have to be nearer for a neighbour to lose its part in the
        frames. Wider: smoother weights, more views
    fallback : w0, weight of the views without all directions
    mirrors : whether views come with their mirror images, for invariance under O(3) instead of
        SO(3)

    Returns
    -------
    Views
        Differentiable twice in ``vectors``. Pairs and axes without weight are left out.
    """
    N, E = num_atoms, len(vectors)
    i = edge_index[1]
    hood = gather_neighborhoods(vectors, edge_index, N, cutoff)
    v = hood.vectors  # (N, K, 3)
    K = v.shape[1]
    first = first_edges(i, N)
    slot = torch.arange(K, device=i.device)
    edges = first[:-1, None] + slot  # (N, K) where there is one
    filled = slot < first.diff()[:, None]  # (N, K)
    r = v.norm(dim=-1)
    unit = v / r[..., None]
    f = polynomial_envelope(r / cutoff) * filled
    u = needed(r, f, width)

    # Axes: P of them, each of an atom and one of its slots.
    owner, first = torch.nonzero(u > 0, as_tuple=True)
    axis = unit[owner, first]  # (P, 3)
    r_axis, f_axis = r.index_select(0, owner), f.index_select(0, owner)  # (P, K)
    cos = (unit.index_select(0, owner) @ axis[:, :, None])[..., 0]
    angle = (math.pi / 2) * (1 - cos)
    planar = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], dim=-1)
    planar = planar * r_axis[..., None]  # (P, K, 3)

    # Pairs: F of them, each of an axis and another slot.
    cos2 = cos.square()
    low, high = COLLINEAR
    weight = f_axis * (1 - step((1 - cos2 - low) / (high - low)))
    weight = needed(r_axis + TILT * width * cos2, weight, width)
    pair, second = torch.nonzero(weight > 0, as_tuple=True)
    a, atom = axis.index_select(0, pair), owner.index_select(0, pair)
    normal = torch.linalg.cross(a, unit[atom, second])  # longer than the root of ``low``
    e3 = normal / normal.norm(dim=-1, keepdim=True)
    R = torch.stack([a, torch.linalg.cross(e3, a), e3], dim=1)  # (F, 3, 3), rows are the axes
    seen = v.index_select(0, atom) @ R.mT  # (F, K, 3)
    w_axis = u[owner, first]
    w_pair = w_axis.index_select(0, pair) * weight[pair, second]

    atoms = [torch.arange(N, device=i.device), owner, atom]
    weights = [torch.full((N,), fallback, dtype=r.dtype, device=r.device), fallback * w_axis]
    zero = torch.zeros_like(r)
    views = [torch.stack([r, zero, zero], dim=-1), planar, seen]
    if mirrors:
        atoms.append(atom)
        weights += [w_pair / 2, w_pair / 2]
        views.append(seen * seen.new_tensor([1, 1, -1]))
    else:
        weights.append(w_pair)
    atom = torch.cat(atoms)
    there = filled.index_select(0, atom)  # (M, K)
    view, _ = torch.nonzero(there, as_tuple=True)
    return Views(
        atom=atom,
        weight=torch.cat(weights),
        edge=edges.index_select(0, atom)[there] if E else view,
        view=view,
        vectors=torch.cat(views)[there],
    )
