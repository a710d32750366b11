"""The models, one file each, and the table that names them.

Adding a model is three edits: its file, its line here, its presets in ``training/sizes.py``; the
tests of the contract pick it up.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mlip.config import Config, parse
from mlip.models.environment import Environment, EnvironmentConfig
from mlip.models.escaip import EScAIP, EScAIPConfig
from mlip.models.facet import Facet, FacetConfig
from mlip.models.gaunt import Gaunt, GauntConfig
from mlip.models.mace import MACE, MACEConfig
from mlip.models.ponita import Ponita, PonitaConfig
from mlip.models.ponita_published import PonitaPublished, PonitaPublishedConfig
from mlip.models.transip import TransIP, TransIPConfig

MODELS: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "facet": (Facet, FacetConfig),
    "escaip": (EScAIP, EScAIPConfig),
    "transip": (TransIP, TransIPConfig),
    "gaunt": (Gaunt, GauntConfig),
    "mace": (MACE, MACEConfig),
    "ponita": (Ponita, PonitaConfig),
    "ponita_published": (PonitaPublished, PonitaPublishedConfig),
    "environment": (Environment, EnvironmentConfig),
}


def build(name: str, **hyperparameters: Any) -> Any:
    """Build an untrained model by name; a misspelt hyperparameter is answered with the nearest."""
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}'; there are {', '.join(MODELS)}")
    model_class, config_class = MODELS[name]
    return model_class(parse(config_class, hyperparameters, f"model '{name}'"))


def name_of(model: nn.Module) -> str:
    """The name under which ``build`` makes this model's class."""
    for name, (model_class, _) in MODELS.items():
        if type(model) is model_class:
            return name
    raise ValueError(
        f"{type(model).__name__} is not in MODELS; pass the model as an object and save it yourself"
    )
