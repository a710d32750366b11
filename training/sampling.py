"""Adaptive sampling: structures are shown as often as their group's learning curve makes it worth.

With err_g(n) the validation error of group g after n of its items (structures, or atoms of an
element) were shown,

    err_g(n) = a_g (n / n_g)^-b_g + c_g,      a, c >= 0          fitted to all validations so far
    minimise  sum_g err_g(n_g + m_g)^p   over   m_g >= 0,  sum_g m_g = items of an epoch

so the next epoch is spent where the marginal gain -d err_g^p / dn is largest, until the gains are
equal.  A share of each epoch (``floor``) stays spread evenly: no group is forgotten, and every
curve goes on.  Weights are functions of recorded numbers alone, hence the same in every process and
after a resume.

After "adaptive sampling for equitable datasets", which allots a budget of new data by estimated
learning curves; here the budget is that of an epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from mlip.data.dataset import HDF5Dataset
from mlip.training.sampling_config import SamplingConfig

logger = logging.getLogger(__name__)

MAX_GROUPS = 100  # more are too small to have learning curves
MOST = 10.0  # times as often as in an even epoch, at most
EXPONENTS = np.geomspace(0.05, 3, 200)


class LearningCurves(NamedTuple):
    """err_g(n) = a_g (n / n_g)^-b_g + c_g; NaN of groups without a fit."""

    n: np.ndarray  # (G,) items shown until now
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray

    def error(self, n: np.ndarray) -> np.ndarray:
        """(G,) errors after n items."""
        return np.asarray(self.a * (n / self.n) ** -self.b + self.c)

    def gain(self, n: np.ndarray, power: float = 1.0) -> np.ndarray:
        """(G,) decrease of err^power / power by one more item."""
        slope = self.a * self.b / self.n * (n / self.n) ** (-self.b - 1)
        return np.asarray(self.error(n) ** (power - 1) * slope)


def fit_power_law(n: np.ndarray, error: np.ndarray) -> tuple[float, float, float]:
    """Least squares of relative residuals, (a, b, c) of error = a (n / n[-1])^-b + c, a, c >= 0.

    Linear in a and c, and b from a grid: no start, no iteration, the same everywhere.

    Parameters
    ----------
    n : (k,) increasing
    error : (k,) positive
    """
    x = (n / n[-1])[None] ** -EXPONENTS[:, None] / error  # (B, k)
    y = 1 / np.broadcast_to(error, x.shape)
    xx, xy, yy, x1, y1 = ((p * q).sum(axis=1) for p, q in ((x, x), (x, y), (y, y), (x, 1), (y, 1)))
    determinant = np.maximum(xx * yy - xy * xy, 1e-12 * xx * yy)
    a, c = (x1 * yy - y1 * xy) / determinant, (y1 * xx - x1 * xy) / determinant
    a, c = np.where(c < 0, x1 / xx, a), np.maximum(c, 0)  # the better of two edges, where it leaves
    a, c = np.maximum(a, 0), np.where(a < 0, y1 / yy, c)
    best = int(np.square(a[:, None] * x + c[:, None] * y - 1).sum(axis=1).argmin())
    return float(a[best]), float(EXPONENTS[best]), float(c[best])


def allot(curves: LearningCurves, budget: float, power: float = 1.0) -> np.ndarray:
    """(G,) items of the budget for each group; marginal gains are equal where it is not zero."""
    usable = np.nan_to_num(curves.gain(curves.n, power)) > 0
    share = np.zeros(len(curves.n))
    if not usable.any():
        return share
    part = LearningCurves(*(values[usable] for values in curves))

    def items(level: float) -> np.ndarray:
        """How many are shown until the gain has fallen to the level, the budget at most."""
        low, high = np.zeros(len(part.n)), np.full(len(part.n), budget)
        for _ in range(40):
            middle = (low + high) / 2
            more = part.gain(part.n + middle, power) > level
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        return low

    top = float(np.log(part.gain(part.n, power).max()))
    low, high = top - 100, top
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if items(np.exp(middle)).sum() > budget else (low, middle)
    found = items(np.exp(high))
    share[usable] = found * (budget / found.sum()) if found.sum() > 0 else budget / usable.sum()
    return share


class AdaptiveSampling:
    """Weights of the structures of a training set, from the errors of the validations.

    Parameters
    ----------
    train, valid : data sets with the groups

    Raises
    ------
    ValueError
        With fewer than two groups or too many, or if the validation set has none of them.
    """

    def __init__(self, config: SamplingConfig, train: HDF5Dataset, valid: HDF5Dataset) -> None:
        self.config = config
        self.names, self.items = members(train, config.by)  # (M, G) items of each structure
        known = set(members(valid, config.by)[0])
        number, missing = len(self.names), [n for n in self.names if n not in known]
        what = f"sampling.by={config.by}: {train.path} has"
        if not 1 < number <= MAX_GROUPS:
            raise ValueError(
                f"{what} {number} of them; 2 to {MAX_GROUPS} can be weighed; take another 'by', or "
                "name them in mlip convert (--config-type-key, --group-key)"
            )
        if len(missing) == number:
            raise ValueError(f"{what} none that the validation set has; split the data otherwise")
        if missing:
            logger.warning("sampling: no validation of %s, shown evenly", ", ".join(missing))
        self.shown = np.zeros(number)
        self.weights = np.ones(number)
        self.history = np.zeros((0, 2, number))  # items shown until then, error

    def add_epoch(self, times: np.ndarray) -> None:
        """Note how often each structure was shown in an epoch, (M,)."""
        self.shown = self.shown + times @ self.items

    def update(self, errors: Mapping[str, float]) -> None:
        """Take the groups' errors after a validation, and weigh anew."""
        row = np.array([self.shown, [errors.get(name, np.nan) for name in self.names]])
        self.history = np.concatenate([self.history, row[None]])
        if len(self.history) < self.config.first:
            return
        curves = self.curves()
        even = self.items.sum(axis=0)
        fitted = ~np.isnan(curves.a)
        best = allot(curves, float(even[fitted].sum()), self.config.power)
        if best.any():
            times = np.where(fitted, best / even, 1.0)
            floor = self.config.floor
            self.weights = np.minimum(floor + (1 - floor) * times, MOST)
        logger.info("sampling: %s", self._line(curves))

    def curves(self) -> LearningCurves:
        """Power laws of all groups, fitted to the validations so far."""
        found = np.full((4, len(self.names)), np.nan)
        for g in range(len(self.names)):
            n, error = self.history[:, 0, g], self.history[:, 1, g]
            valid = (error > 0) & (n > 0)
            if valid.sum() >= 3:
                found[:, g] = self.shown[g], *fit_power_law(n[valid], error[valid])
        return LearningCurves(*found)

    def of_structures(self) -> np.ndarray:
        """(M,) weights of the structures: means over their items."""
        return np.asarray(self.items @ self.weights / self.items.sum(axis=1))

    def flat(self) -> dict[str, float]:
        """``{"sampling_bulk": 0.7}`` for the log."""
        pairs = zip(self.names, self.weights.tolist(), strict=True)
        return {f"sampling_{name or 'none'}": weight for name, weight in pairs}

    def tensors(self) -> dict[str, Tensor]:
        """The state, for the file of the training."""
        arrays = {"shown": self.shown, "weights": self.weights, "history": self.history}
        return {f"sampling.{name}": torch.from_numpy(value) for name, value in arrays.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of ``tensors``."""
        for name in ("shown", "weights", "history"):
            setattr(self, name, tensors[f"sampling.{name}"].numpy().copy())

    def _line(self, curves: LearningCurves) -> str:
        """``bulk x0.70 (0.31 n^-0.52 + 0.02)``, n relative to what was shown."""
        return ", ".join(
            f"{name or '(none)'} x{w:.2f} ({a:.3g} n^-{b:.2f} + {c:.3g})"
            for name, w, a, b, c in zip(self.names, self.weights, *curves[1:], strict=True)
        )


def members(dataset: HDF5Dataset, by: str) -> tuple[list[str], np.ndarray]:
    """Names of the groups of a data set, and (M, G) how many items of each a structure holds."""
    if by == "element":
        kinds = [dataset.structure(k).atomic_numbers for k in range(len(dataset))]
        counts = np.array([np.bincount(z, minlength=len(chemical_symbols)) for z in kinds])
        present = np.flatnonzero(counts.any(axis=0))
        return [chemical_symbols[z] for z in present], counts[:, present].astype(np.float64)
    labels = dataset.groups if by == "group" else dataset.config_types
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) > MAX_GROUPS:  # the caller refuses; no matrix of all of them
        return [str(name) for name in names], np.zeros((len(dataset), 0))
    return [str(name) for name in names], np.eye(len(names))[codes.reshape(-1)]
