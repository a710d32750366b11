"""Loss terms that teach a model its symmetry; each works with any model.

With a random rotation or rotoreflection g_k for each structure x_k, h the features of the atoms, E
and F energy and forces, n the number of atoms, means over the global batch:

    latent      mean | D(g) h_i(x) - h_i(g x) |^2                     D a fixed action on irreps
    pooled      mean | T(z(x), g) - z(g x) |^2,  z = mean_i h_i       T a network, trained along
    variance    w_E Var_g [E(g x)] / n^2 + w_F mean Var_g [g^-1 F_i(g x)]
    constraint  lambda mean ( |F_i(x) - g^-1 F_i(g x)|^2 / 6 + ... ),  lambda a dual variable

Variances are those over the group, estimated without bias by the sample variance of K views that
are drawn uniformly: the batch itself is one of them if it was augmented so, ``given``.

Random numbers come from torch's generator, which a training saves for each process.  Networks and
dual variables are parameters and buffers of the terms, which the training moves and saves.

Latent: A. Elhag et al. (arXiv:2510.00027), the fixed action after arXiv:2506.08244.  Constraint:
I. Hounie, L. Chamon, A. Ribeiro, ICML 2023 (arXiv:2209.15031), with a multiplicative dual step and
with proposals near rotations that were hard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.data.transforms import random_rotations, rotated_each
from mlip.nn.irreps import rotate_irreps
from mlip.training.distributed import all_sum, rank, world_size
from mlip.training.loss import LossTerm
from mlip.training.soft_equivariance import ProjectionTerm, irreps_layers
from mlip.training.symmetry_config import ConstraintConfig, SymmetryConfig

SLOTS = 64  # hard rotations that are remembered, over all processes
TINY = 1e-30  # of a mean violation; that of an exact model may be zero
STEP = 0.3  # rad, typical length of a move from a hard rotation


def mean_over_batch(values: Tensor) -> Tensor:
    """Share of this process in the mean of all values of all processes."""
    count = all_sum(torch.tensor(values.numel(), device=values.device)).clamp(min=1)
    return values.sum() / count


def drawn(graph: AtomicGraph, reflect: bool) -> Tensor:
    """(G, 3, 3) float64, a uniform rotation for each structure."""
    return random_rotations(graph.num_structures, reflect=reflect).to(graph.positions.device)


def node_output(potential: Any, graph: AtomicGraph) -> NodeOutput:
    """What the model alone says; much cheaper than the forces of a conservative potential."""
    vectors = graph.edge_vectors().to(potential.dtype)
    output: NodeOutput = potential.model(graph.replace(vectors=vectors))
    return output


def features_of(out: Mapping[str, Tensor | None]) -> Tensor:
    """(N, C), or an error with the remedy."""
    found = out.get("features")
    if found is None:
        raise ValueError("this model gives no features; take symmetry.variance instead")
    return found


def features(potential: Any, graph: AtomicGraph) -> Tensor:
    """(N, C) by the model alone."""
    return features_of({"features": node_output(potential, graph).features})


def latent_irreps(potential: Any, width: int) -> Sequence[int]:
    """Channels of each degree in the model's features; scalars only, unless it says otherwise."""
    return getattr(potential.model, "latent_irreps", (width,))


