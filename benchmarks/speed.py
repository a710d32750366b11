"""Speed and memory of our models and of other packages, side by side in one run.

    PEERS=FOLDER MLIP_DATASETS=FOLDER python benchmarks/speed.py            all, for a night
    PEERS=FOLDER MLIP_DATASETS=FOLDER python benchmarks/speed.py --quick    a quarter of an hour
    python benchmarks/speed.py --estimate [--quick]                         how long it would take
    python benchmarks/speed.py --page                                       docs/speed.md

Models: a name of this package (``name``, ``name:size``, a variant of ``trainings.py``; ``+compile``
or ``+splines`` at the end for an acceleration), a model file, or one of the packages in
``peers.py`` with a size; their environments are made by ``install_peers.sh``.  All but files and
published models have random weights: time and memory do not depend on their values.

Two halves: energy, forces and stress through the ASE calculator, positions changed at every step
(``--systems``); and steps of training on forces (``--trainings``, float32), see
``speed_training.py``.  Each model runs in a process of its own, and these take turns: medians over
all rounds are written, the peak of memory above the loaded model, and what finding neighbours, the
model, and the rest, which is Python, have of the time.

In pieces: a row of the results for each model, system or training, dtype, number of threads and
allocator; rows that are there for this processor are not made again, so that a broken-off call goes
on.  Models that are added later run beside the first ``--reference``, whose time in the same run is
in each row.  What would not fit into the memory, or would take longer than ``--longest`` for a
step, is predicted from the next smaller system and left out, with the reason in its row.
``tuned`` is the setting of ``mlip.allocator`` for all alike, ``default`` glibc's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pieces import Pieces, Row

HERE = Path(__file__).parent
SYSTEMS = ("molecule", "Si8", "Si64", "Si216", "Si512", "Si1000", "Si4096")
TRAININGS = ("3BPA:5", "3BPA:32", "Si:2")
PEERS = ("mace", "nequip", "sevenn", "matgl", "chgnet")
REFERENCE = "mace-small"
# Rough ms of a step for each atom of silicon, and of training for each molecule, in float32 with
# two threads and the tuned allocator: for the estimate only.
ROUGH = {
    "facet:small+compile": (0.10, 0), "facet:small": (0.14, 9), "facet": (0.3, 16),
    "gaunt": (0.3, 16), "escaip": (0.25, 16), "transip": (0.25, 20), "ponita": (0.3, 20),
    "environment": (0.15, 12), "mace:small": (0.45, 40), "mace:medium": (0.95, 80),
    "mace-small": (1.2, 90), "mace-medium": (2.7, 160), "nequip-small": (0.12, 6),
    "nequip-medium": (2.0, 120), "sevenn": (3.5, 200), "matgl": (0.7, 40), "chgnet": (1.3, 60),
}  # fmt: skip
QUICK = ("facet:small", "facet:small+compile", "facet", "mace-small", "matgl")
QUICK_SYSTEMS = ("molecule", "Si8", "Si64", "Si216", "Si1000")
SLOWER = {"float64": 2.0, 1: 1.8, "default": 1.8}  # times, for the estimate
START = 3.0  # seconds until a process is there, about; more of them with ``+compile``
COMPILE = 40.0
TURN = 1.0  # seconds that a turn takes at least
LEAST_ROUNDS = 2


class Setting(NamedTuple):
    dtype: str
    threads: int
    allocator: str


Work = dict[str, Any]  # {"system": name} or {"training": set, "batch": structures}


def cpu_name() -> str:
    """Name and widest vectors of the processor: virtual ones of other speed have the same name."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]} ({torch.backends.cpu.get_cpu_capability()})"


def python_of(name: str) -> str:
    """The interpreter of the environment that a model lives in."""
    peer = name.partition("-")[0]
    if peer not in PEERS:
        return sys.executable
    if "PEERS" not in os.environ:
        raise SystemExit("set PEERS to the folder that install_peers.sh has made")
    return str(Path(os.environ["PEERS"]) / peer / "bin" / "python")


def environment(threads: int, allocator: str = "tuned") -> dict[str, str]:
    """Variables of a process that is timed; those of glibc are what ``mlip.allocator`` sets."""
    found = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")},
        "OMP_NUM_THREADS": str(threads),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "PYTHONPATH": str(HERE.parent),
    }
    if allocator == "tuned":
        found["MALLOC_MMAP_THRESHOLD_"] = str(1 << 30)
        found["MALLOC_TRIM_THRESHOLD_"] = str(2**31 - 1)
        found["MALLOC_TOP_PAD_"] = str(1 << 26)
    return found


def available_MiB() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    return float("inf")


