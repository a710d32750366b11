"""Nothing is made, read or mixed on the wrong device, and a GPU is not made to wait without need.

One is played.  Its tensors hold their numbers on the processor and say that they are elsewhere: on
``meta``, the one other device that torch has everywhere.  Each operation is looked at before it is
done.  What CUDA refuses, or does by a silent copy, is refused: tensors of two devices, and arrays
of numpy on the device.  What makes the host wait is counted.  The numbers are those of the
processor, to the bit.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mlip.calculators import EqCalculator, relax_many
from mlip.compiled import Compiled, Laid
from mlip.data.graph import AtomicGraph
from mlip.models import MODELS, build
from mlip.nn.cohesion import Cohesion
from mlip.nn.zbl import ZBL
from mlip.potential import Potential
from mlip.recorded import Recorded
from mlip.training.config import TrainConfig
from mlip.training.run import train
from mlip.wrappers import wrap
from tests.conftest import random_facet, rattled, toy, without_zeros
from tests.test_models import SMALL, VARIANTS, WRAPPED
from tests.test_recorded import Tape
from tests.training.conftest import configure, copper  # noqa: F401 (fixtures)

DEVICE = torch.device("meta")
aten = torch.ops.aten
# Their results have sizes that only the device knows, or are on the host.
WAITING = {
    aten._local_scalar_dense.default, aten.bincount.default, aten.equal.default,
    aten.masked_select.default, aten.nonzero.default, aten._unique2.default,
    aten.unique_dim.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPYING = {aten._to_copy.default, aten.copy_.default}


class Far(Tensor):
    """A tensor on the device, whose numbers are ``near``."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        with torch.inference_mode(False):  # in which torch makes none of a class
            made = Tensor._make_wrapper_subclass(
                cls,
                near.shape,
                strides=near.stride(),
                storage_offset=near.storage_offset(),
                dtype=near.dtype,
                device=DEVICE,
            )
        made.near = near
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an array of a tensor on the device; copy it first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} after the device is gone")


class Played(TorchDispatchMode):
    """The device: does all operations, and counts those for which the host has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # for what the device says
        self.sent: Counter[str] = Counter()  # to the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = any(isinstance(x, Far) for x in tensors)
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if func in COPYING:
            source = args[-1] if func is aten.copy_.default else args[0]
            to = args[0].device if func is aten.copy_.default else target or source.device
            if to != source.device:
                (self.waits if isinstance(source, Far) else self.sent)[str(func)] += 1
            far = to == DEVICE
        elif far and any(x.dim() and not isinstance(x, Far) for x in tensors):
            raise RuntimeError(f"{func}: tensors of two devices")
        elif far and (func in WAITING or (func in INDEXING and _has_mask(args[1]))):
            self.waits[str(func)] += 1
        if target is not None:
            far = target == DEVICE
            kwargs["device"] = "cpu"
        places = {id(x.near): x for x in tensors if isinstance(x, Far)}
        out = func(*tree_map(_near, args), **tree_map(_near, kwargs))

        def result(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if func._schema.is_mutable and id(x) in places:
                return places[id(x)]
            return Far(x) if far else x

        return tree_map(result, out)


class Lists(TorchFunctionMode):
    """Tensors of Python's numbers are made on the host and sent, as for CUDA; without this torch
    makes tensors of nothing on ``meta``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


def _near(x: Any) -> Any:
    return x.near if isinstance(x, Far) else x


def _has_mask(indices: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in indices)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """The device, in use."""
    autocast, is_set = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cpu" and is_set(kind))
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **o: autocast(kind, **o) if kind == "cpu" else nullcontext()
    )
    with Lists(), Played() as played:
        yield played


def silicon() -> Atoms:
    return rattled(bulk("Si", cubic=True))


def facet() -> Potential:
    return Potential(random_facet(), toy().e0, 3.0).double().eval()


