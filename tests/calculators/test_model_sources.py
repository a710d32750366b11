"""How a calculator is told its model, and what it answers to mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ase import Atoms

import mlip.pretrained
from mlip.calculators import EqCalculator
from mlip.checkpoint import save
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.models import build
from mlip.potential import Potential
from tests.conftest import Toy


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> None:
    """A folder of shipped models of the test's own."""
    model = build("facet", cutoff=4.0, channels=8, num_layers=1, lmax=1)
    for name in ("Silicon", "ethanol"):
        save(Potential(model, torch.zeros(119)), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(mlip.pretrained, "FOLDER", tmp_path)


@pytest.mark.parametrize("name", ["silicon", "SILICON", "Silicon"])
def test_shipped_names_in_any_case(shipped, name: str) -> None:
    assert EqCalculator(name).get_potential_energy(Atoms("Si")) == 0


def test_a_misspelt_name_is_answered_with_the_names(shipped) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"silcon.*Silicon, ethanol.*did you mean 'Silicon'"
    ):
        EqCalculator("silcon")


@pytest.mark.parametrize("alias", ["model_paths", "model_path", "models", "checkpoint"])
def test_other_names_of_the_model(toy, alias: str) -> None:
    assert EqCalculator(**{alias: toy}).cutoff == 5.0
    with pytest.raises(TypeError, match=alias):
        EqCalculator(toy, **{alias: toy})


def test_device_and_dtype_may_be_given_by_position() -> None:
    calc = EqCalculator("silicon", "cpu", "float64")
    assert calc.device.type == "cpu" and calc.dtype is torch.float64


def test_a_model_that_float32_spoils_says_so(toy, tmp_path) -> None:
    class Cancelling(Toy):
        """Differences of large numbers."""

        def forward(self, graph: AtomicGraph) -> NodeOutput:
            return NodeOutput(super().forward(graph).energy * 1e5 + 1e10 - 1e10)

    spoilt = Potential(Cancelling().double(), toy.e0, scale=1e-5).eval()
    words = r"saved in float64; 'float32' is refused: .* energy .* differs .* dtype='float64'"
    with pytest.warns(UserWarning, match=words):
        assert EqCalculator(spoilt, dtype="float32").dtype == torch.float32
    for dtype in (None, "float64"):  # other cases, and sound models, warn of nothing
        assert EqCalculator(spoilt, dtype=dtype).dtype == torch.float64
    sound = Potential(build("facet", cutoff=4.0, channels=8), toy.e0).double()
    save(sound, tmp_path / "sound.safetensors")
    for model in (toy, sound, tmp_path / "sound.safetensors"):
        assert EqCalculator(model, dtype="float32").dtype == torch.float32


def test_importing_the_calculator_leaves_the_environment_alone() -> None:
    code = (
        "import os; before = dict(os.environ); from mlip.calculators import EqCalculator, run_md; "
        "EqCalculator('silicon'); assert dict(os.environ) == before, set(os.environ) ^ set(before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_habits_of_other_calculators(toy) -> None:
    calc = EqCalculator(
        models=[toy], use_device="cpu", default_dtype="float32", enable_cueq=False, head=None
    )
    assert calc.dtype == torch.float32
    with pytest.warns(UserWarning, match="enable_cueq.*there is accelerate='cuequivariance'"):
        EqCalculator(toy, enable_cueq=True)
    with pytest.raises(TypeError, match="'compile', did you mean 'accelerate'"):
        EqCalculator(toy, compile="auto")
    atoms = Atoms("Si")
    EqCalculator(toy, atoms=atoms, directory=".")
    assert atoms.get_potential_energy() == -1.5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"devise": "cpu"}, "did you mean 'device'"),
        ({"skinn": 0.5}, "did you mean 'skin'"),
        ({"zzz": 1}, "unknown option 'zzz'"),
    ],
)
def test_unknown_options(toy, options: dict, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        EqCalculator(toy, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "double"}, "double"),
        ({"device": "gpu"}, "gpu"),
        ({"skin": -1.0}, "skin"),
        ({"info_keys": {"dipole": "d"}}, "dipole"),
    ],
)
def test_values_that_make_no_sense(toy, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EqCalculator(toy, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(toy) -> None:
    with pytest.raises(ValueError, match="cuda"):
        EqCalculator(toy, device="cuda")
    assert EqCalculator(toy, device="").device.type == "cpu"


def test_things_that_are_no_model(toy, tmp_path) -> None:
    with pytest.raises(TypeError, match="model"):
        EqCalculator()
    with pytest.raises(ValueError, match="Potential"):
        EqCalculator(toy.model)
    with pytest.raises(ValueError, match="model"):
        EqCalculator([])
    with pytest.raises(ValueError, match="42"):
        EqCalculator(42)  # type: ignore[arg-type]
    with pytest.raises(IsADirectoryError, match="folder"):
        EqCalculator(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        EqCalculator(str(tmp_path / "*.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        EqCalculator(tmp_path / "bad.safetensors")
