"""Attention inside padded neighbourhoods, whose keys fade with an envelope instead of a mask.

    out_q = sum_k f_k exp(s_qk) v_k / sum_k f_k exp(s_qk),      s_qk = q . k / sqrt(d)

With f_k = exp(key_bias_k) the weight of a key vanishes in numerator and denominator alike: a key
with f = 0 is not there at all, and nothing jumps when it arrives.  A first key with f = 1 (the atom
itself) keeps the denominator above zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ABSENT = -1e4  # logit of a key that is not there; exp of it is exactly zero in every dtype
MAX_BATCH = 65_535  # rows that the backward pass of the fused kernel on a GPU can take


def attend(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, *, fused: bool = False
) -> Tensor:
    """Softmax attention, scaled by the square root of the width of ``q``.

    Parameters
    ----------
    q : (..., Q, d)
    k : (..., T, d)
    v : (..., T, C)
    key_bias : (..., T), broadcast over the dimensions before; added to the logits of each key
    fused : bool
        The fused kernel of torch: less memory, faster on a GPU, differentiable once, also in
        ``key_bias``. Otherwise plain products, differentiable twice. The numbers are the same.

    Returns
    -------
    Tensor
        (..., Q, C)
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if not fused:
        *batch, Q, d = q.shape
        T = k.shape[-2]
        bias = q.new_zeros(()) if key_bias is None else key_bias.expand(*batch, T).reshape(-1, 1, T)
        logits = torch.baddbmm(bias, q.reshape(-1, Q, d), k.reshape(-1, T, d).mT, alpha=scale)
        return torch.bmm(torch.softmax(logits, dim=-1), v.reshape(-1, T, v.shape[-1])).view(
            *batch, Q, -1
        )
    if key_bias is not None:
        # One more column, 1 in the queries and the bias in the keys: a mask would be a tensor
        # (Q, T), and most kernels give it no gradient.
        bias = (key_bias / scale).unsqueeze(-1).expand(*k.shape[:-1], 1)
        q = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
        k = torch.cat([k, bias], dim=-1)
    return _fused(q, k, v, scale)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    kernel = nn.functional.scaled_dot_product_attention
    if q.dim() < 4 or q.shape[0] <= MAX_BATCH:
        return kernel(q, k, v, scale=scale)
    parts = zip(q.split(MAX_BATCH), k.split(MAX_BATCH), v.split(MAX_BATCH), strict=True)
    return torch.cat([kernel(*part, scale=scale) for part in parts])


def log_envelope(x: Tensor) -> Tensor:
    """Logarithm of ``mlip.nn.radial.polynomial_envelope``, ``ABSENT`` from x = 1 on.

    The envelope is (1 - x)^3 (1 + 3 x + 6 x^2 + 10 x^3 + 15 x^4 + 21 x^5): factored, its logarithm
    loses no digits near the cutoff and stays finite for every x < 1.  There its derivatives grow as
    1 / (1 - x), but in a softmax they always come with the weight (1 - x)^3 itself.
    """
    inside = x < 1
    y = torch.where(inside, x, 0)  # both branches of the second where must be finite
    series = 1 + y * (3 + y * (6 + y * (10 + y * (15 + 21 * y))))
    return torch.where(inside, 3 * torch.log1p(-y) + torch.log(series), ABSENT)
