"""The command: quick, helpful, and one line for a user's mistake."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlip.checkpoint import save
from mlip.models import build
from mlip.potential import Potential

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlip", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def verbs() -> list[str]:
    """Names of all verbs, read from the source: functions decorated with ``app.command``."""
    found = []
    for node in ast.parse((ROOT / "mlip" / "cli.py").read_text()).body:
        for decorator in getattr(node, "decorator_list", []):
            if ast.unparse(decorator).startswith("app.command"):
                named = [ast.literal_eval(k.value) for k in decorator.keywords if k.arg == "name"]
                found.append(named[0] if named else node.name.replace("_", "-"))
    return found


def fastest(*arguments: str) -> float:
    """Seconds of processor time of a fresh interpreter, best of three: the machine may be busy."""
    times = []
    for _ in range(3):
        start = os.times()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        end = os.times()
        times.append(
            end.children_user + end.children_system - start.children_user - start.children_system
        )
    return min(times)


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    assert fastest("-c", "import mlip") - fastest("-c", "pass") < 0.2
    code = (
        "import sys, mlip, mlip.cli; "
        "print([name for name in ('torch', 'numpy', 'ase') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_help_is_quick() -> None:
    assert fastest("-m", "mlip", "--help") < 1.0


@pytest.mark.parametrize("verb", ["", *verbs()])
def test_help_explains_with_examples_and_without_torch(verb: str) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, ase=None); sys.argv[0] = 'mlip'; "
        "from mlip.cli import main; main()"
    )
    arguments = [*([verb] if verb else []), "--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if verb:
        assert f"  mlip {verb} " in done.stdout, "no example in the help"
    else:
        for name in verbs():
            assert re.search(rf"^  {name} +[A-Z]", done.stdout, re.M), f"{name} is not listed"


def test_version() -> None:
    import mlip

    assert run("--version").stdout == f"eqmlip {mlip.__version__}\n"


def test_info_of_a_file(tmp_path: Path) -> None:
    model = build("facet", channels=4, num_layers=1, lmax=1, hidden=4)
    save(Potential(model, torch.zeros(119)), tmp_path / "m", level_of_theory="PBE")
    done = run("info", str(tmp_path / "m"))
    assert done.returncode == 0 and done.stderr == ""
    assert "facet" in done.stdout and "PBE" in done.stdout


@pytest.mark.parametrize("text", [None, "not a model", ""])
def test_mistakes_of_the_user_are_one_line(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "model.safetensors"
    if text is not None:
        path.write_text(text)
    done = run("info", str(path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(path) in done.stderr
    assert "Traceback" in run("info", str(path), MLIP_DEBUG="1").stderr


def test_unknown_verbs_and_options_are_refused_with_a_hint() -> None:
    for arguments in (["no-such-verb"], ["info", "--no-such-option"], ["info"]):
        done = run(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "mlip" in done.stderr and "-h" in done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m mlip --help | true",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
