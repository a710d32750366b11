"""The allocator is tuned on request only, and tensors come out the same."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, torch
from mlip.allocator import tune_allocator
tuned = tune_allocator()
assert tuned or not sys.platform.startswith("linux") or "musl" in sys.version
x = torch.arange(3_000_000.0)
assert (x + x).sum() == 2 * x.sum() and x[-1] == 2_999_999
print("torch" in sys.modules, tuned)
"""


def test_in_a_process_of_its_own() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
