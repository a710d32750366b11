"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def datasets() -> Path:
    """Folder of reference data outside the repository; tests that ask for it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "datasets"
    folder = Path(os.environ.get("MLIP_DATASETS", default)).resolve()
    if not folder.is_dir():
        pytest.skip("reference data not found; set MLIP_DATASETS to their folder")
    return folder
