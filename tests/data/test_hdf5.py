"""The data file: round trip, crash safety, damaged and hostile files, processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip.data.hdf5 import COLUMNS, HDF5File, HDF5Writer


def write(path: Path, sizes=(3, 1, 5), **options) -> list[dict]:
    rng = np.random.default_rng(0)
    frames = []
    with HDF5Writer(path, {"source": "random", "level_of_theory": "none"}, **options) as writer:
        for k, n in enumerate(sizes):
            frame = {
                "atomic_numbers": rng.integers(1, 119, n),
                "positions": rng.normal(size=(n, 3)),
                "cell": rng.normal(size=(3, 3)),
                "pbc": rng.integers(0, 2, 3).astype(bool),
                "energy": rng.normal() if k != 1 else None,
                "forces": rng.normal(size=(n, 3)) if k != 2 else None,
                "stress": rng.normal(size=(3, 3)) if k == 2 else None,
                "config_type": ["bulk", "", "Ångström"][k % 3],
            }
            writer.append(**frame)
            frames.append(frame)
    return frames


def test_round_trip_and_missing_labels_are_nan(tmp_path):
    path = tmp_path / "a.h5"
    frames = write(path)
    file = HDF5File(path)
    assert len(file) == 3 and file.num_atoms == 9
    assert file.attributes["source"] == "random"
    assert "charge" not in file.columns and "weight" not in file.columns
    for k, frame in enumerate(frames):
        s = file.read(k)
        for name in ("atomic_numbers", "positions"):
            np.testing.assert_array_equal(getattr(s, name), frame[name])
        for name in ("cell", "pbc", "energy", "stress"):
            value = frame[name]
            got = getattr(s, name)[0]
            assert np.isnan(got).all() if value is None else np.array_equal(got, value)
        assert (
            np.isnan(s.forces).all()
            if frame["forces"] is None
            else np.array_equal(s.forces, frame["forces"])
        )
    assert file.column("config_type").tolist() == ["bulk", "", "Ångström"]
    assert file.column("group") is None
    assert sorted(os.listdir(tmp_path)) == ["a.h5"]


def test_block_equals_single_reads(tmp_path):
    write(tmp_path / "a.h5", sizes=(3, 1, 5, 2, 7))
    file = HDF5File(tmp_path / "a.h5")
    block = file.read_block(1, 4)
    assert block.ptr.tolist() == [0, 1, 6, 8]
    for k in range(3):
        np.testing.assert_array_equal(block[k].positions, file.read(1 + k).positions)
        np.testing.assert_array_equal(block[k].energy, file.read(1 + k).energy)
    with pytest.raises(IndexError):
        file.read(5)


def test_float32_columns_are_read_as_float64(tmp_path):
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        forces = file["forces"][()].astype("f4")
        del file["forces"]
        file["forces"] = forces
    assert HDF5File(tmp_path / "a.h5").read(0).forces.dtype == np.float64


def test_nothing_is_left_after_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match="positions has shape"),
        HDF5Writer(tmp_path / "a.h5") as writer,
    ):
        writer.append([1], np.zeros((1, 3)), np.eye(3), [True] * 3, energy=1.0)
        writer.append([1, 2], np.zeros((1, 3)), np.eye(3), [True] * 3)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="no structure"), HDF5Writer(tmp_path / "a.h5"):
        pass
    assert os.listdir(tmp_path) == []


def test_existing_file_is_kept_unless_asked(tmp_path):
    write(tmp_path / "a.h5")
    before = (tmp_path / "a.h5").read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.h5 exists"):
        HDF5Writer(tmp_path / "a.h5")
    with pytest.raises(RuntimeError), HDF5Writer(tmp_path / "a.h5", overwrite=True) as writer:
        writer.append([1], np.zeros((1, 3)), np.eye(3), [True] * 3, energy=1.0)
        raise RuntimeError
    assert (tmp_path / "a.h5").read_bytes() == before


@pytest.mark.parametrize("numbers", [[0], [119], [-1]])
def test_impossible_elements_are_refused(tmp_path, numbers):
    with pytest.raises(ValueError, match="no element"), HDF5Writer(tmp_path / "a.h5") as writer:
        writer.append(numbers, np.zeros((1, 3)), np.eye(3), [True] * 3)


KILLED = """
import sys, numpy as np
from mlip.data.hdf5 import HDF5Writer
n = 40
with HDF5Writer(sys.argv[1], overwrite=True) as writer:
    print("started", flush=True)
    for k in range(int(sys.argv[2])):
        writer.append(np.full(n, 6), np.zeros((n, 3)), np.eye(3), [True] * 3, energy=0.0,
        forces=np.zeros((n, 3)))
