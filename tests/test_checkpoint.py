"""Model files: what is loaded is what was saved, to the bit, or nothing is loaded."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from safetensors.torch import save as serialize

import mlip.checkpoint
from mlip.checkpoint import (
    CheckpointError,
    describe,
    load,
    read_metadata,
    read_tensors,
    save,
    write_tensors,
)
from mlip.data.graph import AtomicGraph
from mlip.models import MODELS, build
from mlip.nn.cohesion import Cohesion
from mlip.nn.zbl import ZBL
from mlip.potential import Potential
from mlip.tensorfile import write_bytes

ROOT = Path(__file__).parent.parent
FILES = Path(__file__).parent / "files"
TINY = {"channels": 4, "num_layers": 1, "lmax": 1, "hidden": 4, "num_basis": 4}


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Potential:
    """A small Facet for silicon and carbon with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build("facet", **TINY)
    e0 = torch.full((119,), torch.nan, dtype=torch.float64)
    e0[6], e0[14] = -7.25, -5.125
    return Potential(model, e0, scale=0.75, **options).to(dtype).eval()


def energy_and_forces(potential: Potential) -> tuple[float, np.ndarray]:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=1)
    out = potential(AtomicGraph.from_atoms(atoms, potential.cutoff))
    return float(out["energy"]), out["forces"].numpy()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A saved tiny potential."""
    path = tmp_path / "model.safetensors"
    save(tiny(), path, level_of_theory="PBE", licence="MIT")
    return path


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a model file with other contents and a correct checksum, as a liar would."""
    tensors, metadata = read_tensors(path)
    replaced = change(metadata, tensors)
    write_tensors(path, tensors, replaced if isinstance(replaced, list) else metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("priors", [False, True])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, dtype: torch.dtype, priors: bool) -> None:
    potential = tiny(dtype=dtype)
    if priors:
        energies = torch.linspace(-3, -1, 119, dtype=torch.float64)
        potential = tiny(dtype=dtype, repulsion=ZBL(), cohesion=Cohesion(energies))
    path = tmp_path / "a.safetensors"
    save(potential, path, level_of_theory="PBE")
    loaded = load(path)
    assert loaded.dtype == dtype and not loaded.training and loaded.e0.dtype == torch.float64
    (E, F), (E_loaded, F_loaded) = energy_and_forces(potential), energy_and_forces(loaded)
    assert E == E_loaded
    assert np.array_equal(F, F_loaded)
    assert loaded.elements == [6, 14]
    assert loaded.metadata["level_of_theory"] == "PBE"
    again = tmp_path / "b.safetensors"
    save(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_the_default_of_every_model_passes(tmp_path: Path) -> None:
    for name in MODELS:
        potential = Potential(build(name), torch.zeros(119))
        save(potential, tmp_path / name)
        for key, tensor in load(tmp_path / name).state_dict().items():
            assert torch.equal(tensor, potential.state_dict()[key])


def test_dtype_can_be_chosen_on_loading(file: Path) -> None:
    E32, _ = energy_and_forces(load(file))
    double = load(file, dtype=torch.float64)
    assert double.dtype == torch.float64
    assert energy_and_forces(double)[0] == pytest.approx(E32, abs=1e-4)


def test_saving_and_loading_leave_the_random_state_alone(file: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    save(load(file), tmp_path / "copy.safetensors")
    assert torch.equal(before, torch.get_rng_state())


def test_all_dtypes_and_shapes_pass(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, generator=generator)
    tensors = {str(d): values.to(d) for d in mlip.checkpoint.DTYPES.values()}
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5), "strided": values.T}
    write_tensors(tmp_path / "t", tensors, {"step": 3, "best": float("inf")})
    back, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"step": 3, "best": float("inf")}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    with pytest.raises(ValueError, match=r"'z' is torch\.complex64"):
        write_tensors(tmp_path / "t", {"z": torch.zeros(1, dtype=torch.complex64)}, {})


