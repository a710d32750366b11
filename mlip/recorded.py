"""A model's program recorded on a GPU: the kernels of a step started as one.

Of a small system a GPU computes each of the hundreds of operations faster than Python can ask for
the next.  A CUDA graph asks for all at once.  It has fixed sizes and fixed places in memory, so
sizes are rounded up, by empty slots that contribute nothing and atoms without neighbours; the
inputs are copied into their places; and there is one recording for each size, of which the oldest
are forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlip.compiled import Program

LARGE = 200_000  # slots; of so many each operation takes longer than the asking
RECORDINGS = 8  # sizes that are kept
REHEARSALS = 3  # in which libraries choose their kernels, which cannot be recorded

Results = tuple[Tensor, Tensor, Tensor]
Record = Callable[[Program, Results], tuple[Callable[[], None], Results]]


class Recording(NamedTuple):
    """A program of one size."""

    inputs: Results  # where they are read from: Z, v, neighbors
    replay: Callable[[], None]
    results: Results  # where they are after that


class Recorded:
    """A program that computes what another one does.

    Parameters
    ----------
    program : energies, features and gradient of padded neighbourhoods
    cutoff : angstrom; the length of empty slots
    record : how one is recorded, on a GPU by ``cuda_graph``
    """

    def __init__(self, program: Program, cutoff: float, record: Record | None = None) -> None:
        self.program, self.cutoff = program, cutoff
        self.record = record or cuda_graph
        self._recordings: dict[tuple[int, int], Recording] = {}
        self._lock = threading.Lock()  # places in memory serve one at a time

    def __call__(self, Z: Tensor, v: Tensor, neighbors: Tensor) -> Results:
        N, K = neighbors.shape
        if N * K > LARGE:
            return self.program(Z, v, neighbors)
        size = rounded(N), rounded(K)
        with self._lock:
            enlarged = self._enlarged(size, Z, v, neighbors)
            recording = self._recordings.pop(size, None) or self._made(enlarged)
            self._recordings[size] = recording  # the last one used is the last one
            for place, value in zip(recording.inputs, enlarged, strict=True):
                place.copy_(value)
            recording.replay()
            energy, features, g = recording.results
            return energy[:N].clone(), features[:N].clone(), g[:N, :K].clone()

    def _enlarged(self, size: tuple[int, int], Z: Tensor, v: Tensor, neighbors: Tensor) -> Results:
        N, K = neighbors.shape
        atoms, slots = size[0] - N, size[1] - K
        larger = v.new_zeros(*size, 3)
        larger[..., 2] = self.cutoff
        larger[:N, :K] = v
        more = nn.functional.pad(neighbors, (0, slots, 0, atoms))
        return nn.functional.pad(Z, (0, atoms)), larger, more

    def _made(self, inputs: Results) -> Recording:
        if len(self._recordings) >= RECORDINGS:
            self._recordings.pop(next(iter(self._recordings)))
        return Recording(inputs, *self.record(self.program, inputs))


def rounded(n: int) -> int:
    """n or a little more, at most an eighth: few sizes stand for all."""
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step


def cuda_graph(program: Program, inputs: Results) -> tuple[Callable[[], None], Results]:
    """The program as a CUDA graph that reads these inputs: what starts it, and its results."""
    with torch.cuda.device(inputs[0].device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(REHEARSALS):
                program(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = program(*inputs)
    return graph.replay, results
