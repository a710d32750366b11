"""Energy, forces and stress through the calculator: Facet beside mace-torch small, in one run.

    MACE=/path/to/mace/venv python benchmarks/speed.py --model best.safetensors --threads 2

Each package runs in a process of its own; rounds alternate between them, positions change at every
step, the medians and minima of all rounds are written.  The models have random weights unless
``--model`` is given: the time does not depend on their values.  ``--allocator default`` leaves
glibc's settings alone for both.
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
SYSTEMS = ("molecule", "Si8", "Si64", "Si216")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="")
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
    pythons = {
        "facet": sys.executable,
        "mace-small": str(Path(os.environ["MACE"]) / "bin" / "python"),
    }
    workers = {
        name: subprocess.Popen(
            [python, "-W", "ignore", str(HERE / "speed_worker.py"), name, str(a.threads), a.model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for name, python in pythons.items()
    }
    times: dict[str, dict[str, list[float]]] = {s: {n: [] for n in workers} for s in SYSTEMS}
    for _ in range(a.rounds):
        for system in SYSTEMS:
            for name, worker in workers.items():
                assert worker.stdin and worker.stdout
                worker.stdin.write(system + "\n")
                worker.stdin.flush()
                while not (line := worker.stdout.readline()).startswith("RESULT "):
                    if not line:
                        raise RuntimeError(f"the process of {name} ended")
                times[system][name] += json.loads(line.removeprefix("RESULT "))
    for worker in workers.values():
        worker.terminate()
    table = {
        system: {
            **{
                f"{n}_{kind}_ms": round(1e3 * f(t), 2)
                for n, t in by_name.items()
                for kind, f in (("median", statistics.median), ("min", min))
            },
            "ratio_of_medians": round(
                statistics.median(by_name["mace-small"]) / statistics.median(by_name["facet"]), 2
            ),
        }
        for system, by_name in times.items()
    }
    result = {"cpu": cpu_name(), "threads": a.threads, "allocator": a.allocator, "systems": table}
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