def without_torch(code: str, *arguments: str | Path) -> str:
    """Output of ``code`` in a fresh interpreter in which torch and ase cannot be imported."""
    block = "import sys; sys.modules.update(torch=None, ase=None, e3nn=None); "
    done = subprocess.run(
        [sys.executable, "-c", block + code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_readable_with_safetensors_and_json_alone(file: Path) -> None:
    code = (
        "import json; from safetensors import safe_open; "
        "f = safe_open(sys.argv[1], framework='numpy'); m = json.loads(f.metadata()['mlip']); "
        "print(m['model'], m['elements'], m['cutoff'], m['units']['energy']); "
        "print(f.get_tensor('e0')[14])"
    )
    assert without_torch(code, file) == "facet ['C', 'Si'] 5.0 eV\n-5.125\n"


def test_info_needs_no_torch(file: Path) -> None:
    code = "from mlip.modelcard import describe; print(describe(sys.argv[1]))"
    assert without_torch(code, file) == describe(file) + "\n"


def test_description_says_what_a_user_asks(tmp_path: Path) -> None:
    errors = {
        "test": {"energy MAE": 1.25, "force MAE": 31.5},
        "hot": {"energy MAE": 2.5, "force MAE": None},
    }
    save(
        tiny(),
        tmp_path / "m",
        level_of_theory="PBE, 500 eV",
        training={"data": "si.h5", "frames": 400},
        errors=errors,
        licence="CC-BY-4.0",
        citation="A. Author 2026",
        colour="blue",
    )
    text = describe(tmp_path / "m")
    for words in (
        "facet",
        "C Si",
        "cutoff (angstrom)    5",
        "PBE, 500 eV",
        "si.h5",
        "CC-BY-4.0",
        "A. Author 2026",
        "colour",
        "eV/angstrom^3",
        torch.__version__,
    ):
        assert words in text
    parameters = sum(p.numel() for p in tiny().parameters())
    assert f"parameters           {parameters}\n" in text
    table = [line.split() for line in text.splitlines() if line.split()[:1] in (["hot"], ["test"])]
    assert table == [["hot", "2.5", "none"], ["test", "1.25", "31.5"]]


def test_a_file_cannot_send_control_sequences_to_the_terminal(tmp_path: Path) -> None:
    save(
        tiny(),
        tmp_path / "m",
        citation="\x1b[2J\x07 hidden\rtext" + "x" * 10**5,
        **{"\x1b]k": [1] * 10**5},
    )
    text = describe(tmp_path / "m")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text) < 10_000


def test_every_flipped_byte_is_noticed(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    random = np.random.default_rng(0)
    places = [*range(header), *random.integers(header, len(whole), 300)]
    for place in places:
        changed = whole.copy()
        changed[place] ^= 1 << int(random.integers(8))
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ."):
            read_tensors(file)


def test_truncated_and_extended_files_are_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 60, dtype=int):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ."):
            load(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ."):
        load(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"cutoff\\": 5.0', '"cutoff\\": 5.1'),
        ('"energy\\": \\"eV\\"', '"energy\\": \\"Ry\\"'),
        ("\\\"Si\\\"", "\\\"Ge\\\""),
        ('"repulsion\\": null', '"repulsion\\": \\"zbl\\"'),
        ('"avg_num_neighbors\\": 20.0', '"avg_num_neighbors\\": 10.0'),
        ("PBE", "HSE"),
    ],
)  # fmt: skip
def test_no_other_energy_by_altered_metadata(file: Path, old: str, new: str) -> None:
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].decode()
    assert old in header
    header = header.replace(old, new)
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + whole[8 + length :])
    for reader in (load, read_metadata, describe):
        with pytest.raises(CheckpointError, match=r"model.safetensors: .*checksum"):
            reader(file)


