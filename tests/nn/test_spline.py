"""Splines: their error, their derivatives, and few functions for many."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlip.nn.radial import bessel, polynomial_envelope
from mlip.nn.spline import Spline, leading_functions


def functions(x: Tensor) -> Tensor:
    """Like a radial network: Bessel functions, the envelope, and some curvature."""
    b = bessel(x, 5) * polynomial_envelope(x)[:, None]
    return torch.nn.functional.silu(b) + 0.1 * b**2


@pytest.fixture(name="spline", scope="module")
def spline_fixture() -> Spline:
    return Spline(functions, 1e-11).double()


def test_values_and_slopes_are_those_of_the_functions(spline: Spline) -> None:
    x = torch.linspace(0.05, 1, 997, dtype=torch.float64).requires_grad_()
    exact, found = functions(x), spline(x)
    v = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (a,) = torch.autograd.grad((exact * v).sum(), x)
    (b,) = torch.autograd.grad((found * v).sum(), x)
    assert (found - exact).abs().max() < 1e-10 * exact.abs().max()
    assert (b - a).abs().max() < 1e-10 * a.abs().max()


def test_derivatives_are_those_of_the_spline(spline: Spline) -> None:
    """To third order, also where the table ends; on the knots the third jumps."""
    x = torch.tensor([0.0, 0.001, 0.1234, 0.5678, 0.9999, 1.0001, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(spline, x.clone().requires_grad_(), eps=1e-7, atol=1e-4)
    assert torch.autograd.gradgradcheck(spline, x.clone().requires_grad_(), eps=1e-7, atol=1e-2)


def test_two_derivatives_are_continuous_at_the_knots(spline: Spline) -> None:
    n = len(spline.table()) - 1
    for knot in (1, 2, n // 2, n - 1):
        sides = torch.tensor([knot / n - 1e-12, knot / n + 1e-12], dtype=torch.float64)
        sides.requires_grad_()
        value = spline(sides)[:, 0]
        (slope,) = torch.autograd.grad(value.sum(), sides, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), sides)
        for derivative, scale in ((value, 1.0), (slope, 1e2), (curvature, 1e4)):
            assert (derivative[1] - derivative[0]).abs().detach() < 1e-9 * scale


def test_beyond_one_it_is_exactly_what_it_is_at_one(spline: Spline) -> None:
    for dtype in (torch.float64, torch.float32):
        x = torch.tensor([1.0, 1.5, 40.0], dtype=dtype).requires_grad_()
        values = spline.to(dtype)(x)
        (slope,) = torch.autograd.grad(values.sum(), x)
        assert not values.any() and not slope.any()
    spline.double()


def test_any_shape_and_float32(spline: Spline) -> None:
    x = torch.rand(3, 0, 7, dtype=torch.float64)
    assert spline(x).shape == (3, 0, 7, 5)
    x = torch.rand(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = functions(x.flatten()).view(30, 4, 5)
    found = spline.float()(x.float())
    spline.double()
    # What rounding x costs is the slope times it.
    assert (found - exact).abs().max() < 3e-6 * exact.abs().max()


def test_functions_that_are_not_smooth_are_refused() -> None:
    with pytest.raises(ValueError, match="not smooth"):
        Spline(lambda x: (x - 1 / math.pi).abs().pow(1.5)[:, None], 1e-8)


def test_few_functions_stand_for_many() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.01, 1, 300, dtype=torch.float64)
    h = functions(x) @ torch.randn(5, 40, dtype=torch.float64, generator=generator)
    W = torch.randn(40, 90, dtype=torch.float64, generator=generator)
    mix, back = leading_functions(h, W, 1e-10)
    assert mix.shape[1] == 5
    assert (h @ mix @ back - h @ W).abs().max() < 1e-9 * (h @ W).abs().max()
    coarse, _ = leading_functions(h, W, 0.3)
    assert coarse.shape[1] < 5
