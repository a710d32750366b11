"""Verbs of the command ``mlip`` that show and make model files."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model file, or name of a shipped model.")
]
Dtype = Annotated[
    str, typer.Option(help="float32 or float64. [default: the model's]", show_default=False)
]


def info(
    model: Model,
) -> None:
    """Show what a model says of itself: elements, cutoff, level of theory, errors, licence.

    \b
    Examples:
      mlip info runs/si/model.safetensors
      mlip info silicon
    """
    from mlip.modelcard import describe

    typer.echo(describe(model))


def compile_model(
    model: Model,
    out: Annotated[str, typer.Option(help="Program file to write, NAME.pt2.")],
    dtype: Dtype = "",
) -> None:
    """Compile a model ahead of time for this machine: escaip, facet, gaunt, ponita, transip.

    The program file is code, checked here and whenever it is loaded beside its model.

    \b
    Examples:
      mlip compile silicon --out silicon.pt2 --dtype float32
      mlip md si.cif -m silicon --dtype float32 --program silicon.pt2
    """
    from mlip.calculators.reports import compile_and_report

    compile_and_report(model, out, dtype=dtype)


def import_mace_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model file of mace-torch: a pickle, that is, code; give only one that you trust.",
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Model file to write, NAME.safetensors.")
    ],
    python: Annotated[
        str,
        typer.Option(help="Interpreter of an environment with mace-torch. [default: this one]"),
    ] = "",
) -> None:
    """Make a model file from one of mace-torch: the same energies and forces, checked.

    For models of one head, as mace_run_train makes them by default or with --model
    ScaleShiftMACE. mace-torch opens the file, in a process of its own.

    \b
    Examples:
      mlip import-mace MACE_model.model mace.safetensors
      mlip import-mace mace.model mace.safetensors --python ~/mace-environment/bin/python
    """
    from mlip.mace_import import import_mace, summary

    typer.echo(f"{out}: {summary(import_mace(model, out, python or None))}")
