"""Optimizers, schedules as functions of the progress of the training, and the average of the
weights.

Muon: K. Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; scale of the step after J.
Liu et al., arXiv:2502.16982: an orthogonal matrix m x n has entries of size max(m, n)^-1/2, times
0.2 max(m, n)^1/2 it moves the weights as far as AdamW does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlip.training.config import OptimizerConfig, ScheduleConfig

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic that drives singular values to about 1


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised; for matrices, or stacks of them in one parameter (...,
    m, n).

    (``torch.optim.Muon`` takes single matrices only, and weights of steerable features are stacks.)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the weights along the orthogonalised Nesterov momentum."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(buffer, group["momentum"]), group["steps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def orthogonalized(G: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: singular values of each matrix in ``G`` (..., m, n) go to 1."""
    a, b, c = NS_COEFFICIENTS
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    # A gradient of zero stays zero: the floor only keeps 0 / 0 away.
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(G.dtype).tiny)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay (matrices) and without (biases, norms, embeddings)."""
    exempt = {
        id(p)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, *NORMS))
        for p in module.parameters(recurse=False)
    }
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (plain if p.ndim < 2 or id(p) in exempt else decay).append(p)
    return decay, plain


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together move all parameters; ``top_lr`` of a group is its full rate."""
    decay, plain = parameter_groups(model)
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        # A matrix with a single row or column, such as a readout, has no directions to balance.
        matrices = [p for p in decay if min(p.shape[-2:]) > 1]
        decay = [p for p in decay if min(p.shape[-2:]) == 1]
        if matrices:
            optimizers.append(
                Muon(
                    matrices,
                    lr=config.muon_lr,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                )
            )
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(
            torch.optim.AdamW(
                groups, lr=config.lr, betas=config.betas, amsgrad=config.amsgrad, fused=True
            )
        )
    if not optimizers:
        raise ValueError("the model has no parameters to train")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["top_lr"] = group["lr"]
    return optimizers


def learning_rate(config: ScheduleConfig, progress: float, reduction: float = 1.0) -> float:
    """Learning rate relative to its top after a share ``progress`` of the training.

    Linear warm-up from 0, then half a cosine down to ``final``, or constant; ``reduction`` is that
    of the plateau.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return reduction * progress / config.warmup
    if config.kind != "cosine":
        return reduction
    x = (progress - config.warmup) / (1 - config.warmup)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * x)) / 2


class Plateau:
    """Halve (say) the learning rate after ``patience`` validations without improvement."""

    def __init__(self, factor: float, patience: int) -> None:
        self.factor, self.patience = factor, patience
        self.reduction, self.waited = 1.0, 0

    def update(self, improved: bool) -> None:
        """Tell of one validation."""
        self.waited = 0 if improved else self.waited + 1
        if self.waited >= self.patience:
            self.reduction, self.waited = self.reduction * self.factor, 0

    def state_dict(self) -> dict[str, float]:
        return {"reduction": self.reduction, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reduction, self.waited = float(state["reduction"]), int(state["waited"])


class AveragedWeights:
    """Exponential moving average of the parameters.

    Early on the decay is that of a plain mean, (1 + n) / (10 + n), so that the random start is soon
    forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, [p.data for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for k, p in enumerate(self.parameters):  # exchanges pointers, copies nothing
            p.data, self.averages[k] = self.averages[k], p.data
