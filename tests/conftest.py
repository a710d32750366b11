"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ase import Atoms
from numpy.random import default_rng

from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.models import build
from mlip.nn.radial import polynomial_envelope
from mlip.potential import Potential


@pytest.fixture(scope="session")
def datasets() -> Path:
    """Folder of reference data outside the repository; tests that ask for it are skipped where it
    is absent."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "datasets"
    folder = Path(os.environ.get("MLIP_DATASETS", default)).resolve()
    if not folder.is_dir():
        pytest.skip("reference data not found; set MLIP_DATASETS to their folder")
    return folder


class Toy(torch.nn.Module):
    """A model as small as can be: a Morse pair and a cohesive term of the density."""

    def __init__(self, cutoff: float = 5.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(cutoff=cutoff)
        self.depth = torch.nn.Parameter(torch.tensor(0.15))  # eV
        self.width = torch.nn.Parameter(torch.tensor(1.5))  # 1/angstrom
        self.bond = torch.nn.Parameter(torch.tensor(2.5))  # angstrom
        self.receptive_field = cutoff
        self.exact_symmetry = True

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        r = graph.vectors.norm(dim=-1)
        j, i = graph.edge_index
        Z = graph.atomic_numbers.to(r.dtype) / 20
        bond = self.bond + 0.05 * (Z[i] + Z[j])
        fade = polynomial_envelope(r / self.config.cutoff)
        morse = self.depth * (1 - torch.exp(-self.width * (r - bond))) ** 2 - self.depth
        zero = torch.zeros_like(Z)
        pair = zero.index_add(0, i, morse * fade)
        density = zero.index_add(0, i, Z[j] * torch.exp(-r) * fade)
        return NodeOutput(pair - 0.3 * torch.tanh(density), torch.stack([pair, density], dim=-1))


class Lopsided(torch.nn.Module):
    """A network of raw vectors: smooth, with charge as an input, and blind to the symmetry of
    space."""

    graph_inputs = ("charge",)
    exact_symmetry = False

    def __init__(self, cutoff: float = 4.0, *, direct: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(cutoff=cutoff)
        self.receptive_field = cutoff
        self.direct = direct
        self.message = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)
        )
        self.node = torch.nn.Sequential(
            torch.nn.Linear(7, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        )

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        v, (j, i) = graph.vectors, graph.edge_index
        Z = graph.atomic_numbers.to(v.dtype)[:, None] / 20
        x = torch.cat([v, Z[i], Z[j]], dim=1)
        fade = polynomial_envelope(v.norm(dim=1) / self.config.cutoff)[:, None]
        h = v.new_zeros(len(Z), 6).index_add(0, i, self.message(x) * fade)
        charge = graph.charge if "charge" in graph else graph.cell.new_zeros(graph.num_structures)
        out = self.node(torch.cat([h, charge[graph.batch].to(v.dtype)[:, None]], dim=1))
        return NodeOutput(out[:, 0], h, out[:, 1:] if self.direct else None)


@pytest.fixture(name="lopsided")
def lopsided_fixture() -> Callable[..., Potential]:
    """Function that makes potentials without rotational symmetry: ``lopsided(direct=True)``."""

    def make(**options: object) -> Potential:
        return Potential(Lopsided(**options), toy().e0, scale=2.0).double().eval()  # type: ignore[arg-type]

    return make


def without_zeros(model: torch.nn.Module, std: float) -> None:
    """Random numbers for weights that training starts with as zeros; a model of zeros obeys any
    law."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=std)


def rattled(atoms: Atoms, size: float = 0.08, seed: int = 0) -> Atoms:
    """The atoms, displaced at random by ``size`` angstrom in each coordinate."""
    atoms.positions += default_rng(seed).normal(0, size, atoms.positions.shape)
    return atoms


def random_facet(seed: int = 0, num_layers: int = 2, lmax: int = 2) -> torch.nn.Module:
    """A small Facet in which no weight is zero."""
    torch.manual_seed(seed)
    model = build(
        "facet", cutoff=4.0, channels=8, num_layers=num_layers, lmax=lmax, num_basis=6, hidden=16
    )
    without_zeros(model, 0.3)
    return model


@pytest.fixture(name="random_facet")
def random_facet_fixture() -> Callable[..., torch.nn.Module]:
    """Function that builds small random Facets."""
    return random_facet


def toy() -> Potential:
    e0 = torch.full((119,), torch.nan, dtype=torch.float64)
    e0[[1, 6, 8, 14, 29]] = torch.tensor([-13.6, -1030.0, -2040.0, -1.5, -2.5], dtype=torch.float64)
    return Potential(Toy(), e0).double().eval()


@pytest.fixture(name="toy")
def toy_fixture() -> Potential:
    """Pair potential with a minimum: knows H, C, O, Si, Cu; float64."""
    return toy()


@pytest.fixture(params=["toy", "facet"])
def potential(request: pytest.FixtureRequest) -> Potential:
    """Toy and random Facet in turn, float64, knowing H, C, O, Si, Cu."""
    made = toy()
    if request.param == "facet":
        made = Potential(random_facet(), made.e0, scale=3.0).double().eval()
    return made