"""


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 0.6])
def test_killed_writer_leaves_the_target_absent_or_whole(tmp_path, delay):
    path = tmp_path / "a.h5"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), "8000"],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if path.exists():
        assert len(HDF5File(path)) == 8000
    assert not list(tmp_path.glob("*.h5")) or path.exists()  # no temporary file looks like data
    write(path, overwrite=True)  # and nothing left behind is in the way
    assert len(HDF5File(path)) == 3


def edit(path, change):
    with h5py.File(path, "a") as file:
        change(file)


def replace(name, make):
    def change(file):
        del file[name]
        make(file)

    return change


def external(file):
    file.create_dataset("energy", (3,), "f8", external=[("/etc/passwd", 0, 24)])


def virtual(file):
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "energy", (3,))
    file.create_virtual_dataset("energy", layout)


HOSTILE = {
    "soft link": (
        replace("energy", lambda f: f.__setitem__("energy", h5py.SoftLink("/ptr"))),
        "link",
    ),
    "external link": (
        replace("energy", lambda f: f.__setitem__("energy", h5py.ExternalLink("other.h5", "/x"))),
        "link",
    ),
    "link beside": (
        lambda f: f.__setitem__("extra", h5py.ExternalLink("/etc/passwd", "/x")),
        "link",
    ),
    "external storage": (replace("energy", external), "another file"),
    "virtual": (replace("energy", virtual), "contiguous"),
    "chunked": (
        replace("positions", lambda f: f.create_dataset("positions", (9, 3), "f8", chunks=(1, 3))),
        "contiguous",
    ),
    "huge chunked shape": (
        replace(
            "positions", lambda f: f.create_dataset("positions", (10**13, 3), "f8", chunks=(1, 3))
        ),
        "shape|contiguous",
    ),
    "huge contiguous shape": (
        replace("energy", lambda f: f.create_dataset("energy", (10**12,), "f8")),
        "shape",
    ),
    "unallocated column": (
        replace("energy", lambda f: f.create_dataset("energy", (3,), "f8")),
        "cut short",
    ),
    "group for a column": (replace("energy", lambda f: f.create_group("energy")), "not a column"),
    "missing column": (lambda f: f.__delitem__("cell"), "'cell' is missing"),
    "wrong type": (replace("energy", lambda f: f.__setitem__("energy", np.zeros(3, "i8"))), "type"),
    "object type": (
        replace("energy", lambda f: f.create_dataset("energy", (3,), h5py.string_dtype())),
        "type",
    ),
    "big endian": (
        replace("energy", lambda f: f.__setitem__("energy", np.zeros(3, ">f8"))),
        "type",
    ),
    "wrong length": (replace("energy", lambda f: f.__setitem__("energy", np.zeros(4))), "shape"),
    "ptr backwards": (
        replace("ptr", lambda f: f.__setitem__("ptr", np.array([0, 5, 4, 9]))),
        "ptr",
    ),
    "ptr negative": (
        replace("ptr", lambda f: f.__setitem__("ptr", np.array([-4, 3, 4, 9]))),
        "ptr",
    ),
    "ptr beyond": (replace("ptr", lambda f: f.__setitem__("ptr", np.array([0, 3, 4, 99]))), "ptr"),
    "no schema": (lambda f: f.attrs.__delitem__("schema"), "schema"),
    "other schema": (lambda f: f.attrs.__setitem__("schema", "mlip-9"), "mlip-9"),
    "schema of another type": (lambda f: f.attrs.__setitem__("schema", np.arange(3)), "schema"),
    "many entries": (lambda f: [f.create_group(f"g{k}") for k in range(100)], "entries"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_their_name(tmp_path, name):
    path = tmp_path / "bad.h5"
    write(path)
    change, message = HOSTILE[name]
    edit(path, change)
    start = time.perf_counter()
    with pytest.raises((ValueError, OSError), match=message) as error:
        HDF5File(path)
    assert "bad.h5" in str(error.value)
    assert time.perf_counter() - start < 1.0


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    write(path, sizes=(40,) * 20)
    whole = path.read_bytes()
    for keep in [0, 1, 100, *np.linspace(500, len(whole) - 1, 25).astype(int)]:
        cut = tmp_path / "cut.h5"
        cut.write_bytes(whole[:keep])
        with pytest.raises((ValueError, OSError), match=r"cut\.h5"):
            HDF5File(cut)


def test_flipped_bytes_never_crash(tmp_path):
    """Each byte of the header damaged: a clear refusal, or an intact reading of the columns."""
    path = tmp_path / "a.h5"
    write(path)
    whole = bytearray(path.read_bytes())
    bad = tmp_path / "bad.h5"
    refused = 0
    for where in range(0, min(len(whole), 4000), 7):
        damaged = bytearray(whole)
        damaged[where] ^= 0xFF
        bad.write_bytes(damaged)
        try:
            file = HDF5File(bad)
            file.read_block(0, len(file))
        except (ValueError, OSError) as error:
            assert "bad.h5" in str(error)
            refused += 1
    assert refused > 20


def test_no_file_and_no_hdf5(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5"):
        HDF5File(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("not HDF5 at all")
    with pytest.raises(OSError, match=r"text\.h5"):
        HDF5File(tmp_path / "text.h5")


def test_change_while_in_use_is_noticed(tmp_path):
    path = tmp_path / "a.h5"
    write(path)
    file = pickle.loads(pickle.dumps(HDF5File(path)))
    time.sleep(0.01)
    write(path, sizes=(2, 2), overwrite=True)
    with pytest.raises(OSError, match="changed"):
        file.read(0)


def first_position(file: HDF5File, k: int) -> float:
    return float(file.read(k).positions[0, 0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_in_other_processes(tmp_path, method):
    write(tmp_path / "a.h5")
    file = HDF5File(tmp_path / "a.h5")
    expected = [first_position(file, k) for k in range(3)]  # opens the file before the fork
    queue = multiprocessing.get_context(method)
    if method == "fork":
        reader, writer = queue.Pipe(duplex=False)
        process = queue.Process(
            target=lambda: writer.send([first_position(file, k) for k in range(3)])
        )
        process.start()
        got = reader.recv()
        process.join()
    else:
        code = (
            "import pickle, sys; f = pickle.loads(sys.stdin.buffer.read());"
            "print([float(f.read(k).positions[0, 0]) for k in range(3)])"
        )
        out = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(file),
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        got = [float(x) for x in out.stdout.decode().strip("[]\n").split(",")]
    assert got == expected
    assert first_position(file, 0) == expected[0]


def test_every_column_is_documented():
    import mlip.data.hdf5 as module

    assert module.__doc__ is not None
    for name in COLUMNS:
        assert f"/{name}" in module.__doc__
