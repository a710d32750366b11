"""Write a model of mace-torch as plain arrays: ``python mace_export.py MODEL OUT.npz``.

Runs where mace-torch is installed and imports nothing of this package; ``mlip import-mace`` calls
it.  A model file of mace-torch is a pickle: opening it, which mace-torch does here, runs whatever
it says.

OUT.npz holds ``facts`` (JSON: what the model is made of), ``weights/NAME``, and probe structures
with the energies and forces that the model gives in float64.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
from ase import Atoms

FLAGS = (
    "use_so3", "use_agnostic_product", "use_edge_irreps_first", "use_last_readout_only",
    "embedding_readout", "joint_embedding", "pair_repulsion_fn", "lora_config",
)  # fmt: skip
SPACING = 2.2  # angstrom between atoms of the probes
MOST = 8  # elements in a probe


def main(model: str, out: str) -> None:
    """Write facts, weights and probes of a model file."""
    from mace.calculators import MACECalculator

    as_saved = MACECalculator(model_paths=[model], device="cpu", default_dtype="").models[0]
    dtype = str(next(as_saved.parameters()).dtype)[6:]
    calculator = MACECalculator(model_paths=[model], device="cpu", default_dtype="float64")
    exact = calculator.models[0]
    facts = described(exact) | {"dtype": dtype, "mace-torch": version("mace-torch")}
    arrays = {f"weights/{name}": x.numpy() for name, x in exact.state_dict().items()}
    for k, atoms in enumerate(probes(facts["elements"])):
        atoms.calc = calculator
        arrays |= {
            f"numbers/{k}": atoms.numbers,
            f"positions/{k}": atoms.positions,
            f"cell/{k}": np.array(atoms.cell),
            f"pbc/{k}": atoms.pbc,
            f"energy/{k}": np.array(atoms.get_potential_energy()),
            f"forces/{k}": atoms.get_forces(),
        }
    np.savez(out, facts=np.array(json.dumps(facts)), **arrays)


def described(model: Any) -> dict[str, Any]:
    """What the model is made of; None for what it has not."""

    def find(path: str, of: Any = model) -> Any:
        for name in path.split("."):
            if isinstance(of, dict) or not hasattr(of, name):
                return None
            of = getattr(of, name)
        return of

    def name(x: Any) -> str | None:
        return None if x is None else type(x).__name__

    def number(x: Any) -> Any:
        return None if x is None else np.asarray(x.detach() if hasattr(x, "detach") else x).tolist()

    contraction = find("symmetric_contractions.contractions", model.products[0])
    gate = find("non_linearity.acts", model.readouts[-1])
    radial = find("conv_tp_weights.hs", model.interactions[0])
    return {
        "class": name(model),
        "interactions": [name(x) for x in model.interactions],
        "products": [name(x) for x in model.products],
        "readouts": [name(x) for x in model.readouts],
        "radial": name(find("radial_embedding.bessel_fn")),
        "envelope": name(find("radial_embedding.cutoff_fn")),
        "distance_transform": name(find("radial_embedding.distance_transform")),
        "apply_cutoff": find("apply_cutoff"),
        "flags": [flag for flag in FLAGS if find(flag)],
        "heads": [str(head) for head in find("heads") or ["default"]],
        "cutoff": number(model.r_max),
        "num_basis": len(find("radial_embedding.bessel_fn.bessel_weights")),
        "envelope_power": number(find("radial_embedding.cutoff_fn.p")),
        "max_ell": find("spherical_harmonics._lmax"),
        "num_layers": number(model.num_interactions),
        "hidden_irreps": str(model.products[0].linear.irreps_out),
        "radial_hidden": None if radial is None else [int(n) for n in radial[1:-1]],
        "correlation": None if contraction is None else len(contraction[0].weights) + 1,
        "readout_irreps": str(find("hidden_irreps", model.readouts[-1])),
        "gate": None if gate is None else getattr(gate[0].f, "__name__", name(gate[0].f)),
        "avg_num_neighbors": [number(x.avg_num_neighbors) for x in model.interactions],
        "elements": number(model.atomic_numbers),
        "atomic_energies": np.atleast_2d(number(model.atomic_energies_fn.atomic_energies)).tolist(),
        "scale": np.atleast_1d(number(find("scale_shift.scale"))).tolist(),
        "shift": np.atleast_1d(number(find("scale_shift.shift"))).tolist(),
    }


def probes(elements: list[int]) -> list[Atoms]:
    """A cluster and crystals with some of the elements, disordered."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    found = []
    for periodic in (False, True, True):
        some = rng.permutation(elements)[:MOST]
        positions = SPACING * grid + rng.normal(0, 0.15, grid.shape)
        if periodic:
            numbers = np.resize(some, len(grid))
            found.append(Atoms(numbers, positions, cell=[3 * SPACING] * 3, pbc=True))
        else:
            kept = rng.permutation(len(grid))[:14]
            found.append(Atoms(np.resize(some, 14), positions[kept]))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
