"""Models side by side on rMD17 for the same time: errors, and how far from exact symmetry.

    MLIP_DATASETS=... python benchmarks/rmd17.py ponita facet mace escaip --minutes 60
    python benchmarks/rmd17.py --table

A model is a name of this package, or name:size (medium by default), or a variant of trainings.py.
Each trains on one thread; the same command may run once for each core, and takes what the others
leave.  Models whose rotations are learned see rotated structures.  Test errors are those of one
pass over the 1000 test structures, with no average over rotations: energies in meV for the whole
molecule, as published, forces in meV/angstrom.  The rotation error is the root mean square
deviation of forces (energies) on orbits of random rotations and reflections from their mean; it is
also given relative to the root mean square error of forces.  Rows go into results/rmd17.json as
runs finish; a broken-off call goes on where it stopped.  ``--table`` writes docs/models.md.
"""

from __future__ import annotations

import argparse
import json

from pieces import Pieces, Row, insert
from trainings import HERE, RMD17, for_minutes, measure, run_folder, train

RESULTS = Pieces(HERE / "results" / "rmd17.json")


def table(rows: list[Row]) -> str:
    lines = [
        "| molecule | minutes | model | parameters | steps | E MAE (meV) | F MAE (meV/Å) "
        "| rotation error of F (meV/Å, RMS) | of the RMSE of F |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    timed = [r for r in rows if r["minutes"] is not None]
    for r in sorted(timed, key=lambda r: (RMD17.index(r["set"]), r["minutes"], r["forces_mae"])):
        lines.append(
            f"| {r['set']} | {r['minutes']:g} | `{r['model']}` | {r['parameters']} "
            f"| {r['steps']} | {r['energy_mae']:.3g} | {r['forces_mae']:.3g} "
            f"| {r['rotation_forces_rms']:.2g} | {100 * r['rotation_over_error']:.2g} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["ponita", "facet", "mace", "escaip"])
    parser.add_argument("--molecules", nargs="+", choices=RMD17, default=RMD17[:3])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--epochs", type=int, help="the same number of steps instead of time")
    parser.add_argument("--set", nargs="+", default=[], help="options of the training, a.b=c")
    parser.add_argument(
        "--validation", action="store_true", help="print validation errors only, record nothing"
    )
    parser.add_argument("--table", action="store_true", help="write the table into the docs")
    a = parser.parse_args()
    if a.table:
        text = table(RESULTS.rows())
        insert(HERE.parent / "docs" / "models.md", "rmd17", text)
        print(text)
        return
    length = [f"schedule.max_epochs={a.epochs}"] if a.epochs else for_minutes(a.minutes)
    for molecule in a.molecules:
        for model in a.models:
            key: Row = {"set": molecule, "model": model, "minutes": a.minutes}
            if a.epochs:
                key |= {"minutes": None, "epochs": a.epochs}
            if a.set:
                key["options"] = a.set
            run = run_folder(
                model, molecule, f"{a.epochs}-epochs" if a.epochs else f"{a.minutes:g}m"
            )
            if a.set:
                run = run.with_name("-".join([run.name, *a.set]))
            with RESULTS.claimed(run, **key) as ours:
                if not ours:
                    continue
                speed = train(run, model, molecule, [*length, *a.set])
                if a.validation:
                    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
                    errors = {k: 1e3 * v for k, v in last.items() if k.startswith("valid_")}
                    print(key, speed, errors, flush=True)
                else:
                    RESULTS.add({**key, **speed, **measure(run, molecule)})


if __name__ == "__main__":
    main()
