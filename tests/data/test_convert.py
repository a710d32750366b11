"""Conversion: what comes out is what went in, in our units, or an error that names file and
frame."""

from __future__ import annotations

import gzip
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from typer.testing import CliRunner

from mlip.cli import app
from mlip.data.convert import convert
from mlip.data.dataset import HDF5Dataset
from mlip.data.hdf5 import HDF5File
from mlip.data.labels import energy_unit, forces_unit, length_unit, stress_unit


def structures() -> list[Atoms]:
    """A molecule without a cell, a slab, a skewed and a left-handed crystal, isolated atoms, a
    one-atom cell."""
    left = bulk("Cu", cubic=True)
    left.set_cell(np.asarray(left.cell)[[1, 0, 2]])
    skewed = bulk("Si") * (2, 1, 1)
    frames = [
        molecule("H2O"),
        fcc111("Al", (1, 1, 2), vacuum=5),
        skewed,
        left,
        Atoms("O"),
        bulk("Fe"),
    ]
    rng = np.random.default_rng(0)
    for atoms in frames:
        atoms.rattle(0.05, seed=3)
        atoms.info.clear()  # the builders leave notes that no file format takes
        atoms.info["REF_energy"] = rng.normal()
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        if atoms.pbc.all():
            s = rng.normal(size=(3, 3))
            atoms.info["REF_stress"] = (s + s.T).ravel()
    del frames[2].info["REF_energy"], frames[3].arrays["REF_forces"]
    frames[0].info.update(charge=-1, spin=2, config_type="Wasser", config_weight=2.5, run="a b")
    return frames


@pytest.fixture
def source(tmp_path):
    ase.io.write(tmp_path / "in.xyz", structures(), format="extxyz")
    return tmp_path / "in.xyz"


def assert_same(file: HDF5File, frames: list[Atoms], places: float = 1e-6) -> None:
    assert len(file) == len(frames)
    for k, atoms in enumerate(frames):
        s = file.read(k)
        assert s.atomic_numbers.tolist() == atoms.numbers.tolist()
        assert s.pbc[0].tolist() == atoms.pbc.tolist()
        np.testing.assert_allclose(s.positions, atoms.positions, atol=1e-7)
        np.testing.assert_allclose(s.cell[0], np.asarray(atoms.cell), atol=1e-7)
        energy = atoms.info.get("REF_energy", np.nan)
        forces = atoms.arrays.get("REF_forces", np.full((len(atoms), 3), np.nan))
        stress = atoms.info.get("REF_stress", np.full(9, np.nan)).reshape(3, 3)
        np.testing.assert_allclose(s.energy[0], energy, atol=places)
        np.testing.assert_allclose(s.forces, forces, atol=places)
        np.testing.assert_allclose(s.stress[0], stress, atol=places)


@pytest.mark.parametrize("suffix", [".xyz", ".extxyz", ".xyz.gz", ".traj", ".db"])
def test_there_and_back(source, tmp_path, suffix):
    convert(source, tmp_path / "a.h5")
    assert_same(HDF5File(tmp_path / "a.h5"), structures())
    convert(tmp_path / "a.h5", tmp_path / f"b{suffix}")
    convert(tmp_path / f"b{suffix}", tmp_path / "c.h5")
    again = HDF5File(tmp_path / "c.h5")
    assert_same(again, structures())
    assert again.column("config_type").tolist()[:2] == ["Wasser", ""]
    if suffix != ".traj":
        s = again.read(0)
        assert (s.charge[0], s.spin[0], s.weight[0]) == (-1, 2, 2.5)
        assert np.isnan(again.read(1).charge[0]) and again.read(1).weight[0] == 1


def test_report_says_what_came_from_where(source, tmp_path):
    report = convert(source, tmp_path / "a.h5", group_key="run")
    assert report.num_structures == 6 and report.num_isolated == 1
    assert report.sources["energy", "REF_energy", "info"] == 5
    assert report.sources["forces", "REF_forces", "arrays"] == 5
    assert report.lacking == {
        ("energy", "in.xyz"): 1,
        ("forces", "in.xyz"): 1,
        ("stress", "in.xyz"): 3,
    }
    dataset = HDF5Dataset(tmp_path / "a.h5", 3.0)
    assert dataset.isolated.tolist() == [False] * 4 + [True, False]
    assert dataset.config_types[4] == "IsolatedAtom" and dataset.groups[0] == "a b"


