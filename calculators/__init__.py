"""Potentials at work in ASE: ``EqCalculator``, ``relax``, ``relax_many``, ``run_md``.

>>> from mlip.calculators import EqCalculator
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip.calculators.eq_calculator import EqCalculator
    from mlip.calculators.simulate import relax, relax_many, run_md

__all__ = ["EqCalculator", "relax", "relax_many", "run_md"]


def __getattr__(name: str) -> Any:
    # Late, so that importing the package loads no torch.
    if name == "EqCalculator":
        from mlip.calculators.eq_calculator import EqCalculator

        return EqCalculator
    if name in ("relax", "relax_many", "run_md"):
        from mlip.calculators import simulate

        return getattr(simulate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