def test_what_cuda_refuses_is_refused(device: Played) -> None:
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    assert there.device == DEVICE and (2 * there).tolist() == [2, 2, 2]
    for mistake in (lambda: here + there, lambda: there[torch.zeros(1).long()]):
        with pytest.raises(RuntimeError, match="two devices"):
            mistake()
    with pytest.raises(TypeError, match="copy it first"):
        there.numpy()
    device.waits.clear()
    assert bool(there.any()) and len(there[there > 0]) == 3
    assert sum(device.waits.values()) == 2


# How often the host waits for energy and gradient: for the largest number of neighbours; for the
# numbers of atoms of each element or degree; for views, of which nobody knows how many there are.
WAITS = {"escaip": 2, "escaip-soft-knn": 2, "mace": 2, "ponita_published": 2}
VIEWED = {"environment-local": 20, "transip-local": 20}
CHOSEN = [*MODELS, "escaip-soft-knn", "transip-irreps", "facet-field", *VIEWED]


@pytest.mark.parametrize("variant", CHOSEN)
def test_models(variant: str, device: Played) -> None:
    name, hyperparameters = VARIANTS[variant]
    torch.manual_seed(0)
    model = build(name, cutoff=3.5, **hyperparameters)
    without_zeros(model, 0.3)
    if variant in WRAPPED:
        model = wrap(model, **WRAPPED[variant])
    frames = [rattled(molecule("H2O")), rattled(bulk("NaCl", "rocksalt", a=5.5))]
    batch = AtomicGraph.collate([AtomicGraph.from_atoms(atoms, 3.5) for atoms in frames])
    cohesion = Cohesion(torch.ones(119, dtype=torch.float64))
    potential = Potential(model, torch.zeros(119), 2.0, ZBL(), cohesion).double().eval()
    expected = potential(batch, stress=True)
    potential.to(DEVICE)
    batch.to(DEVICE)
    device.waits.clear()
    found = potential(batch, stress=True)
    waits = sum(device.waits.values())
    assert waits == WAITS.get(variant, 1) or waits <= VIEWED.get(variant, 0), device.waits
    for key, value in expected.items():
        assert torch.equal(found[key].cpu().nan_to_num(), value.nan_to_num()), key
    out = potential.train()(batch, stress=True)
    (out["forces"].square().sum() + out["energy"].sum()).backward()
    assert {p.grad.device for p in potential.parameters() if p.grad is not None} == {DEVICE}


