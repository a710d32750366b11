"""Equivariance error of Facet's two products on the sphere, with random weights.

For `poly` and `mlp` and growing grids: root mean square, over 20 rotations of a rattled molecule
and a rattled crystal, of the change of the energy per atom and of the back-rotated forces, relative
to the root mean square force.  Writes results/grid_equivariance.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation

from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.potential import Potential


def main() -> None:
    rng = np.random.default_rng(0)
    structures = [molecule("CH3CH2OH"), bulk("Si", cubic=True)]
    for atoms in structures:
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
    rotations = torch.from_numpy(Rotation.random(20, random_state=0).as_matrix())
    rows = []
    for grid, degree in (("poly", 9), ("mlp", 9), ("mlp", 12), ("mlp", 18), ("mlp", 27)):
        torch.manual_seed(0)
        model = build("facet", grid=grid, grid_degree=degree)
        with torch.no_grad():
            for p in model.parameters():
                if not p.any():
                    p.normal_(0, 0.1)
        potential = Potential(model, torch.zeros(119)).double().eval()
        energy, forces, size = [], [], []
        for atoms in structures:
            graph = AtomicGraph.from_atoms(atoms, potential.cutoff)
            plain = potential(graph)
            size.append(plain["forces"].square().mean())
            for R in rotations:
                turned = potential(graph.rotated(R))
                energy.append(
                    (turned["energy"] - plain["energy"]).square().mean() / len(atoms) ** 2
                )
                forces.append((turned["forces"] @ R - plain["forces"]).square().mean())
        force = torch.stack(size).mean().sqrt()
        rows.append(
            {
                "grid": grid,
                "degree": degree,
                "points": (degree // 2 + 1) * (degree + 1),
                "energy_error_relative": float(torch.stack(energy).mean().sqrt() / force),
                "force_error_relative": float(torch.stack(forces).mean().sqrt() / force),
            }
        )
        print(rows[-1])
    path = Path(__file__).parent / "results" / "grid_equivariance.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
