"""Models of mace-torch become ours with the same numbers, or the refusal says why not.

``files/mace_export.npz`` is what ``mlip.mace_export`` wrote of a small random model of mace-torch
0.3.16 (2x0e + 2x1o, l <= 1, three elements) with the numbers that it gives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from mlip.calculators import EqCalculator
from mlip.mace_import import RefusedModel, import_mace, in_our_basis, potential_of, summary
from mlip.nn.symmetric_contraction import symmetric_couplings

FILE = Path(__file__).parent / "files" / "mace_export.npz"


def exported(**changes: Any) -> dict[str, np.ndarray]:
    arrays = dict(np.load(FILE))
    facts = json.loads(str(arrays["facts"])) | changes
    return {**arrays, "facts": np.array(json.dumps(facts))}


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """Stands for the one of an environment with mace-torch."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\ncp "{FILE}" "$3"\n')
    script.chmod(0o755)
    return str(script)


def test_the_numbers_are_those_of_mace_torch() -> None:
    arrays = exported(dtype="float64")
    potential = potential_of(arrays)
    calculator = EqCalculator(potential, dtype="float64")
    for k in range(2):
        atoms = Atoms(*(arrays[f"{key}/{k}"] for key in ("numbers", "positions")))
        atoms.cell, atoms.pbc = arrays[f"cell/{k}"], arrays[f"pbc/{k}"]
        atoms.calc = calculator
        assert abs(arrays[f"forces/{k}"]).max() > 0.1
        np.testing.assert_allclose(atoms.get_potential_energy(), arrays[f"energy/{k}"], rtol=1e-9)
        np.testing.assert_allclose(atoms.get_forces(), arrays[f"forces/{k}"], atol=1e-6)
    assert potential.elements == [1, 6, 8]


def test_a_file_comes_out(
    tmp_path: Path, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "a.model", tmp_path / "a.safetensors"
    model.write_text("a pickle")
    made = import_mace(model, out, interpreter)
    assert made.dtype == torch.float32
    atoms = Atoms("OH2", [[0, 0, 0], [0.8, 0.6, 0], [-0.8, 0.6, 0]])
    energies = []
    for source in (out, made):
        atoms.calc = EqCalculator(source)
        energies.append(atoms.get_potential_energy())
    assert energies[0] == energies[1]
    assert "H, C, O, cutoff 4 angstrom, float32" in summary(made)
    monkeypatch.chdir(tmp_path)
    for name in ("./python", "../" + tmp_path.name + "/python"):  # relative to here
        import_mace("a.model", "b.safetensors", name)
    assert Path("b.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class": "MACE"}, "kind of model is MACE, not ScaleShiftMACE"),
        ({"interactions": ["RealAgnosticDensityInteractionBlock"] * 2}, "its interaction block is"),
        ({"distance_transform": "AgnesiTransform"}, "transform of distances is AgnesiTransform"),
        ({"radial": "GaussianBasis"}, "radial basis is GaussianBasis, not BesselBasis"),
        ({"flags": ["pair_repulsion_fn"]}, "without counterpart: pair_repulsion_fn"),
        ({"heads": ["a", "b"]}, "heads a, b; make a model of one with mace_select_head"),
        ({"correlation": None}, "mace_cueq_to_e3nn"),
        ({"avg_num_neighbors": [8.0, 9.0]}, "different average numbers"),
        ({"readout_irreps": "3x0e+1x1o"}, r"readout has 3x0e\+1x1o"),
        ({"radial_hidden": [4, 5]}, "weights do not fit: layers.0.convolution"),
        ({"max_ell": 2}, "weights do not fit"),
        ({"num_layers": 1}, "weights do not fit"),
        ({"num_layers": 3}, "weights do not fit"),
        ({"hidden_irreps": "4x0e"}, "weights do not fit"),
        ({"hidden_irreps": "4x0e+2x1o"}, "weights do not fit: .*hidden_irreps"),
        ({"correlation": 4}, "weights do not fit: .*correlation"),
        ({"scale": [1.8]}, "would differ by"),
        ({"shift": [0.301]}, "energy would differ by"),
        ({"envelope_power": 6}, "would differ by"),
        ({"cutoff": 4.1}, "would differ by"),
    ],
)
def test_what_is_not_the_same_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedModel, match=words):
        potential_of(exported(**changes))


def test_other_weights_are_refused() -> None:
    arrays = exported()
    arrays["weights/products.0.linear.weight"] = arrays["weights/products.0.linear.weight"] * 1.001
    with pytest.raises(RefusedModel, match="would differ"):
        potential_of(arrays)


def test_no_mace_no_file_no_folder(tmp_path: Path) -> None:
    model, out = tmp_path / "a.model", tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        import_mace(model, out)
    model.write_text("a pickle")
    with pytest.raises(ValueError, match=r"named NAME\.safetensors"):
        import_mace(model, tmp_path / "a.model")
    with pytest.raises(FileNotFoundError, match="make it first"):
        import_mace(model, tmp_path / "b" / "a.safetensors")
    with pytest.raises(RefusedModel, match="cannot be run"):
        import_mace(model, out, tmp_path / "nowhere")
    for error, words in (
        ("ModuleNotFoundError: No module named 'mace'", "--python PATH"),
        ("ValueError: no head. Available heads are: ['a']", "mace_select_head"),
        ("KeyError: 1\nCheck the documentation", "mace-torch cannot open it: KeyError: 1"),
        ("ModuleNotFoundError: No module named 'mace.old'", "cannot open it: ModuleNotFound"),
    ):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nprintf "{error}" >&2\nexit 1\n')
        script.chmod(0o755)
        with pytest.raises(RefusedModel, match=words):
            import_mace(model, out, script)
    assert not out.exists()


@pytest.mark.parametrize("L", [0, 1])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_reduced_couplings_give_the_same_forms(L: int, order: int) -> None:
    theirs = symmetric_couplings(2, L, order, reduced=True)
    ours = symmetric_couplings(2, L, order, reduced=False)
    weights = np.random.default_rng(0).normal(size=(3, len(theirs), 4))
    stored = theirs.movedim(0, -1)
    mine = in_our_basis(weights, (stored[0] if L == 0 else stored).numpy(), 2, L, order)
    np.testing.assert_allclose(
        np.einsum("zkc,k...->zc...", mine, ours.numpy()),
        np.einsum("zkc,k...->zc...", weights, theirs.numpy()),
        atol=1e-12,
    )


def test_the_exporter_needs_nothing_of_this_package() -> None:
    source = Path(sys.modules["mlip"].__file__ or "").with_name("mace_export.py").read_text()
    assert "mlip." not in source.split('"""', 2)[2]
