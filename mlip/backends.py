"""Faster ways to compute a model, each checked before it is used.

``accelerated(potential, "splines")`` gives a potential with a faster model, if its energies, forces
and stress on probe structures are those of the plain model in float64 and its forces are the
gradient of its energy; otherwise it refuses, and says why.  Nothing of this is ever stored: a model
file holds the plain model.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.random import default_rng
from torch import Tensor, nn

from mlip.compiled import Compiled, Program, compiled, uncompiled
from mlip.data.graph import AtomicGraph
from mlip.facet_gradient import AnalyticFacet
from mlip.models.environment import Environment
from mlip.models.escaip import EScAIP
from mlip.models.facet import Facet
from mlip.models.gaunt import Gaunt
from mlip.models.mace import MACE, Convolution, Layer
from mlip.models.ponita import Ponita
from mlip.models.transip import TransIP
from mlip.nn.spline import Spline, leading_functions
from mlip.nn.symmetric_contraction import SymmetricContraction
from mlip.potential import Potential
from mlip.recorded import Recorded


class Bars(NamedTuple):
    """Largest differences to the plain model in float64."""

    energy: float  # eV, of an atom
    force: float  # eV/angstrom
    stress: float  # eV/angstrom^3


BARS = {torch.float32: Bars(1e-6, 1e-4, 1e-6), torch.float64: Bars(1e-9, 1e-8, 1e-9)}
# Where the plain model itself has rounding errors beyond the bars, so many times these are allowed.
ROUNDING = 10
# Evaluations after which "auto" compiles; for fewer the compiler's minute does not pay.
PATIENCE = 5000
PATH = 0.05  # angstrom, of each coordinate on the path on which the work of the forces is taken
NODES = 6  # points on it


class BackendError(ValueError):
    """A back end that cannot be used here, or gives other numbers."""


class Backend(Protocol):
    """Another way to compute a model."""

    name: str

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot be used on this device; None if it can."""

    def convert(self, model: Any, elements: Sequence[int]) -> Any:
        """Energy model with the same weights, for some elements; the given one stays as it is."""


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

    def convert(self, model: Any, elements: Sequence[int]) -> Any:
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


class Splines:
    """Radial networks of MACE: few tabulated functions of the distance instead.

    All radial weights R_l[p, c](r) of a layer are combinations of 20 to 50 functions, found by a
    singular value decomposition.  Those of all layers are one table of splines.
    """

    name = "splines"

    def obstacle(self, device: torch.device) -> str | None:
        """None: it needs nothing."""
        return None

    def convert(self, model: Any, elements: Sequence[int]) -> Any:
        """Copy with tables in place of networks, exact to the model's dtype."""
        if isinstance(model, Compiled):
            raise BackendError(f"{self.name} come before what compiles or records them")
        if not isinstance(model, MACE):
            raise BackendError(
                f"{self.name} are for MACE; the radial functions of {type(model).__name__} are "
                "cheap as they are"
            )
        dtype = next(model.parameters()).dtype
        device = next(model.parameters()).device
        tolerance = {torch.float32: 1e-8, torch.float64: 1e-11}[dtype]
        fast = copy.deepcopy(model).cpu().double()
        basis = fast.basis
        x = torch.linspace(1e-3, 1, 1024, dtype=torch.float64)
        networks, end = [], 0
        for layer in fast.layers:
            convolution = cast(Layer, layer).convolution
            network = nn.Sequential(basis, convolution.radial, convolution.activation)
            weights = convolution.weights.detach()  # (H, P, C), taken with H^-1/2 in each forward
            with torch.no_grad():
                mix, back = leading_functions(network(x), weights.flatten(1), tolerance)
            k = len(back)
            back = back.view(k, *weights.shape[1:]) * math.sqrt(k / len(weights))
            convolution.weights = nn.Parameter(back, requires_grad=False)
            convolution.radial = Columns(end, end + k)  # type: ignore[assignment]
            convolution.activation = nn.Identity()  # type: ignore[assignment]
            networks.append((network, mix))
            end += k
        fast.basis = Spline(lambda x: torch.cat([f(x) @ m for f, m in networks], dim=1), tolerance)
        return fast.to(device=device, dtype=dtype)


