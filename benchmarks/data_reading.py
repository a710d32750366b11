"""How fast a data file is read: 100 000 synthetic configurations of 20-40 atoms.

    python benchmarks/data_reading.py [--structures 100000] [--out
    benchmarks/results/data_reading.json]

Bars: 15 000 random reads and 300 000 block reads per second, opened in under 2 s, memory
independent of the size. The file lies in the page cache, as it does after the first epoch of a
training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from mlip.data.dataset import HDF5Dataset
from mlip.data.hdf5 import HDF5File, HDF5Writer
from mlip.data.loader import GraphLoader


def write(path: Path, structures: int) -> float:
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    with HDF5Writer(path, {"source": "synthetic"}) as writer:
        for k in range(structures):
            n = int(rng.integers(20, 41))
            writer.append(
                rng.integers(1, 9, n),
                rng.uniform(0, 7.5, (n, 3)),
                np.eye(3) * 7.5,
                [True] * 3,
                energy=float(k),
                forces=rng.normal(size=(n, 3)),
                stress=np.eye(3),
                config_type="even" if k % 2 == 0 else "odd",
            )
    return time.perf_counter() - start


def memory() -> float:
    """Peak resident memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rate(count: int, start: float) -> int:
    return round(count / (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structures", type=int, default=100_000)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "data_reading.json"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.h5"
        result = {
            "command": f"python benchmarks/data_reading.py --structures {arguments.structures}",
            "structures": arguments.structures,
            "write_seconds": round(write(path, arguments.structures), 2),
            "file_MB": round(path.stat().st_size / 1e6, 1),
        }
        before = memory()
        start = time.perf_counter()
        file = HDF5File(path)
        result["open_seconds"] = round(time.perf_counter() - start, 4)
        order = np.random.default_rng(1).integers(0, len(file), 30_000).tolist()
        start, cpu = time.perf_counter(), time.process_time()
        for k in order:
            assert file.read(k).energy is not None
        result["random_reads_per_second"] = rate(len(order), start)
        # On a shared machine the clock also counts others' work; this is what the reads themselves
        # cost.
        result["random_reads_per_cpu_second"] = round(len(order) / (time.process_time() - cpu))
        seen = 0
        start = time.perf_counter()
        for _, block in file.blocks():
            seen += len(block)
        assert seen == len(file)
        result["block_reads_per_second"] = rate(seen, start)
        result["memory_growth_MB"] = round(memory() - before, 1)

        dataset = HDF5Dataset(path, cutoff=4.0).subset(np.arange(min(4000, len(file))))
        start = time.perf_counter()
        for _ in GraphLoader(dataset, batch_size=32, shuffle=True):
            pass
        result["batched_graphs_per_second_cutoff_4"] = rate(len(dataset), start)
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "h5py": h5py.__version__,
        "numpy": np.__version__,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
