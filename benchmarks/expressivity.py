"""Which model tells environments apart that share their 2-, 3- and 4-body correlations, and at
which depth.

For every model, depths 1 to 3 and three sets of random weights (small presets, float64, cutoff 5
angstrom): the largest relative difference of the energy of the centre, and of the whole cluster,
whose other atoms have environments of their own.  Models whose rotations are learned see the pose
of any structure and are left out.  Prints the table of docs/models.md, writes
results/expressivity.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mlip.evaluation.expressivity import tell_apart, with_random_weights
from mlip.models import MODELS, build
from mlip.training.sizes import SIZES

DEPTHS = ("num_layers", "num_rounds", "num_interactions")
TOLD = 1e-11  # ten thousand times rounding


def main() -> None:
    rows = []
    print("| model | depth | sees (cutoffs) | 2 bodies | 3 bodies | 4 bodies |")
    print("|---|---:|---:|---|---|---|")
    for name, (_, config) in MODELS.items():
        depth_key = next(key for key in DEPTHS if key in config.model_fields)
        for depth in (1, 2, 3):
            center, whole = torch.zeros(3), torch.zeros(3)
            for seed in range(3):
                torch.manual_seed(seed)
                options = {**SIZES[name]["small"], depth_key: depth}
                potential = with_random_weights(build(name, cutoff=5.0, **options), seed)
                if not potential.model.exact_symmetry:
                    break
                told = tell_apart(potential)
                center = torch.maximum(center, torch.tensor([t.center for t in told]))
                whole = torch.maximum(whole, torch.tensor([t.whole for t in told]))
            else:
                hops = round(potential.model.receptive_field / potential.cutoff)
                both = list(zip(center.tolist(), whole.tolist(), strict=True))
                cells = " | ".join(f"{verdict(a)} / {verdict(b)}" for a, b in both)
                print(f"| `{name}` | {depth} | {hops} | {cells} |")
                rows.append(
                    {
                        "model": name,
                        "depth": depth,
                        "cutoffs": hops,
                        "center": dict(zip(("2", "3", "4"), center.tolist(), strict=True)),
                        "whole": dict(zip(("2", "3", "4"), whole.tolist(), strict=True)),
                    }
                )
    path = Path(__file__).parent / "results" / "expressivity.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")


def verdict(difference: float) -> str:
    return f"{difference:.0e}" if difference > TOLD else "no"


if __name__ == "__main__":
    main()
