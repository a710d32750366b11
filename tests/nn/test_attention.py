"""Laws of attention with fading keys, of buckets, of soft neighbours and of projected forces."""

from __future__ import annotations

import math

import pytest
import torch
from numpy.random import default_rng

from mlip.nn.attention import ABSENT, attend, log_envelope
from mlip.nn.buckets import MAX_BUCKETS, MAX_PADDING, bucket_by_degree, cut_by_degree
from mlip.nn.radial import polynomial_envelope
from mlip.nn.rigid_motion import without_rigid_motion
from mlip.nn.soft_neighbors import log_soft_knn, soft_ranks

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def sequences(T: int = 7) -> list[torch.Tensor]:
    q, k, v = (random(5, 2, T, d, seed=d) for d in (6, 6, 4))
    bias = log_envelope(torch.linspace(0, 1.2, T, dtype=F64)).expand(5, 1, T)
    return [q, k + 0.1, v, bias.clone()]


def test_fused_and_plain_attention_give_the_same_numbers() -> None:
    inputs = [x.requires_grad_() for x in sequences()]
    outputs = [attend(*inputs, fused=fused) for fused in (False, True)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    weight = random(*outputs[0].shape, seed=9)
    plain, fused = (torch.autograd.grad((out * weight).sum(), inputs) for out in outputs)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-12)
    q, k, v, _ = inputs
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, fused=True), rtol=0, atol=1e-12)


