"""Models of mace-torch as models of this package: the same energies and forces, checked, faster.

    import_mace("mace.model", "mace.safetensors", python="mace-environment/bin/python")

A model file of mace-torch is a pickle, which runs what it says when it is opened.  It is opened by
mace-torch in a process of its own (``mlip.mace_export``); only arrays and JSON come back.

Taken are models of one head that ``mace_run_train`` makes by default or with ``--model
ScaleShiftMACE``; for others the refusal says what stands in the way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

from mlip import mace_export
from mlip.checkpoint import save
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.nn.symmetric_contraction import sum_over_permutations, symmetric_couplings
from mlip.potential import Potential

Arrays = dict[str, np.ndarray]
RESIDUAL, AGNOSTIC = "RealAgnosticResidualInteractionBlock", "RealAgnosticInteractionBlock"
# Largest difference in float64, in units of the largest interaction energy or force, of one at
# least; a model that was saved in float32 has constants that are rounded.
BARS = {"float32": 1e-5, "float64": 1e-6}
# What has to be so, and the words for it.
EXPECTED: dict[str, tuple[str, set[Any]]] = {
    "class": ("kind of model", {"ScaleShiftMACE"}),
    "interactions": ("interaction block", {RESIDUAL}),
    "products": ("product block", {"EquivariantProductBasisBlock"}),
    "readouts": ("readout", {"LinearReadoutBlock", "NonLinearReadoutBlock"}),
    "radial": ("radial basis", {"BesselBasis"}),
    "envelope": ("envelope", {"PolynomialCutoff"}),
    "distance_transform": ("transform of distances", {None}),
    "apply_cutoff": ("cutoff on the features", {None, True}),
    "gate": ("activation of the readout", {"silu"}),
}


class RefusedModel(ValueError):
    """A model of mace-torch that cannot be taken over."""


def import_mace(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    python: str | os.PathLike[str] | None = None,
) -> Potential:
    """Write a model of mace-torch as a model file of this package.

    Parameters
    ----------
    model : file of mace-torch: a pickle, that is, code; give only one that you trust
    out : ``NAME.safetensors``
    python : interpreter of an environment that has mace-torch; this one by default

    Returns
    -------
    Potential
        What was written, in the dtype of the given model.

    Raises
    ------
    FileNotFoundError, RefusedModel
        No file; mace-torch cannot open it; a part that has no counterpart here; other numbers.
    """
    model, out = Path(model).expanduser(), Path(out).expanduser()
    if not model.is_file():
        raise FileNotFoundError(f"{model}: there is no such file")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: a model file is named NAME.safetensors")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first")
    interpreter = os.path.expanduser(os.fspath(python or sys.executable))
    if os.path.dirname(interpreter):  # a path, not a name to be found
        interpreter = os.path.abspath(interpreter)
    with TemporaryDirectory() as folder:
        exported = Path(folder) / "model.npz"
        # A copy, for Python looks for modules beside the script first.
        script = shutil.copy(mace_export.__file__, folder)
        command = [interpreter, script, str(model.absolute()), str(exported)]
        environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=folder, env=environment
            )
        except OSError as error:
            raise RefusedModel(f"{interpreter} cannot be run: {error.strerror}") from None
        if done.returncode:
            raise RefusedModel(f"{model}: {_reason(done.stderr, interpreter)}")
        with np.load(exported, allow_pickle=False) as stored:
            arrays = dict(stored)
    try:
        potential = potential_of(arrays)
    except RefusedModel as error:
        raise RefusedModel(f"{model}: {error}") from None
    origin = f"imported from {model.name} of mace-torch {facts_of(arrays)['mace-torch']}"
    save(potential, out, training=origin)
    return potential


def summary(potential: Potential) -> str:
    """What was imported, in a line."""
    elements = potential.elements
    named = ", ".join(chemical_symbols[z] for z in elements[:10])
    more = f" and {len(elements) - 10} more" if len(elements) > 10 else ""
    parameters = sum(p.numel() for p in potential.parameters())
    return (
        f"{parameters} parameters, {named}{more}, cutoff {potential.cutoff:g} angstrom, "
        f"{str(potential.dtype)[6:]}; energies and forces of probe structures are mace-torch's"
    )


def _reason(stderr: str, interpreter: str) -> str:
    lines = stderr.strip().splitlines() or ["no message"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    last = (raised or lines)[-1]
    if "No module named 'mace'" in last:
        return (
            f"{interpreter} has no mace-torch; give the interpreter of an environment that has "
            "it: --python PATH"
        )
    if "Available heads" in last:
        return "it has several heads; make a model of one with mace_select_head"
    return f"mace-torch cannot open it: {last}"


def facts_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the model is made of, as ``mlip.mace_export`` describes it."""
    facts: dict[str, Any] = json.loads(str(arrays["facts"]))
    return facts


