"""Potentials at work in ASE: ``EqCalculator``, ``relax``, ``run_md``."""
