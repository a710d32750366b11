"""The command ``mlip``: each verb parses its arguments, imports what it needs, and delegates."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mlip.cli_models import Dtype, Model, compile_model, import_mace_model, info

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

# What several verbs have.
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Accelerate = Annotated[
    list[str] | None,
    typer.Option(
        help="compile, analytic, splines, cudagraph, cuequivariance (may be repeated), auto, or "
        "plain."
    ),
]
Program = Annotated[
    str | None, typer.Option(help="File of `mlip compile`: code, give only one that you trust.")
]
Memory = Annotated[
    str | None, typer.Option(help="As 8GB; structures that need more are evaluated in pieces.")
]
Symmetrize = Annotated[
    str | None,
    typer.Option(help="Average over rotations: octahedral, icosahedral, lebedev-11, ..."),
]


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


app.command()(info)


@app.command()
def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... OUT", help="Files or patterns; the last one is the output."
        ),
    ],
    energy_key: Annotated[str | None, typer.Option(help="Key of the energy.")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Key of the forces.")] = None,
    stress_key: Annotated[str | None, typer.Option(help="Key of the stress.")] = None,
    virial_key: Annotated[str | None, typer.Option(help="Key of the virial, -V stress.")] = None,
    config_type_key: Annotated[str | None, typer.Option(help="Key of the config_type.")] = None,
    group_key: Annotated[
        str | None, typer.Option(help="Key that says which structures belong together in a split.")
    ] = None,
    energy_unit: Annotated[
        str, typer.Option(help="eV, meV, kcal/mol, kJ/mol, Hartree or Ry.")
    ] = "eV",
    length_unit: Annotated[str, typer.Option(help="angstrom, bohr or nm.")] = "angstrom",
    forces_unit: Annotated[
        str | None, typer.Option(help="For example Hartree/bohr. [default: energy/length]")
    ] = None,
    stress_unit: Annotated[
        str | None, typer.Option(help="eV/A^3, GPa, kbar, ... [default: energy/length^3]")
    ] = None,
    virial_unit: Annotated[str | None, typer.Option(help="[default: the energy's]")] = None,
    stress_order: Annotated[
        str | None,
        typer.Option(help="Of six numbers: ase (xx yy zz yz xz xy) or vasp (xx yy zz xy yz zx)."),
    ] = None,
    flip_stress: Annotated[
        bool, typer.Option("--flip-stress", help="Compression is positive in the input.")
    ] = False,
    level_of_theory: Annotated[str, typer.Option(help="Text stored with the data.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    allow_unfinished: Annotated[
        bool, typer.Option("--allow-unfinished", help="Take VASP outputs that were cut short.")
    ] = False,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="No labels needed.")] = False,
) -> None:
    """Convert labelled structures to a data file (OUT.h5), or a data file back (OUT.xyz).

    \b
    Examples:
      mlip convert train.xyz.gz train.h5
      mlip convert 'runs/*/OUTCAR' more.traj all.h5 --level-of-theory PBE
      mlip convert md.xyz md.h5 --energy-unit kcal/mol --forces-key grad
      mlip convert all.h5 all.xyz
    """
    from rich.console import Console

    from mlip.data.convert import convert as run
    from mlip.data.convert import format_report
    from mlip.data.labels import LabelOptions

    if len(paths) < 2:
        raise ValueError("give at least one input and the output: mlip convert INPUT... OUT")
    report = run(
        paths[:-1],
        paths[-1],
        overwrite=overwrite,
        allow_unfinished=allow_unfinished,
        allow_unlabelled=unlabelled,
        level_of_theory=level_of_theory,
        options=LabelOptions(
            energy_key=energy_key,
            forces_key=forces_key,
            stress_key=stress_key,
            virial_key=virial_key,
            config_type_key=config_type_key,
            group_key=group_key,
            energy_unit=energy_unit,
            length_unit=length_unit,
            forces_unit=forces_unit,
            stress_unit=stress_unit,
            virial_unit=virial_unit,
            stress_order=stress_order,
            flip_stress=flip_stress,
        ),
    )
    Console().print(format_report(report))
    for text in report.warnings:
        typer.echo(f"warning: {text}", err=True)


@app.command()
def relax(
    structures: Annotated[
        list[str], typer.Argument(metavar="STRUCTURE...", help="Files; all frames are relaxed.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model file, pattern, or name of a shipped model.")
    ],
    cell: Annotated[bool, typer.Option("--cell", help="Relax the cell too.")] = False,
    pressure: Annotated[float, typer.Option(help="External pressure in GPa, with --cell.")] = 0.0,
    symmetry: Annotated[bool, typer.Option("--symmetry", help="Keep the space group.")] = False,
    fmax: Annotated[float, typer.Option(help="Largest force at the end, eV/angstrom.")] = 0.01,
    steps: Annotated[int, typer.Option(help="Give up after so many steps.")] = 500,
    optimizer: Annotated[
        str, typer.Option(help="FIRE, FIRE2, BFGS, LBFGS or BFGSLineSearch.")
    ] = "FIRE",
    symprec: Annotated[float, typer.Option(help="Tolerance of symmetry, angstrom.")] = 0.01,
    out: Annotated[str | None, typer.Option(help="Write the relaxed structures here.")] = None,
    max_atoms: Annotated[int, typer.Option(help="In a batch; thousands on a GPU.")] = 256,
    device: Device = "auto",
    dtype: Dtype = "",
    symmetrize: Symmetrize = None,
    accelerate: Accelerate = None,
    program: Program = None,
    max_memory: Memory = None,
) -> None:
    """Relax structures; those that fail say why and the rest are finished.

    \b
    Examples:
      mlip relax si.cif --model silicon --cell
      mlip relax *.cif -m model.safetensors --cell --pressure 10 --symmetry --out relaxed.xyz
    """
    from mlip.calculators.reports import relax_and_report

    finished = relax_and_report(
        structures,
        model,
        out=out,
        cell=cell,
        pressure=pressure,
        keep_symmetry=symmetry,
        fmax=fmax,
        max_steps=steps,
        optimizer=optimizer,
        symprec=symprec,
        max_atoms=max_atoms,
        device=device,
        dtype=dtype,
        symmetrize=symmetrize,
        accelerate=accelerate,
        program=program,
        max_memory=max_memory,
    )
    if not finished:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model,
    structure: Annotated[
        str | None,
        typer.Argument(metavar="[STRUCTURE]", help="File; it and its supercells are timed."),
    ] = None,
    timestep: Annotated[float, typer.Option(help="fs, of the molecular dynamics.")] = 1.0,
    max_atoms: Annotated[int, typer.Option(help="Try no larger structure.")] = 4096,
    device: Device = "auto",
    dtype: Dtype = "",
    symmetrize: Symmetrize = None,
    accelerate: Accelerate = None,
    program: Program = None,
    max_memory: Memory = None,
) -> None:
    """Time a model on this machine: ms/step, atoms/s, ns/day, memory, the largest system that fits.

    \b
    Examples:
      mlip bench silicon
      mlip bench model.safetensors slab.cif --dtype float32 --timestep 2
    """
    from mlip.calculators.reports import bench_and_report

    bench_and_report(
        model,
        structure,
        timestep=timestep,
        max_atoms=max_atoms,
        device=device,
        dtype=dtype,
        symmetrize=symmetrize,
        accelerate=accelerate,
        program=program,
        max_memory=max_memory,
    )


app.command(name="compile")(compile_model)
app.command(name="import-mace")(import_mace_model)


@app.command()
def md(
    structure: Annotated[
        str, typer.Argument(metavar="STRUCTURE", help="File; its last frame is the start.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model file, pattern, or name of a shipped model.")
    ],
    ensemble: Annotated[str, typer.Option(help="nve, langevin, nose-hoover or npt.")] = "langevin",
    temperature: Annotated[float, typer.Option(help="K")] = 300.0,
    pressure: Annotated[float, typer.Option(help="GPa, of npt.")] = 0.0,
    timestep: Annotated[float, typer.Option(help="fs")] = 1.0,
    steps: Annotated[int, typer.Option(help="Of the whole run, restarts included.")] = 1000,
    friction: Annotated[float, typer.Option(help="1/fs, of langevin.")] = 0.01,
    whole_cell: Annotated[
        bool, typer.Option("--whole-cell", help="npt: all of the cell, not its volume only.")
    ] = False,
    repeat: Annotated[
        tuple[int, int, int], typer.Option(help="Repeat the structure: a supercell.")
    ] = (1, 1, 1),
    trajectory: Annotated[str, typer.Option(help="extxyz, or ASE's .traj.")] = "md.xyz",
    log: Annotated[str, typer.Option(help="CSV file.")] = "md.csv",
    interval: Annotated[int, typer.Option(help="Steps between frames and lines.")] = 10,
    restart: Annotated[bool, typer.Option("--restart", help="Continue an earlier run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of momenta and thermostat.")] = 0,
    max_force: Annotated[float, typer.Option(help="Stop beyond, eV/angstrom.")] = 1000.0,
    device: Device = "auto",
    dtype: Dtype = "",
    symmetrize: Symmetrize = None,
    accelerate: Accelerate = None,
    program: Program = None,
    max_memory: Memory = None,
) -> None:
    """Run molecular dynamics with trajectory, log and exact restart.

    \b
    Examples:
      mlip md si.cif --model silicon --repeat 2 2 2 --temperature 600 --steps 5000
      mlip md si.cif --model silicon --repeat 2 2 2 --temperature 600 --steps 9000 --restart
      mlip md water.xyz -m model.safetensors --ensemble npt --pressure 0.1 --timestep 0.5
    """
    from mlip.calculators.reports import md_and_report

    md_and_report(
        structure,
        model,
        repeat=repeat,
        ensemble=ensemble,
        temperature=temperature,
        pressure=pressure,
        timestep=timestep,
        steps=steps,
        friction=friction,
        whole_cell=whole_cell,
        trajectory=trajectory,
        log=log,
        interval=interval,
        restart=restart,
        overwrite=overwrite,
        seed=seed,
        max_force=max_force,
        device=device,
        dtype=dtype,
        symmetrize=symmetrize,
        accelerate=accelerate,
        program=program,
        max_memory=max_memory,
    )


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As model.channels=32.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what run_dir holds, if it holds anything.")
    ] = False,
) -> None:
    """Train a potential.

    \b
    Examples:
      mlip config --preset small > si.yaml
      mlip train si.yaml data.train=si.h5 schedule.max_time=30m run_dir=runs/si
      mlip train si.yaml data.train=si.h5 schedule.max_time=30m run_dir=runs/si --resume
      torchrun --nproc-per-node 2 -m mlip train si.yaml
    """
    from mlip.training.config import load_training
    from mlip.training.console import train_on_console

    more = ["resume=auto"] if resume else []
    train_on_console(load_training(config, [*(overrides or []), *more]))


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Annotated[list[str], typer.Argument(metavar="DATA.h5...", help="Labelled data files.")],
    out: Annotated[
        str | None, typer.Option(help="Folder for tables, parity plots and predictions (extxyz).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Structures at a time.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "",
    symmetrize: Symmetrize = None,
) -> None:
    """Errors of a model on labelled data: MAE and RMSE of energy, forces and stress by config_type.

    \b
    Examples:
      mlip eval runs/si/best.safetensors test.h5
      mlip eval silicon test.h5 --out report
      mlip eval runs/learned/best.safetensors test.h5 --symmetrize octahedral
    """
    from mlip.calculators.rotation_spread import averaged
    from mlip.evaluation.evaluate import evaluate_files

    reports = evaluate_files(
        model,
        data,
        out,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        wrap=lambda potential: averaged([potential], symmetrize)[0],
    )
    typer.echo("\n\n".join(report.text() for report in reports))


@app.command()
def nero(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... DATA", help="Models, then one file of structures (.h5 or ASE's)."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for page, figures and arrays.")],
    name: Annotated[
        list[str] | None, typer.Option(help="What a model is called; once for each model.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Structures, evenly spaced over the file.")] = 16,
    grid: Annotated[int, typer.Option(help="Rings of the sphere; cost grows as its cube.")] = 10,
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="rotations, reflections, plane, translations, permutations or cells; may be "
            "repeated. [default: all]",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Also figures as PNG and PDF.")] = True,
    device: Device = "auto",
    dtype: Dtype = "",
) -> None:
    """Errors of models over all poses of a structure: is the symmetry known, and where is it not.

    \b
    Examples:
      mlip nero runs/a/best.safetensors runs/b/best.safetensors test.h5 --out orbits
      mlip nero silicon si.cif --out orbits --group rotations --group cells
    """
    from rich.console import Console

    from mlip.evaluation.nero import summary
    from mlip.evaluation.nero_report import nero_report

    if len(paths) < 2:
        raise ValueError("give at least one model and the structures: mlip nero MODEL... DATA")
    with Console(stderr=True).status("orbits") as status:
        result = nero_report(
            paths[:-1],
            paths[-1],
            out,
            names=name or (),
            samples=samples,
            grid=grid,
            groups=group or None,
            figures=figures,
            device=device,
            dtype=dtype,
            progress=lambda model, number: status.update(f"{model}: sample {number + 1}"),
        )
    typer.echo(f"{summary(result)}\n\nopen {os.path.join(out, 'nero.html')}")


@app.command()
def config(
    preset: Annotated[str, typer.Option(help="small, medium or large.")] = "medium",
    model: Annotated[str, typer.Option(help="Name of the model.")] = "facet",
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema instead, for editors.")
    ] = False,
) -> None:
    """Print a commented configuration to start from.

    \b
    Examples:
      mlip config --preset small > train.yaml
      mlip config --schema > schema.json
    """
    import json

    from mlip.training.config import json_schema, to_yaml
    from mlip.training.config import preset as make

    text = json.dumps(json_schema(model), indent=2) if schema else to_yaml(make(model, preset))
    typer.echo(text)


def main() -> None:
    """Entry point: errors of the user's input are one line without a traceback.

    With MLIP_DEBUG=1 in the environment the traceback is shown.
    """
    if os.environ.get("MLIP_ALLOCATOR") != "default":
        from mlip.allocator import tune_allocator

        tune_allocator()
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
