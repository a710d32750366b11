"""Machine-learned interatomic potentials for ASE.

The map of the package:

``mlip.potential``      energy, forces and stress of an energy model
``mlip.models``         the models, one file each; ``build(name, **hyperparameters)``
``mlip.checkpoint``     ``save`` and ``load`` a potential (safetensors and JSON)
``mlip.data``           structures to HDF5 to batches of graphs
``mlip.training``       losses, one trainer for all models
``mlip.calculators``    ``EqCalculator`` for ASE, ``relax`` and ``run_md``
``mlip.evaluation``     error metrics
``mlip.cli``            the command ``mlip``

Nothing heavy is imported here: each part imports torch when it is itself imported.
Units everywhere: eV, angstrom, eV/angstrom, eV/angstrom^3.
"""

__version__ = "0.1.0"
