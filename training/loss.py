"""Loss terms: ``term(potential, graph, out) -> Tensor``, a mean over all labelled items of the
global batch.

    loss = sum_k w_k mean_k,    mean = (sum over items of all processes) / (their number)

The value on one process is its share of the sum: shares, and with them gradients, add up over
processes. Missing labels are NaN.  They are replaced before the residual is formed, so that no NaN
enters a derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlip.data.graph import AtomicGraph
from mlip.training.config import LossConfig
from mlip.training.distributed import all_sum

Penalty = Callable[[Tensor], Tensor]  # elementwise, of a residual


class LossTerm(Protocol):
    """One addend of the loss.  ``out`` is what the potential made of the graph."""

    def __call__(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor: ...


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Share of this process in the mean of ``values`` where ``mask``; zero if there are none."""
    count = all_sum(mask.sum()).clamp(min=1)
    return torch.where(mask, values, 0).sum() / count


def penalty(kind: str, delta: float = 0.01) -> Penalty:
    """x -> x^2 (mse), |x| (mae), or quadratic below ``delta`` and of slope 1 above (huber)."""
    if kind == "mse":
        return torch.square
    if kind == "mae":
        return torch.abs

    def huber(x: Tensor) -> Tensor:
        a = x.abs()
        return torch.where(a < delta, x * x / (2 * delta), a - delta / 2)

    return huber


class EnergyTerm:
    """Residual of the energy per atom, eV."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    def __call__(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        residual, mask = _residual(out["energy"], graph, "energy")
        values = self.penalty(residual / graph.ptr.diff())  # (G,)
        return masked_mean(values * _weight(graph), mask)


class ForcesTerm:
    """Residual of the forces, eV/angstrom: components, or each atom's length of error (``l2``)."""

    def __init__(self, penalty: Penalty, l2: bool = False) -> None:
        self.penalty, self.l2 = penalty, l2

    def __call__(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        residual, mask = _residual(out["forces"], graph, "forces")  # (N, 3)
        weight = _weight(graph).index_select(0, graph.batch)
        if self.l2:
            mask = mask.all(dim=1)
            square = residual.square().sum(dim=1)
            # The norm has no derivative at zero, where all labels of the padding lie.
            positive = mask & (square > 0)
            length = torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
            return masked_mean(self.penalty(length) * weight, mask)
        return masked_mean(self.penalty(residual) * weight[:, None], mask)


class StressTerm:
    """Residual of the nine components of the stress, eV/angstrom^3."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    def __call__(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        residual, mask = _residual(out["stress"], graph, "stress")  # (G, 3, 3)
        return masked_mean(self.penalty(residual) * _weight(graph)[:, None, None], mask)


class Objective:
    """Weighted sum of named terms; terms of weight zero are not evaluated.

    Parameters
    ----------
    terms : name -> term
    weights : name -> weight
    stage_two : weights from ``start`` (share of the training) on
    """

    def __init__(
        self,
        terms: Mapping[str, LossTerm],
        weights: Mapping[str, float],
        stage_two: Mapping[str, float] | None = None,
        start: float = 1.0,
    ) -> None:
        self.terms = dict(terms)
        self.weights, self.stage_two, self.start = dict(weights), dict(stage_two or {}), start
        # Terms may have networks to train and a state to save.
        self.modules = nn.ModuleDict(
            {name: term for name, term in self.terms.items() if isinstance(term, nn.Module)}
        )

    @classmethod
    def from_config(cls, config: LossConfig, *, has_stress: bool = True) -> Objective:
        """Terms of energy, forces and stress."""
        p = penalty(config.kind, config.delta)
        of_energy = penalty(config.kind, config.energy_delta or config.delta)
        terms: dict[str, LossTerm] = {
            "energy": EnergyTerm(of_energy),
            "forces": ForcesTerm(p, config.l2),
        }
        if has_stress:
            terms["stress"] = StressTerm(p)
        weights = {name: getattr(config, name) for name in terms}
        second = config.stage_two
        if second is None:
            return cls(terms, weights)
        new = {name: getattr(second, name) for name in terms if getattr(second, name) is not None}
        return cls(terms, weights, new, second.start)

    @property
    def needs_stress(self) -> bool:
        """Whether the potential has to compute the stress."""
        return max(self.weights.get("stress", 0), self.stage_two.get("stress", 0)) > 0

    def at(self, progress: float) -> dict[str, float]:
        """Weights after a share ``progress`` of the training."""
        return {**self.weights, **self.stage_two} if progress >= self.start else self.weights

    def extended(self, terms: Mapping[str, LossTerm], weights: Mapping[str, float]) -> Objective:
        """With further terms."""
        return Objective(
            {**self.terms, **terms}, {**self.weights, **weights}, self.stage_two, self.start
        )

    def after_step(self, potential: Any) -> bool:
        """Let terms act on the weights once the optimizer has moved them; True if models from
        before no longer count."""
        acts = [getattr(term, "after_step", None) for term in self.modules.values()]
        return any([act(potential) for act in acts if act is not None])

    def numbers(self) -> dict[str, float]:
        """What terms say of their state, for the log: ``{"constraint_dual": 3.1}``."""
        found: dict[str, float] = {}
        for name, term in self.modules.items():
            tell = getattr(term, "numbers", None)
            if tell is not None:
                found |= {f"{name}_{key}": value for key, value in tell().items()}
        return found

    @property
    def acts_on_weights(self) -> bool:
        """Whether ``after_step`` does anything."""
        return any(hasattr(term, "after_step") for term in self.modules.values())

    def __call__(
        self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor], progress: float = 0.0
    ) -> Tensor:
        total = out["energy"].new_zeros(())
        for name, weight in self.at(progress).items():
            if weight > 0:
                if hasattr(self.terms[name], "progress"):
                    setattr(self.terms[name], "progress", progress)  # noqa: B010
                total = total + weight * self.terms[name](potential, graph, out)
        return total


def _residual(value: Tensor, graph: AtomicGraph, name: str) -> tuple[Tensor, Tensor]:
    """Prediction minus label and where both exist; elsewhere zero with zero gradient."""
    if name not in graph:
        return torch.zeros_like(value), torch.zeros_like(value, dtype=torch.bool)
    label = graph[name]
    # A stress is undefined, NaN, without a periodic cell; any other NaN of the model must come to
    # light.
    mask = ~label.isnan()
    if name == "stress":
        mask = mask & ~graph.volume.isnan()[:, None, None]
    return torch.where(mask, value, 0) - torch.where(mask, label, 0), mask


def _weight(graph: AtomicGraph) -> Tensor:
    return (
        graph.weight if "weight" in graph else torch.ones_like(graph.ptr[1:], dtype=torch.float64)
    )
