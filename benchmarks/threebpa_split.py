"""Write the 450/50 split of 3BPA's train_300K: ``python threebpa_split.py FOLDER OUT``."""

import sys
from pathlib import Path

import numpy as np
from ase.io import read, write

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
frames = read(folder / "train_300K.xyz.gz", ":")
isolated = read(folder / "iso_atoms.xyz.gz", ":")
order = np.random.default_rng(1).permutation(len(frames))
write(out / "train.xyz", isolated + [frames[k] for k in order[:450]])
write(out / "valid.xyz", [frames[k] for k in order[450:]])
