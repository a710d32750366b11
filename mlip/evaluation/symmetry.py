"""How far a potential is from exact symmetry, measured on the orbits of structures under O(3).

With z_k the prediction for the copy R_k x, rotated back (``mlip.rotation_orbit``), and weights w_k:

    consensus  z = sum_k w_k z_k,        V = sum_k w_k |z_k - z|^2
    MSE = sum_k w_k |z_k - label|^2 = |z - label|^2 + V                                          (1)

V is the part of the error that is broken symmetry and nothing else; V / MSE is its share of the
loss.  The identity (1) is exact for any weights of sum one.  On rotations drawn at random V has to
be multiplied by K / (K - 1), which makes it unbiased; |z - label|^2 is then MSE - V.

The spectrum says what kind of anisotropy it is.  The orbit function u(R) = f(R x), not rotated
back, has components of degree l and parity p = +-1,

    u^{l,p}_mn = sum_k w_k p^[det R_k < 0] D^l_mn(R'_k) u(R_k),      R' = R det R,
    power(l, p) = (2 l + 1) sum_mn |u^{l,p}_mn|^2,      sum_{l,p} power(l, p) = sum_k w_k |u(R_k)|^2

(Parseval).  Exact symmetry leaves (0, +) of energies, (1, -) of forces, (0, +) and (2, +) of
stresses; all else is an error, and its degree says which rule (``mlip.nn.rotations``) averages it
away.

The orbit of a crystal also holds the cells by which it can be described: see
``mlip.evaluation.cell_choices``.

Xu et al., NERO, arXiv:2305.19889; Domina et al., arXiv:2603.24638.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.evaluation.metrics import QUANTITIES, SYMBOLS, UNITS
from mlip.nn.rotations import Rotations, random_rotations, rotations, wigner_matrices
from mlip.potential import Potential
from mlip.rotation_orbit import RotationOrbit, mean, rotation_orbit, variance


class Decomposition(NamedTuple):
    """Mean square error over an orbit, and its two parts."""

    mse: Tensor
    consensus: Tensor  # of the consensus
    variance: Tensor  # over the orbit

    @property
    def symmetry_share(self) -> Tensor:
        """V / MSE."""
        return self.variance / self.mse


def decompose(values: Tensor, labels: Tensor, weights: Tensor) -> Decomposition:
    """MSE = MSE of the consensus + variance, each computed by itself.

    Parameters
    ----------
    values : (K, ...) predictions, rotated back
    labels : (...)
    weights : (K,) of sum one

    Returns
    -------
    Decomposition
        Three tensors (...); take their means over components, atoms and structures.
    """
    mse = torch.tensordot(weights, (values - labels).square(), dims=1)
    return Decomposition(mse, (mean(values, weights) - labels).square(), variance(values, weights))


@dataclass(frozen=True)
class SymmetryError:
    """Of one quantity; energies per atom, forces and stresses per component, in eV and angstrom."""

    rms: float  # root of the mean of V
    largest: float  # deviation from the consensus
    mse: float  # over the orbit, NaN without labels
    share: float  # V / MSE over what is labelled, NaN without labels


@dataclass(frozen=True)
class SymmetryReport:
    """Symmetry errors of a potential on some structures."""

    errors: dict[str, SymmetryError]
    structures: int
    rotations: str  # in words

    def line(self) -> str:
        """``E 0.21 meV/atom  F 3.5 meV/Å``: root mean squares, to two digits."""
        return "  ".join(
            # Rounded before it is written: 140, not 1.4e+02.
            f"{SYMBOLS[q]} {float(f'{1000 * e.rms:.2g}'):g} {UNITS[q]}"
            for q, e in self.errors.items()
        )

    def text(self) -> str:
        """What was measured, and the share of the squared error where there are labels."""
        shares = [
            f"{SYMBOLS[q]} {100 * e.share:.2g} %"
            for q, e in self.errors.items()
            if math.isfinite(e.share)
        ]
        of = f"; of the squared error {', '.join(shares)}" if shares else ""
        return (
            f"symmetry error (RMS over {self.rotations} of {self.structures} structures): "
            f"{self.line()}{of}"
        )

    def flat(self, prefix: str = "") -> dict[str, float]:
        """``{"symmetry_forces_rms": ...}``, in eV and angstrom."""
        return {f"{prefix}symmetry_{q}_rms": e.rms for q, e in self.errors.items()}


def symmetry_errors(
    potential: Potential,
    graphs: Iterable[AtomicGraph],
    rule: Rotations | int = 8,
    *,
    seed: int = 0,
    stress: bool = False,
) -> SymmetryReport:
    """Deviations from the consensus on the orbits of structures.

    Parameters
    ----------
    potential : used where it is, in evaluation mode; its mode is restored
    graphs : structures or batches, with labels or without
    rule : a quadrature; or how many random rotations and reflections, drawn anew for each graph,
        by which the result is unbiased
    seed : of the random ones
    stress : whether to include the stress

    Raises
    ------
    ValueError
        For fewer than two random rotations.
    """
    if isinstance(rule, int) and rule < 2:
        raise ValueError(f"{rule} rotations have no spread; take 2 at least")
    generator = torch.Generator().manual_seed(seed)
    # quantity -> sums: V, its count, largest deviation^2, MSE and V over labels, their count
    sums = {q: [0.0] * 6 for q in QUANTITIES}
    structures = 0
    training = potential.training
    potential.eval()
    try:
        for graph in graphs:
            structures += graph.num_structures
            graph = graph.replace().to(potential.e0.device)  # a copy: .to moves its own
            chosen = rule
            if isinstance(chosen, int):
                chosen = random_rotations(chosen, generator, mirrors=True)
            orbit = rotation_orbit(potential, graph, chosen, stress=stress)
            unbiased = len(chosen) / (len(chosen) - 1) if isinstance(rule, int) else 1.0
            for quantity, (values, labels) in _comparable(orbit, graph).items():
                _add(sums[quantity], values, labels, orbit.weights, unbiased)
    finally:
        potential.train(training)
    errors = {}
    for quantity, (V, count, largest, mse, V_labelled, number) in sums.items():
        if count:
            errors[quantity] = SymmetryError(
                math.sqrt(V / count),
                math.sqrt(largest),
                mse / number if number else math.nan,
                V_labelled / mse if mse else math.nan,
            )
    words = f"{rule} random rotations and reflections"
    if isinstance(rule, Rotations):
        words = f"{len(rule)} rotations{' and reflections' if rule.mirrors else ''} ({rule.name})"
    return SymmetryReport(errors, structures, words)


def sampled_symmetry_errors(
    potential: Potential, dataset: HDF5Dataset, *, structures: int = 32, copies: int = 8,
    stress: bool = False,
) -> SymmetryReport:  # fmt: skip
    """``symmetry_errors`` on at most so many structures, evenly chosen from a data set."""
    step = max(1, -(-len(dataset) // structures))
    graphs = (dataset[k] for k in range(0, len(dataset), step))
    return symmetry_errors(potential, graphs, copies, stress=stress)


def _comparable(orbit: RotationOrbit, graph: AtomicGraph) -> dict[str, tuple[Tensor, Tensor]]:
    """Predictions (K, ...) and labels (...), NaN where there are none; energies per atom."""
    sizes = graph.ptr.diff()
    found = {"energy": (orbit.energy / sizes, "energy"), "forces": (orbit.forces, "forces")}
    if orbit.stress is not None:
        found["stress"] = (orbit.stress, "stress")
    compared = {}
    for quantity, (values, name) in found.items():
        label = graph[name] if name in graph else torch.full_like(values[0], torch.nan)
        compared[quantity] = (values, label / sizes if quantity == "energy" else label)
    return compared


def _add(
    sums: list[float], values: Tensor, labels: Tensor, weights: Tensor, unbiased: float
) -> None:
    deviation = (values - mean(values, weights)).square()
    there = ~deviation[0].isnan()
    if not there.any():
        return
    V = unbiased * torch.tensordot(weights, deviation, dims=1)
    known = there & ~labels.isnan()
    mse = torch.tensordot(weights, (values - labels).square(), dims=1)
    sums[0] += float(V[there].sum())
    sums[1] += int(there.sum())
    sums[2] = max(sums[2], float(deviation[:, there].max()))
    sums[3] += float(mse[known].sum())
    sums[4] += float(V[known].sum())
    sums[5] += int(known.sum())


@dataclass(frozen=True)
class Spectrum:
    """Powers of an orbit function by degree and parity, per atom (energy) or component, squared."""

    power: dict[tuple[int, int], float]  # (l, p) -> power
    total: float
    allowed: tuple[tuple[int, int], ...]  # what exact symmetry leaves

    @property
    def rest(self) -> float:
        """Power of degrees beyond lmax."""
        return self.total - sum(self.power.values())

    @property
    def forbidden(self) -> dict[tuple[int, int], float]:
        """What exact symmetry would make zero."""
        return {key: power for key, power in self.power.items() if key not in self.allowed}


ALLOWED = {"energy": ((0, 1),), "forces": ((1, -1),), "stress": ((0, 1), (2, 1))}


def spectrum(
    potential: Potential,
    graph: AtomicGraph,
    lmax: int = 3,
    *,
    rule: Rotations | None = None,
    stress: bool = False,
) -> dict[str, Spectrum]:
    """Content of the orbits of energy (per atom) and forces, and stress, by degree and parity.

    Parameters
    ----------
    potential : in evaluation mode
    graph : one structure, or a batch, of which the powers are averaged
    lmax : largest degree
    rule : with mirrors and of degree 2 lmax at least, and then exact if there is nothing beyond
        lmax; anisotropies of degree l' > degree - l are mistaken for such of degree l.
        ``gauss-(2 lmax)`` by default
    """
    rule = rotations(f"gauss-{max(1, 2 * lmax)}", True) if rule is None else rule
    if not rule.mirrors:
        raise ValueError("parities need a rule with mirrors: rotations(name, mirrors=True)")
    if rule.degree < 2 * lmax:
        raise ValueError(f"degree {lmax} needs a rule of degree {2 * lmax}, not {rule.degree}")
    orbit = rotation_orbit(potential, graph, rule, stress=stress)
    R = rule.matrices.to(orbit.weights)
    energy = orbit.energy / graph.ptr.diff()
    center = mean(energy, orbit.weights)
    functions = {
        # The mean belongs to (0, +) and is put there; of -1e3 eV it would drown all else.
        "energy": energy - center,
        "forces": orbit.forces @ R.mT,
    }
    if orbit.stress is not None:
        defined = ~graph.volume.isnan()
        functions["stress"] = R[:, None] @ orbit.stress[:, defined] @ R[:, None].mT
    sign = torch.linalg.det(R).sign()  # (K,)
    D = wigner_matrices(R * sign[:, None, None], lmax)
    spectra = {}
    for quantity, u in functions.items():
        u = u.reshape(len(R), -1)  # (K, M)
        power = {}
        for l in range(lmax + 1):
            for p in (1, -1):
                w = orbit.weights * (sign if p < 0 else 1.0)
                c = (w[:, None, None] * D[l]).flatten(1).T @ u  # ((2l+1)^2, M)
                power[l, p] = (2 * l + 1) * float(c.square().sum()) / max(1, u.shape[1])
        total = float((orbit.weights @ u.square()).mean())
        if quantity == "energy":
            extra = float(center.square().mean())
            power[0, 1] += extra
            total += extra
        spectra[quantity] = Spectrum(power, total, ALLOWED[quantity])
    return spectra
