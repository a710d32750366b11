"""The command ``mlip``: each verb parses its arguments, imports what it needs, and delegates."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="mlip",
    help="""Machine-learned interatomic potentials: convert data, train, evaluate, relax, run MD.

    Each verb explains itself, with examples: mlip VERB --help""",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        import mlip

        typer.echo(f"eqmlip {mlip.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model file, or the name of a shipped model.")
    ],
) -> None:
    """Show what a model says of itself: elements, cutoff, level of theory, errors, licence.

    \b
    Examples:
      mlip info runs/si/model.safetensors
      mlip info silicon
    """
    from mlip.modelcard import describe

    typer.echo(describe(model))


def main() -> None:
    """Entry point: errors of the user's input are one line without a traceback.

    With MLIP_DEBUG=1 in the environment the traceback is shown.
    """
    try:
        app(prog_name="mlip")
    except BrokenPipeError:  # `mlip info FILE | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("MLIP_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
