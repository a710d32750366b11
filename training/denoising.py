"""Pre-training without labels: learn the forces that undo noise.

Positions are displaced by d = sigma normal(0, 1), without its mean, for nothing can tell a
translation.  The forces

    F = -kT d / sigma^2,      E [ F | r + d ] = kT grad log p_sigma (r + d)

are noisy, but their mean given the displaced structure is the force of the energy -kT log p_sigma,
where p_sigma is the distribution of the data smeared by the noise (Vincent, Neural Computation 23,
1661 (2011)).  So squares of errors are minimised, of several sigmas without weights: then the mean
is still a gradient, that of the mixture.  If the data are samples of Boltzmann's distribution at T,
the energy is the true one but for the smearing.  Zaidi et al., "Pre-training via denoising"
(arXiv:2206.00133).

Energies are determined up to a constant for each composition, and are not learned.
"""

from __future__ import annotations

import math

from ase.data import chemical_symbols
from ase.units import kB

from mlip.data.transforms import RandomDisplacement
from mlip.training.config import LossConfig, TrainConfig
from mlip.training.denoising_config import DenoisingConfig

NAME = "denoising"  # the objective that a pre-trained model names
NO_ENERGIES = dict.fromkeys(chemical_symbols[1:], 0.0)  # of isolated atoms


def displacement(config: DenoisingConfig, cutoff: float) -> RandomDisplacement:
    """The noise, which replaces all labels."""
    return RandomDisplacement(config.sigma, kB * config.temperature, cutoff)


def typical_force(config: DenoisingConfig) -> float:
    """Root mean square of the forces that are learned, eV/angstrom; the unit of the energies."""
    mean = sum(sigma**-2 for sigma in config.sigma) / len(config.sigma)
    return kB * config.temperature * math.sqrt(mean)


def with_loss(config: TrainConfig) -> TrainConfig:
    """The configuration with the loss of denoising: squares of errors of forces alone."""
    if config.denoising is None:
        return config
    loss = LossConfig(kind="mse", energy=0.0, stress=0.0)
    return config.model_copy(update={"loss": loss})
