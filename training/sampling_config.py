"""Section ``sampling`` of a training's configuration: which structures are shown more often."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlip.config import Config


class SamplingConfig(Config):
    """Show groups of structures as often as their learning curves make it worth."""

    by: Literal["config_type", "group", "element"] = Field(
        "config_type", description="what a group is; both training and validation set need it"
    )
    power: float = Field(
        1.0,
        ge=1,
        le=16,
        description="of the groups' errors whose sum is made small: 1 the mean, 8 about the worst",
    )
    floor: float = Field(
        0.3, gt=0, le=1, description="share of each epoch that stays spread evenly"
    )
    first: int = Field(5, ge=3, description="validations before the first fit")
