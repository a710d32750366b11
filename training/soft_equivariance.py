"""Projection-based regularisation towards equivariance, and the exact projection at the end.

    R_g = 1/2 sum_layers |W - P_g W|^2 + |b - P_g b|^2,        loss = sum_g lambda_g R_g

P_g is the orthogonal projector onto weights equivariant under the group g, in closed form
(``mlip.nn.irreps``).  Several groups at once show which of them the data break: after a share of
the training the strengths are set once by the violations seen, lambda_g <- lambda_g (min R /
R_g)^p, so that a group the data violate is enforced weakly.

After H. Kim, H. Lee, H. Yang, J. Lee, ICML 2023 (arXiv:2306.00356), who take the projectors from a
numerical solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlip.data.graph import AtomicGraph
from mlip.nn.irreps import IrrepsLinear, equivariant_bias, equivariant_part
from mlip.training.distributed import world_size
from mlip.training.symmetry_config import ProjectionConfig

MEMORY = 0.95  # of the running mean of the violations


def irreps_layers(potential: Any) -> list[IrrepsLinear]:
    """The layers that the model declares, or an error with the remedy."""
    declare = getattr(potential.model, "irreps_layers", None)
    found: list[IrrepsLinear] = [] if declare is None else declare()
    if not found:
        raise ValueError(
            f"{type(potential.model).__name__} declares no layers between irreps; "
            "soft equivariance of weights is for model: {name: transip, tokens: irreps}"
        )
    return found


def violation(potential: Any, group: str) -> Tensor:
    """R_g, half the squared distance of all weights from equivariant ones; differentiable."""
    total: Tensor | None = None
    for spec in irreps_layers(potential):
        for name, part in _parts(spec, group):
            value = getattr(spec.layer, name)
            with torch.no_grad():
                off = value - part
            # P is an orthogonal projector: the gradient of |W - P W|^2 / 2 is W - P W itself.
            slope = (value * off).sum()
            term = off.square().sum() / 2 + (slope - slope.detach())
            total = term if total is None else total + term
    assert total is not None
    return total


@torch.no_grad()
def project(potential: Any, group: str = "O3") -> None:
    """Replace all declared weights by their equivariant part."""
    for spec in irreps_layers(potential):
        for name, part in _parts(spec, group):
            getattr(spec.layer, name).copy_(part)


@torch.no_grad()
def _parts(spec: IrrepsLinear, group: str) -> list[tuple[str, Tensor]]:
    parts = [("weight", equivariant_part(spec.layer.weight, spec, group))]
    if spec.layer.bias is not None:
        parts.append(("bias", equivariant_bias(spec.layer.bias, spec, group)))
    return parts


class ProjectionTerm(nn.Module):
    """sum_g lambda_g R_g; ``progress`` is set by the training."""

    strengths: Tensor
    means: Tensor
    adapted: Tensor
    projected: Tensor

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__()
        self.config = config
        self.groups = list(config.groups)
        self.progress = 0.0
        values = torch.tensor(list(config.groups.values()), dtype=torch.float64)
        self.register_buffer("strengths", values)
        self.register_buffer("means", torch.full_like(values, torch.nan))
        self.register_buffer("adapted", torch.tensor(False))
        self.register_buffer("projected", torch.tensor(False))

    def forward(self, potential: Any, graph: AtomicGraph, out: Mapping[str, Tensor]) -> Tensor:
        c = self.config
        terms = torch.stack([violation(potential, group).double() for group in self.groups])
        with torch.no_grad():
            started = ~self.means.isnan()
            mean = torch.where(started, MEMORY * self.means + (1 - MEMORY) * terms, terms)
            self.means.copy_(mean)
            if c.adapt_at is not None and self.progress >= c.adapt_at and not self.adapted:
                smallest = mean.min().clamp(min=torch.finfo(mean.dtype).tiny)
                self.strengths.mul_((smallest / mean.clamp(min=smallest)) ** c.adapt_power)
                self.adapted.fill_(True)
        # Weights are the same in all processes, whose shares are summed.
        return (self.strengths * terms).sum() * c.anneal**self.progress / world_size()

    def numbers(self) -> dict[str, float]:
        """For the log: which symmetries the data break is told by the violations."""
        violations = {
            f"{g}_violation": float(v) for g, v in zip(self.groups, self.means, strict=True)
        }
        strengths = {
            f"{g}_strength": float(x) for g, x in zip(self.groups, self.strengths, strict=True)
        }
        return violations | strengths

    def after_step(self, potential: Any) -> bool:
        """Exactly equivariant weights from ``project_from`` on; True when it begins."""
        start = self.config.project_from
        if start is None or self.progress < start:
            return False
        project(potential, self.groups[0])
        begins = not self.projected
        self.projected.fill_(True)
        return begins
