"""The command ``mlip``: each verb parses its arguments, imports what it needs, and delegates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mlip",
    help="Machine-learned interatomic potentials: convert data, train, evaluate, relax, run MD.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def info(
    model: Annotated[Path, typer.Argument(help="Model file (.safetensors).")],
) -> None:
    """Show what a model file says of itself: elements, cutoff, level of theory, errors, licence."""
    from mlip.checkpoint import describe

    typer.echo(describe(model))


def main() -> None:
    """Entry point: errors of the user's input are one line without a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
