"""A potential on the orbit of a structure under rotations, in one batch of rotated copies.

    z_k(x) = R_k^-1 f(R_k x):    E_k = E(R_k x),   F_k = R_k^T F(R_k x),   sigma_k = R_k^T sigma R_k

are the predictions for the copies, brought back to the structure's own pose; for a potential with
exact symmetry they are all the same.  Their mean is the consensus, and the gradient of the mean
energy is the mean of the forces: averaged forces are conservative.  Each copy has its own edge
vectors, so one backward pass gives the forces of all copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mlip.data.graph import AtomicGraph
from mlip.nn.rotations import Rotations

MAX_EDGES = 100_000  # of a batch of copies; bounds the memory


class Evaluated(Protocol):
    """A ``Potential``, or what evaluates one."""

    training: bool

    def __call__(self, graph: AtomicGraph, *, stress: bool = False) -> Any: ...


class RotationOrbit(NamedTuple):
    """Predictions for K rotated copies of G structures of N atoms, rotated back; all float64."""

    weights: Tensor  # (K,)
    energy: Tensor  # (K, G) eV
    node_energy: Tensor  # (K, N) eV
    forces: Tensor  # (K, N, 3) eV/angstrom
    stress: Tensor | None  # (K, G, 3, 3) eV/angstrom^3
    features: Tensor | None  # (N, C), their mean

    def consensus(self) -> dict[str, Tensor]:
        """Weighted means, under the names that a ``Potential`` gives them."""
        found = {
            "energy": self.energy,
            "node_energy": self.node_energy,
            "forces": self.forces,
            "stress": self.stress,
        }
        means = {key: mean(x, self.weights) for key, x in found.items() if x is not None}
        return means if self.features is None else {**means, "features": self.features}

    def energy_spread(self) -> Tensor:
        """(G,) root of the weighted mean square deviation of the energy from its mean, eV."""
        return variance(self.energy, self.weights).sqrt()

    def forces_spread(self) -> Tensor:
        """(N,) the same of the force vector of each atom, eV/angstrom."""
        return variance(self.forces, self.weights).sum(dim=-1).sqrt()


def mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the first dimension.

    Taken of the differences to the first row: energies of -1e5 eV keep their last digits, and
    equal rows give exactly their value.
    """
    return values[0] + torch.tensordot(weights, values - values[0], dims=1)


def variance(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean square deviation from the mean, over the first dimension."""
    return torch.tensordot(weights, (values - mean(values, weights)).square(), dims=1)


def rotation_orbit(
    potential: Evaluated,
    graph: AtomicGraph,
    rotations: Rotations,
    *,
    stress: bool = False,
    max_edges: int = MAX_EDGES,
) -> RotationOrbit:
    """Evaluate a potential on all rotated copies of a batch of structures.

    Parameters
    ----------
    potential : in evaluation mode
    graph : of which labels are not looked at
    rotations : the rule; see ``mlip.nn.rotations``
    stress : whether to predict stress; NaN without a periodic cell
    max_edges : edges of the copies that are evaluated at a time; at least one copy is

    Raises
    ------
    ValueError
        If the potential is in training mode: the graphs of all copies would be kept.
    """
    if potential.training:
        raise ValueError("the orbit of a potential in training mode; call potential.eval() before")
    device = graph.positions.device
    R, weights = rotations.matrices.to(device), rotations.weights.to(device)
    N, G = len(graph.positions), graph.num_structures
    step = max(1, max_edges // max(1, graph.edge_index.shape[1]))
    parts: list[dict[str, Tensor]] = []
    features = None
    for first in range(0, len(R), step):
        turn = R[first : first + step]
        out = potential(graph.rotated_copies(turn), stress=stress)
        part = {
            "energy": out["energy"].view(-1, G),
            "node_energy": out["node_energy"].view(-1, N),
            "forces": out["forces"].view(-1, N, 3) @ turn,
        }
        if stress:
            back = turn[:, None]
            part["stress"] = back.mT @ out["stress"].view(-1, G, 3, 3) @ back
        if "features" in out:
            x = out["features"].view(-1, N, out["features"].shape[-1])
            total = torch.tensordot(weights[first : first + step].to(x), x, dims=1)
            features = total if features is None else features + total
        parts.append(part)
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return RotationOrbit(weights, stress=whole.pop("stress", None), features=features, **whole)
