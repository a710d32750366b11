"""Plot the MD of the quickstart, say what lies where: summarize_quickstart.py [FOLDER]."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from ase.io import read

matplotlib.use("Agg")
import matplotlib.pyplot as plt

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
log = np.genfromtxt(folder / "md.csv", delimiter=",", names=True)
figure, axes = plt.subplots(2, 1, sharex=True, figsize=(6, 4))
for axis, name in zip(axes, ("temperature_K", "potential_eV"), strict=True):
    axis.plot(log["time_ps"], log[name])
    axis.set_ylabel(name.replace("_", " / "))
axes[-1].set_xlabel("time / ps")
figure.savefig(folder / "md.png", dpi=150, bbox_inches="tight")

start, relaxed = (read(folder / f"{name}.xyz") for name in ("start", "relaxed"))
a, b = (np.cbrt(atoms.get_volume()) for atoms in (start, relaxed))
print(f"lattice constant of silicon: {a:.3f} -> {b:.3f} angstrom (PBE: about 5.47)")
meanings = {
    "best.safetensors": "the model: mlip info, mlip relax --model, EqCalculator(...)",
    "errors.txt": "errors on training, validation and test set",
    "parity.png": "predicted against reference",
    "learning_curve.png": "errors and learning rate by epoch",
    "log.csv": "the same as numbers",
    "config.yaml": "the configuration with all defaults",
    "eval": "predictions on the test set",
    "relaxed.xyz": "the relaxed crystal",
    "md.xyz": "the trajectory",
    "md.png": "temperature and potential energy along it",
}
for name, meaning in meanings.items():
    if (folder / name).exists():
        print(f"  {folder / name!s:<42} {meaning}")
