"""A program file computes what its model computes, and nothing but its loader ever opens it."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch.testing import assert_close

import mlip.compiled
import mlip.programfile
from mlip.backends import BackendError, Compile, accelerated
from mlip.calculators import EqCalculator
from mlip.calculators.reports import compile_and_report
from mlip.checkpoint import CheckpointError, load, save
from mlip.cli import main
from mlip.data.graph import AtomicGraph
from mlip.modelcard import describe
from mlip.models import build
from mlip.nn.spline import Spline
from mlip.potential import Potential
from mlip.programfile import STAMP, ProgramFile, read_stamp, stamp, write_program
from tests.conftest import without_zeros

ROOT = Path(__file__).resolve().parents[1]


def potential(seed: int = 0, name: str = "facet") -> Potential:
    """A tiny random model in which no weight is zero."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"channels": 4, "lmax": 1, "hidden": 4, "num_basis": 4, "num_layers": 1}
    sizes |= {"message_channels": (2,), "quartic": False}
    if name != "facet":
        sizes = {"channels": 4}
    if name == "mace":
        sizes |= {"elements": (1, 6, 8), "radial_hidden": (8,), "max_ell": 1, "correlation": 2}
    model = build(name, cutoff=4.0, avg_num_neighbors=8.0, **sizes)
    without_zeros(model, 0.3)
    e0 = torch.full((119,), torch.nan)
    e0[[1, 6, 8]] = torch.tensor([-13.0, -1030.0, -2040.0])
    return Potential(model, e0, scale=2.0).double().eval().requires_grad_(False)


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its program, of the command."""
    if Compile().obstacle(torch.device("cpu")) is not None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("made")
    save(potential(), folder / "model.safetensors")
    compile_and_report(str(folder / "model.safetensors"), str(folder / "model.pt2"))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.pt2"}
    return folder


@pytest.fixture(scope="module", name="calc")
def calc_fixture(made: Path) -> EqCalculator:
    """The model with its program."""
    return EqCalculator(made / "model.safetensors", device="cpu", program=made / "model.pt2")


def sealed(path: Path, content: object) -> Path:
    """An archive with a stamp and no program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/code.so", b"no code at all")
        archive.writestr(f"model/{STAMP}", json.dumps(content))
    return path


def graphs() -> dict[str, AtomicGraph]:
    """Structures of very different sizes, down to no edge and one atom."""
    crystal = bulk("C", cubic=True)
    crystal.rattle(0.05, seed=0)
    frames = {
        "molecule": molecule("CH3COOH"),
        "small cell": bulk("C"),  # far smaller than the cutoff: images of the same atom
        "crystal": crystal,
        "slab": Atoms("C2", [[0, 0, 0], [1.1, 1.2, 0.3]], cell=[2.4, 2.5, 20], pbc=[1, 1, 0]),
        "two edges": Atoms("OH", [[0, 0, 0], [0, 0, 1]]),
        "isolated atoms": Atoms("OH", [[0, 0, 0], [30, 0, 0]]),
        "isolated atom": Atoms("O"),
    }
    result = {name: AtomicGraph.from_atoms(atoms, 4.0) for name, atoms in frames.items()}
    pair = result["two edges"]
    result["one edge"] = pair.replace(
        edge_index=pair.edge_index[:, :1], cell_shifts=pair.cell_shifts[:1]
    )
    return result


