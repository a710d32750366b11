"""Section ``symmetry`` of a training's configuration: how a model is taught its symmetry."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from mlip.config import Config
from mlip.nn.irreps import GROUPS


def _known(groups: dict[str, float]) -> dict[str, float]:
    for name, strength in groups.items():
        if name not in GROUPS:
            raise ValueError(f"'{name}' is none of the groups {', '.join(GROUPS)}")
        if strength <= 0:
            raise ValueError(f"the strength of {name} has to be positive")
    if not groups:
        raise ValueError("name at least one group, for example {O3: 1.0}")
    return groups


class LatentConfig(Config):
    """Latents of each atom that rotate with it, the action being fixed."""

    weight: float = Field(1.0, gt=0, description="of squares of latents, which are of size one")


class PooledLatentConfig(Config):
    """TransIP's loss: a network predicts the rotated structure's mean latent."""

    weight: float = Field(10.0, gt=0, description="of squares of mean latents")
    hidden: int = Field(128, ge=1, le=8192, description="width of the network")


class VarianceConfig(Config):
    """Variance of the outputs over rotations, unbiased."""

    energy: float = Field(1000.0, ge=0, description="weight of the variance in (eV/atom)^2")
    forces: float = Field(1000.0, ge=0, description="weight of that in (eV/angstrom)^2")
    views: int = Field(2, ge=2, le=64, description="views it is estimated from")

    @model_validator(mode="after")
    def _some_weight(self) -> VarianceConfig:
        if self.energy == self.forces == 0:
            raise ValueError("both weights are zero; leave the section out instead")
        return self


class ProjectionConfig(Config):
    """Distance of the weights from equivariant ones; for models with irreps layers."""

    groups: Annotated[dict[str, float], AfterValidator(_known)] = Field(
        {"O3": 0.01}, description="strength for each group, of " + ", ".join(GROUPS)
    )
    anneal: float = Field(
        1.0, ge=1, description="factor by which the strengths have grown at the end"
    )
    adapt_at: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the training after which strengths are set by how much the data "
        "violate each group; null: never",
    )
    adapt_power: float = Field(1.0, gt=0, description="of the ratio of violations in that")
    project_from: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the training after which weights are projected exactly onto the "
        "first group; null: never",
    )


class ConstraintConfig(Config):
    """Forces that may differ over rotations by epsilon at most, by a dual variable."""

    epsilon: float = Field(0.005, gt=0, description="eV/angstrom")
    start: float = Field(1.0, gt=0, description="first value of the dual variable")
    rate: float = Field(0.05, gt=0, le=1, description="of its change, relative, in a step")
    bounds: tuple[float, float] = Field((1e-3, 1e5), description="between which it stays")
    fresh: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of rotations drawn uniformly; the others near hard ones; 1: none",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ConstraintConfig:
        if not 0 < self.bounds[0] <= self.start <= self.bounds[1]:
            raise ValueError("it must be that 0 < bounds[0] <= start <= bounds[1]")
        return self


class SymmetryConfig(Config):
    """What is added to the loss so that the model learns to be symmetric; nothing by default."""

    reflect: bool = Field(True, description="mirror images belong to the rotations of all terms")
    latent: LatentConfig | None = Field(
        None, description="latents of atoms with a fixed action: {weight: 1}"
    )
    pooled: PooledLatentConfig | None = Field(
        None, description="mean latent with a learned action, as in TransIP: {weight: 10}"
    )
    variance: VarianceConfig | None = Field(
        None, description="variance of energy and forces: {energy: 1000, forces: 1000, views: 2}"
    )
    projection: ProjectionConfig | None = Field(
        None, description="soft equivariance of weights (PER): {groups: {O3: 0.01}}"
    )
    constraint: ConstraintConfig | None = Field(
        None, description="dual variable, until forces agree within: {epsilon: 0.005}"
    )

    @property
    def active(self) -> bool:
        """Whether any term is on."""
        terms = (self.latent, self.pooled, self.variance, self.projection, self.constraint)
        return any(term is not None for term in terms)