class Worker:
    """A model in a process of its own."""

    def __init__(self, model: str, setting: Setting) -> None:
        self.model = model
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [
                python_of(model), "-W", "ignore", str(HERE / "speed_worker.py"),
                model, str(setting.threads), setting.dtype,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment(setting.threads, setting.allocator),
        )  # fmt: skip
        self.versions = ""

    def answer(self) -> Row | None:
        """The next one; None if the process has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        return None

    def ready(self) -> None:
        hello = self.answer()
        if hello is None:
            self.errors.seek(0)
            raise SystemExit(f"{self.model} does not start:\n{self.errors.read()[-2000:]}")
        self.versions = hello["versions"]

    def ask(self, task: Work) -> Row:
        try:
            assert self.process.stdin
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            answer = self.answer()
        except BrokenPipeError:
            answer = None
        killed = {"left_out": "its process was killed, for memory as a rule", "too_large": True}
        return answer or killed

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


class Workers:
    """The processes of one setting; started when they are needed first."""

    def __init__(self) -> None:
        self.setting: Setting | None = None
        self.all: dict[str, Worker] = {}

    def of(self, setting: Setting, models: Sequence[str]) -> dict[str, Worker]:
        if setting != self.setting:
            self.end()
            self.setting = setting
        new = [m for m in models if m not in self.all or self.all[m].process.poll() is not None]
        for model in new:
            self.all[model] = Worker(model, setting)
        for model in new:
            self.all[model].ready()
        return {m: self.all[m] for m in models}

    def end(self) -> None:
        for worker in self.all.values():
            worker.end()
        self.all.clear()


class Speed:
    """Rows of the results for this processor, and how more are made."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.results = Pieces(a.out)
        self.cpu = cpu_name()
        self.a = a
        self.workers = Workers()

    def rows(self, setting: Setting, work: Work, **key: Any) -> list[Row]:
        return self.results.rows(cpu=self.cpu, **setting._asdict(), **work, **key)

    def missing(self, setting: Setting, work: Work) -> list[str]:
        """Models whose row is not there."""
        models = [m for m in self.a.models if "training" not in work or trainable(m)]
        return [m for m in models if not self.rows(setting, work, model=m)]

    def too_large(self, model: str, setting: Setting, work: Work) -> str:
        """Why a model should not be tried, or nothing: judged by the next smaller system."""
        here = atoms_of(work.get("system", ""))
        smaller = [(n, s) for s in SYSTEMS if 64 <= (n := atoms_of(s)) < here]
        for atoms, system in reversed(smaller):
            for row in self.rows(setting, {"system": system}, model=model):
                if "left_out" in row:
                    return row["left_out"] if row.get("too_large") else ""
                times = here / atoms
                if (step := row["ms"] * times / 1e3) > self.a.longest:
                    return f"a step would take about {step:.0f} s"
                if (peak := row["peak_MiB"] * times) > 0.9 * available_MiB():
                    return f"would need about {peak / 1024:.0f} GiB"
                return ""
        return ""

    def measure(self, setting: Setting, work: Work, missing: list[str]) -> None:
        """All missing rows of a system or a training, in turns."""
        done: dict[str, Row] = {}
        for model in missing:
            if reason := self.too_large(model, setting, work):
                done[model] = {"left_out": reason, "too_large": True}
        models = [m for m in missing if m not in done]
        reference = self.a.reference
        if models and reference not in missing and not self.too_large(reference, setting, work):
            models.append(reference)
        workers = self.workers.of(setting, models)
        answers: dict[str, list[Row]] = {m: [] for m in models}
        begin = time.monotonic()
        for k in range(self.a.rounds):
            if k >= LEAST_ROUNDS and time.monotonic() - begin > 60 * self.a.minutes:
                break
            for model, worker in workers.items():
                if model in done:
                    continue
                answer = worker.ask({**work, "limit": TURN})
                if "left_out" in answer:
                    done[model] = answer
                else:
                    answers[model].append(answer)
        for model in models:
            if model not in done:
                done[model] = summary(answers[model])
        reference_ms = done.get(reference, {}).get("ms")
        for model in missing:
            row = {"model": model, **work, **setting._asdict(), "cpu": self.cpu, **done[model]}
            if model in workers:
                row["versions"] = workers[model].versions
            if "ms" in row and reference_ms:
                row |= {"reference": reference, "reference_ms": reference_ms}
            self.results.add(row)


