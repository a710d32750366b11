"""The first weights of a training are those of another one: staged training and fine-tuning.

What a model computes is decided by its weights and its hyperparameters together, so both are those
of the file: two of them that data decide elsewhere (``decided``) come from it, all others have to
be the same, but for direct forces, whose layers are left out or begin at random.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols

from mlip.potential import Potential
from mlip.training import denoising
from mlip.wrappers import unwrapped

logger = logging.getLogger(__name__)

OF_DATA = ("avg_num_neighbors", "elements")  # hyperparameters that the training set decides


def decided(old: Potential, elements: Iterable[int], path: Path) -> dict[str, Any]:
    """Hyperparameters that come with the weights of a file, where nobody gives them.

    Raises
    ------
    ValueError
        If it has weights for single elements, and not for all those of the data.
    """
    config = unwrapped(old.model)[0].config
    found = {key: getattr(config, key) for key in OF_DATA if hasattr(config, key)}
    known = found.get("elements")
    if known is not None and (missing := sorted(set(elements) - set(known))):
        names = ", ".join(chemical_symbols[z] for z in missing)
        raise ValueError(f"init_from: {path} has no weights for {names}, which the data contain")
    return found


def start_from(potential: Potential, old: Potential, path: Path) -> None:
    """Give a new potential the weights of a saved one.

    Scale and energies of cohesion go with the weights, reference energies stay those of the data;
    wrappers may differ.

    Raises
    ------
    ValueError
        If they are models of different kinds or hyperparameters.
    """
    model, theirs = unwrapped(potential.model)[0], unwrapped(old.model)[0]
    odd = [f"a {type(theirs).__name__}, not a {type(model).__name__}"]
    if type(theirs) is type(model):
        there, here = theirs.config.model_dump(), model.config.model_dump()
        odd = [
            f"{key} is {there[key]} there and {here[key]} here"
            for key in here
            if key != "direct_forces" and there[key] != here[key]
        ]
    if odd:
        raise ValueError(
            f"init_from: {path} is another model than the configured one: {', '.join(odd)}; "
            "take the hyperparameters of the file, which 'mlip info' shows"
        )
    weights = model.state_dict()
    model.load_state_dict(
        {**weights, **{k: v for k, v in theirs.state_dict().items() if k in weights}}
    )
    potential.scale.copy_(old.scale)
    potential.cohesion = old.cohesion
    logger.info("weights of %s", path)


def leaves_a_constant(old: Potential) -> bool:
    """Whether a constant for each element is open where reference energies are those of other data:
    denoising teaches none, and of atoms whose energy is learned it is part of the old ones."""
    config = unwrapped(old.model)[0].config
    learned = getattr(config, "isolated", None) == "learned" and old.cohesion is None
    return old.objective == denoising.NAME or learned
