"""A model's program recorded on a GPU: the kernels of a step started as one.

Of a small system a GPU computes each of the hundreds of operations faster than Python can ask for
the next.  A CUDA graph asks for all at once.  It has fixed sizes and fixed places in memory, so
sizes are rounded up, by empty slots that contribute nothing and atoms without neighbours; the
inputs are copied into their places; and there is one recording for each size that comes again, of
which the oldest are forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlip.compiled import Program

LARGE = 100_000  # slots; of so many each operation takes longer than the asking
RECORDINGS = 32  # sizes that are kept
REHEARSALS = 3  # in which libraries choose their kernels, which cannot be recorded

Results = tuple[Tensor, Tensor, Tensor]
Replay = Callable[[], None]
Record = Callable[[Program, Results], tuple[Replay, Results]]


class Recording(NamedTuple):
    """A program of one size."""

    inputs: Results  # where they are read from: Z, v, neighbors
    replay: Replay
    results: Results  # where they are after that


class Recorded:
    """A program that computes what another one does.

    A size is recorded when it comes for the second time: in relaxations of many structures most
    come once.

    Parameters
    ----------
    program : energies, features and gradient of padded neighbourhoods
    cutoff : angstrom; the length of empty slots
    record : how one is recorded; on a GPU by CUDA graphs in one pool of memory
    """

    def __init__(self, program: Program, cutoff: float, record: Record | None = None) -> None:
        self.program, self.cutoff = program, cutoff
        self.record = record or CudaGraphs()
        self._recordings: dict[tuple[int, int], Recording] = {}
        self._seen: dict[tuple[int, int], None] = {}
        self._lock = threading.Lock()  # places in memory serve one at a time
        self._free: torch.cuda.Event | None = None  # when the last results have been copied

    def __call__(self, Z: Tensor, v: Tensor, neighbors: Tensor) -> Results:
        N, K = v.shape[:2]
        size = rounded(N), rounded(K)
        with self._lock:
            if N * K > LARGE or not self._comes_again(size):
                return self.program(Z, v, neighbors)
            if self._free is not None:  # another thread may have queued on another stream
                torch.cuda.current_stream(v.device).wait_event(self._free)
            enlarged = self._enlarged(size, Z, v, neighbors)
            recording = self._recordings.pop(size, None) or self._made(enlarged)
            self._recordings[size] = recording  # the last one used is the last one
            for place, value in zip(recording.inputs, enlarged, strict=True):
                place.copy_(value)
            recording.replay()
            energy, features, g = recording.results
            copies = energy[:N].clone(), features[:N].clone(), g[:N, :K].clone()
            if v.is_cuda:
                self._free = torch.cuda.current_stream(v.device).record_event()
            return copies

    def _comes_again(self, size: tuple[int, int]) -> bool:
        known = size in self._seen
        self._seen.pop(size, None)
        self._seen[size] = None
        if len(self._seen) > 4 * RECORDINGS:
            self._seen.pop(next(iter(self._seen)))
        return known

    def _enlarged(self, size: tuple[int, int], Z: Tensor, v: Tensor, neighbors: Tensor) -> Results:
        N, K = v.shape[:2]
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
    """n or a little more, one atom or slot more than a multiple, as padded neighbourhoods are: few
    sizes stand for all."""
    step = 1 << max((n - 1).bit_length() - 3, 0)
    return -(-(n - 1) // step) * step + 1


class CudaGraphs:
    """Records programs as CUDA graphs, which share their memory: they run one at a time, and their
    results are copied."""

    one_at_a_time = threading.Lock()  # torch records no two in a process

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, program: Program, inputs: Results) -> tuple[Replay, Results]:
        """What starts the program on these inputs, and its results."""
        with self.one_at_a_time, torch.cuda.device(inputs[0].device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(REHEARSALS):
                    program(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # On a stream of this device, and without a word to other threads.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=aside, capture_error_mode="thread_local"
            ):
                results = program(*inputs)
        return graph.replay, results
