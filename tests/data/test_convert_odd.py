"""Inputs and outputs that people try: what is meant is done, anything else is answered."""

from __future__ import annotations

import os

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.singlepoint import SinglePointCalculator

from mlip.data.convert import convert
from mlip.data.dataset import HDF5Dataset
from mlip.data.statistics import compute_statistics


@pytest.fixture
def source(tmp_path):
    atoms = bulk("Si")
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((2, 3)))
    ase.io.write(tmp_path / "in.traj", atoms)
    return tmp_path / "in.traj"


@pytest.mark.parametrize("name", ["out", "out.foo", "out.h5x"])
def test_an_output_of_unknown_format_is_refused_before_anything_is_read(tmp_path, source, name):
    source.write_bytes(b"broken")  # reading it would be another error
    with pytest.raises(ValueError, match=rf"{name}: no format .*\.xyz"):
        convert(source, tmp_path / name)
    assert os.listdir(tmp_path) == [source.name]


@pytest.mark.parametrize("name", ["out.h5", "out.xyz", "out.db"])
def test_a_folder_that_is_not_there_is_named(tmp_path, source, name):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        convert(source, tmp_path / "nowhere" / name)


@pytest.mark.parametrize("name", ["out.xyz", "out.extxyz.gz", "out.traj", "out.db", "out.json"])
def test_formats_that_are_written_are_read_again(tmp_path, source, name):
    convert(source, tmp_path / name)
    convert(tmp_path / name, tmp_path / "again.h5")
    assert float(HDF5Dataset(tmp_path / "again.h5", cutoff=3.0)[0].energy) == -1.0


def test_an_unknown_element_is_named(tmp_path):
    (tmp_path / "in.xyz").write_text("1\nenergy=-1\nH 0 0 0\n1\nenergy=-1\nQq 0 0 0\n")
    with pytest.raises(ValueError, match=r"in\.xyz: frame 1: .*unknown element.*Qq") as caught:
        convert(tmp_path / "in.xyz", tmp_path / "out.h5")
    assert "KeyError" not in str(caught.value)


def test_an_atom_alone_in_a_large_periodic_box_is_isolated(tmp_path):
    frames = [Atoms("Si", cell=[15, 16, 17], pbc=True), bulk("Si") * (2, 1, 1), bulk("Fe")]
    for energy, atoms in zip((-0.75, -20.0, -8.0), frames, strict=True):
        atoms.info["REF_energy"] = energy
    ase.io.write(tmp_path / "in.xyz", frames)
    with pytest.warns(UserWarning, match="no isolated-atom frame for Fe"):
        report = convert(tmp_path / "in.xyz", tmp_path / "out.h5")
        dataset = HDF5Dataset(tmp_path / "out.h5", cutoff=5.0)
        statistics = compute_statistics(dataset)
    assert report.num_isolated == 1 and dataset.isolated.tolist() == [True, False, False]
    assert float(statistics.e0[14]) == -0.75


def test_a_label_that_is_not_read_is_told_once(tmp_path):
    slab = fcc111("Cu", (1, 1, 2), vacuum=5)
    slab.calc = SinglePointCalculator(slab, energy=-1.0, stress=np.arange(6.0))
    ase.io.write(tmp_path / "in.traj", slab)
    report = convert(tmp_path / "in.traj", tmp_path / "out.h5")
    assert [name for name in report.ignored if "stress" in name] == [
        "stress (calculator): no stress without three periodic directions"
    ]


def test_structures_given_for_a_data_file_are_answered_with_the_remedy(tmp_path):
    ase.io.write(tmp_path / "train.xyz", bulk("Si"))
    with pytest.raises(OSError, match=r"train\.xyz: not an HDF5 file.*mlip convert"):
        HDF5Dataset(tmp_path / "train.xyz", cutoff=5.0)


def test_positions_beyond_the_digits_of_float64_are_refused(tmp_path, source):
    atoms = ase.io.read(source)
    atoms.positions[1] += 1e12
    atoms.info["REF_energy"] = -1.0
    ase.io.write(tmp_path / "far.traj", atoms)
    with pytest.raises(ValueError, match=r"far\.traj: frame 0: atom 1 is at .* rounding"):
        convert(tmp_path / "far.traj", tmp_path / "out.h5")
