"""Results are given once more for the same tensor only."""

from __future__ import annotations

import gc
import weakref

import torch
from ase.build import bulk
from torch import Tensor

from mlip.data.graph import AtomicGraph
from mlip.nn.buckets import bucketed_neighborhoods
from mlip.nn.remembered import remembered


@remembered
def doubled(x: Tensor, times: int = 2) -> Tensor:
    return x * times


def test_the_same_tensor_gives_the_same_object() -> None:
    x, y = torch.ones(3), torch.ones(3)
    first = doubled(x)
    assert doubled(x) is first
    assert doubled(x, 3).tolist() == [3.0] * 3
    assert doubled(y) is not first
    assert doubled(x, times=4).tolist() == [4.0] * 3


def test_a_tensor_that_was_changed_is_another() -> None:
    x = torch.ones(3)
    doubled(x)
    x[1] = 5
    assert doubled(x).tolist() == [2.0, 10.0, 2.0]


def test_what_inference_mode_has_made_is_not_given_outside() -> None:
    x = torch.ones(3)
    with torch.inference_mode():
        assert doubled(x).is_inference()
        untracked = torch.ones(3)
        doubled(untracked)
        untracked += 1
        assert doubled(untracked).tolist() == [4.0] * 3
    assert not doubled(x).is_inference()


def test_nothing_is_kept_of_a_tensor_that_is_gone() -> None:
    x = torch.ones(3)
    result = weakref.ref(doubled(x))
    assert result() is not None
    del x
    gc.collect()
    assert result() is None


def test_neighbourhoods_follow_the_vectors() -> None:
    graph = AtomicGraph.from_atoms(bulk("Si"), 4.0)
    v = graph.edge_vectors()
    for vectors in (v, 2 * v):
        _, (hood,) = bucketed_neighborhoods(vectors, graph.edge_index, 2, 4.0)
        torch.testing.assert_close(hood.vectors.flatten(0, 1)[0], vectors[0])
