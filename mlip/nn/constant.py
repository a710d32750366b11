"""Constants of a model that keep their float64 digits whatever dtype the model visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A tensor in the model's device and dtype, always cast from its float64 original.

    An ordinary buffer would come back rounded from a visit to float32, and with it a symmetry exact
    to 1e-7 only.  It is not part of the state dict.

    Raises
    ------
    ValueError
        If the given tensor is not float64: its digits would depend on the default dtype.
    """

    value: Tensor

    def __init__(self, exact: Tensor) -> None:
        super().__init__()
        if exact.dtype != torch.float64:
            raise ValueError(f"a constant has to be given in float64, not in {exact.dtype}")
        self.exact = exact.detach().cpu()
        self.register_buffer("value", self.exact.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.value
        super()._apply(fn, recurse)
        if self.value is not before:
            self.value = self.exact.to(device=self.value.device, dtype=self.value.dtype)
        return self

    def forward(self) -> Tensor:
        return self.value