def summary(turns: list[Row]) -> Row:
    """One row of the answers of all rounds."""
    seconds = [s for turn in turns for s in turn["seconds"]]
    row: Row = {
        "ms": round(1e3 * statistics.median(seconds), 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "steps": len(seconds),
        "rounds": len(turns),
        # What is only made in the first round does not count.
        "peak_MiB": round(statistics.median(turn["peak_MiB"] for turn in turns), 1),
        "processors": round(statistics.median(turn["processors"] for turn in turns), 2),
    }
    if "atoms" in turns[0]:
        row |= {key: turns[0][key] for key in ("atoms", "parameters")}
        for part in ("neighbors", "model"):
            time_of_part = sum(turn["parts"].get(part, 0.0) for turn in turns)
            row[f"share_{part}"] = round(time_of_part / sum(seconds), 4)
        row["share_python"] = round(1 - row["share_neighbors"] - row["share_model"], 4)
    return row


def trainable(model: str) -> bool:
    return model.partition("+")[2] in ("", "compile") and not Path(model).is_file()


def atoms_of(system: str) -> int:
    return int(system[2:]) if system.startswith("Si") else 27


def plan(a: argparse.Namespace) -> Iterator[tuple[Setting, Work]]:
    """What is to be measured, the most important first."""
    for allocator, dtype, threads in product(a.allocators, a.dtypes, a.threads):
        setting = Setting(dtype, threads, allocator)
        for system in a.systems:
            yield setting, {"system": system}
        for training in a.trainings if dtype == "float32" else ():
            name, _, batch = training.partition(":")
            yield setting, {"training": name, "batch": int(batch)}


def expected_seconds(a: argparse.Namespace, setting: Setting, work: Work, models: list) -> float:
    """A guess: turns last a second, or the step that warms up and one more."""
    slower = 1.0
    for value in setting:
        slower *= SLOWER.get(value, 1.0)
    total = 0.0
    for model in models:
        of_atom, of_molecule = ROUGH.get(model, (1.0, 60.0))
        if "system" in work:
            step = 1e-3 * (5 + of_atom * atoms_of(work["system"]))
        else:  # 64 atoms with more neighbours are about four molecules
            step = 1e-3 * of_molecule * work["batch"] * (4 if work["training"] == "Si" else 1)
        if (step := step * slower) < a.longest:
            total += max(TURN, 2 * step)
    rounds = a.rounds if total * a.rounds < 60 * a.minutes else LEAST_ROUNDS
    rounds = max(rounds, min(a.rounds, int(60 * a.minutes / max(total, 1e-9)) + 1))
    return total * rounds


def estimate(speed: Speed) -> list[tuple[Setting, Work, float]]:
    """What is still to be done, and about how many seconds each piece takes."""
    pieces = [(setting, work, speed.missing(setting, work)) for setting, work in plan(speed.a)]
    return [(s, w, expected_seconds(speed.a, s, w, m)) for s, w, m in pieces if m]


def tell(pieces: list[tuple[Setting, Work, float]], models: Sequence[str]) -> None:
    start = START * len(models) + COMPILE * sum("+compile" in m for m in models)
    by_setting: dict[Setting, float] = {}
    for setting, _, seconds in pieces:
        by_setting[setting] = by_setting.get(setting, start) + seconds
    for setting, seconds in by_setting.items():
        print(f"{' '.join(map(str, setting)):24s} {seconds / 60:6.1f} min")
    print(f"{len(pieces)} pieces, about {sum(by_setting.values()) / 60:.0f} min on a quiet machine")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"default: {' '.join(ROUGH)}")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS)
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, help="set:batch")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"])
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--allocators", nargs="+", choices=["tuned", "default"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=4, help="for more than two rounds")
    parser.add_argument("--longest", type=float, default=60, help="step, seconds")
    parser.add_argument("--reference", default=REFERENCE)
    parser.add_argument("--quick", action="store_true", help="what matters most")
    parser.add_argument("--estimate", action="store_true", help="only say how long it takes")
    parser.add_argument("--page", action="store_true", help="write the page of the results")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="of the page")
    a = parser.parse_args()
    whole: dict[str, Sequence[Any]] = {
        "models": tuple(ROUGH), "systems": SYSTEMS, "trainings": TRAININGS,
        "dtypes": ("float32", "float64"), "threads": (2, 1), "allocators": ("tuned", "default"),
    }  # fmt: skip
    some = {"models": QUICK, "systems": QUICK_SYSTEMS, "dtypes": ("float32",), "threads": (2,)}
    for name, values in whole.items():
        given = getattr(a, name)
        if given is None or (name == "models" and not given):
            setattr(a, name, some.get(name, values) if a.quick else values)
    return a


def main() -> None:
    a = parse()
    if a.page:
        from speed_page import write_page

        write_page(Pieces(a.out).rows(), a.docs)
        return
    speed = Speed(a)
    pieces = estimate(speed)
    tell(pieces, a.models)
    if a.estimate:
        return
    if any("training" in work for _, work, _ in pieces) and "MLIP_DATASETS" not in os.environ:
        raise SystemExit("set MLIP_DATASETS to the folder of the data, or give --trainings alone")
    begin, expected = time.monotonic(), 0.0
    try:
        for k, (setting, work, seconds) in enumerate(pieces):
            speed.measure(setting, work, speed.missing(setting, work))
            expected += seconds
            left = sum(s for _, _, s in pieces[k + 1 :]) / expected * (time.monotonic() - begin)
            print(f"{k + 1} of {len(pieces)} pieces, about {left / 60:.0f} min left", flush=True)
    finally:
        speed.workers.end()


if __name__ == "__main__":
    main()
