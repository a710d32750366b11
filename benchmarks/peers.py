"""Other packages with random weights, in the sizes that their users take: models, calculators, and
the functions whose time is taken.

Each function runs in the package's own environment (``install_peers.sh``) and imports nothing of
ours.  Time and memory do not depend on the values of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers

CUTOFF = 5.0  # angstrom


def mace_model(size: str, symbols: list[str], dtype: str) -> torch.nn.Module:
    """mace-torch: two layers, l <= 3, correlation 3; small 128x0e, medium 128x0e+128x1o."""
    from e3nn import o3
    from mace.modules import ScaleShiftMACE, interaction_classes

    torch.set_default_dtype(getattr(torch, dtype))
    block = interaction_classes["RealAgnosticResidualInteractionBlock"]
    return ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(symbols),
        hidden_irreps=o3.Irreps({"small": "128x0e", "medium": "128x0e+128x1o"}[size]),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(symbols)),
        avg_num_neighbors=20,
        atomic_numbers=sorted(atomic_numbers[s] for s in symbols),
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        radial_MLP=[64, 64, 64],
    )


def mace(size: str, symbols: list[str], dtype: str) -> Calculator:
    """Calculator of mace-torch."""
    from mace.calculators import MACECalculator

    model = mace_model(size, symbols, dtype)
    return MACECalculator(models=model, device="cpu", default_dtype=dtype)


def nequip_model(size: str, symbols: list[str], dtype: str) -> torch.nn.Module:
    """NequIP: l <= 2, 32 features; small two layers, medium four."""
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    return NequIPGNNModel(
        seed=0,
        model_dtype=dtype,
        r_max=CUTOFF,
        type_names=symbols,
        num_layers={"small": 2, "medium": 4}[size],
        l_max=2,
        num_features=32,
        avg_num_neighbors=20.0,
    )


def nequip_transforms(symbols: list[str]) -> list[Callable[[Any], Any]]:
    """What NequIP does to a structure before its model sees it."""
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform

    mapper = ChemicalSpeciesToAtomTypeMapper(model_type_names=symbols)
    return [mapper, NeighborListTransform(r_max=CUTOFF)]


def nequip(size: str, symbols: list[str], dtype: str) -> Calculator:
    """Calculator of NequIP."""
    from nequip.integrations.ase import NequIPCalculator

    model = nequip_model(size, symbols, dtype)
    return NequIPCalculator(model.eval(), device="cpu", transforms=nequip_transforms(symbols))


def sevenn(size: str, symbols: list[str], dtype: str) -> Calculator:
    """SevenNet-0 as published, with its weights, which come with the package."""
    from sevenn.calculator import SevenNetCalculator

    if dtype != "float32":
        raise ValueError("SevenNet computes in float32")
    return SevenNetCalculator("7net-0", device="cpu")


def matgl_model(size: str, symbols: list[str], dtype: str) -> torch.nn.Module:
    """TensorNet: 64 units, two layers."""
    import matgl as package
    from matgl.apps.pes import Potential
    from matgl.models import TensorNet

    torch.set_default_dtype(getattr(torch, dtype))
    package.set_default_dtype("float", int(dtype.removeprefix("float")))
    model = TensorNet(element_types=tuple(symbols), cutoff=CUTOFF, is_intensive=False)
    return Potential(model=model).to(getattr(torch, dtype))


def matgl(size: str, symbols: list[str], dtype: str) -> Calculator:
    """Calculator of TensorNet."""
    from matgl.ext.ase import PESCalculator

    return PESCalculator(matgl_model(size, symbols, dtype).eval(), stress_unit="eV/A3")


def chgnet(size: str, symbols: list[str], dtype: str) -> Calculator:
    """CHGNet as published, with its weights, which come with the package; crystals only."""
    from chgnet.model.dynamics import CHGNetCalculator

    if dtype != "float32":
        raise ValueError("CHGNet computes in float32")
    return CHGNetCalculator(use_device="cpu")


PEERS: dict[str, Callable[[str, list[str], str], Calculator]] = {
    "mace": mace,
    "nequip": nequip,
    "sevenn": sevenn,
    "matgl": matgl,
    "chgnet": chgnet,
}
CRYSTALS_ONLY = ("chgnet",)

# Distributions whose versions are recorded: the package first, then what its speed depends on.
DISTRIBUTIONS = {
    "mace": ("mace-torch", "e3nn", "matscipy"),
    "nequip": ("nequip", "e3nn", "matscipy"),
    "sevenn": ("sevenn", "e3nn", "matscipy", "torch-geometric"),
    "matgl": ("matgl", "torch-geometric"),
    "chgnet": ("chgnet", "pymatgen"),
}


def watched(peer: str) -> list[tuple[Any, str, str]]:
    """Owner and name of the functions that find neighbours and that evaluate the model."""
    if peer == "mace":
        from mace.data import atomic_data
        from mace.modules import ScaleShiftMACE

        return [
            (atomic_data, "get_neighborhood", "neighbors"),
            (ScaleShiftMACE, "forward", "model"),
        ]
    if peer == "nequip":
        from nequip.data.transforms import NeighborListTransform
        from nequip.integrations.ase import NequIPCalculator

        return [
            (NeighborListTransform, "forward", "neighbors"),
            (NequIPCalculator, "call_model", "model"),
        ]
    if peer == "sevenn":
        from sevenn.nn.sequential import AtomGraphSequential
        from sevenn.train import dataload

        return [
            (dataload, "_graph_build_f", "neighbors"),
            (AtomGraphSequential, "forward", "model"),
        ]
    if peer == "matgl":
        from matgl.apps.pes import Potential
        from matgl.ext import ase

        return [(ase, "find_points_in_spheres", "neighbors"), (Potential, "forward", "model")]
    from chgnet.graph.converter import CrystalGraphConverter
    from chgnet.model.model import CHGNet

    # Finds neighbours and the angles between them.
    return [(CrystalGraphConverter, "forward", "neighbors"), (CHGNet, "forward", "model")]
