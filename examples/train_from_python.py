"""Train without the command line: python examples/train_from_python.py [DATA.h5] [FOLDER]."""

import logging
import sys

from ase.build import bulk

from mlip.calculators import EqCalculator
from mlip.data.hdf5 import HDF5File
from mlip.training.config import parse_training
from mlip.training.run import train

data = sys.argv[1] if len(sys.argv) > 1 else "examples/data/silicon_train.h5"
folder = sys.argv[2] if len(sys.argv) > 2 else "runs/from_python"
logging.basicConfig(level=logging.INFO, format="%(message)s")

config = parse_training(
    {
        "run_dir": folder,
        "data": {"train": data, "valid_fraction": 0.1, "batch_size": 5},
        "model": {"name": "facet", "size": "small", "cutoff": 4.5},
        "schedule": {"max_epochs": 3},
    }
)
model = train(config)

first = HDF5File(data).read(1)
print(f"{model}: trained; the second structure of {data} has {len(first.atomic_numbers)} atoms")
atoms = bulk("Si") if 14 in first.atomic_numbers else bulk("Cu")
atoms.calc = EqCalculator(model)
print(f"energy {atoms.get_potential_energy():.3f} eV")
