"""What a configuration fills in for each model: presets of size, and learning rates.

Keys given in a configuration come before them.
"""

from __future__ import annotations

from typing import Any

_DENSITY: dict[str, dict[str, Any]] = {
    "small": {
        "channels": 32,
        "num_layers": 2,
        "lmax": 2,
        "hidden": 32,
        "message_channels": (12, 6),
    },
    "medium": {
        "channels": 64,
        "num_layers": 2,
        "lmax": 3,
        "hidden": 64,
        "message_channels": (16, 8, 4),
    },
    "large": {
        "channels": 128,
        "num_layers": 3,
        "lmax": 3,
        "hidden": 128,
        "message_channels": (32, 16, 8),
    },
}

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "facet": _DENSITY,
    "gaunt": _DENSITY,  # the same density, other products
    "escaip": {
        "small": {"hidden": 48, "node_hidden": 64, "num_layers": 2},
        "medium": {"hidden": 64, "node_hidden": 128, "num_layers": 2},
        "large": {"hidden": 128, "node_hidden": 256, "num_layers": 3, "num_heads": 8},
    },
    "transip": {
        "small": {"hidden": 96, "num_layers": 3, "num_heads": 4, "latent": (12, 2)},
        "medium": {"hidden": 192, "num_layers": 4, "num_heads": 8, "latent": (24, 8)},
        "large": {
            "hidden": 384,
            "num_layers": 8,
            "num_heads": 12,
            "latent": (48, 16),
            "edge_functions": 32,
            "edge_hidden": 128,
        },
    },
    "mace": {
        "small": {"channels": 128, "lmax": 0},
        "medium": {"channels": 128, "lmax": 1},
        "large": {"channels": 128, "lmax": 2},
    },
    "ponita": {
        "small": {"channels": 32, "message_channels": 8, "hidden": 32},
        "medium": {"channels": 64, "message_channels": 16, "hidden": 64},
        "large": {"channels": 128, "message_channels": 32, "hidden": 128, "num_layers": 3},
    },
    "ponita_published": {
        "small": {"channels": 32, "num_layers": 2, "basis_hidden": 64},
        "medium": {"channels": 64, "num_layers": 3, "basis_hidden": 128},
        "large": {"channels": 128, "num_layers": 5, "basis_hidden": 256},
    },
    "environment": {
        "small": {"hidden": 64, "edge_hidden": 32, "num_rounds": 2},
        "medium": {"hidden": 128, "edge_hidden": 64, "num_rounds": 3},
        "large": {"hidden": 256, "edge_hidden": 128, "num_rounds": 4, "num_heads": 8},
    },
}

# The default rates are for weights of size 1 / sqrt(inputs).  Those of MACE are of size one, with
# the factor in the formulas, and need steps that are ten times as large.
RATES: dict[str, dict[str, dict[str, float]]] = {
    "mace": {"muon": {"muon_lr": 0.05, "lr": 0.03}, "adamw": {"lr": 0.01}},
}
