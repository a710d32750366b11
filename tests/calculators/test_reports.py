"""The verbs ``mlip relax`` and ``mlip md``."""

from __future__ import annotations

import pytest
import torch
from ase.build import bulk
from ase.io import read, write
from typer.testing import CliRunner

from mlip.checkpoint import save
from mlip.cli import app
from mlip.potential import Potential


@pytest.fixture
def files(random_facet, tmp_path, monkeypatch) -> None:
    """A folder with a model and structures, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    e0 = torch.full((119,), torch.nan)
    e0[14] = -1.0
    save(Potential(random_facet(num_layers=1, lmax=1), e0), "m.safetensors")
    write("si.xyz", bulk("Si", cubic=True))
    write("cu.cif", bulk("Cu"))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    return result.exit_code, result.output + str(result.exception or "")


def test_relax_prints_a_table_and_writes_the_structures(files) -> None:
    code, text = run("relax", "si.xyz", "-m", "m.safetensors", "--cell", "--out", "r.xyz")
    assert code == 0, text
    for word in ("E/atom", "si.xyz", "converged", "r.xyz"):
        assert word in text
    assert read("r.xyz").get_forces().shape == (8, 3)


def test_what_batches_and_memory_may_be_is_asked(files) -> None:
    common = ("relax", "si.xyz", "-m", "m.safetensors")
    code, text = run(*common, "--max-atoms", "1", "--max-memory", "1GB")
    assert code == 0, text
    for more, words in (
        (("--max-atoms", "0"), "max_atoms = 0"),
        (("--max-memory", "much"), "give a number of bytes"),
        (("--program", "none.pt2"), "there is no file"),
        (("--accelerate", "magic"), "unknown acceleration 'magic'"),
    ):
        code, text = run(*common, *more)
        assert code == 1 and words in text, text


def test_relax_finishes_what_it_can_and_says_so(files) -> None:
    code, text = run("relax", "cu.cif", "si.xyz", "none.cif", "-m", "m.safetensors")
    assert code == 1
    for word in ("does not know the element Cu", "converged", "cannot be read"):
        assert word in text


@pytest.mark.parametrize("out", ["r.foo", "r", "nowhere/r.xyz"])
def test_an_output_that_cannot_be_written_costs_no_relaxation(files, monkeypatch, out) -> None:
    # Calling it would be a TypeError.
    monkeypatch.setattr("mlip.calculators.reports.relax_many", None)
    code, text = run("relax", "si.xyz", "-m", "m.safetensors", "--out", out)
    assert code == 1 and out.partition("/")[0] in text
    assert "no format" in text or "not a folder" in text


def test_md_restart_and_no_loss_of_earlier_files(files) -> None:
    start = ("md", "si.xyz", "-m", "m.safetensors", "--interval", "2")
    code, text = run(*start, "--steps", "4")
    assert code == 0 and "temperature" in text, text
    code, text = run(*start, "--steps", "8")
    assert code != 0 and "--restart" in text
    code, text = run(*start, "--steps", "8", "--restart")
    assert code == 0, text
    assert [frame.info["step"] for frame in read("md.xyz", ":")] == [0, 2, 4, 6, 8]
    code, text = run(*start, "--steps", "2", "--overwrite", "--repeat", "2", "1", "1")
    assert code == 0 and len(read("md.xyz")) == 16


@pytest.mark.filterwarnings("ignore:symmetrize")  # of an exact model
def test_averages_over_rotations(files) -> None:
    many = ("-m", "m.safetensors", "--symmetrize", "tetrahedral")
    code, text = run("relax", "si.xyz", *many, "--cell", "--out", "r.xyz")
    assert code == 0, text
    code, text = run("md", "r.xyz", *many, "--steps", "2", "--trajectory", "s.xyz")
    assert code == 0, text
    assert len(read("s.xyz", ":")) > 0


def test_mistakes_are_one_line(files) -> None:
    for arguments, word in (
        (("relax", "si.xyz", "-m", "m.safetensors", "--symmetrize", "cubic"), "octahedral"),
        (("md", "si.xyz", "-m", "nothing"), "nothing"),
        (("md", "si.xyz", "-m", "m.safetensors", "--ensemble", "nvt"), "langevin"),
        (("relax", "si.xyz", "-m", "m.safetensors", "--pressure", "3"), "cell"),
        (("relax", "si.xyz", "-m", "m.safetensors", "--accelerate", "magic"), "splines, compile"),
        (("md", "si.xyz", "-m", "m.safetensors", "--accelerate", "splines"), "are for MACE"),
        (("bench", "m.safetensors", "--accelerate", "cudagraph", "--device", "cpu"), "of a GPU"),
    ):
        code, text = run(*arguments)
        assert code != 0 and word in text
