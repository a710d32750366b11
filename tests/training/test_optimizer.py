"""Optimizers, schedules and the average of the weights."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mlip.training.config import OptimizerConfig, ScheduleConfig
from mlip.training.optimizer import (
    AveragedWeights,
    Muon,
    Plateau,
    learning_rate,
    make_optimizers,
    orthogonalized,
    parameter_groups,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False)
    )


def test_biases_norms_and_embeddings_do_not_decay() -> None:
    net = network()
    decay, plain = parameter_groups(net)
    assert [id(p) for p in decay] == [id(net[1].weight), id(net[3].weight)]
    assert len(plain) == 4
    net[1].weight.requires_grad_(False)
    assert len(parameter_groups(net)[0]) == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_moved_once(name: str) -> None:
    net = network()
    optimizers = make_optimizers(net, OptimizerConfig(name=name))
    groups = [g for o in optimizers for g in o.param_groups]
    moved = [id(p) for g in groups for p in g["params"]]
    assert sorted(moved) == sorted(id(p) for p in net.parameters())
    assert len(optimizers) == (1 if name == "adamw" else 2)
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.tensor([0, 1, 2, 3, 4])).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3), (4, 5, 7), (2, 3, 9, 4)])
def test_muon_steps_have_singular_values_about_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    G = torch.randn(shape, dtype=torch.float64) + 2  # one dominant direction
    s = torch.linalg.svdvals(orthogonalized(G))
    assert 0.4 < float(s.min())
    assert float(s.max()) < 1.3
    assert not orthogonalized(torch.zeros(shape)).any()


def test_muon_agrees_with_torch() -> None:
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(8, 5))
    b = nn.Parameter(a.detach().clone())
    mine = Muon([a], lr=0.02, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon(
        [b], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for k in range(3):
        g = torch.randn(8, 5, generator=torch.Generator().manual_seed(k))
        a.grad, b.grad = g, g.clone()
        mine.step()
        theirs.step()
    # torch iterates in bfloat16, which keeps two to three digits of each step.
    assert torch.allclose(a, b, atol=5e-3)
    assert not torch.allclose(a, torch.zeros_like(a), atol=5e-2)


def test_cosine_with_warmup() -> None:
    config = ScheduleConfig(warmup=0.1, final=0.01)
    values = [learning_rate(config, k / 1000) for k in range(1001)]
    assert values[0] == 0
    assert max(values) == values[100] == 1
    assert values[50] == pytest.approx(0.5)
    assert values[550] == pytest.approx((1 + 0.01) / 2)
    assert values[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(values[100:]))
    assert learning_rate(config, 2.0) == values[-1]
    assert max(abs(a - b) for a, b in pairwise(values)) < 0.011


def test_plateau_reduces_after_patience() -> None:
    plateau = Plateau(0.5, 2)
    for improved in (True, False, True, False, False):
        plateau.update(improved)
    assert plateau.reduction == 0.5
    other = Plateau(0.5, 2)
    other.load_state_dict(plateau.state_dict())
    for p in (plateau, other):
        p.update(False)
        p.update(False)
    assert plateau.reduction == other.reduction == 0.25
    config = ScheduleConfig(kind="plateau", warmup=0.0)
    assert learning_rate(config, 0.9, plateau.reduction) == 0.25
    assert learning_rate(ScheduleConfig(kind="constant", warmup=0.0), 0.9) == 1


def test_average_is_that_of_its_definition_and_swaps_back() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    ema = AveragedWeights([p], decay=0.6)
    expected = 0.0
    for n in range(1, 20):
        p.data.fill_(float(n))
        ema.update()
        d = min(0.6, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
    with ema.applied():
        assert torch.allclose(p.detach(), torch.full((3,), expected, dtype=torch.float64))
    assert torch.equal(p.detach(), torch.full((3,), 19.0, dtype=torch.float64))
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert math.isclose(float(p.detach()[0]), 19.0)
