"""An external vector per structure: exact symmetry of structure and field together, and of what
the field leaves; from the file and from the calculator to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.io import read, write
from numpy.random import default_rng
from scipy.spatial.transform import Rotation

from mlip.calculators import EqCalculator
from mlip.data.convert import convert
from mlip.data.dataset import HDF5Dataset
from mlip.data.duplicates import find_duplicates
from mlip.data.graph import AtomicGraph
from mlip.data.transforms import random_rotations, rotated_each
from mlip.evaluation.symmetry import symmetry_errors
from mlip.models import build
from mlip.potential import Potential
from tests.conftest import without_zeros

FIELD = (0.3, -0.2, 0.5)
SMALL: dict[str, dict[str, Any]] = {
    "facet": dict(channels=8, lmax=2, num_basis=4, hidden=12, message_channels=(6, 4)),
    "gaunt": dict(channels=8, lmax=2, num_basis=4, hidden=12, message_channels=(6, 4)),
    "ponita": dict(channels=8, num_basis=4, hidden=12, message_channels=4),
    "escaip": dict(hidden=12, node_hidden=16, num_heads=2, angular_channels=(3, 2, 1)),
}


def make(name: str, field: Any = "given") -> Potential:
    torch.manual_seed(0)
    model = build(name, cutoff=4.0, field=field, **SMALL[name])
    without_zeros(model, 1)
    return Potential(model, torch.linspace(-3, 3, 119, dtype=torch.float64)).double().eval()


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ethanol(field: Any = FIELD) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.positions += default_rng(0).normal(0, 0.08, atoms.positions.shape)
    if field is not None:
        atoms.info["field"] = field
    return atoms


def graph(atoms: Atoms) -> AtomicGraph:
    return AtomicGraph.from_atoms(atoms, 4.0)


def turned(g: AtomicGraph, R: np.ndarray) -> AtomicGraph:
    """The structure alone, the field stays."""
    return g.rotated(torch.from_numpy(R)).replace(field=g.field)


@pytest.mark.parametrize("improper", [False, True])
def test_structure_and_field_rotate_together(name: str, improper: bool) -> None:
    potential, atoms = make(name), bulk("NaCl", "rocksalt", a=5.5, cubic=True)
    atoms.positions += default_rng(1).normal(0, 0.1, atoms.positions.shape)
    atoms.info["field"] = FIELD
    R = torch.from_numpy(Rotation.random(random_state=3).as_matrix()) * (-1 if improper else 1)
    g = graph(atoms)
    a, b = potential(g, stress=True), potential(g.rotated(R), stress=True)
    assert (b["energy"] - a["energy"]).abs().max() < 1e-9
    assert (b["forces"] - a["forces"] @ R.T).abs().max() < 1e-8
    assert (b["stress"] - R @ a["stress"] @ R.T).abs().max() < 1e-8
    assert symmetry_errors(potential, [g], 2).errors["forces"].rms < 1e-8


@pytest.mark.parametrize("field", ["given", FIELD])
def test_only_what_the_field_leaves_is_a_symmetry(name: str, field: Any) -> None:
    potential, g = make(name, field), graph(ethanol())
    assert potential.model.exact_symmetry == (field == "given")
    energy = potential(g)["energy"]
    axis = np.array(FIELD) / np.linalg.norm(FIELD)
    across = np.cross(axis, [1.0, 0, 0])
    across /= np.linalg.norm(across)
    mirror = np.eye(3) - 2 * np.outer(across, across)  # its plane contains the axis
    for R in (Rotation.from_rotvec(1.1 * axis).as_matrix(), mirror):
        assert (potential(turned(g, R))["energy"] - energy).abs() < 1e-9
    for R in (Rotation.from_rotvec(1.1 * across).as_matrix(), -np.eye(3)):
        assert (potential(turned(g, R))["energy"] - energy).abs() > 1e-5


def test_a_fixed_vector_is_a_given_one(name: str) -> None:
    given, fixed = make(name), make(name, FIELD)
    fixed.load_state_dict(given.state_dict())
    a, b = given(graph(ethanol())), fixed(graph(ethanol(None)))
    assert torch.equal(a["energy"], b["energy"]) and torch.equal(a["forces"], b["forces"])


def test_without_a_field_it_is_the_model_without_one(name: str) -> None:
    potential, plain = make(name), make(name, None)
    keep = {k: v for k, v in potential.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(keep)
    a, b = potential(graph(ethanol((0, 0, 0)))), plain(graph(ethanol(None)))
    assert (a["forces"] - b["forces"]).abs().max() < 1e-12
    assert (potential(graph(ethanol()))["forces"] - b["forces"]).abs().max() > 1e-5


def test_forces_are_the_gradient_and_an_atom_alone_feels_nothing(name: str) -> None:
    potential, atoms = make(name), ethanol()
    forces = potential(graph(atoms))["forces"].numpy()
    d, h = default_rng(2).normal(size=atoms.positions.shape), 2e-5
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions += sign * h * d
        energies.append(float(potential(graph(moved))["energy"]))
    assert abs((energies[0] - energies[1]) / (2 * h) + (forces * d).sum()) < 1e-6
    alone = Atoms("O")
    alone.info["field"] = FIELD
    assert abs(float(potential(graph(alone))["energy"] - potential.e0[8])) < 1e-12


def test_each_structure_of_a_batch_has_its_own(name: str) -> None:
    potential = make(name)
    graphs = [graph(ethanol(f)) for f in (FIELD, (0, 0, 0.1), (1, 0, 0))]
    batch = potential(AtomicGraph.collate(graphs))
    singles = torch.cat([potential(g)["energy"] for g in graphs])
    assert (batch["energy"] - singles).abs().max() < 1e-10
    assert len(singles.unique()) == 3
    R = random_rotations(3, generator=torch.Generator().manual_seed(0))
    again = potential(rotated_each(AtomicGraph.collate(graphs), R))["energy"]
    assert (again - singles).abs().max() < 1e-9


def test_ponita_needs_directions_for_it() -> None:
    with pytest.raises(ValueError, match="fiber_lmax of 1 or more"):
        build("ponita", orientations=0, field="given")
    with pytest.raises(ValueError, match="proper_rotations"):
        build("ponita", random_grid=True, field="given")
    assert build("ponita", field="given").exact_groups
    assert not build("ponita", field=(0.0, 0.0, 1.0)).exact_groups


def test_a_missing_field_is_an_error(name: str) -> None:
    potential, missing = make(name), torch.full((1, 3), torch.nan, dtype=torch.float64)
    for g in (graph(ethanol(None)), graph(ethanol()).replace(field=missing)):
        with pytest.raises(ValueError, match=r"external field .* atoms.info\['field'\]"):
            potential(g)


def test_from_extended_xyz_to_the_graph_and_back(tmp_path: Path) -> None:
    frames = [ethanol(), ethanol(None), ethanol((0, 0, 1))]
    frames[2].info["electric_field"] = frames[2].info.pop("field")
    for atoms in frames:
        atoms.info["REF_energy"] = -1.0
    write(tmp_path / "a.xyz", frames)
    convert(tmp_path / "a.xyz", tmp_path / "a.h5")
    convert(tmp_path / "a.h5", tmp_path / "b.xyz")
    convert(tmp_path / "b.xyz", tmp_path / "b.h5")
    for path in (tmp_path / "a.h5", tmp_path / "b.h5"):
        found = torch.cat([HDF5Dataset(path, 4.0)[k].field for k in range(3)])
        assert found.tolist()[0] == list(FIELD) and found.tolist()[2] == [0, 0, 1]
        assert found[1].isnan().all()
    assert np.allclose(read(tmp_path / "b.xyz", 0).info["field"], FIELD)
    # The same structure in another field is another structure.
    assert not find_duplicates({"a": HDF5Dataset(tmp_path / "a.h5", 4.0)}).groups
    frames[0].info["field"] = (1.0, 2.0)
    write(tmp_path / "c.xyz", frames[0])
    with pytest.raises(ValueError, match=r"frame 0: field has shape \(2,\)"):
        convert(tmp_path / "c.xyz", tmp_path / "c.h5")


def test_through_the_calculator(name: str) -> None:
    potential, atoms = make(name), ethanol()
    expected = [float(potential(graph(ethanol(f)))["energy"]) for f in (FIELD, (0, 0, 0.1))]
    atoms.calc = EqCalculator(potential)
    assert atoms.get_potential_energy() == pytest.approx(expected[0], abs=1e-10)
    atoms.info["field"] = np.array([0, 0, 0.1])  # ASE's cache does not look at info
    assert atoms.get_potential_energy() == pytest.approx(expected[1], abs=1e-10)
    del atoms.info["field"]
    with pytest.raises(ValueError, match=r"atoms.info\['field'\].*EqCalculator\(\.\.\., field="):
        atoms.get_potential_energy()
    atoms.info["field"] = "up"
    with pytest.raises(ValueError, match="three numbers"):
        atoms.get_potential_energy()
    del atoms.info["field"]
    atoms.calc = EqCalculator(potential, field=FIELD)
    assert atoms.get_potential_energy() == pytest.approx(expected[0], abs=1e-10)
    atoms.info["E"] = (0, 0, 0.1)
    with pytest.warns(UserWarning, match="copies give what one gives"):  # the field turns with them
        atoms.calc = EqCalculator(potential, info_keys={"field": "E"}, symmetrize="octahedral")
    assert atoms.get_potential_energy() == pytest.approx(expected[1], abs=1e-9)


def test_a_slab_knows_its_normal(name: str) -> None:
    """With the normal as fixed vector the two sides of a wall of one element differ."""
    potential = make(name, (0.0, 0.0, 1.0))
    slab = fcc111("Cu", (1, 1, 3), vacuum=6.0)
    energies = potential(graph(slab))["node_energy"]
    assert (energies[0] - energies[-1]).abs() > 1e-6
    turned_in_plane = slab.copy()
    turned_in_plane.rotate(33, "z", rotate_cell=True)
    again = potential(graph(turned_in_plane))["node_energy"]
    assert (again - energies).abs().max() < 1e-9
