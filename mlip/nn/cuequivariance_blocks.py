"""Kernels of NVIDIA's cuEquivariance in the place of two blocks of MACE: the same functions.

Which of its weights is which of ours, with what factor, is not read from its documentation but
found by evaluating both at random points: products are polynomials, and a few points fix them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.spherical import clebsch_gordan
from mlip.nn.symmetric_contraction import SymmetricContraction

F64: dict[str, Any] = dict(dtype=torch.float64)


def irreps(multiplicity: int, degrees: Sequence[int]) -> Any:
    """Irreps of natural parity in the basis of e3nn."""
    cue = import_module("cuequivariance")
    kind = e3nn_group()
    return cue.Irreps(kind, [(multiplicity, kind(l=l, p=(-1) ** l)) for l in degrees])


@cache  # one class, for irreps of two classes are not of one group
def e3nn_group() -> Any:
    """O(3) of cuequivariance with the components and coefficients of e3nn."""
    cue = import_module("cuequivariance")

    class E3nnO3(cue.O3):  # type: ignore[name-defined]
        def __mul__(self, other: Any) -> Any:
            return [E3nnO3(l=ir.l, p=ir.p) for ir in cue.O3.__mul__(self, other)]

        def __lt__(self, other: Any) -> bool:
            other = self._from(other)
            return bool((self.l, self.p) < (other.l, other.p))

        @classmethod
        def iterator(cls) -> Any:
            for l in count():
                yield E3nnO3(l=l, p=(-1) ** l)
                yield E3nnO3(l=l, p=-((-1) ** l))

        @classmethod
        def clebsch_gordan(cls, a: Any, b: Any, c: Any) -> Any:
            a, b, c = cls._from(a), cls._from(b), cls._from(c)
            C = clebsch_gordan(a.l, b.l, c.l) * c.dim**0.5
            return C.numpy()[None] if a.p * b.p == c.p else C.new_zeros(0, *C.shape).numpy()

    return E3nnO3


class CueContraction(nn.Module):
    """``SymmetricContraction`` by its kernel, with the weights of the plain one."""

    def __init__(self, plain: SymmetricContraction, method: str | None = None) -> None:
        super().__init__()
        self.weights = plain.weights
        self.kernel = contraction_kernel(plain, plain.weights[0].shape[-1], method).f
        self.change = Constant(change_of_basis(plain))  # (theirs, ours)

    def forward(self, A: Tensor, elements: Tensor, sizes: Sequence[int]) -> Tensor:
        LM, N, C = A.shape
        W = torch.cat(list(self.weights), dim=1).index_select(0, elements)  # (M, K, C)
        counts = torch.tensor(list(sizes), device=A.device)
        which = torch.arange(len(sizes), device=A.device)
        which = which.repeat_interleave(counts, output_size=N)
        out = self.kernel(
            [(self.change() @ W).flatten(1), A.transpose(0, 1).reshape(N, LM * C)],
            input_indices={0: which.to(torch.int32)},
        )[0]
        return cast(Tensor, out).view(N, -1, C).transpose(0, 1)


def contraction_kernel(plain: SymmetricContraction, channels: int, method: str | None) -> Any:
    """Its module; ``f`` in it is ([weights (M, K C), densities (N, LM C)]) -> [(N, LM' C)]."""
    cue, cuet = (import_module(f"cuequivariance{part}") for part in ("", "_torch"))
    return cuet.SymmetricContraction(
        irreps(channels, range(plain.lmax + 1)),
        irreps(channels, range(plain.lmax_out + 1)),
        plain.correlation,
        1,
        layout=cue.ir_mul,
        device="cpu",
        method=method,
    )


def change_of_basis(plain: SymmetricContraction) -> Tensor:
    """(theirs, ours): their weights of the polynomial that each of our weights stands for."""
    sizes = [weight.shape[1] for weight in plain.weights]
    K = sum(sizes)
    ours = SymmetricContraction(
        plain.lmax, plain.lmax_out, plain.correlation, 1, K, reduced=plain.reduced
    ).double()
    for weight, rows in zip(ours.weights, torch.eye(K, **F64).split(sizes, dim=1), strict=True):
        weight.data.copy_(rows[..., None])
    kernel = contraction_kernel(plain, 1, "naive")
    P = int(kernel.weight_shape[0])
    x = random_points(4 * P, (plain.lmax + 1) ** 2)
    which = torch.arange(P, dtype=torch.int32).repeat_interleave(4 * P)
    inputs = [torch.eye(P, **F64), x.repeat(P, 1)]
    with torch.no_grad():
        theirs = kernel.f(inputs, input_indices={0: which})[0]  # (P points, W)
        mine = ours(x.repeat(K, 1).T[..., None], torch.arange(K), [4 * P] * K)[..., 0].T
    return torch.linalg.lstsq(theirs.view(P, -1).T, mine.reshape(K, -1).T).solution


class CuePathSums(nn.Module):
    """``PathSums`` by its kernel; ``plain`` has ``paths`` (l1, l2, l) and ``max_ell``."""

    order: Tensor  # (P,) our path in the place of theirs

    def __init__(self, plain: Any, channels: int, method: str | None = None) -> None:
        super().__init__()
        self.paths = plain.paths
        self.kernel = paths_kernel(plain, channels, method)
        order, factor = matching_paths(plain)
        self.places = order.tolist()  # the same for the host
        self.register_buffer("order", order, persistent=False)
        self.factor = Constant(factor)

    def forward(
        self, Y: Tensor, hidden: Tensor, weights: Tensor, u: Tensor, neighbors: Tensor
    ) -> list[list[Tensor]]:
        N, K, H = hidden.shape
        C = weights.shape[-1]
        W = weights.index_select(1, self.order) * self.factor()[:, None]
        centers = torch.arange(N, device=Y.device).repeat_interleave(K)
        out = self.kernel(
            u.reshape(N, -1),
            Y.reshape(N * K, -1),
            hidden.reshape(-1, H) @ W.flatten(1),
            indices_1=neighbors,
            indices_out=centers,
            size_out=N,
        )  # (N, sum (2l+1) C)
        degrees = [self.paths[p][2] for p in self.places]
        parts = out.view(N, -1, C).split([2 * l + 1 for l in degrees], dim=1)
        result: list[list[Tensor]] = [[] for _ in range(self.paths[-1][2] + 1)]
        for p, (_, _, l) in enumerate(self.paths):
            result[l].append(parts[self.places.index(p)])
        return result


def paths_kernel(plain: Any, channels: int, method: str | None) -> Any:
    """Its module: (features (N, LM_in C), Y (E, LM), weights (E, P C)) -> (E, sum (2l+1) C)."""
    cue, cuet = (import_module(f"cuequivariance{part}") for part in ("", "_torch"))
    kind = e3nn_group()
    return cuet.ChannelWiseTensorProduct(
        irreps(channels, range(len(plain.widths))),
        irreps(1, range(plain.max_ell + 1)),
        [kind(l=l, p=(-1) ** l) for l in range(plain.paths[-1][2] + 1)],
        layout=cue.ir_mul,
        shared_weights=False,
        internal_weights=False,
        device="cpu",
        method=method,
    )


def matching_paths(plain: Any) -> tuple[Tensor, Tensor]:
    """Which of our paths, and how many times, each of theirs is: (P,) and (P,) float64."""
    P = len(plain.paths)
    u, Y = random_points(1, sum(plain.widths)), random_points(1, (plain.max_ell + 1) ** 2)
    # One edge and one channel; the weights choose the path.
    exact = copy.deepcopy(plain).double()
    one = torch.ones(1, 1, 1, **F64)
    sums = exact(Y[None], one, torch.ones(1, P, 1, **F64), u[..., None], torch.zeros(1).long())
    ours = [part.flatten() for degree in sums for part in degree]
    theirs = paths_kernel(plain, 1, "naive")(u.repeat(P, 1), Y.repeat(P, 1), torch.eye(P, **F64))
    order, factor = [], []
    for row in theirs:
        block = row[row != 0]
        for p, vector in enumerate(ours):
            if len(vector) == len(block) and p not in order:
                times = (block @ vector) / (block @ block)
                if torch.allclose(block * times, vector, rtol=0, atol=1e-10):
                    order.append(p)
                    factor.append(times)
                    break
    if len(order) != P:
        raise RuntimeError("its channel-wise product has other paths than ours")
    return torch.tensor(order), torch.stack(factor)


def random_points(number: int, size: int) -> Tensor:
    """(number, size) float64, always the same."""
    return torch.randn(number, size, generator=torch.Generator().manual_seed(0), **F64)
