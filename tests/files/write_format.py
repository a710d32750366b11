"""Write the tiny stored model of the present checkpoint format, with its energy and forces.

Run once when a format number is born, and commit the two files; they are not to change afterwards:
``python tests/files/write_format.py`` from the root of the repository.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_checkpoint import FILES, energy_and_forces, tiny

from mlip.checkpoint import FORMAT, load, save
from mlip.nn.zbl import ZBL

path = FILES / f"format_{FORMAT}.safetensors"
save(
    tiny(dtype=torch.float64, repulsion=ZBL()),
    path,
    level_of_theory="none, random weights",
    licence="MIT",
)
energy, forces = energy_and_forces(load(path))
text = json.dumps({"energy": energy, "forces": forces.tolist()}, indent=1)
path.with_suffix(".json").write_text(text + "\n")