class LatentTerm:
    """Per-atom latents under a fixed action.

    A model says by ``latent_irreps`` how many channels of degree 0, 1, 2, ... its features hold, in
    this order, each channel with its 2 l + 1 components; without it all are scalars.
    """

    def __init__(self, reflect: bool = True) -> None:
        self.reflect = reflect

    def __call__(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        h = features_of(out)
        R = drawn(graph, self.reflect)
        other = features(potential, rotated_each(graph, R))
        of_atom = R.index_select(0, graph.batch)
        expected = rotate_irreps(h, latent_irreps(potential, h.shape[1]), of_atom)
        return mean_over_batch((expected - other).square())


class PooledLatentTerm(nn.Module):
    """Mean latent of a structure under an action that is learned.

    T(z, g) = z + MLP(z, g - 1) starts as the identity; it is not part of the model.
    """

    def __init__(self, width: int, hidden: int = 128, reflect: bool = True) -> None:
        super().__init__()
        self.reflect = reflect
        last = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(last.weight)
        self.action = nn.Sequential(nn.Linear(width + 9, hidden), nn.SiLU(), last)

    def forward(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        R = drawn(graph, self.reflect)
        z = _pooled(features_of(out), graph)
        expected = _pooled(features(potential, rotated_each(graph, R)), graph)
        turn = (R - torch.eye(3, dtype=R.dtype, device=R.device)).flatten(1).to(z.dtype)
        return mean_over_batch((z + self.action(torch.cat([z, turn], dim=-1)) - expected).square())


def _pooled(h: Tensor, graph: AtomicGraph) -> Tensor:
    total = h.new_zeros(graph.num_structures, h.shape[1]).index_add(0, graph.batch, h)
    return total / graph.ptr.diff()[:, None]


class VarianceTerm:
    """Variance of energy per atom and forces over the group.

    Parameters
    ----------
    energy, forces : weights of (eV/atom)^2 and (eV/angstrom)^2
    views : from which it is estimated
    given : the batch itself is a uniform draw from the group, and one of the views
    reflect : the group is O(3), not SO(3)
    """

    def __init__(
        self,
        energy: float = 1.0,
        forces: float = 1.0,
        views: int = 2,
        *,
        given: bool = False,
        reflect: bool = True,
    ) -> None:
        if views < 2:
            raise ValueError("a variance needs two views at least")
        self.energy, self.forces, self.views = energy, forces, views
        self.given, self.reflect = given, reflect

    def __call__(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        energies, forces = [], []
        for k in range(self.views):
            if self.forces == 0:  # energies need no gradient, the model alone is enough
                E, F = self._energy(potential, graph), None
            elif k == 0 and self.given:
                E, F = out["energy"], out["forces"]
            else:
                E, F = view(potential, graph, drawn(graph, self.reflect))
            energies.append(E / graph.ptr.diff())
            forces.append(F)
        total = energies[0].new_zeros(())
        if self.energy > 0:
            total = total + self.energy * mean_over_batch(torch.stack(energies).var(dim=0))
        if self.forces > 0:
            found = torch.stack([F for F in forces if F is not None])
            total = total + self.forces * mean_over_batch(found.var(dim=0))
        return total

    def _energy(self, potential: Any, graph: AtomicGraph) -> Tensor:
        node = node_output(potential, rotated_each(graph, drawn(graph, self.reflect)))
        energy = potential.scale * node.energy.double()
        return energy.new_zeros(graph.num_structures).index_add(0, graph.batch, energy)


def view(potential: Any, graph: AtomicGraph, R: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (G,) and forces turned back (N, 3) of the structures rotated by R (G, 3, 3)."""
    out = potential(rotated_each(graph, R))
    back = R.mT.index_select(0, graph.batch)
    return out["energy"], (back @ out["forces"][:, :, None])[:, :, 0]


class ConstraintTerm(nn.Module):
    """Violation v of the symmetry times a dual variable that rises while v exceeds epsilon^2.

    v is the mean over components of (F(x) - g^-1 F(g x))^2 / 2 plus (E(x) - E(g x))^2 / 2 in
    (eV/atom)^2, an estimate of the variance; per step

        lambda <- lambda exp( rate clip(v / epsilon^2 - 1, -1, 1) )

    Rotations are drawn uniformly or, with probability 1 - ``fresh``, near one that was hard: of
    ``SLOTS`` chains each keeps a rotation, replaced by the next with probability min(1, v' / v), as
    Metropolis and Hastings do for a density proportional to v.  Each v is in units of the mean of
    its step: violations fall by orders of magnitude in a training, and against those of its
    beginning no later rotation would be accepted.
    """

    dual: Tensor
    rotations: Tensor
    violations: Tensor
    next_slot: Tensor

    def __init__(self, config: ConstraintConfig, reflect: bool = True) -> None:
        super().__init__()
        self.config, self.reflect = config, reflect
        f64 = torch.float64
        self.register_buffer("dual", torch.tensor(config.start, dtype=f64))
        self.register_buffer("rotations", torch.eye(3, dtype=f64).repeat(SLOTS, 1, 1))
        self.register_buffer("violations", torch.zeros(SLOTS, dtype=f64))
        self.register_buffer("next_slot", torch.zeros((), dtype=torch.int64))

    def forward(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        c = self.config
        slots = self._slots(graph.num_structures)
        R = self._proposals(slots)
        E, F = view(potential, graph, R)
        squares = (F - out["forces"]).square().mean(dim=1)  # (N,)
        energy = ((E - out["energy"]) / graph.ptr.diff()).square()
        share = (mean_over_batch(squares) + mean_over_batch(energy)) / 2
        loss = float(self.dual) * share
        with torch.no_grad():
            each = squares.new_zeros(graph.num_structures).index_add(0, graph.batch, squares)
            mean = all_sum(share)
            relative = (each / graph.ptr.diff() + energy) / 2 / mean.clamp(min=TINY)
            self._remember(slots, R, relative)
            excess = float(mean) / c.epsilon**2 - 1
            factor = math.exp(c.rate * min(max(excess, -1.0), 1.0))
            self.dual.mul_(factor).clamp_(*c.bounds)
        return loss

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {"dual": float(self.dual)}

    def _slots(self, num: int) -> Tensor:
        """(num,) chains of this process's structures; each process has its own ones."""
        own = SLOTS // world_size() or 1
        places = (self.next_slot + torch.arange(num, device=self.next_slot.device)) % own
        return (places + rank() * own) % SLOTS

    def _proposals(self, slots: Tensor) -> Tensor:
        num, device = len(slots), slots.device
        uniform = random_rotations(num, reflect=self.reflect).to(device)
        fresh = torch.rand(num, dtype=torch.float64).to(device) < self.config.fresh
        omega = STEP * torch.randn(num, 3, dtype=torch.float64).to(device)
        generator = torch.linalg.cross(
            omega[:, None], torch.eye(3, dtype=omega.dtype, device=device)[None]
        ).mT
        near = torch.linalg.matrix_exp(generator) @ self.rotations[slots]
        return torch.where(fresh[:, None, None], uniform, near)

    def _remember(self, slots: Tensor, R: Tensor, violation: Tensor) -> None:
        """Metropolis and Hastings in this process's chains, then all processes share them."""
        chance = torch.rand(len(slots), dtype=torch.float64).to(slots.device)
        accepted = chance * self.violations[slots] <= violation
        rotations, violations = self.rotations.clone(), self.violations.clone()
        for k in torch.nonzero(accepted).flatten().tolist():  # in order: a chain may occur twice
            rotations[slots[k]], violations[slots[k]] = R[k], violation[k]
        self.rotations += all_sum(rotations - self.rotations)
        self.violations += all_sum(violations - self.violations)
        self.next_slot += all_sum(torch.tensor(len(slots), device=slots.device))


def symmetry_terms(
    config: SymmetryConfig, potential: Any, graph: AtomicGraph, *, given: bool = False
) -> tuple[dict[str, LossTerm], dict[str, float]]:
    """Terms and their weights by name.

    Parameters
    ----------
    potential : on its device and in its dtype
    graph : any structure, to learn the width of the features
    given : batches are uniform draws from the group

    Raises
    ------
    ValueError
        If the model has not what a term needs.
    """
    terms: dict[str, LossTerm] = {}
    weights: dict[str, float] = {}
    device, reflect = potential.e0.device, config.reflect
    if config.latent is not None or config.pooled is not None:
        with torch.no_grad():
            width = features(potential, graph.to(device)).shape[1]
    if config.latent is not None:
        terms["latent"], weights["latent"] = LatentTerm(reflect), config.latent.weight
    if config.pooled is not None:
        pooled = PooledLatentTerm(width, config.pooled.hidden, reflect)
        terms["pooled"] = pooled.to(device=device, dtype=potential.dtype)
        weights["pooled"] = config.pooled.weight
    if config.variance is not None:
        v = config.variance
        terms["variance"] = VarianceTerm(v.energy, v.forces, v.views, given=given, reflect=reflect)
    if config.projection is not None:
        irreps_layers(potential)  # an error now rather than at the first step
        terms["projection"] = ProjectionTerm(config.projection).to(device)
    if config.constraint is not None:
        terms["constraint"] = ConstraintTerm(config.constraint, reflect).to(device)
    return terms, {name: weights.get(name, 1.0) for name in terms}
