"""What the README and the docs show works: snippets, commands, links, examples."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from mlip.data.hdf5 import HDF5Writer
from mlip.pretrained import names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

needs_shipped_model = pytest.mark.skipif("silicon" not in names(), reason="no shipped model")


def blocks(page: str, language: str = "") -> list[str]:
    """Fenced blocks of a language, of none by default."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", TEXTS[page], re.M | re.S)
    return [text for name, text in found if name == language]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_shipped_model
def test_snippets_of_the_readme_run_one_after_the_other(tmp_path: Path) -> None:
    snippets = [*blocks("README.md", "python"), "print(atoms.get_stress())"]
    output = run(sys.executable, "-c", "\n".join(snippets), cwd=tmp_path)
    assert "converged" in output


@pytest.mark.parametrize("page", TEXTS)
def test_commands_in_the_docs_exist_with_their_options(page: str) -> None:
    from typer.main import get_command

    from mlip.cli import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for block in blocks(page):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words and words[0] != "mlip":
                words = words[1:]
            if len(words) < 2:
                continue
            assert words[1] in verbs, line
            known = {option for p in verbs[words[1]].params for option in p.opts} | {"--help"}
            assert {w for w in words[2:] if re.match(r"--?[a-z]", w)} <= known, line


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_named_files_exist(page: str) -> None:
    text, folder = TEXTS[page], (ROOT / page).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        file = folder / target if target else ROOT / page
        file = file if file.exists() else file.with_name(file.name + ".md")
        assert file.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            names = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in names, anchor
    for name in re.findall(r"(?:examples|docs|tests|configs)/[\w/]+\.\w+", text):
        if not name.endswith(".h5"):
            assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", TEXTS)
def test_configurations_in_the_docs_are_valid(page: str, tmp_path: Path) -> None:
    from mlip.training.config import load_training

    for block in blocks(page, "yaml"):
        path = tmp_path / "config.yaml"
        # a block that shows one section leaves out the data
        path.write_text(block if "data:" in block else "data: {train: train.h5}\n" + block)
        load_training(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_that_come_with_the_package_are_valid(path: Path) -> None:
    from mlip.training.config import load_training

    load_training(path)


def rattled(atoms: Atoms, seed: int) -> Atoms:
    """A strained, rattled copy with EMT's labels."""
    rng = np.random.default_rng(seed)
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell @ (np.eye(3) + rng.normal(scale=0.02, size=(3, 3))), scale_atoms=True)
    atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
    atoms.calc = EMT()
    return atoms


def write(path: Path, structures: list[Atoms]) -> Path:
    """A data file of structures with a calculator."""
    with HDF5Writer(path, {"level_of_theory": "EMT"}) as writer:
        for atoms in structures:
            writer.append(
                atoms.numbers,
                atoms.positions,
                np.asarray(atoms.cell),
                atoms.pbc,
                energy=atoms.get_potential_energy(),
                forces=atoms.get_forces(),
                stress=atoms.get_stress(voigt=False),
            )
    return path


def test_example_that_trains(tmp_path: Path) -> None:
    data = write(tmp_path / "cu.h5", [rattled(bulk("Cu", cubic=True), k) for k in range(20)])
    output = run(sys.executable, "examples/train_from_python.py", str(data), str(tmp_path / "run"))
    assert "energy" in output.splitlines()[-1]
    assert (tmp_path / "run" / "best.safetensors").exists()


@needs_shipped_model
@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("relax_crystal", [], "bulk modulus"),
        ("run_md", ["silicon", "20"], "meV/atom/ps"),
        ("phonons", [], "THz"),
    ],
)
def test_examples_with_the_shipped_model(script: str, arguments: list[str], words: str) -> None:
    if script == "phonons":
        pytest.importorskip("phonopy")
    output = run(sys.executable, f"examples/{script}.py", *arguments)
    assert words in output.splitlines()[-1]


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert path.read_text().count("\n") < 45, path.name


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_quickstart_goes_through(tmp_path: Path) -> None:
    data = ROOT / "examples" / "data"
    if not (data / "silicon_train.h5").exists():
        pytest.skip("the silicon data are not there")
    output = run(
        "bash",
        "examples/quickstart.sh",
        OUT=str(tmp_path),
        PYTHON_ENV=sys.prefix,
        OVERRIDES="schedule.max_time=10s",
    )
    assert "lattice constant of silicon: 5.580 -> 5." in output
    made = {"best.safetensors", "config.yaml", "relaxed.xyz", "md.xyz", "md.csv", "md.png", "eval"}
    made |= {"parity.png", "learning_curve.png", "log.csv", "errors.txt"}
    assert made <= set(os.listdir(tmp_path))
    for name in made:
        assert name in output or name == "md.csv"