LIES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "unknown model": lambda m, t: m.update(model="os.system"),
    "model is a list": lambda m, t: m.update(model=["facet"]),
    "unknown hyperparameter": lambda m, t: m["hyperparameters"].update(chanels=4),
    "hyperparameters are text": lambda m, t: m.update(hyperparameters="channels=4"),
    "other hyperparameter": lambda m, t: m["hyperparameters"].update(channels=8),
    "negative cutoff": lambda m, t: m["hyperparameters"].update(cutoff=-1.0),
    "infinite cutoff": lambda m, t: m["hyperparameters"].update(cutoff=float("inf")),
    "other cutoff": lambda m, t: m.update(cutoff=6.0),
    "other elements": lambda m, t: m.update(elements=["C", "Ge"]),
    "other units": lambda m, t: m["units"].update(energy="kcal/mol"),
    "unknown dtype": lambda m, t: m.update(dtype="float128"),
    "dtype is a table": lambda m, t: m.update(dtype={}),
    "other dtype": lambda m, t: m.update(dtype="float64"),
    "unknown repulsion": lambda m, t: m.update(repulsion="lj"),
    "format zero": lambda m, t: m.update(format=0),
    "format true": lambda m, t: m.update(format=True),
    "format text": lambda m, t: m.update(format="1"),
    "training state": lambda m, t: m.update(kind="training state"),
    "metadata is a list": lambda m, t: [m],
    "no e0": lambda m, t: t.pop("e0"),
    "nan cohesion": lambda m, t: t.update(
        {"cohesion.energies": torch.full((119,), torch.nan, dtype=torch.float64)}
    ),
    "short cohesion": lambda m, t: t.update({"cohesion.energies": torch.zeros(3)}),
    "short e0": lambda m, t: t.update(e0=torch.zeros(3, dtype=torch.float64)),
    "infinite e0": lambda m, t: t["e0"].fill_(torch.inf),
    "single precision e0": lambda m, t: t.update(e0=t["e0"].float()),
    "vector scale": lambda m, t: t.update(scale=torch.ones(2, dtype=torch.float64)),
    "nan scale": lambda m, t: t["scale"].fill_(torch.nan),
    "tensor too many": lambda m, t: t.update({"../../evil\n": torch.zeros(1)}),
    "tensor too few": lambda m, t: t.pop(next(k for k in t if k.startswith("model."))),
    "tensor reshaped": lambda m, t: t.update({"model.embed.weight": torch.zeros(119 * 4)}),
    "tensor of integers": lambda m, t: t.update(
        {"model.embed.weight": torch.zeros(119, 4, dtype=torch.int64)}
    ),
    "many channels": lambda m, t: m["hyperparameters"].update(channels=1024, hidden=4096),
    "largest of all": lambda m, t: m["hyperparameters"].update(
        channels=1024, hidden=4096, num_layers=8, lmax=6, num_basis=64, message_channels=[1024] * 7
    ),
    "senseless messages": lambda m, t: m["hyperparameters"].update(message_channels=[10**12, 8]),
    "senseless number": lambda m, t: m["hyperparameters"].update(channels=10**4000),
    "many messages": lambda m, t: m["hyperparameters"].update(message_channels=[1] * 10**6),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_gets_an_error_and_little_memory(file: Path, lie: str) -> None:
    forge(file, LIES[lie])
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .") as caught:
        load(file)
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
    assert len(str(caught.value)) < 3000 + len(str(file))


