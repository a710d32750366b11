"""Files are data: nothing that is read can run, and nothing is fetched."""

from __future__ import annotations

import ast
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlip.config import ConfigError, read_yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mlip", "calculators", "data", "training", "examples", "benchmarks", "configs")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES}

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "np.fromfile",
    "os.system", "os.popen", "importlib.import_module",
    "torch.set_default_dtype", "torch.set_default_device",
}  # fmt: skip
# mace-torch builds its networks in the default precision; its workers are processes of their own
SETS_THE_DEFAULT_DTYPE = {"benchmarks/peers.py", "benchmarks/mace_worker.py"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


@pytest.mark.parametrize("file", TREES)
def test_source_has_no_way_to_run_what_a_file_says(file: str) -> None:
    for node in ast.walk(TREES[file]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {n.split(".")[0] for n in names} & FORBIDDEN_MODULES, f"{file}:{node.lineno}"
    for name, call in calls(TREES[file]):
        where = f"{file}:{call.lineno}: {name}"
        if not (name == "torch.set_default_dtype" and file in SETS_THE_DEFAULT_DTYPE):
            assert name not in FORBIDDEN_CALLS, where
        for keyword in call.keywords:
            value = getattr(keyword.value, "value", None)
            assert keyword.arg != "allow_pickle" or value is False, where
            assert keyword.arg != "weights_only", where
            assert keyword.arg != "shell" or value is False, where


def test_the_check_above_can_fail() -> None:
    assert "torch.load" in [name for name, _ in calls(ast.parse("x = torch.load('a')"))]
    assert len(TREES) > 10


def test_no_source_opens_a_connection() -> None:
    clients = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib"}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & clients, file
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in clients, file


def test_import_and_evaluation_open_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import socket, sys
def refused(*args, **options):
    raise AssertionError("a socket was opened")
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refused
import torch
from ase.build import bulk
import mlip.calculators, mlip.checkpoint, mlip.data.graph, mlip.training
from mlip.models import build
from mlip.potential import Potential
potential = Potential(build("facet", channels=4, num_layers=1, lmax=1, hidden=4), torch.zeros(119))
graph = mlip.data.graph.AtomicGraph.from_atoms(bulk("Si"), potential.cutoff)
assert torch.isfinite(potential.eval()(graph)["energy"]).all()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert socket.socket is not None  # only the child was cut off


def bomb(levels: int) -> str:
    """YAML that stands for 10^levels words."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "python object": "model: !!python/object/apply:os.system ['touch {target}']",
    "python name": "model: !!python/name:os.system",
    "python module": "model: !!python/module:os",
    "new object": "a: !!python/object/new:os.mkdir ['{target}']",
    "own tag": "model: !anything [1]",
    "billion laughs": bomb(10),
    "merge of an anchor": "a: &a {{x: 1}}\nb:\n  <<: *a",
    "endless recursion": "a: &a [*a]",
    "deep nesting": "a: " + "[" * 100_000,
    "deep mapping": "{{a: " * 20_000,
    "deep list": "a:\n  " + "- " * 50_000,
    "deep indentation": "".join(" " * k + "a:\n" for k in range(1000)),
    "too long": "a: " + "x" * 2_000_000,
    "a list": "- 1\n- 2",
    "a number": "3",
    "not UTF-8": "a: \udcff",
    "a null byte": "a: \0",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    target, path = tmp_path / "target", tmp_path / "config.yaml"
    text = HOSTILE[kind].format(target=target)
    path.write_bytes(text.encode(errors="surrogateescape"))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"config\.yaml: .") as caught:
        read_yaml(path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert len(str(caught.value)) < 2000
    assert not target.exists()


def test_archives_are_not_unpacked() -> None:
    unpackers = {"extract", "extractall", "unpack_archive"}
    for file, tree in TREES.items():
        for name, call in calls(tree):
            assert name.split(".")[-1] not in unpackers, f"{file}:{call.lineno}"


def test_old_torch_is_refused_at_installation() -> None:
    import tomllib

    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=2.10" in requirements
