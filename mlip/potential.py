"""Potential: an energy model with reference energies becomes energy, forces and stress.

    E = sum_i ( e0[Z_i] + scale model_i + cohesion_i + repulsion_i )
    F = -dE/dr,    sigma = (1/V) dE/d eps

Forces and stress are derivatives of this one energy and are made here only.  A model sees positions
only through the edge vectors v_e = r_j - r_i + S.cell, so one gradient g_e = dE/dv_e gives
everything:

    dE/dr_k = sum_{e: j=k} g_e - sum_{e: i=k} g_e,      dE/d eps = sum_e (v_e g_e^T + g_e v_e^T) / 2

The second is the derivative under the symmetric strain r -> r (1 + eps) of positions and cell
(Knuth et al., Comput. Phys. Commun. 190, 33 (2015)), in which all v_e transform alike; its sign is
ASE's.  Differences of positions, reference energies and sums over atoms and edges are float64
whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mlip.data.graph import AtomicGraph, EnergyModel, NodeOutput
from mlip.nn.irreps import invariant_lengths


class Potential(nn.Module):
    """Energy, forces and stress of an energy model.

    Parameters
    ----------
    model : EnergyModel
    e0 : (119,) energy in eV of the isolated atom of each element; NaN where it is not known
    scale : float, eV; the unit of the model's energies
    repulsion : module (graph) -> (N,) energies in eV, added unscaled; for example ``ZBL``
    cohesion : the same for the mean energy of cohesion; for example ``Cohesion``
    metadata : what a checkpoint says of itself (level of theory, training, errors, licence, ...)
    """

    e0: Tensor
    scale: Tensor

    def __init__(
        self,
        model: EnergyModel,
        e0: Tensor,
        scale: float = 1.0,
        repulsion: nn.Module | None = None,
        cohesion: nn.Module | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if e0.shape != (119,):
            raise ValueError(
                f"e0 has shape {tuple(e0.shape)}; give (119,), one energy per atomic number"
            )
        self.model: Any = model
        self.repulsion = repulsion
        self.cohesion = cohesion
        self.register_buffer("e0", e0.to(torch.float64))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.metadata = dict(metadata or {})

    @property
    def cutoff(self) -> float:
        """Angstrom; neighbours beyond it are not needed."""
        return float(self.model.config.cutoff)

    @property
    def elements(self) -> list[int]:
        """Atomic numbers that the potential knows."""
        return torch.nonzero(~self.e0.isnan()).flatten().tolist()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's parameters, in which it computes."""
        return next(self.model.parameters()).dtype

    @property
    def objective(self) -> str | None:
        """What it was trained for, if not for energies and forces."""
        training = self.metadata.get("training")
        found = training.get("objective") if isinstance(training, dict) else None
        return None if found is None else str(found)[:40]

    @property
    def reservation(self) -> str | None:
        """What has to be known before its energies are used."""
        if self.objective is None:
            return None
        return (
            f"pre-trained ({self.objective}): its energies and forces mean nothing yet; fine-tune "
            "it on labels with init_from"
        )

    def invariants(self, features: Tensor) -> Tensor:
        """What rotations leave as it is, or would if the model had learned them, of ``features``
        (N, C): of vectors and tensors the squared lengths.

        A model whose features hold such says so by ``latent_irreps``.
        """
        irreps = getattr(self.model, "latent_irreps", None)
        return features if irreps is None else invariant_lengths(features, irreps)

    def with_model(self, model: Any) -> Potential:
        """Potential of another energy model with everything else of this one, in its mode."""
        other = Potential(
            model, self.e0, float(self.scale), self.repulsion, self.cohesion, self.metadata
        )
        other.to(self.e0.device)
        other.training = self.training
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(float32) is meant for the network: reference energies stay float64 and only change
        # device.
        kept = {"e0": self.e0, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, graph: AtomicGraph, *, stress: bool = False) -> dict[str, Tensor]:
        """Evaluate a batch of structures.

        Returns
        -------
        dict
            ``energy`` (G,) eV, ``node_energy`` (N,) eV, ``forces`` (N, 3) eV/angstrom, all float64;
            ``features`` where the model has them; ``stress`` (G, 3, 3) eV/angstrom^3 if asked for,
            NaN without a periodic cell. In training mode they can be differentiated once more.
        """
        if hasattr(self.model, "with_gradient") and not self.training:
            return self._known(graph, stress)
        with torch.enable_grad():
            vectors = graph.edge_vectors()  # (E, 3) float64
            if not vectors.requires_grad:
                vectors.requires_grad_()
            atoms = self.atoms(graph, vectors)
            g = None
            if atoms.forces is None or stress:
                (g,) = torch.autograd.grad(
                    atoms.energy.sum(),
                    vectors,
                    create_graph=self.training,  # the force loss differentiates these once more
                    materialize_grads=True,  # isolated atoms have no edges: zero, not None
                )
            out = self.collect(graph, vectors, atoms, g, stress=stress)
        return out if self.training else {key: value.detach() for key, value in out.items()}

    @torch.no_grad()
    def _known(self, graph: AtomicGraph, stress: bool) -> dict[str, Tensor]:
        """``forward`` in evaluation mode of a model that gives the gradient with the energy."""
        vectors = graph.edge_vectors()
        node, g = self.model.with_gradient(graph.replace(vectors=vectors.to(self.dtype)))
        energy = self.e0.index_select(0, graph.atomic_numbers) + self.scale * node.energy.double()
        g = self.scale * g.double()
        for prior in (self.cohesion, self.repulsion):
            if prior is not None:
                with torch.enable_grad():
                    v = vectors.detach().requires_grad_()
                    more = prior(graph.replace(vectors=v))
                    (slope,) = torch.autograd.grad(more.sum(), v, materialize_grads=True)
                energy, g = energy + more.detach(), g + slope
        atoms = NodeOutput(energy, node.features)
        return self.collect(graph, vectors, atoms, g, stress=stress)

    def atoms(self, graph: AtomicGraph, vectors: Tensor) -> NodeOutput:
        """What each atom has, in eV and float64: energies with the reference, features, and forces
        of models that predict them; ``vectors`` (E, 3) float64."""
        node = self.model(graph.replace(vectors=vectors.to(self.dtype)))
        energy = self.e0.index_select(0, graph.atomic_numbers) + self.scale * node.energy.double()
        for prior in (self.cohesion, self.repulsion):
            if prior is not None:
                energy = energy + prior(graph.replace(vectors=vectors))
        forces = None if node.forces is None else node.forces.double() * self.scale
        return NodeOutput(energy, node.features, forces)

    def collect(
        self,
        graph: AtomicGraph,
        vectors: Tensor,
        atoms: NodeOutput,
        g: Tensor | None,
        *,
        stress: bool,
    ) -> dict[str, Tensor]:
        """Sums over atoms and edges, as ``forward`` returns them; g (E, 3) = dE/d vectors."""
        energy = vectors.new_zeros(graph.num_structures).index_add_(0, graph.batch, atoms.energy)
        out = {"energy": energy, "node_energy": atoms.energy}
        if atoms.features is not None:
            out["features"] = atoms.features
        if atoms.forces is not None:
            out["forces"] = atoms.forces
        elif g is not None:
            j, i = graph.edge_index
            forces = torch.zeros_like(graph.positions).index_add_(0, i, g)
            out["forces"] = forces.index_add_(0, j, -g)
        if stress and g is not None:
            out["stress"] = self._stress(graph, vectors, g)
        return out

    @staticmethod
    def _stress(graph: AtomicGraph, vectors: Tensor, g: Tensor) -> Tensor:
        if graph.num_structures == 1:
            virial = (vectors.mT @ g)[None]
        else:
            outer = vectors[:, :, None] * g[:, None, :]  # (E, 3, 3)
            owner = graph.batch.index_select(0, graph.edge_index[1])
            virial = vectors.new_zeros(graph.num_structures, 3, 3).index_add(0, owner, outer)
        volume = graph.volume[:, None, None]
        # The NaN of an undefined stress must not enter the division: its derivative would be NaN
        # even where a loss masks the value.
        defined = ~volume.isnan()
        stress = (virial + virial.mT) / 2 / torch.where(defined, volume, 1.0)
        return torch.where(defined, stress, torch.nan)