@pytest.mark.parametrize(
    "key",
    "kind model hyperparameters dtype units elements cutoff repulsion format".split(),
)
def test_missing_metadata_are_named(file: Path, key: str) -> None:
    forge(file, lambda metadata, tensors: metadata.pop(key) and None)
    with pytest.raises(CheckpointError, match=key):
        load(file)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "{" * 10**5, '{"a":' * 10**5, "1" * 10**5, "", "\ud800x"]
)
def test_hostile_json_is_refused(file: Path, text: str) -> None:
    body = json.dumps({"__metadata__": {"mlip": text, "sha256": "0" * 64}}).encode()
    for header in (body, text.encode(errors="surrogatepass")):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        for reader in (load, describe):
            with pytest.raises(CheckpointError, match=r"model\.safetensors: ."):
                reader(file)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_files_of_other_kinds_are_refused_and_run_nothing(tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    torch.save({"a": torch.zeros(1), "b": Bomb(target)}, tmp_path / "torch.pt")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb(target)))
    (tmp_path / "foreign.safetensors").write_bytes(serialize({"a": torch.zeros(3)}))
    (tmp_path / "huge_header").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (tmp_path / "text").write_text("a: 1\n" * 100)
    (tmp_path / "empty").touch()
    for path in sorted(tmp_path.iterdir()):
        for reader in (load, describe, read_tensors, read_metadata):
            with pytest.raises(CheckpointError, match=path.name):
                reader(path)
    assert not target.exists()
    with pytest.raises(CheckpointError, match="can run code"):
        load(tmp_path / "torch.pt")
    for path in (tmp_path, tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load(path)


def test_newer_formats_ask_for_an_upgrade(file: Path) -> None:
    forge(file, lambda metadata, tensors: metadata.update(format=mlip.checkpoint.FORMAT + 1))
    with pytest.raises(CheckpointError, match="pip install -U eqmlip"):
        load(file)


def test_older_formats_go_through_the_chain(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    E, _ = energy_and_forces(load(file))
    forge(file, lambda metadata, tensors: metadata.update(model="old name", format=1))

    def renamed(metadata: dict[str, Any]) -> dict[str, Any]:
        return {**metadata, "model": "older name" if metadata["model"] == "old name" else "?"}

    def renamed_again(metadata: dict[str, Any]) -> dict[str, Any]:
        return {**metadata, "model": "facet" if metadata["model"] == "older name" else "?"}

    monkeypatch.setattr(mlip.checkpoint, "FORMAT", 3)
    monkeypatch.setattr(mlip.checkpoint, "UPGRADES", {1: renamed, 2: renamed_again})
    assert energy_and_forces(load(file))[0] == E
    assert read_metadata(file)["format"] == 3
    monkeypatch.setattr(mlip.checkpoint, "UPGRADES", {1: lambda metadata: metadata["absent"]})
    with pytest.raises(CheckpointError, match="upgrade from format 1"):
        load(file)


@pytest.mark.parametrize("number", range(1, mlip.checkpoint.FORMAT + 1))
def test_stored_files_of_every_format_give_their_energies(number: int) -> None:
    E, F = energy_and_forces(load(FILES / f"format_{number}.safetensors", dtype=torch.float64))
    expected = json.loads((FILES / f"format_{number}.json").read_text())
    assert pytest.approx(expected["energy"], abs=1e-9) == E
    np.testing.assert_allclose(F, expected["forces"], atol=1e-8)


def test_what_cannot_be_saved_is_refused_and_the_old_file_kept(file: Path) -> None:
    whole = file.read_bytes()

    class Stranger(torch.nn.Module):
        config = build("facet", **TINY).config

    for call, words in (
        (lambda: save(Potential(Stranger(), torch.zeros(119)), file), "Stranger is not in MODELS"),
        (lambda: save(tiny(repulsion=torch.nn.Identity()), file), "Identity cannot be saved"),
        (lambda: save(tiny(cohesion=torch.nn.Identity()), file), "Identity cannot be saved"),
        (lambda: save(tiny(), file, training=object()), "object is not JSON"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
        assert file.read_bytes() == whole
    assert os.listdir(file.parent) == [file.name]


def test_metadata_of_numpy_and_torch_become_json(tmp_path: Path) -> None:
    errors = {"mae": np.float32(0.5), "rmse": torch.tensor([1.0, torch.nan]), "frames": np.int64(3)}
    save(tiny(), tmp_path / "m", errors=errors, training={"file": Path("a/b.h5")})
    metadata = read_metadata(tmp_path / "m")
    assert metadata["errors"] == {"mae": 0.5, "rmse": [1.0, None], "frames": 3}
    assert metadata["training"] == {"file": "a/b.h5"}


def test_a_full_disk_keeps_the_old_file(file: Path) -> None:
    whole = file.read_bytes()
    code = (
        "import resource, signal, sys; from mlip.tensorfile import write_bytes; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
        "write_bytes(sys.argv[1], bytes(10000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "not written" in done.stderr and file.name in done.stderr
    assert file.read_bytes() == whole
    assert os.listdir(file.parent) == [file.name]


def test_a_kill_at_any_moment_leaves_a_whole_file(file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from mlip.tensorfile import write_bytes\n"
        "contents = [bytes([k]) * 3_000_000 for k in (1, 2)]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for content in contents: write_bytes(sys.argv[1], content)\n"
    )
    random = np.random.default_rng(0)
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(file)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(random.uniform(0.02, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        content = file.read_bytes()
        assert len(content) == 3_000_000 and len(set(content)) == 1
    assert all(name == file.name or name.endswith(".tmp") for name in os.listdir(tmp_path))


def test_writing_follows_links_and_the_umask(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "link", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"x"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_bytes(tmp_path / "absent" / "x", b"x")


def test_old_torch_is_warned_of(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.warns(UserWarning, match=r"2\.9\.1\+cpu has known holes.*2\.10"):
        load(file)


def test_files_older_than_an_option_keep_its_old_value(file: Path) -> None:
    old = build("facet", **TINY, stretch=0.0, quartic=True)
    potential = tiny()
    potential.model = old.to(potential.dtype)
    save(potential, file)
    E, F = energy_and_forces(load(file))

    def of_format_1(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        metadata["format"] = 1
        del metadata["hyperparameters"]["stretch"], metadata["hyperparameters"]["quartic"]

    forge(file, of_format_1)
    assert energy_and_forces(load(file))[0] == E
    np.testing.assert_array_equal(energy_and_forces(load(file))[1], F)


@pytest.mark.parametrize("given", [{"model": "os.system"}, {"kind": "training state", "model": 1}])
def test_what_is_wrong_with_an_old_file_is_named(file: Path, given: dict[str, Any]) -> None:
    forge(file, lambda metadata, _: metadata.update(given, format=1))
    with pytest.raises(CheckpointError, match=r"unknown model 'os.system|a training state, not"):
        load(file)
