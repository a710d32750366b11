"""Calculators of other packages with random weights, in the sizes that their users take.

Each function runs in the package's own environment (``install_peers.sh``) and imports nothing of
ours.  Time and memory do not depend on the values of weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers

CUTOFF = 5.0  # angstrom


def mace(size: str, symbols: list[str], dtype: str) -> Calculator:
    """mace-torch: two layers, l <= 3, correlation 3; small 128x0e, medium 128x0e+128x1o."""
    from e3nn import o3
    from mace.calculators import MACECalculator
    from mace.modules import ScaleShiftMACE, interaction_classes

    torch.set_default_dtype(getattr(torch, dtype))
    block = interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = ScaleShiftMACE(
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
    return MACECalculator(models=model, device="cpu", default_dtype=dtype)


def nequip(size: str, symbols: list[str], dtype: str) -> Calculator:
    """NequIP: l <= 2, 32 features; small two layers, medium four."""
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    model = NequIPGNNModel(
        seed=0,
        model_dtype=dtype,
        r_max=CUTOFF,
        type_names=symbols,
        num_layers={"small": 2, "medium": 4}[size],
        l_max=2,
        num_features=32,
        avg_num_neighbors=20.0,
    )
    mapper = ChemicalSpeciesToAtomTypeMapper(model_type_names=symbols)
    neighbors = NeighborListTransform(r_max=CUTOFF)
    return NequIPCalculator(model.eval(), device="cpu", transforms=[mapper, neighbors])


def sevenn(size: str, symbols: list[str], dtype: str) -> Calculator:
    """SevenNet-0 as published, with its weights, which come with the package."""
    from sevenn.calculator import SevenNetCalculator

    if dtype != "float32":
        raise ValueError("SevenNet computes in float32")
    return SevenNetCalculator("7net-0", device="cpu")


def matgl(size: str, symbols: list[str], dtype: str) -> Calculator:
    """TensorNet: 64 units, two layers."""
    from matgl.apps.pes import Potential
    from matgl.ext.ase import PESCalculator
    from matgl.models import TensorNet

    torch.set_default_dtype(getattr(torch, dtype))
    model = TensorNet(element_types=tuple(symbols), cutoff=CUTOFF, is_intensive=False)
    return PESCalculator(Potential(model=model), stress_unit="eV/A3")


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
