"""Which model tells environments apart that share their 2-, 3- and 4-body correlations, and at
which depth.

For every model, depths 1 to 3 and three sets of random weights (small presets, float64, cutoff 5
angstrom): the largest relative difference of the energy of the centre, and of the whole cluster,
whose other atoms have environments of their own.  Models whose rotations are learned see the pose
of any structure and are left out; in local frames they take part.  Writes the table into
docs/models.md, and results/expressivity.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pieces import Row, insert

from mlip.evaluation.expressivity import tell_apart, with_random_weights
from mlip.models import MODELS, build
from mlip.training.sizes import SIZES
from mlip.wrappers import wrap

DEPTHS = ("num_layers", "num_rounds")
FRAMED = {"environment": {}, "transip": {}, "escaip": {"angular": "vectors"}}
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{name: (name, {}, False) for name in MODELS},
    **{f"{name}, local frames": (name, options, True) for name, options in FRAMED.items()},
}
BODIES = ("2", "3", "4")
TOLD = 1e-11  # ten thousand times rounding


def main() -> None:
    rows = []
    for label, (name, changes, framed) in VARIANTS.items():
        depth_key = next(key for key in DEPTHS if key in MODELS[name][1].model_fields)
        for depth in (1, 2, 3):
            center, whole = torch.zeros(3), torch.zeros(3)
            for seed in range(3):
                torch.manual_seed(seed)
                options = {**SIZES[name]["small"], depth_key: depth, **changes}
                model = build(name, cutoff=5.0, **options)
                if framed:
                    model = wrap(model, "frame_averaging")
                potential = with_random_weights(model, seed)
                if not potential.model.exact_symmetry:
                    break
                told = tell_apart(potential)
                center = torch.maximum(center, torch.tensor([t.center for t in told]))
                whole = torch.maximum(whole, torch.tensor([t.whole for t in told]))
            else:
                hops = round(potential.model.receptive_field / potential.cutoff)
                rows.append(
                    {
                        "model": label,
                        "depth": depth,
                        "cutoffs": hops,
                        "center": dict(zip(BODIES, center.tolist(), strict=True)),
                        "whole": dict(zip(BODIES, whole.tolist(), strict=True)),
                    }
                )
    here = Path(__file__).parent
    (here / "results" / "expressivity.json").write_text(json.dumps(rows, indent=1) + "\n")
    insert(here.parent / "docs" / "models.md", "expressivity", table(rows))
    print(table(rows))


def table(rows: list[Row]) -> str:
    lines = [
        "| model | layers | sees (cutoffs) | 2 bodies | 3 bodies | 4 bodies |",
        "|---|---:|---:|---|---|---|",
    ]
    for row in rows:
        name, comma, more = row["model"].partition(",")
        cells = [f"{verdict(row['center'][b])} / {verdict(row['whole'][b])}" for b in BODIES]
        lines.append(
            f"| `{name}`{comma}{more} | {row['depth']} | {row['cutoffs']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def verdict(difference: float) -> str:
    text = f"{difference:.0e}".replace("e+00", "").replace("e-0", "e-")
    return text if difference > TOLD else "no"


if __name__ == "__main__":
    main()
