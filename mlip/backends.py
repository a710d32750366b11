"""Faster back ends of models, each checked before it is used.

``accelerated(potential, "cuequivariance")`` gives a potential whose model computes by the kernels
of that library, if energies, forces and stress on probe structures are those of the plain model in
float64; otherwise it refuses, and says why.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import default_rng

from mlip.data.graph import AtomicGraph
from mlip.models.mace import MACE, Convolution, Layer
from mlip.nn.symmetric_contraction import SymmetricContraction
from mlip.potential import Potential

# Largest difference to the plain model in float64, relative to the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


class BackendError(RuntimeError):
    """A back end that cannot be used here, or gives other numbers."""


class Backend(Protocol):
    """Another way to compute a model."""

    name: str

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot be used on this device; None if it can."""

    def convert(self, model: Any) -> Any:
        """Energy model with the same weights; the given one stays as it is."""


class CuEquivariance:
    """Kernels of NVIDIA's cuEquivariance for the two costly blocks of MACE."""

    name = "cuequivariance"

    def __init__(self, method: str | None = None) -> None:
        self.method = method  # None: the library's choice

    def obstacle(self, device: torch.device) -> str | None:
        """The library or a GPU is missing."""
        for library in ("cuequivariance", "cuequivariance_torch", "cuequivariance_ops_torch"):
            if find_spec(library) is None:
                return (
                    f"{library} is not installed; "
                    "pip install cuequivariance-torch cuequivariance-ops-torch-cu12"
                )
        if device.type != "cuda":
            return f"its kernels need a GPU, and the potential is on the {device.type}"
        return None

    def convert(self, model: Any) -> Any:
        """Copy with other blocks for the sums over neighbours and the products."""
        from mlip.nn.cuequivariance_blocks import CueContraction, CuePathSums

        if not isinstance(model, MACE):
            raise BackendError(f"{self.name} is for MACE, not for {type(model).__name__}")
        weight = next(model.parameters())
        model = copy.deepcopy(model)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            convolution, contraction = layer.convolution, layer.contraction
            assert isinstance(convolution, Convolution)
            assert isinstance(contraction, SymmetricContraction)
            convolution.sums = CuePathSums(convolution.sums, model.config.channels, self.method)
            layer.contraction = CueContraction(contraction, self.method)
        return model.to(device=weight.device, dtype=weight.dtype)


BACKENDS: dict[str, Backend] = {"cuequivariance": CuEquivariance()}


def accelerated(
    potential: Potential,
    backend: str | Backend,
    probes: Sequence[AtomicGraph] | None = None,
) -> Potential:
    """The potential with a faster model that was checked against the plain one.

    Parameters
    ----------
    potential : Potential, on the device and in the dtype in which it will be used
    backend : name, or an object
    probes : structures on which both are compared; by default a random cluster and a random crystal
        of the potential's elements

    Raises
    ------
    ValueError
        For an unknown name.
    BackendError
        If the library or a GPU is missing, or if energies, forces or stress differ.
    """
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"unknown back end '{backend}'; there is {', '.join(BACKENDS)}")
        backend = BACKENDS[backend]
    device = potential.e0.device
    if (obstacle := backend.obstacle(device)) is not None:
        raise BackendError(f"back end '{backend.name}': {obstacle}")
    fast = potential.with_model(backend.convert(potential.model)).eval()
    check(potential, fast, backend.name, probe_structures(potential) if probes is None else probes)
    fast.training = potential.training
    return fast


def check(plain: Potential, fast: Potential, name: str, probes: Sequence[AtomicGraph]) -> None:
    """Refuse ``fast`` where it differs from ``plain`` in float64 by more than its rounding.

    Raises
    ------
    BackendError
        Naming the quantity and the difference.
    """
    exact = copy.deepcopy(plain).double().eval()
    tolerance = TOLERANCE[fast.dtype]
    for number, probe in enumerate(probes):
        probe = probe.to(str(plain.e0.device))
        a, b = exact(probe, stress=True), fast(probe, stress=True)
        energy = (a["node_energy"] - exact.e0[probe.atomic_numbers], "eV")
        mine = b["node_energy"] - exact.e0[probe.atomic_numbers]
        for key, (right, unit), value in (
            ("energy of an atom", energy, mine),
            ("force", (a["forces"], "eV/angstrom"), b["forces"]),
            ("stress", (a["stress"], "eV/angstrom^3"), b["stress"]),
        ):
            defined = ~right.isnan()  # a cluster has no stress
            if not defined.any():
                continue
            error = float((value - right)[defined].abs().max())
            size = float(right[defined].abs().max())
            if not error <= tolerance * max(size, 1e-3 * float(plain.scale)):
                raise BackendError(
                    f"back end '{name}' is refused: on probe structure {number} its {key} differs "
                    f"by {error:.3g} {unit} from the plain model, of {size:.3g}; "
                    f"allowed is {tolerance:.0e} of it"
                )


def probe_structures(potential: Potential) -> list[AtomicGraph]:
    """A random cluster and a random crystal of up to six of the potential's elements."""
    known = potential.elements
    chosen = [
        known[k] for k in np.linspace(0, len(known) - 1, min(len(known), 6)).round().astype(int)
    ]
    rng, result = default_rng(0), []
    for periodic in (False, True):
        # A simple cubic lattice of 2 angstrom, so loosened that no site is special.
        sites = 2.0 * np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
        positions = sites + rng.uniform(-0.3, 0.3, sites.shape)
        numbers = np.resize(chosen, len(sites))
        cell = 6.0 * np.eye(3) + rng.uniform(-0.3, 0.3, (3, 3)) if periodic else np.zeros((3, 3))
        result.append(
            AtomicGraph.from_arrays(
                numbers, positions, cell, np.full(3, periodic), potential.cutoff
            )
        )
    return result
