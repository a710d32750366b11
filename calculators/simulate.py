"""Relaxation and molecular dynamics over ASE's own drivers."""

from __future__ import annotations

from mlip.calculators.dynamics import MDResult, run_md
from mlip.calculators.relaxation import RelaxResult, relax, relax_many

__all__ = ["MDResult", "RelaxResult", "relax", "relax_many", "run_md"]
