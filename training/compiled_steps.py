"""Steps of training through one compiled program of energies, forces and their derivative by the
weights (``mlip.compiled``), after a look at whether it gives what the plain model gives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mlip.backends import BackendError, Compile, require_program
from mlip.compiled import CompiledTraining
from mlip.data.graph import AtomicGraph
from mlip.potential import Potential

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}  # of the largest value of each kind
REMEDY = "set runtime.compile: false"


def require_compilable(potential: Potential) -> None:
    """BackendError, with the remedy, if steps of this potential cannot be compiled here."""
    compiler, model = Compile(), potential.model
    reason = compiler.obstacle(potential.e0.device)
    if reason is None:
        try:
            require_program(model, compiler.name)
        except BackendError as error:
            reason = str(error)
    if reason is None and getattr(model.config, "random_grid", False):
        reason = "a grid that is turned at random in each step is not compiled"
    if reason is not None:
        raise BackendError(f"runtime.compile: {reason}; {REMEDY}")


def compiled_steps(potential: Potential, graph: AtomicGraph) -> Potential:
    """The same potential, for steps of training only; compiled and tried with this batch.

    It is tried with weights moved at random, which are put back to the bit: a new model has zeros
    at its ends, behind which a wrong program would not be seen.

    Raises
    ------
    BackendError
        If compiling fails, or energies, forces, stress or the gradient of a loss differ from those
        of the plain model by more than ``TOLERANCE`` of the largest one.
    """
    require_compilable(potential)
    start = time.monotonic()
    fast = potential.with_model(CompiledTraining(potential.model))
    with _moved(potential):
        right = _probe(potential, potential, graph)
        try:
            found = _probe(fast, potential, graph)
        except Exception as problem:  # compilers raise whatever they like
            first = (str(problem).splitlines() or [""])[0]
            raise BackendError(
                f"runtime.compile: compiling failed: {type(problem).__name__}: {first}; {REMEDY}"
            ) from problem
    for name, value in right.items():
        size, error = (float(x.abs().max()) for x in (value, found[name] - value))
        if not error <= TOLERANCE[potential.dtype] * size:
            raise BackendError(
                f"runtime.compile: {name} of the compiled program differ by {error:.2g} of "
                f"{size:.2g}; {REMEDY}"
            )
    logger.info("steps compiled and checked in %.0f s", time.monotonic() - start)
    return fast


@contextmanager
def _moved(potential: Potential) -> Iterator[None]:
    """Weights with normal numbers of a tenth added, as they were afterwards."""
    generator = torch.Generator().manual_seed(0)  # torch's own is that of the training
    kept = [(p, p.detach().clone()) for p in potential.parameters()]
    try:
        with torch.no_grad():
            for p, _ in kept:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
        yield
    finally:
        with torch.no_grad():
            for p, old in kept:
                p.copy_(old)


def _probe(potential: Potential, owner: Potential, graph: AtomicGraph) -> dict[str, Tensor]:
    """Energies, forces, stresses, and the gradient of a loss of all of them by the weights."""
    out = potential(graph, stress=True)
    e0 = potential.e0[graph.atomic_numbers]
    named = {"energies": out["node_energy"] - e0, "forces": out["forces"]}
    periodic = ~out["stress"].isnan()
    if periodic.any():
        named["stresses"] = out["stress"][periodic]
    loss = sum((x / x.detach().abs().max().clamp(min=1e-9)).square().mean() for x in named.values())
    weights = [p for p in owner.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, weights, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, slopes, strict=True)]
    named["gradients"] = torch.cat([g.flatten() for g in flat])
    return {name: value.detach() for name, value in named.items()}