class Analytic:
    """Energy and gradient of Facet written out (``mlip.facet_gradient``)."""

    name = "analytic"

    def obstacle(self, device: torch.device) -> str | None:
        """None: it needs nothing."""
        return None

    def convert(self, model: Any, elements: Sequence[int]) -> Any:
        """Copy that gives the gradient with the energy."""
        found = written(model, elements)
        if not isinstance(found, AnalyticFacet):
            raise BackendError(
                f"'{self.name}' is for Facet with grid: poly, without quartic and field, not for "
                f"{type(model).__name__} with these options"
            )
        return copy.deepcopy(found)


def written(model: Any, elements: Sequence[int]) -> Any:
    """The same model with its gradient written out, where it can be."""
    if isinstance(model, Facet) and AnalyticFacet.writes(model):
        return AnalyticFacet(model, elements)
    return model


class Compile:
    """Energy and gradient as one compiled program (``mlip.compiled``).

    For models whose operations depend on the sizes alone.
    """

    name = "compile"

    def obstacle(self, device: torch.device) -> str | None:
        """No C++ compiler for the processor."""
        compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
        if device.type == "cpu" and not any(map(which, compilers)):
            return (
                "it needs a C++ compiler; install one (apt install g++, conda install gxx) or "
                "name it in the environment as CXX"
            )
        return None

    def convert(self, model: Any, elements: Sequence[int]) -> Any:
        """Copy that is compiled when it is first called."""
        require_program(model, self.name)
        return Compiled(written(copy.deepcopy(model), elements), compiled_function)


def compiled_function(model: Any) -> Program:
    """The compiled program as a mere function: a module would become a part of ``Compiled``, and be
    copied, moved and pickled (which it cannot be) with it."""
    return partial(compiled(model))


def require_program(model: Any, way: str) -> None:
    """BackendError if this model cannot be one program."""
    if isinstance(model, AnalyticFacet):
        return
    if not isinstance(model, EScAIP | Environment | Facet | Gaunt | MACE | Ponita | TransIP):
        raise BackendError(
            f"{way} is for EScAIP, Environment, Facet, Gaunt, MACE, Ponita and TransIP, not "
            f"{type(model).__name__}"
        )
    if not all(isinstance(m.contraction, SymmetricContraction) for m in mace_layers(model)):
        raise BackendError(f"{way} is not for what has kernels of a library in it")
    if getattr(model.config, "direct_forces", False):
        raise BackendError(f"{way} is for models whose forces are gradients")
    if getattr(model, "graph_inputs", ()) or getattr(model.config, "field", None) is not None:
        raise BackendError(f"{way} is for models that read no external field")


def mace_layers(model: Any) -> list[Layer]:
    """Those of MACE; none of other models."""
    return [cast(Layer, layer) for layer in model.layers] if isinstance(model, MACE) else []


class CudaGraph:
    """The operations of energy and gradient recorded on a GPU (``mlip.recorded``).

    For the models of ``Compile``, and of what it has compiled.
    """

    name = "cudagraph"

    def obstacle(self, device: torch.device) -> str | None:
        """No GPU."""
        if device.type == "cuda":
            return None
        return f"it records the kernels of a GPU, and the potential is on the {device.type}"

    def convert(self, model: Any, elements: Sequence[int]) -> Any:
        """Copy that is recorded at the first call with each size."""
        if isinstance(model, Compiled):
            return Compiled(model.model, partial(recorded, model.ready or compiled))
        require_program(model, self.name)
        return Compiled(written(copy.deepcopy(model), elements), partial(recorded, uncompiled))


def recorded(make: Callable[[Any], Program], model: Any) -> Program:
    """The program that ``make`` gives of a model, recorded."""
    return Recorded(make(model), model.config.cutoff)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (Analytic(), Splines(), Compile(), CudaGraph(), CuEquivariance())
}


