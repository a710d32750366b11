"""MACE: the numbers of mace-torch, elements, isolated atoms, MACE's names of options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from mlip.config import ConfigError
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.models.mace import MACEConfig
from mlip.potential import Potential
from mlip.training.config import hyperparameters, parse_training

FILE = Path(__file__).parents[1] / "files" / "mace_torch.npz"
SMALL: dict[str, Any] = dict(channels=4, radial_hidden=(6,), cutoff=4.0, avg_num_neighbors=4.0)


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.positions += np.random.default_rng(0).normal(0, 0.1, atoms.positions.shape)
    return atoms


def potential(seed: int = 0, **options: Any) -> Potential:
    torch.manual_seed(seed)
    return Potential(build("mace", **{**SMALL, **options}), torch.zeros(119)).double().eval()


def test_weights_of_mace_torch_give_its_energies_and_forces() -> None:
    """Numbers of mace-torch 0.3.16 in float64; ``benchmarks/mace_reference.py`` wrote the file."""
    stored = dict(np.load(FILE))
    h = json.loads(str(stored.pop("hyperparameters")))
    p = Potential(build("mace", **h), torch.zeros(119)).double().eval()
    names = dict(p.model.named_parameters())
    assert names.keys() <= stored.keys()
    p.model.load_state_dict({name: torch.from_numpy(stored[name]) for name in names})
    count = sum(key.startswith("numbers/") for key in stored)
    graphs = [
        AtomicGraph.from_arrays(
            *(stored[f"{key}/{k}"] for key in ("numbers", "positions", "cell", "pbc")), p.cutoff
        )
        for k in range(count)
    ]
    out = p(AtomicGraph.collate(graphs))
    assert np.abs(stored["forces"]).max() > 0.01
    np.testing.assert_allclose(out["energy"], stored["energy"], rtol=0, atol=1e-11)
    np.testing.assert_allclose(out["forces"], stored["forces"], rtol=0, atol=1e-11)


def test_the_published_energy_of_isolated_atoms_is_a_constant() -> None:
    """isolated="zero" takes it off, for each element, and changes no force."""
    zero = potential(elements=(1, 6, 8))
    learned = potential(elements=(1, 6, 8), isolated="learned")
    learned.load_state_dict(zero.state_dict())
    g = AtomicGraph.from_atoms(ethanol(), 4.0)
    a, b = zero(g), learned(g)
    torch.testing.assert_close(a["forces"], b["forces"], rtol=0, atol=1e-14)
    alone = {
        z: learned(AtomicGraph.from_atoms(Atoms(numbers=[z]), 4.0))["energy"].item()
        for z in (1, 6, 8)
    }
    assert min(abs(e) for e in alone.values()) > 1e-4
    expected = torch.tensor([alone[z] for z in g.atomic_numbers.tolist()], dtype=torch.float64)
    torch.testing.assert_close(b["node_energy"] - a["node_energy"], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{"gate": False}, {"gate": True}, {"first_layer": "species"}])
def test_isolated_atoms_of_several_elements_have_energy_zero(options: dict[str, Any]) -> None:
    p = potential(elements=(1, 6, 8), **options)
    atoms = Atoms("OHCHO", positions=[[20.0 * k, 0, 0] for k in range(5)])
    assert p(AtomicGraph.from_atoms(atoms, 4.0))["node_energy"].abs().max() < 1e-14


def test_weights_of_absent_elements_do_not_matter() -> None:
    p = potential(elements=(1, 6, 8, 14))
    g = AtomicGraph.from_atoms(ethanol(), 4.0)
    before = p(g)["energy"].item()
    with torch.no_grad():
        p.model.embed[3] += 1
        for layer in p.model.layers:
            layer.skip.weight[3] += 1
            for weight in layer.contraction.weights:
                weight[3] += 1
    assert p(g)["energy"].item() == before
    with torch.no_grad():
        p.model.layers[0].contraction.weights[0][1] += 1
    assert p(g)["energy"].item() != before


def test_an_unknown_element_is_named() -> None:
    with pytest.raises(ValueError, match=r"no weights for the atomic numbers \[8\]"):
        potential(elements=(1, 6))(AtomicGraph.from_atoms(ethanol(), 4.0))


def test_without_a_list_all_elements_have_weights() -> None:
    p = potential(channels=1, correlation=1, max_ell=1)
    assert p(AtomicGraph.from_atoms(Atoms("UOg", [[0, 0, 0], [0, 0, 2.0]]), 4.0))[
        "energy"
    ].isfinite()


def test_reduced_products_are_the_same_functions() -> None:
    """Fewer weights, of which some choice gives any model of the redundant ones."""
    from mlip.nn.symmetric_contraction import symmetric_couplings

    full, reduced = potential(elements=(1, 6, 8)), potential(elements=(1, 6, 8), reduced=True)
    state = full.state_dict()
    for name, value in reduced.state_dict().items():
        if ".contraction.weights." not in name:
            continue
        L, columns, start = int(name[-1]), [], 0
        for order in (1, 2, 3):
            U = symmetric_couplings(3, L, order, reduced=False).flatten(1)
            V = symmetric_couplings(3, L, order, reduced=True).flatten(1)
            W = state[name][:, start : start + len(U)]
            start += len(U)
            columns.append(torch.linalg.lstsq(V.T, U.T).solution @ W)
        state[name] = torch.cat(columns, dim=1)
        assert state[name].shape == value.shape
    reduced.load_state_dict(state)
    g = AtomicGraph.from_atoms(ethanol(), 4.0)
    a, b = full(g), reduced(g)
    torch.testing.assert_close(a["forces"], b["forces"], rtol=0, atol=1e-12)


def test_options_by_the_names_of_mace() -> None:
    content = {
        "train_file": "train.h5",
        "model": {"name": "mace"},
        "hidden_irreps": "64x0e + 64x1o",
        "num_interactions": 3,
        "r_max": 4.5,
        "max_ell": 2,
        "correlation": 2,
        "num_radial_basis": 10,
        "num_cutoff_basis": 6,
        "radial_MLP": [32, 32],
    }
    own = hyperparameters(parse_training(content))
    config = MACEConfig(**{k: v for k, v in own.items() if k != "avg_num_neighbors"})
    assert (config.channels, config.lmax, config.num_layers) == (64, 1, 3)
    assert (config.cutoff, config.max_ell, config.correlation) == (4.5, 2, 2)
    assert (config.num_basis, config.envelope_power) == (10, 6)
    assert config.radial_hidden == (32, 32)
    content = {"train_file": "train.h5", "model": "mace", "num_channels": 32, "max_L": 0}
    own = hyperparameters(parse_training(content))
    assert (own["channels"], own["lmax"], own["elements"]) == (32, 0, None)


@pytest.mark.parametrize(
    "text", ["64x0e + 32x1o", "64x0e + 64x1e", "64x1o", "64x0e + 64x2e", "abc"]
)
def test_other_irreps_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="natural parity"):
        parse_training({"train_file": "train.h5", "model": {"name": "mace", "hidden_irreps": text}})


@pytest.mark.parametrize("elements", [(), (6, 1), (1, 1), (0, 1), (119,)])
def test_elements_are_ascending_atomic_numbers(elements: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="elements"):
        build("mace", elements=elements)


def test_one_layer_and_no_edge() -> None:
    p = potential(elements=(1, 6, 8), num_layers=1)
    assert p(AtomicGraph.from_atoms(ethanol(), 4.0))["forces"].abs().max() > 1e-3
    assert p(AtomicGraph.from_atoms(Atoms("C"), 4.0))["energy"].item() == 0


def test_features_of_larger_degrees_than_the_harmonics_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_ell=1"):
        build("mace", lmax=2, max_ell=1)
    p = potential(elements=(1, 6, 8), lmax=1, max_ell=1)
    assert p(AtomicGraph.from_atoms(ethanol(), 4.0))["forces"].abs().max() > 1e-3
