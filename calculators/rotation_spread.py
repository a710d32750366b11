"""Means over rotated copies in a calculator, with the spread over the copies as an uncertainty."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from mlip.calculators.chunks import BoundedPotential
from mlip.data.graph import AtomicGraph
from mlip.potential import Potential
from mlip.rotation_orbit import rotation_orbit
from mlip.wrappers.rotation_averaging import RotationAveraging, RotationAveragingConfig


def averaged(
    potentials: Sequence[Potential], rotations: str | RotationAveragingConfig | None
) -> list[Potential]:
    """The potentials with the mean over rotations of their models; as they are if None.

    Warns of models that are exactly invariant by construction, under all rotations
    (``exact_symmetry``) or under this group (``exact_groups``).
    """
    if rotations is None:
        return list(potentials)
    wrapped = [p.with_model(RotationAveraging(p.model, rotations)) for p in potentials]
    for potential in wrapped:
        rule, model = potential.model.rotations, potential.model.model
        if getattr(model, "exact_symmetry", False):
            under, remedy = "all rotations", "Leave symmetrize out"
        elif rule.name in getattr(model, "exact_groups", ()):
            under = f"the {rule.name} group"
            remedy = "Leave symmetrize out, or take another rule, such as 'lebedev-11'"
        else:
            continue
        warnings.warn(
            f"symmetrize: the model is exactly invariant under {under} by construction; "
            f"{len(rule)} copies give what one gives. {remedy}",
            stacklevel=3,
        )
    return wrapped


def has_spread(potential: Potential) -> bool:
    """Whether the potential is a mean over rotations."""
    return isinstance(potential.model, RotationAveraging)


def num_turns(potential: Potential) -> int:
    """Of how many copies of a structure the potential is the mean."""
    return len(potential.model.rotations) if has_spread(potential) else 1


def without_mean(potential: Potential) -> Potential:
    """The potential whose mean over rotations this is, or itself."""
    model = potential.model
    return potential.with_model(model.model) if isinstance(model, RotationAveraging) else potential


def with_spread(
    potential: Potential, bounded: BoundedPotential, graph: AtomicGraph, stress: bool
) -> dict[str, Tensor]:
    """Output of a potential in evaluation mode, of which ``bounded`` is ``without_mean``.

    Of a mean over rotations all copies are evaluated one by one, at the same cost: the result is
    the same, and ``energy_spread`` (G,) eV and ``forces_spread`` (N,) eV/angstrom come with it.
    """
    wrapper = potential.model
    if not isinstance(wrapper, RotationAveraging):
        return bounded(graph, stress=stress)
    orbit = rotation_orbit(
        bounded, graph, wrapper.rotations, stress=stress, max_edges=wrapper.options.max_edges
    )
    spread = {"energy_spread": orbit.energy_spread(), "forces_spread": orbit.forces_spread()}
    return orbit.consensus() | spread