def by_default(potential: Potential) -> list[str]:
    """Names of what computes the same at once, only better arranged."""
    model = written(potential.model, potential.elements)
    # Weights that are no numbers cannot be compared; who uses them is told of them.
    sound = all(bool(p.isfinite().all()) for p in potential.model.parameters())
    return ["analytic"] if sound and isinstance(model, AnalyticFacet) else []


def automatic(potential: Potential) -> list[str]:
    """Names of what makes this potential faster at once, as far as benchmarks say."""
    return ["splines"] if isinstance(potential.model, MACE) else by_default(potential)


def is_auto(wish: str | Sequence[str] | None) -> bool:
    """Whether a user wishes for ``"auto"``."""
    return wish is not None and (wish == "auto" or list(wish) == ["auto"])


def eventually(potential: Potential) -> Potential:
    """The potential with what pays after thousands of evaluations: compiled on a processor, if it
    can be, with a warning of the pause; otherwise as it is, and so if its gradient is written out,
    to which compiling adds little."""
    device, way, model = potential.e0.device, BACKENDS["compile"], potential.model
    if device.type != "cpu" or way.obstacle(device) is not None:
        return potential
    if isinstance(model, AnalyticFacet) or not has_program(model):
        return potential
    pause = f"compiling the model after {PATIENCE} evaluations: a pause of about a minute"
    warnings.warn(pause, stacklevel=3)
    try:
        return accelerated(potential, way)
    except BackendError as problem:
        warnings.warn(f"not compiled: {problem}", stacklevel=3)
        return potential


def has_program(model: Any) -> bool:
    """Whether ``require_program`` lets this model pass."""
    try:
        require_program(model, "compile")
    except BackendError:
        return False
    return True


def requested(potential: Potential, wish: str | Sequence[str] | None) -> Potential:
    """``accelerated`` by the wish of a user: a name, several, ``"plain"`` for nothing, ``"auto"``,
    or None for ``by_default``.

    What the last two choose and the check refuses is left out with a warning.
    """
    if wish is not None and not is_auto(wish):
        names = [wish] if isinstance(wish, str) else list(wish)
        if len(names) > 1 and (alone := {"plain", "auto"} & set(names)):
            raise ValueError(f"accelerate = {names}: '{alone.pop()}' stands alone; leave it out")
        return accelerated(potential, [] if names == ["plain"] else names)
    try:
        return accelerated(potential, (by_default if wish is None else automatic)(potential))
    except BackendError as problem:
        warnings.warn(f"not accelerated: {problem}", stacklevel=3)
        return potential


def accelerated(
    potential: Potential,
    backends: str | Backend | Sequence[str | Backend],
    probes: Sequence[AtomicGraph] | None = None,
) -> Potential:
    """The potential with a faster model that was checked against the plain one.

    Parameters
    ----------
    potential : Potential, on the device and in the dtype in which it will be used
    backends : names or objects, applied one after the other
    probes : structures on which both are compared; by default a random cluster and a random crystal
        of the potential's elements

    Raises
    ------
    ValueError
        For an unknown name.
    BackendError
        If the library or a GPU is missing, or if energies, forces or stress differ.
    """
    chosen = (
        [backends] if isinstance(backends, str) or not isinstance(backends, Sequence) else backends
    )
    device = potential.e0.device
    model, names = potential.model, []
    for backend in chosen:
        if isinstance(backend, str):
            if backend not in BACKENDS:
                raise ValueError(
                    f"unknown acceleration '{backend}'; there is {', '.join(BACKENDS)}, plain, auto"
                )
            backend = BACKENDS[backend]
        if (obstacle := backend.obstacle(device)) is not None:
            raise BackendError(f"'{backend.name}': {obstacle}")
        model = backend.convert(model, potential.elements)
        names.append(backend.name)
    if not names:
        return potential
    fast = potential.with_model(model).eval()
    name = " + ".join(names)
    try:
        check(potential, fast, name, probe_structures(potential) if probes is None else probes)
    except BackendError:
        raise
    except Exception as problem:  # compilers and libraries of kernels raise whatever they like
        first = (str(problem).splitlines() or [""])[0]
        raise BackendError(f"'{name}' failed: {type(problem).__name__}: {first}") from problem
    fast.training = potential.training
    return fast