def test_keys_that_ase_moves_into_a_calculator(tmp_path):
    atoms = bulk("Si")
    stress = np.array([[1.0, 0.1, 0.2], [0.1, 2.0, 0.3], [0.2, 0.3, 3.0]])
    forces = np.arange(6).reshape(2, 3) / 10
    atoms.calc = SinglePointCalculator(
        atoms, energy=-3.0, forces=forces, stress=full_3x3_to_voigt_6_stress(stress)
    )
    for name in ("a.xyz", "a.traj", "a.json"):
        ase.io.write(tmp_path / name, atoms)
        report = convert(tmp_path / name, tmp_path / "a.h5", overwrite=True)
        s = HDF5File(tmp_path / "a.h5").read(0)
        assert s.energy[0] == -3.0
        np.testing.assert_allclose(s.forces, forces, atol=1e-8)
        np.testing.assert_allclose(s.stress[0], stress, atol=1e-8)
        assert report.sources["energy", "energy", "calculator"] == 1


def test_constraints_do_not_touch_the_forces(tmp_path):
    from ase.constraints import FixAtoms

    atoms = bulk("Si")
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.ones((2, 3)))
    atoms.set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "a.traj", atoms)
    convert(tmp_path / "a.traj", tmp_path / "a.h5")
    assert (HDF5File(tmp_path / "a.h5").read(0).forces == 1).all()


@pytest.mark.parametrize("key", ["dft_energy", "DFT_energy", "QM_energy", "free_energy", "my_own"])
def test_habitual_and_explicit_keys(tmp_path, key):
    atoms = molecule("H2O")
    atoms.info[key], atoms.info["other"] = -7.5, 1.0
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    options = {"energy_key": "my_own"} if key == "my_own" else {}
    convert(tmp_path / "a.xyz", tmp_path / "a.h5", **options)
    assert HDF5File(tmp_path / "a.h5").read(0).energy[0] == -7.5


def test_explicit_key_is_the_only_one_that_counts(source, tmp_path):
    with pytest.raises(ValueError, match=r"energy under the key 'E_pbe'.*REF_energy"):
        convert(source, tmp_path / "a.h5", energy_key="E_pbe")
    assert os.listdir(tmp_path) == ["in.xyz"]


def test_no_label_at_all_is_an_error(tmp_path):
    ase.io.write(tmp_path / "a.xyz", molecule("H2O"), format="extxyz")
    with pytest.raises(ValueError, match=r"no label was found in 1 structures.*--unlabelled"):
        convert(tmp_path / "a.xyz", tmp_path / "a.h5")
    assert os.listdir(tmp_path) == ["a.xyz"]
    # Denoising needs none.
    report = convert(tmp_path / "a.xyz", tmp_path / "a.h5", allow_unlabelled=True)
    assert report.num_structures == 1 and not report.sources
    assert HDF5File(tmp_path / "a.h5").read(0).energy is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kcal/mol", 0.0433641042418009),
        ("kJ/mol", 0.01036426965),
        ("Hartree", 27.211386024),
        ("ha", 27.211386024),
        ("Ry", 13.605693012),
        ("meV", 1e-3),
        ("EV", 1.0),
    ],
)
def test_energy_units(name, value):
    assert energy_unit(name) == pytest.approx(value, rel=1e-7)


def test_composed_units():
    assert forces_unit("Hartree/bohr") == pytest.approx(units.Hartree / units.Bohr, rel=1e-12)
    assert forces_unit("kcal/mol/Å") == pytest.approx(units.kcal / units.mol, rel=1e-12)
    assert stress_unit("kbar") == pytest.approx(0.1 * units.GPa, rel=1e-12)
    assert stress_unit("gpa") == units.GPa and stress_unit("eV/A^3") == 1.0
    assert stress_unit("Ha/bohr^3") == pytest.approx(units.Hartree / units.Bohr**3, rel=1e-12)
    assert stress_unit("MPa") == pytest.approx(1e-3 * units.GPa, rel=1e-12)
    assert length_unit("\u212b") == length_unit("Å") == 1.0 and length_unit("nm") == 10.0


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (energy_unit, "kcal"),
        (length_unit, "furlong"),
        (forces_unit, "eV"),
        (stress_unit, "psi"),
        (energy_unit, "MeV"),
    ],
)
def test_unknown_unit_is_named(function, name):
    with pytest.raises(ValueError, match=f"unknown unit of .*'{name}'"):
        function(name)