def test_numbers_are_those_of_the_plain_model_at_all_sizes(
    calc: EqCalculator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is compiled, or loaded again."""
    plain, fast = potential(), calc.potentials[0]
    program = fast.model._program
    for name in ("compiled", "traced"):
        monkeypatch.delattr(mlip.compiled, name)
    monkeypatch.delattr(mlip.programfile, "open_program")
    for name, graph in graphs().items():
        a, b = plain(graph, stress=True), fast(graph, stress=True)
        for key in a:
            assert_close(
                b[key], a[key], atol=1e-10, rtol=1e-10, equal_nan=True, msg=f"{name} {key}"
            )
    assert a["energy"].isfinite().all()
    assert fast.model._program is program


def test_any_number_of_threads_is_right(calc: EqCalculator) -> None:
    graph, threads = graphs()["crystal"], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        forces = calc.potentials[0](graph)["forces"]
    finally:
        torch.set_num_threads(threads)
    assert_close(forces, potential()(graph)["forces"], atol=1e-10, rtol=1e-10)


def test_second_derivatives_are_those_of_the_plain_model(calc: EqCalculator) -> None:
    atoms = molecule("H2O")
    right = EqCalculator(potential(), device="cpu").get_hessian(atoms)
    assert abs(right).max() > 0.1
    assert abs(calc.get_hessian(atoms) - right).max() < 1e-8 * abs(right).max()


def test_it_takes_no_compiler(made: Path, calc: EqCalculator) -> None:
    code = """
from ase.build import molecule
from mlip.calculators import EqCalculator
calc = EqCalculator("model.safetensors", device="cpu", program="model.pt2")
print(calc.evaluate([molecule("H2O")])[0]["energy"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=made,
        env={"PATH": "", "HOME": str(made), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - calc.evaluate([molecule("H2O")])[0]["energy"]) < 1e-9


def test_copies_have_it_too_and_other_weights_do_not(calc: EqCalculator) -> None:
    graph = graphs()["molecule"]
    fast = calc.potentials[0]
    twin = copy.deepcopy(fast)
    assert torch.equal(twin(graph)["forces"], fast(graph)["forces"])
    with pytest.raises(BackendError, match="dtype is float64, here it is float32"):
        copy.deepcopy(fast).float()(graph)


@pytest.mark.parametrize("name", ["averages", "committee", "two ways"])
def test_beside_other_options(made: Path, calc: EqCalculator, name: str) -> None:
    model, program = made / "model.safetensors", made / "model.pt2"
    atoms = molecule("H2O")
    if name == "averages":
        with pytest.warns(UserWarning, match="copies give what one gives"):
            mean = EqCalculator(model, device="cpu", program=program, symmetrize="octahedral")
        energies = [c.evaluate([atoms])[0]["energy"] for c in (mean, calc)]
        assert abs(energies[0] - energies[1]) < 1e-9
    elif name == "committee":
        with pytest.raises(ValueError, match="the file of one model, here are 2"):
            EqCalculator([model, model], device="cpu", program=program)
    else:
        with pytest.raises(ValueError, match="'accelerate' or 'program'"):
            EqCalculator(model, device="cpu", program=program, accelerate="compile")


def test_the_stamp_is_asked_and_then_the_numbers(made: Path, tmp_path: Path) -> None:
    other = potential(seed=1)
    with pytest.raises(BackendError, match=r"its checksum of weights is \w{12}\.\.\., here it is"):
        accelerated(other, ProgramFile(made / "model.pt2"))
    lying = tmp_path / "lying.pt2"
    with zipfile.ZipFile(made / "model.pt2") as old, zipfile.ZipFile(lying, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(STAMP):
                content = json.dumps(stamp(other.model)).encode()
            new.writestr(entry.filename, content)
    with pytest.raises(BackendError, match=r"'lying.pt2' is refused: .* energy of an atom differs"):
        accelerated(other, ProgramFile(lying))


WRONG = [
    ("format", 2, "its format is 2, here it is 1"),
    ("system", "plan9 vax", "its system is plan9 vax"),
    ("device", "cuda", "its device is cuda, here it is cpu"),
    ("torch", "1.0", "its version of torch is 1.0, here it is 2"),
    ("processor", "abacus", "its kind of processor is abacus"),
    ("instructions", ["fma9", "avx9999"], "a processor with avx9999, fma9, which this one lacks"),
    ("model", "mace", "its model is mace, here it is facet"),
    ("dtype", "float32", "its dtype is float32, .* make it anew: mlip compile .* --dtype float64"),
    ("weights", None, "its checksum of weights is None"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_what_does_not_fit_is_refused_before_it_runs(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    plain = potential()
    path = sealed(tmp_path / "a.pt2", stamp(plain.model) | {key: value})
    with pytest.raises(BackendError, match=message):
        EqCalculator(plain, device="cpu", program=path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    plain, path = potential(), tmp_path / "a.pt2"
    with pytest.raises(BackendError, match=f"there is no file {path}"):
        EqCalculator(plain, device="cpu", program=path)
    save(plain, tmp_path / "model.safetensors")
    for content in (b"", b"PK\x03\x04 no archive", (tmp_path / "model.safetensors").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(BackendError, match="not a program file"):
            EqCalculator(plain, device="cpu", program=path)
    for stamped in (3, "text", None):
        with pytest.raises(BackendError, match="not a program file"):
            EqCalculator(plain, device="cpu", program=sealed(path, stamped))
    sealed(path, stamp(plain.model))
    path.write_bytes(path.read_bytes().replace(b"no code", b"no cope"))
    with pytest.raises(BackendError, match="damaged"):
        EqCalculator(plain, device="cpu", program=path)


def test_a_truncated_or_altered_file_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    plain = potential()
    path = sealed(tmp_path / "a.pt2", stamp(plain.model))
    content, right, rng = path.read_bytes(), read_stamp(path), np.random.default_rng(0)
    for k in range(600):
        bad = np.frombuffer(content, dtype=np.uint8).copy()
        if k % 3:
            bad[rng.integers(len(bad))] = rng.integers(256)
        else:
            bad = bad[: rng.integers(len(bad))]
        path.write_bytes(bad.tobytes())
        try:
            assert read_stamp(path) == right
        except BackendError as problem:
            assert "not a program file" in str(problem) or "damaged" in str(problem)


def test_the_model_loader_never_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("code was loaded")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", opened)
    path = sealed(tmp_path / "a.pt2", stamp(potential().model))
    for reader in (load, EqCalculator, describe):
        with pytest.raises(
            CheckpointError, match=r"compiled program: code, and no model"
        ) as caught:
            reader(path)  # type: ignore[operator]
        assert "\n" not in str(caught.value)


def test_one_module_alone_loads_code() -> None:
    loaders = {"aoti_load_package", "load_package", "load_pt2", "AOTIModelPackageLoader"}
    found = set()
    for folder in ("mlip", "calculators", "data", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {
                getattr(n, "attr", getattr(n, "id", ""))
                for n in ast.walk(ast.parse(path.read_text()))
            }
            if names & loaders:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"mlip/programfile.py"}


def test_what_cannot_be_compiled_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, path = potential(), tmp_path / "a.pt2"
    path.write_bytes(b"as it was")
    with pytest.raises(ValueError, match=r"NAME\.pt2"):
        write_program(plain, tmp_path / "a.so")
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_program(plain, tmp_path / "nowhere" / "a.pt2")

    given = []

    def broken(model: object) -> None:
        given.append(model)
        raise RuntimeError("internal error\nof the compiler")

    with monkeypatch.context() as patch:
        patch.setattr("mlip.backends.which", lambda _: "g++")
        patch.setattr(mlip.programfile, "exported", broken)
        with pytest.raises(BackendError, match=r"compiling failed: RuntimeError: internal error$"):
            write_program(plain, path)
        with pytest.raises(BackendError, match="compiling failed"):
            write_program(potential(name="mace"), path)
        assert isinstance(given[1].basis, Spline)  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match=r"for EScAIP, .* and TransIP, not Ponita"):
            write_program(potential(name="ponita_published"), path)
    monkeypatch.setattr("mlip.backends.which", lambda _: None)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler; install one .* CXX$"):
        write_program(plain, path)
    save(plain, tmp_path / "model.safetensors")
    command = ["mlip", "compile", str(tmp_path / "model.safetensors"), "--out", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("MLIP_ALLOCATOR", "default")
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "install one" in error and error.count("\n") == 1
    assert path.read_bytes() == b"as it was"
    assert {file.name for file in tmp_path.iterdir()} == {"a.pt2", "model.safetensors"}