@pytest.mark.parametrize("large", [False, True], ids=["list of the host", "list of the device"])
def test_steps(large: bool, device: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of molecular dynamics sends the structure and fetches four results; in between the
    host asks for the largest number of neighbours, for the memory and for the model, and where the
    list is on the device for the number of edges and the smallest distance."""
    potential, atoms = facet(), silicon()
    monkeypatch.setattr("mlip.calculators.neighbor_cache.LARGE", 4 if large else 1000)
    here = EqCalculator(potential, device="cpu")
    there = EqCalculator(potential, device=DEVICE)
    there.calculate(atoms)
    atoms.positions += 0.01
    device.waits.clear()
    device.sent.clear()
    there.calculate(atoms)
    assert sum(device.waits.values()) == (8 if large else 6), device.waits
    assert sum(device.sent.values()) <= 8, device.sent
    here.calculate(atoms)
    for key, value in here.results.items():
        assert np.max(np.abs(value - there.results[key])) < 1e-14


def test_many_structures_are_sent_at_once(device: Played) -> None:
    calculator = EqCalculator(facet(), device=DEVICE)
    counts = []
    for number in (2, 9):
        device.waits.clear()
        device.sent.clear()
        calculator.evaluate([silicon() for _ in range(number)])
        counts.append((sum(device.waits.values()), sum(device.sent.values())))
    assert counts[0] == counts[1]


def test_relaxations_in_batches(device: Played) -> None:
    """Nothing is sent or waited for structure by structure."""
    settings = {"cell": True, "max_steps": 3, "fmax": 1e-9}
    here, there = (EqCalculator(facet(), device=place) for place in ("cpu", DEVICE))
    counts = []
    for number in (2, 9):
        device.waits.clear()
        device.sent.clear()
        found = relax_many([silicon() for _ in range(number)], there, **settings)
        counts.append((sum(device.waits.values()), sum(device.sent.values())))
    assert counts[0] == counts[1]
    (expected,) = relax_many(silicon(), here, **settings)
    for result in found:
        assert abs(result.energy - expected.energy) < 1e-12
        assert abs(result.atoms.positions - expected.atoms.positions).max() < 1e-12


def test_parts_of_the_calculator(device: Played) -> None:
    """Pieces, which are checked first, second derivatives, committees, means over rotations."""
    potential, small = facet(), toy()
    atoms, column = silicon(), silicon() * (1, 1, 6)
    numbers = []
    for place in ("cpu", DEVICE):
        bounded = EqCalculator(small, device=place, max_memory=1e6)
        with pytest.warns(UserWarning, match="pieces"):
            forces = bounded.get_forces(column)
        with pytest.warns(UserWarning, match="invariant"):
            turned = EqCalculator(small, device=place, symmetrize="octahedral")
        members = EqCalculator([potential, potential], device=place)
        hessian = EqCalculator(small, device=place).get_hessian(atoms[:3], method="autograd")
        descriptors = members.get_descriptors(atoms)[0]
        numbers.append(
            [forces, members.get_forces(atoms), turned.get_forces(atoms), hessian, descriptors]
        )
    for a, b in zip(*numbers, strict=True):
        assert np.abs(a - b).max() < 1e-13


def test_recorded_programs(device: Played) -> None:
    """What is around a recorded program asks for no more than what is around the model."""
    potential, atoms = facet().to(DEVICE), silicon()

    def program(Z: Tensor, v: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            out = potential.model(Laid(Z, v, neighbors))
            (g,) = torch.autograd.grad(out.energy.sum(), v)
        return out.energy.detach(), out.features.detach(), g.detach()

    model = Compiled(potential.model, lambda _: Recorded(program, 4.0, Tape()))
    fast = EqCalculator(potential.with_model(model), device=DEVICE)
    for _ in range(3):
        device.waits.clear()
        fast.calculate(atoms)
    assert sum(device.waits.values()) == 5, device.waits
    plain = EqCalculator(facet(), device="cpu")
    assert abs(plain.get_forces(atoms) - fast.results["forces"]).max() < 1e-13


TERMS: dict[str, Any] = {
    "latent": {"weight": 1.0},
    "pooled": {"weight": 1.0, "hidden": 8},
    "variance": {"energy": 1.0, "forces": 1.0},
    "constraint": {},
    "projection": {},
}


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")  # on this meta it is done
def test_training(
    device: Played,
    configure: Callable[..., TrainConfig],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An epoch with all terms, saved, continued and reported."""
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    name = "_get_fused_kernels_supported_devices"
    supported = getattr(optimizers, name)()
    monkeypatch.setattr(optimizers, name, lambda: [*supported, DEVICE.type])
    monkeypatch.setattr("mlip.training.distributed.process_group", lambda _: nullcontext(DEVICE))
    model = {"name": "transip", **SMALL["transip"], "num_layers": 1, "tokens": "irreps"}
    options: dict[str, Any] = dict(
        model={**model, "cutoff": 3.2},
        symmetry=TERMS,
        optimizer={"name": "muon"},
        data={"batch_size": 7},
        resume="auto",
    )
    with monkeypatch.context() as first:
        first.setattr("mlip.training.run.report", lambda *_: None)
        train(configure(schedule={"max_epochs": 1}, **options))
    assert train(configure(schedule={"max_epochs": 2}, **options)).is_file()
