"""Norms and networks of invariants that vanish where their input does."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def soft_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Factor (N,) of an equivariant layer norm: (1 + mean x^2)^-1/2 over all but the atoms.

    The one keeps it smooth and zero at zero: an atom whose last neighbour leaves fades out instead
    of being blown up.
    """
    return torch.rsqrt(1 + x.square().mean(dim=dims))


class ExternalField(nn.Linear):
    """An external vector F (N, 3) in a density (LM, N, C): A_i[1m] + F_m W A_i[00].

    Where there are no neighbours there is no density, and the vector changes nothing.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, bias=False)

    def forward(self, A: Tensor, field: Tensor) -> Tensor:  # type: ignore[override]
        vectors = A[1:4] + field.T[..., None] * super().forward(A[0])
        return torch.cat([A[:1], vectors, A[4:]])


class InvariantMLP(nn.Module):
    """Three layers without biases, the first gated by the species: zero in, zero out."""

    def __init__(self, inputs: int, hidden: int, outputs: int, species: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden, bias=False)
        self.gate = nn.Linear(species, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden, bias=False)
        self.third = nn.Linear(hidden, outputs, bias=False)

    def forward(self, q: Tensor, species: Tensor) -> Tensor:
        h = nn.functional.silu(self.first(q)) * (1 + self.gate(species))
        h = nn.functional.silu(self.second(h))
        return self.third(h)