def check(
    plain: Potential,
    fast: Potential,
    name: str,
    probes: Sequence[AtomicGraph],
    relative: float = 1e-12,
) -> None:
    """Refuse ``fast`` where it differs from ``plain`` in float64 by more than the bars, rounding
    and a part of the largest value, or where its forces are not the gradient of its energy.

    Raises
    ------
    BackendError
        Naming the quantity and the difference.
    """
    exact = copy.deepcopy(plain).double().eval()
    rounded = copy.deepcopy(plain).eval()
    bars = BARS[fast.dtype]
    for number, probe in enumerate(probes):
        probe = probe.to(str(plain.e0.device))
        right, mine = measured(exact, probe), measured(fast, probe)
        usual: dict[str, Tensor] | None = None
        for (key, value), bar, unit in zip(right.items(), bars, UNITS, strict=True):
            defined = ~value.isnan()  # a cluster has no stress
            if not defined.any():
                continue
            error = float((mine[key] - value)[defined].abs().max())
            size = float(value[defined].abs().max())
            allowed = max(bar, relative * size)
            if not error <= allowed:  # so also if it is no number
                usual = measured(rounded, probe) if usual is None else usual
                allowed = max(allowed, ROUNDING * float((usual[key] - value)[defined].abs().max()))
            if not error <= allowed:
                raise BackendError(
                    f"'{name}' is refused: on probe structure {number} its {key} differs by "
                    f"{error:.3g} {unit} from the plain model, of {size:.3g}; allowed is "
                    f"{allowed:.1e}"
                )
        defect, allowed = missing_work(fast, probe), bars.force
        if not defect <= allowed:
            allowed = max(allowed, relative * float(right["force"].abs().max()))
        if not defect <= allowed:
            allowed = max(allowed, ROUNDING * missing_work(rounded, probe))
            if not defect <= allowed:
                raise BackendError(
                    f"'{name}' is refused: on probe structure {number} its forces are not the "
                    f"gradient of its energy; along a path they differ by {defect:.3g} "
                    f"eV/angstrom, allowed is {allowed:.1e}"
                )


UNITS = ("eV", "eV/angstrom", "eV/angstrom^3")


def measured(potential: Potential, probe: AtomicGraph) -> dict[str, Tensor]:
    """What is compared, in the order of ``Bars``; reference energies left out."""
    out = potential(probe, stress=True)
    energy = out["node_energy"] - potential.e0[probe.atomic_numbers]
    return {"energy of an atom": energy, "force": out["forces"], "stress": out["stress"]}


def missing_work(potential: Potential, probe: AtomicGraph) -> float:
    """|E(b) - E(a) + work of the forces from a to b| / |b - a| in eV/angstrom, on a straight path.

    By Gauss's rule, which is exact for smooth forces; a difference of two near energies would
    measure their rounding.
    """
    generator = torch.Generator().manual_seed(0)
    path = PATH * torch.randn(probe.positions.shape, generator=generator, dtype=torch.float64)
    path = path.to(probe.positions.device)

    def at(s: float) -> dict[str, Tensor]:
        return potential(probe.replace(positions=probe.positions + s * path))

    def energy(out: dict[str, Tensor]) -> float:
        return float((out["node_energy"] - potential.e0[probe.atomic_numbers]).sum())

    points, weights = np.polynomial.legendre.leggauss(NODES)
    work = sum(
        w / 2 * float((at((1 + s) / 2)["forces"] * path).sum())
        for s, w in zip(points, weights, strict=True)
    )
    return abs(energy(at(1.0)) - energy(at(0.0)) + work) / float(path.norm())


class Columns(nn.Module):
    """Some of the last dimension."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.stop]


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