def test_attention_is_the_weighted_mean() -> None:
    q, k, v, bias = sequences()
    weights = (q @ k.mT / math.sqrt(6)).exp() * bias.exp()[..., None, :]
    expected = weights @ v / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(attend(q, k, v, bias), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("fused", [False, True])
def test_absent_keys_are_not_there(fused: bool) -> None:
    """To the bit: neither what they hold nor how many there are matters."""
    q, k, v, bias = sequences()
    gone = bias[0, 0] == ABSENT
    assert 0 < gone.sum() < len(gone)
    out = attend(q, k, v, bias, fused=fused)
    k2, v2 = k.clone(), v.clone()
    k2[..., gone, :], v2[..., gone, :] = 3.0, -50.0
    assert torch.equal(attend(q, k2, v2, bias, fused=fused), out)
    few = attend(q, k[..., ~gone, :], v[..., ~gone, :], bias[..., ~gone], fused=fused)
    torch.testing.assert_close(few, out, rtol=0, atol=1e-14)


def test_attention_can_be_differentiated_twice() -> None:
    inputs = [x.requires_grad_() for x in sequences(4)]
    inputs[3] = inputs[3].detach().clamp(min=-3).requires_grad_()
    assert torch.autograd.gradgradcheck(attend, inputs)


def test_logarithm_of_the_envelope() -> None:
    x = torch.linspace(0, 1.5, 400, dtype=F64)
    torch.testing.assert_close(log_envelope(x).exp(), polynomial_envelope(x), rtol=0, atol=1e-13)
    near = torch.tensor([1 - 1e-4], dtype=F64)  # the leading term, which a sum of powers loses
    torch.testing.assert_close(log_envelope(near).exp(), 56 * (1 - near) ** 3, rtol=1e-3, atol=0)
    assert (log_envelope(x[x >= 1]) == ABSENT).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_nothing_blows_up_where_a_key_vanishes(dtype: torch.dtype) -> None:
    """Forces and their derivatives go to zero with the last representable distance."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([0.0, 0.3, 1 - 1e-3, 1 - 1e-5, 1 - eps, 1.0, 2.0], dtype=dtype)
    x.requires_grad_()
    v = torch.arange(7.0, dtype=dtype)[:, None]
    out = attend(torch.zeros(1, 1, dtype=dtype), torch.zeros(7, 1, dtype=dtype), v, log_envelope(x))
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    curvatures = [torch.autograd.grad(s, x, retain_graph=True)[0] for s in slope]
    assert slope.isfinite().all() and all(c.isfinite().all() for c in curvatures)
    assert slope[3:].abs().max() < 1e-7 and curvatures[3][3].abs() < 1e-2
    assert not slope[5:].any()


def test_buckets_hold_every_edge_once() -> None:
    rng = default_rng(0)
    for degrees in ([0, 3, 3, 0, 60], [28] * 20, [0], [0, 0], [], list(rng.integers(0, 80, 300))):
        degree = torch.tensor([int(d) for d in degrees], dtype=torch.int64)
        centers = torch.repeat_interleave(torch.arange(len(degree)), degree)
        order, buckets = bucket_by_degree(centers, len(degree))
        order = torch.arange(len(degree)) if order is None else order
        E, seen, last = len(centers), [], 0
        for bucket in buckets:
            assert bucket.first == last
            last = bucket.last
            assert (bucket.edges[:, 0] == E + 1).all()
            slots = bucket.edges[:, 1:]
            atoms = order[bucket.first : bucket.last, None].expand_as(slots)
            real = slots < E
            assert (slots[~real] == E).all()
            assert (centers[slots[real]] == atoms[real]).all()
            seen.append(slots[real])
        assert last == len(degree)
        assert torch.equal(torch.cat([*seen, torch.arange(0)]).sort().values, torch.arange(E))


def test_padding_of_ragged_structures_is_below_a_fifth() -> None:
    rng = default_rng(1)
    for spread in (5, 20, 60):
        degree = torch.from_numpy(rng.integers(1, 1 + spread, 2000))
        centers = torch.repeat_interleave(torch.arange(2000), degree)
        buckets = bucket_by_degree(centers, 2000)
        assert len(buckets.parts) <= MAX_BUCKETS
        assert buckets.padding <= MAX_PADDING
    assert cut_by_degree([0] * 28 + [1000]) == [28]  # a crystal: one bucket, no padding


def test_soft_ranks_count_and_choose() -> None:
    r = torch.tensor([[1.0, 2.5, 4.0, 5.5, 7.0]], dtype=F64)  # far apart on the scale of 0.2
    rank = soft_ranks(r, torch.ones_like(r))
    expected = torch.arange(5.0, dtype=F64)[None] + 0.5
    torch.testing.assert_close(rank, expected, rtol=0, atol=2e-3)
    weights = log_soft_knn(rank, rank, r / 100, num_neighbors=3).exp()[0]
    assert (weights[:-1] >= weights[1:]).all() and weights[0] > 0.9 and not weights[3:].any()
    # The other end may have nearer ones; and nothing is chosen at the cutoff.
    assert not log_soft_knn(rank[:, :1], rank[:, 4:], r[:, :1] / 100, 3).exp().any()
    assert not log_soft_knn(rank[:, :1], rank[:, :1], torch.ones(1, 1, dtype=F64), 3).exp().any()
    x = torch.linspace(0, 1.3, 300, dtype=F64).requires_grad_()
    (slope,) = torch.autograd.grad(log_soft_knn(0 * x, 0 * x, x, 3).exp().sum(), x)
    assert slope.isfinite().all()


def test_projected_forces_neither_move_nor_turn() -> None:
    """Also of a linear molecule, of one atom, and of a crystal, which may be turned."""
    positions = torch.cat([random(6, 3), torch.linspace(0, 4, 3)[:, None] * random(1, 3, seed=1)])
    positions = torch.cat([positions, random(1, 3, seed=2), random(5, 3, seed=3)])
    batch = torch.tensor([0] * 6 + [1] * 3 + [2] + [3] * 5)
    free = torch.tensor([True, True, True, False])
    forces = random(15, 3, seed=4)
    out = without_rigid_motion(forces, positions, batch, free)
    for g in range(4):
        F, r = out[batch == g], positions[batch == g]
        assert F.sum(dim=0).abs().max() < 1e-13
        torque = torch.linalg.cross(r, F).sum(dim=0).abs().max()
        assert torque < 1e-12 if free[g] else torque > 1e-2
    # A projection: done twice it is done once, and what is already right stays.
    again = without_rigid_motion(out, positions, batch, free)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)
    crystal = batch == 3
    mean = forces[crystal].mean(dim=0)
    torch.testing.assert_close(out[crystal], forces[crystal] - mean, rtol=0, atol=1e-14)
    # The change is the smallest possible: orthogonal to what remains.
    assert abs(((forces - out) * out).sum()) < 1e-12
