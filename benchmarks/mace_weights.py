"""Weights of mace-torch's ScaleShiftMACE as those of our model: the same numbers, other names."""

from __future__ import annotations

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def by_degree(flat: np.ndarray, channels: int) -> np.ndarray:
    """Weights of a linear layer of irreps, (degrees, C, C)."""
    return flat.reshape(-1, channels, channels)


def to_mlip(theirs: Arrays, h: dict[str, Any]) -> Arrays:
    """State dict of ``mlip.models.mace.MACE`` from the one of mace-torch, as arrays.

    ``h`` has the hyperparameters of our model.
    """
    C, Z, T = h["channels"], len(h["elements"]), h["num_layers"]
    ours: Arrays = {"embed": theirs["node_embedding.linear.weight"].reshape(Z, C)}
    for t in range(T):
        a, b, mine = f"interactions.{t}.", f"products.{t}.", f"layers.{t}."
        lmax_in = 0 if t == 0 else h["lmax"]
        lmax_out = 0 if t == T - 1 else h["lmax"]
        ours[mine + "convolution.up.weight"] = by_degree(theirs[a + "linear_up.weight"], C)
        radial = a + "conv_tp_weights.layer{}.weight"
        depth = len(h["radial_hidden"])
        for k in range(depth):
            ours[mine + f"convolution.radial.{2 * k}.weight"] = theirs[radial.format(k)]
        last = theirs[radial.format(depth)]
        ours[mine + "convolution.weights"] = last.reshape(len(last), -1, C)
        blocks = by_degree(theirs[a + "linear.weight"], C)
        start = 0
        for l in range(h["max_ell"] + 1):
            paths = num_paths(lmax_in, l, h["max_ell"])
            ours[mine + f"convolution.mix.{l}"] = blocks[start : start + paths].reshape(-1, C)
            start += paths
        skip = theirs[a + "skip_tp.weight"].reshape(min(lmax_in, lmax_out) + 1, C, Z, C)
        ours[mine + "skip.weight"] = skip.transpose(2, 0, 1, 3)
        for L in range(lmax_out + 1):
            c = b + f"symmetric_contractions.contractions.{L}."
            orders = [c + f"weights.{k}" for k in reversed(range(h["correlation"] - 1))]
            orders.append(c + "weights_max")
            ours[mine + f"contraction.weights.{L}"] = np.concatenate(
                [theirs[name] for name in orders], axis=1
            )
        ours[mine + "update.weight"] = by_degree(theirs[b + "linear.weight"], C)
        if t < T - 1:
            ours[f"readouts.{t}.weight"] = theirs[f"readouts.{t}.linear.weight"].reshape(C, 1)
    last = f"readouts.{T - 1}."
    ours[last + "0.weight"] = theirs[last + "linear_1.weight"].reshape(C, -1)
    ours[last + "2.weight"] = theirs[last + "linear_2.weight"].reshape(-1, 1)
    return ours


def num_paths(lmax_in: int, l: int, max_ell: int) -> int:
    """Couplings of features up to lmax_in with harmonics to degree l, natural parity."""
    return sum(
        (l1 + l2 + l) % 2 == 0
        for l1 in range(lmax_in + 1)
        for l2 in range(abs(l - l1), min(l + l1, max_ell) + 1)
    )