def potential_of(arrays: Arrays) -> Potential:
    """The potential of what ``mlip.mace_export`` wrote, checked against its numbers."""
    try:
        return _potential(arrays, facts_of(arrays))
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, RefusedModel):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedModel(f"its weights do not fit: {first}") from error


def _potential(arrays: Arrays, facts: Mapping[str, Any]) -> Potential:
    h = hyperparameters(facts)
    theirs = {k.removeprefix("weights/"): x for k, x in arrays.items() if k.startswith("weights/")}
    model = build("mace", **h).double()
    weights = {k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in to_mlip(theirs, h).items()}
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise RefusedModel(f"its weights do not fit: {name}")
    model.load_state_dict(weights)
    e0 = torch.full((119,), torch.nan, dtype=torch.float64)
    energies = np.array(facts["atomic_energies"][0]) + facts["shift"][0]
    e0[facts["elements"]] = torch.from_numpy(energies)
    potential = Potential(model, e0, facts["scale"][0]).eval()
    check(potential, arrays)
    return potential.to(getattr(torch, facts["dtype"]))


def hyperparameters(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Options of our model; RefusedModel if it has no counterpart."""
    first, *others = facts["interactions"]
    parts = {**facts, "interactions": [RESIDUAL if first == AGNOSTIC else first, *others]}
    for key, (words, allowed) in EXPECTED.items():
        given = parts[key] if isinstance(parts[key], list) else [parts[key]]
        if odd := [x for x in given if x not in allowed]:
            expected = " or ".join(str(x) for x in sorted(allowed, key=str) if x is not None)
            raise RefusedModel(
                f"its {words} is {odd[0]}" + (f", not {expected}" if expected else ", not none")
            )
    if facts["flags"]:
        raise RefusedModel(f"it has options without counterpart: {', '.join(facts['flags'])}")
    if len(facts["heads"]) != 1:
        heads = ", ".join(facts["heads"])
        raise RefusedModel(f"it has heads {heads}; make a model of one with mace_select_head")
    if None in (facts["correlation"], facts["radial_hidden"]):
        raise RefusedModel(
            "its parts are those of cuEquivariance; make a plain one with mace_cueq_to_e3nn"
        )
    if len(set(facts["avg_num_neighbors"])) != 1:
        raise RefusedModel("its layers have different average numbers of neighbours")
    hidden = re.sub(r"\s", "", facts["hidden_irreps"])
    readout = re.fullmatch(r"(\d+)x0e", facts["readout_irreps"])
    if readout is None:
        raise RefusedModel(f"its readout has {facts['readout_irreps']} instead of scalars")
    copied = ("cutoff", "num_basis", "envelope_power", "max_ell", "num_layers", "correlation")
    options = {key: facts[key] for key in copied}
    options["envelope_power"] = int(options["envelope_power"])
    options["num_layers"] = int(options["num_layers"])
    made = build(
        "mace",
        **options,
        hidden_irreps=hidden,
        radial_hidden=tuple(facts["radial_hidden"]),
        readout_hidden=int(readout[1]),
        elements=tuple(facts["elements"]),
        isolated="learned",
        first_layer="species" if first == AGNOSTIC else "residual",
        avg_num_neighbors=facts["avg_num_neighbors"][0],
    )
    found: dict[str, Any] = made.config.model_dump()
    return found


def check(potential: Potential, arrays: Arrays) -> None:
    """RefusedModel if energies or forces of the probes differ."""
    count = sum(key.startswith("numbers/") for key in arrays)
    scale: dict[str, float] = {"energy": 1.0, "forces": 1.0}
    worst = {"energy": 0.0, "forces": 0.0}
    for k in range(count):
        numbers, positions, cell, pbc = (
            arrays[f"{key}/{k}"] for key in ("numbers", "positions", "cell", "pbc")
        )
        graph = AtomicGraph.from_arrays(numbers, positions, cell, pbc, potential.cutoff)
        out = potential(graph)
        for key in worst:
            given = arrays[f"{key}/{k}"]
            size = given - potential.e0[numbers].sum().item() if key == "energy" else given
            scale[key] = max(scale[key], float(np.abs(size).max()))
            worst[key] = max(worst[key], float(np.abs(out[key].numpy() - given).max()))
    bar = BARS[facts_of(arrays)["dtype"]]
    for key, unit in (("energy", "eV"), ("forces", "eV/angstrom")):
        if not worst[key] <= bar * scale[key]:
            raise RefusedModel(
                f"its {key} would differ by {worst[key]:.2g} {unit} on probe structures"
            )


def by_degree(flat: np.ndarray, channels: int) -> np.ndarray:
    """Weights of a linear layer of irreps, (degrees, C, C)."""
    return flat.reshape(-1, channels, channels)


def to_mlip(theirs: Arrays, h: Mapping[str, Any]) -> Arrays:
    """State dict of ``mlip.models.mace.MACE`` from the one of mace-torch, as arrays.

    ``h`` has the hyperparameters of our model.
    """
    C, Z, T = h["channels"], len(h["elements"]), h["num_layers"]
    ours: Arrays = {"embed": theirs["node_embedding.linear.weight"].reshape(Z, C)}
    for t in range(T):
        a, b, mine = f"interactions.{t}.", f"products.{t}.", f"layers.{t}."
        lmax_in = 0 if t == 0 else h["lmax"]
        lmax_out = 0 if t == T - 1 else h["lmax"]
        ours[mine + "convolution.up.weight"] = by_degree(theirs[a + "linear_up.weight"], C)
        radial = a + "conv_tp_weights.layer{}.weight"
        depth = len(h["radial_hidden"])
        for k in range(depth):
            ours[mine + f"convolution.radial.{2 * k}.weight"] = theirs[radial.format(k)]
        widest = theirs[radial.format(depth)]
        ours[mine + "convolution.weights"] = widest.reshape(len(widest), -1, C)
        blocks = by_degree(theirs[a + "linear.weight"], C)
        start = 0
        for l in range(h["max_ell"] + 1):
            paths = num_paths(lmax_in, l, h["max_ell"])
            ours[mine + f"convolution.mix.{l}"] = blocks[start : start + paths].reshape(-1, C)
            start += paths
        mixed = t == 0 and h["first_layer"] == "species"
        top = h["max_ell"] if mixed else min(lmax_in, lmax_out)
        by_species = theirs[a + "skip_tp.weight"].reshape(top + 1, C, Z, C)
        ours[mine + ("mix.weight" if mixed else "skip.weight")] = by_species.transpose(2, 0, 1, 3)
        for L in range(lmax_out + 1):
            c = b + f"symmetric_contractions.contractions.{L}."
            names = [c + f"weights.{k}" for k in reversed(range(h["correlation"] - 1))]
            orders = []
            for nu, name in enumerate([*names, c + "weights_max"], start=1):
                couplings = theirs.get(c + f"U_matrix_{nu}")
                orders.append(in_our_basis(theirs[name], couplings, h["max_ell"], L, nu))
            ours[mine + f"contraction.weights.{L}"] = np.concatenate(orders, axis=1)
        ours[mine + "update.weight"] = by_degree(theirs[b + "linear.weight"], C)
        if t < T - 1:
            ours[f"readouts.{t}.weight"] = theirs[f"readouts.{t}.linear.weight"].reshape(C, 1)
    last = f"readouts.{T - 1}."
    ours[last + "0.weight"] = theirs[last + "linear_1.weight"].reshape(C, -1)
    ours[last + "2.weight"] = theirs[last + "linear_2.weight"].reshape(-1, 1)
    return ours


def in_our_basis(
    weights: np.ndarray, couplings: np.ndarray | None, lmax: int, L: int, order: int
) -> np.ndarray:
    """Weights (Z, K, C) of their couplings (.., LM, .., K) as weights of ours; theirs may be
    reduced to independent ones."""
    if couplings is None:
        return weights
    ours = symmetric_couplings(lmax, L, order, reduced=False)  # (K', 2 L + 1, LM, ...)
    given = torch.from_numpy(couplings).double()
    given = (given[None] if L == 0 else given).movedim(-1, 0)  # (K, 2 L + 1, LM, ...)
    every = list(permutations(range(order)))
    given = torch.stack([sum_over_permutations(U, every) for U in given])
    if given.shape == ours.shape and torch.allclose(given, ours, rtol=0, atol=1e-6):
        return weights
    mix = torch.linalg.pinv(ours.flatten(1).T) @ given.flatten(1).T  # (K', K)
    return np.einsum("kj,zjc->zkc", mix.numpy(), weights)


def num_paths(lmax_in: int, l: int, max_ell: int) -> int:
    """Couplings of features up to lmax_in with harmonics to degree l, natural parity."""
    return sum(
        (l1 + l2 + l) % 2 == 0
        for l1 in range(lmax_in + 1)
        for l2 in range(abs(l - l1), min(l + l1, max_ell) + 1)
    )
