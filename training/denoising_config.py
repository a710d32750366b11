"""Section ``denoising`` of a training's configuration: pre-training on structures without
labels."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from mlip.config import Config


def _several(value: object) -> object:
    return [value] if isinstance(value, int | float) else value


class DenoisingConfig(Config):
    """Learn to undo noise in positions instead of the labels."""

    sigma: Annotated[
        list[Annotated[float, Field(gt=0, le=2)]],
        BeforeValidator(_several),
        Field(min_length=1, max_length=64),
    ] = Field([0.05], description="standard deviation of each coordinate, angstrom; or several")
    temperature: float = Field(
        300.0, gt=0, description="K; forces are those of Boltzmann's distribution at it"
    )