def test_units_are_converted(tmp_path):
    frames = structures()
    for atoms in frames:
        atoms.set_cell(np.asarray(atoms.cell) / units.Bohr, scale_atoms=False)
        atoms.positions /= units.Bohr
        if "REF_energy" in atoms.info:
            atoms.info["REF_energy"] /= units.Hartree
        if "REF_forces" in atoms.arrays:
            atoms.arrays["REF_forces"] /= units.Hartree / units.Bohr
        if "REF_stress" in atoms.info:
            atoms.info["REF_stress"] /= 0.1 * units.GPa
    ase.io.write(tmp_path / "au.xyz", frames, format="extxyz")
    convert(
        tmp_path / "au.xyz",
        tmp_path / "a.h5",
        energy_unit="Hartree",
        length_unit="bohr",
        stress_unit="kbar",
    )
    assert_same(HDF5File(tmp_path / "a.h5"), structures(), places=2e-6)


def test_large_forces_are_warned_about(source, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        report = convert(source, tmp_path / "a.h5", forces_unit="Hartree/pm")
    assert "RMS force" in caplog.text and report.rms_force > 100
    caplog.clear()
    convert(source, tmp_path / "b.h5")
    assert not caplog.text


STRESS = np.array([[1.0, 0.1, 0.2], [0.1, 2.0, 0.3], [0.2, 0.3, 3.0]])
ASE_ORDER = [1.0, 2.0, 3.0, 0.3, 0.2, 0.1]
VASP_ORDER = [1.0, 2.0, 3.0, 0.1, 0.3, 0.2]


def crystal(path: Path, **info) -> tuple[Path, float]:
    atoms = bulk("Cu", cubic=True)
    ase.io.write(path, atoms, format="extxyz")
    text = path.read_text().splitlines()
    text[1] += "".join(
        f' {key}="{" ".join(map(repr, np.ravel(value).tolist()))}"' for key, value in info.items()
    )
    path.write_text("\n".join(text) + "\n")
    return path, atoms.get_volume()


@pytest.mark.parametrize("key", ["REF_stress", "stress", "dft_stress"])
@pytest.mark.parametrize(
    ("value", "options"),
    [(STRESS, {}), (ASE_ORDER, {"stress_order": "ase"}), (VASP_ORDER, {"stress_order": "vasp"})],
)
def test_stress_conventions_agree(tmp_path, key, value, options):
    path, _ = crystal(tmp_path / "a.xyz", **{key: value})
    convert(path, tmp_path / "a.h5", **options)
    np.testing.assert_allclose(HDF5File(tmp_path / "a.h5").read(0).stress[0], STRESS, atol=1e-12)


@pytest.mark.parametrize("key", ["REF_stress", "stress", "virial"])
def test_six_numbers_without_their_order_are_refused(tmp_path, key):
    path, _ = crystal(tmp_path / "a.xyz", **{key: ASE_ORDER})
    with pytest.raises(ValueError, match=rf"a\.xyz: frame 0: {key} has 6 numbers whose order"):
        convert(path, tmp_path / "a.h5")


@pytest.mark.parametrize("key", ["virial", "virials", "REF_virials"])
def test_virial_is_minus_volume_times_stress(tmp_path, key):
    path, volume = crystal(tmp_path / "a.xyz", **{key: STRESS})
    convert(path, tmp_path / "a.h5")
    np.testing.assert_allclose(
        HDF5File(tmp_path / "a.h5").read(0).stress[0], -STRESS / volume, rtol=1e-7
    )


def test_flipped_sign_and_unit(tmp_path):
    path, _ = crystal(tmp_path / "a.xyz", vasp=VASP_ORDER)
    convert(
        path,
        tmp_path / "a.h5",
        stress_key="vasp",
        stress_order="vasp",
        stress_unit="kbar",
        flip_stress=True,
    )
    got = HDF5File(tmp_path / "a.h5").read(0).stress[0]
    np.testing.assert_allclose(got, -STRESS * 0.1 * units.GPa, rtol=1e-12)


def test_stress_without_full_periodicity_is_not_a_label(tmp_path):
    path, _ = crystal(tmp_path / "a.xyz", REF_stress=STRESS, REF_energy=1.0)
    path.write_text(path.read_text().replace('pbc="T T T"', 'pbc="T T F"'))
    report = convert(path, tmp_path / "a.h5")
    assert "stress" not in HDF5File(tmp_path / "a.h5").columns
    assert any("three periodic directions" in name for name in report.ignored)


FRAME = '2\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:REF_forces:R:3 '
FRAME += 'REF_energy=1.0 pbc="T T T"\n'
FRAME += "Cu 0 0 0 0 0 0\nCu 2 2 2 0 0 0\n"
BROKEN = {
    "nan energy": (FRAME.replace("=1.0", "=nan"), "REF_energy is not finite"),
    "text energy": (FRAME.replace("=1.0", "=abc"), "REF_energy is not a number"),
    "vector energy": (FRAME.replace("=1.0", '="1 2 3"'), "REF_energy has shape"),
    "inf force": (FRAME.replace("2 0 0 0", "2 0 inf 0"), "REF_forces is not finite"),
    "nan position": (FRAME.replace("Cu 2 2 2", "Cu 2 nan 2"), "atom 1 has a non-finite position"),
    "flat cell": (FRAME.replace('0 0 4"', '4 0 0"'), "flat"),
    "zero vector": (FRAME.replace('0 0 4"', '0 0 0"'), "pbc is set along c"),
    "overlap": (FRAME.replace("2 2 2", "4 0 0"), "overlap"),
    "unknown element": (FRAME.replace("Cu 2", "Qq 2"), "cannot be read.*Qq"),
    "dummy atom": (FRAME.replace("Cu 2", "X 2"), "no element"),
    "too few columns": (FRAME.replace("Cu 2 2 2 0 0 0", "Cu 2 2"), "cannot be read"),
    "letters for numbers": (FRAME.replace("Cu 2 2 2", "Cu 2 a 2"), "cannot be read"),
    "no count": ("two" + FRAME[1:], "number of atoms, found 'two'"),
    "negative count": ("-2" + FRAME[1:], "impossible number"),
    "huge count": ("99999999999" + FRAME[1:], "impossible number"),
    "cut short": (FRAME[: FRAME.rindex("Cu")], "cut short"),
    "cut in the comment": (FRAME[:60], "cut short|cannot be read"),
    "cut in a line": (FRAME[:-8], "cannot be read"),
    "no atoms": ("0\n\n", "no atoms"),
    "negative weight": (FRAME.replace("=1.0", "=1.0 config_weight=-1"), "negative"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_frames_are_named_and_nothing_is_written(tmp_path, name, packed):
    text, message = BROKEN[name]
    path = tmp_path / ("bad.xyz.gz" if packed else "bad.xyz")
    content = (FRAME * 3 + text).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=rf"(?s)bad\.xyz.*: frame 3: .*({message})"):
        convert(path, tmp_path / "out.h5")
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match="frame 3"):
        convert(path, tmp_path / "out.xyz")
    assert os.listdir(tmp_path) == [path.name]


def test_cut_archives_and_trajectories_are_refused(tmp_path, source):
    packed = gzip.compress(source.read_bytes())
    (tmp_path / "cut.xyz.gz").write_bytes(packed[:-30])
    convert(source, tmp_path / "whole.h5")
    convert(tmp_path / "whole.h5", tmp_path / "whole.traj")
    (tmp_path / "cut.traj").write_bytes((tmp_path / "whole.traj").read_bytes()[:-200])
    (tmp_path / "cut.h5").write_bytes((tmp_path / "whole.h5").read_bytes()[:-200])
    (tmp_path / "text.dat").write_text("hello")
    (tmp_path / "empty.xyz").write_text("")
    for name in ("cut.xyz.gz", "cut.traj", "cut.h5", "text.dat", "empty.xyz"):
        with pytest.raises((ValueError, OSError), match=name):
            convert(tmp_path / name, tmp_path / "out.h5")
        assert not (tmp_path / "out.h5").exists()


def test_files_that_are_not_there_or_in_the_way(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\*\.xyz"):
        convert(tmp_path / "none*.xyz", tmp_path / "a.h5")
    with pytest.raises(IsADirectoryError):
        convert(tmp_path, tmp_path / "a.h5")
    before = source.read_bytes()
    with pytest.raises(ValueError, match="both input and output"):
        convert(source, source, overwrite=True)
    (tmp_path / "precious.xyz").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(source, tmp_path / "precious.xyz")
    assert source.read_bytes() == before and (tmp_path / "precious.xyz").read_text() == "mine"


def test_globs_and_several_inputs_keep_their_order(source, tmp_path):
    for k in range(3):
        (tmp_path / f"part{k}.xyz").write_bytes(source.read_bytes())
    report = convert([tmp_path / "part*.xyz", source], tmp_path / "a.h5")
    assert [path.name for path in report.files] == ["part0.xyz", "part1.xyz", "part2.xyz", "in.xyz"]
    assert_same(HDF5File(tmp_path / "a.h5"), structures() * 4)


def test_mace_hdf5(tmp_path):
    with h5py.File(tmp_path / "mace.h5", "w") as file:
        for b, k, energy in ((0, 0, 1.0), (0, 1, None), (1, 0, 3.0)):
            group = file.create_group(f"config_batch_{b}/config_{k}")
            group["atomic_numbers"], group["positions"] = [1, 1], [[0, 0, 0], [0, 0, 1.0 + b]]
            group["cell"], group["pbc"] = np.eye(3) * 9, [True, True, True]
            group["config_type"], group["weight"] = b"Default", 1.0
            group["properties/energy"] = "None" if energy is None else energy
            group["properties/forces"], group["property_weights/forces"] = np.zeros((2, 3)), 0.0
    convert(tmp_path / "mace.h5", tmp_path / "a.h5")
    file = HDF5File(tmp_path / "a.h5")
    assert [file.read(k).energy[0] for k in (0, 2)] == [1.0, 3.0] and np.isnan(
        file.read(1).energy[0]
    )
    assert "forces" not in file.columns and file.read(2).positions[1, 2] == 2.0
    with h5py.File(tmp_path / "mace.h5", "a") as file:
        file["config_batch_2"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(ValueError, match="link"):
        convert(tmp_path / "mace.h5", tmp_path / "b.h5")


def test_unknown_hdf5(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/b"] = [1, 2]
    with pytest.raises(ValueError, match=r"x\.h5.*unknown layout"):
        convert(tmp_path / "x.h5", tmp_path / "a.h5")


def test_command(source, tmp_path):
    out = tmp_path / "a.h5"
    result = CliRunner().invoke(app, ["convert", str(source), str(out), "--level-of-theory", "PBE"])
    assert result.exit_code == 0, result.output
    assert (
        "REF_energy" in result.output
        and "none" in result.output
        and "6 structures" in result.output
    )
    assert HDF5File(out).attributes["level_of_theory"] == "PBE"
    back = CliRunner().invoke(app, ["convert", str(out), str(tmp_path / "b.xyz")])
    assert back.exit_code == 0 and len(ase.io.read(tmp_path / "b.xyz", ":")) == 6


def test_killed_conversion_leaves_no_half_file(tmp_path):
    atoms = bulk("Cu", cubic=True) * 2
    atoms.info["REF_energy"] = 1.0
    ase.io.write(tmp_path / "in.xyz", [atoms] * 400, format="extxyz")
    out = tmp_path / "out.h5"
    command = [sys.executable, "-m", "mlip", "convert", str(tmp_path / "in.xyz"), str(out)]
    for delay in (2.0, 3.0):
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() or len(HDF5File(out)) == 400
        out.unlink(missing_ok=True)
    assert [p.name for p in tmp_path.glob("*.h5")] == []


def test_reference_files(datasets, tmp_path):
    """Published files: plain keys in a calculator, VASP's own output, groups of another HDF5."""
    report = convert(datasets / "3bpa" / "train_300K_plain_keys.xyz.gz", tmp_path / "a.h5")
    assert report.sources["forces", "forces", "calculator"] == 500
    same = tmp_path / "b.h5"
    convert(datasets / "3bpa" / "train_300K.xyz.gz", same)
    one, two = HDF5File(tmp_path / "a.h5").read_block(0, 500), HDF5File(same).read_block(0, 500)
    np.testing.assert_allclose(one.energy, two.energy, atol=1e-6)
    np.testing.assert_allclose(one.forces, two.forces, atol=1e-6)

    convert(datasets / "hfo2_outcar" / "OUTCAR_*.gz", tmp_path / "vasp.h5")
    convert(datasets / "hfo2_outcar" / "all.xyz.gz", tmp_path / "xyz.h5")
    vasp, xyz = (HDF5File(tmp_path / f"{n}.h5").read_block(0, 2) for n in ("vasp", "xyz"))
    for name in ("energy", "forces", "stress", "positions"):
        np.testing.assert_allclose(getattr(vasp, name), getattr(xyz, name), atol=2e-5)

    report = convert(
        datasets / "ethane_h5" / "*.h5",
        tmp_path / "eth.h5",
        energy_unit="Hartree",
        forces_unit="Hartree/bohr",
    )
    assert report.num_structures == 10080 and report.rms_force < 100


def test_cut_outcar_is_refused(datasets, tmp_path):
    raw = gzip.decompress((datasets / "hfo2_outcar" / "OUTCAR_1.gz").read_bytes())
    (tmp_path / "OUTCAR").write_bytes(raw[: int(0.9 * len(raw))])
    with pytest.raises(ValueError, match=r"OUTCAR.*did not finish"):
        convert(tmp_path / "OUTCAR", tmp_path / "a.h5")
