"""Energy, forces and stress through the calculator, beside mace-torch, in one run.

    PEERS=FOLDER python benchmarks/speed.py facet facet:small nequip-medium mace-small

The models: a name of this package (medium preset, or name:size), a model file, or one of the
packages in ``peers.py``, ``-small`` or ``-medium``; their environments are made by
``install_peers.sh``.  Each runs in a process of its own; rounds alternate
between them, positions change at every step, medians and minima over all rounds are written, and
the peak of memory above the loaded model.  All but files have random weights: time and memory do
not depend on their values.  ``--allocator default`` leaves glibc's settings alone for all.  Ratios
are those of the last model to each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SYSTEMS = ("molecule", "Si8", "Si64", "Si216", "Si512", "Si1000", "Si4096")
PEERS = ("mace", "nequip", "sevenn", "matgl", "chgnet")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def python_of(name: str) -> str:
    """The interpreter of the environment that a model lives in."""
    peer = name.partition("-")[0]
    if peer not in PEERS:
        return sys.executable
    if "PEERS" not in os.environ:
        raise SystemExit("set PEERS to the folder that install_peers.sh has made")
    return str(Path(os.environ["PEERS"]) / peer / "bin" / "python")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["facet", "mace-small"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS[:4])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--allocator", choices=["tuned", "default"], default="tuned")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed.json")
    a = parser.parse_args()
    environment = dict(
        os.environ, OMP_NUM_THREADS=str(a.threads), TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"
    )
    environment["PYTHONPATH"] = str(HERE.parent)
    if a.allocator == "tuned":
        environment.update(
            MALLOC_MMAP_THRESHOLD_="1073741824",
            MALLOC_TRIM_THRESHOLD_="2147483647",
            MALLOC_TOP_PAD_="67108864",
        )
    pythons = {name: python_of(name) for name in a.models}
    workers = {
        name: subprocess.Popen(
            [python, "-W", "ignore", str(HERE / "speed_worker.py"), name, str(a.threads), a.dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for name, python in pythons.items()
    }
    times: dict[str, dict[str, list[float]]] = {s: {n: [] for n in workers} for s in a.systems}
    memory: dict[str, dict[str, float]] = {s: {} for s in a.systems}
    for _ in range(a.rounds):
        for system in a.systems:
            for name, worker in workers.items():
                assert worker.stdin and worker.stdout
                worker.stdin.write(system + "\n")
                worker.stdin.flush()
                while not (line := worker.stdout.readline()).startswith("RESULT "):
                    if not line:
                        raise RuntimeError(f"the process of {name} ended")
                answer = json.loads(line.removeprefix("RESULT "))
                times[system][name] += answer["seconds"]
                # The first round: later ones reuse what the process has kept.
                memory[system].setdefault(name, answer["peak_MiB"])
    for worker in workers.values():
        worker.terminate()
    last = a.models[-1]
    table = {
        system: {
            name: {
                "median_ms": round(1e3 * statistics.median(t), 2),
                "min_ms": round(1e3 * min(t), 2),
                "peak_MiB": round(memory[system][name], 1),
                f"times_faster_than_{last}": round(
                    statistics.median(by_name[last]) / statistics.median(t), 2
                ),
                f"memory_over_{last}": round(memory[system][name] / memory[system][last], 3),
            }
            for name, t in by_name.items()
        }
        for system, by_name in times.items()
    }
    result = {
        "cpu": cpu_name(),
        "threads": a.threads,
        "allocator": a.allocator,
        "dtype": a.dtype,
        "systems": table,
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
