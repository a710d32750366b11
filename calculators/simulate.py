"""Relaxation and molecular dynamics over ASE's own drivers."""

from __future__ import annotations

from mlip.calculators.dynamics import MDResult, run_md
from mlip.calculators.relaxation import RelaxResult, relax

__all__ = ["MDResult", "RelaxResult", "relax", "run_md"]
