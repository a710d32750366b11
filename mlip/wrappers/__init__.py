"""Wrappers: EnergyModel -> EnergyModel, and the table that names them.

A wrapper holds its model as ``model`` and its hyperparameters as ``options``; in a model file it is
an entry of ``wrappers``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mlip.config import Config, parse
from mlip.wrappers.frame_averaging import FrameAveraging, FrameAveragingConfig
from mlip.wrappers.rotation_averaging import RotationAveraging, RotationAveragingConfig

WRAPPERS: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "rotation_averaging": (RotationAveraging, RotationAveragingConfig),
    "frame_averaging": (FrameAveraging, FrameAveragingConfig),
}


def wrap(model: Any, name: str, **options: Any) -> Any:
    """Put the wrapper of this name around a model."""
    if name not in WRAPPERS:
        raise ValueError(f"unknown wrapper '{str(name)[:40]}'; there are {', '.join(WRAPPERS)}")
    wrapper, config_class = WRAPPERS[name]
    return wrapper(model, parse(config_class, options, f"wrapper '{name}'"))


def unwrapped(model: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The model inside all wrappers, and their names and options, innermost first."""
    entries = []
    names = {wrapper: name for name, (wrapper, _) in WRAPPERS.items()}
    while type(model) in names:
        entries.append({"name": names[type(model)], **model.options.model_dump(mode="json")})
        model = model.model
    return model, entries[::-1]
