"""Long benchmarks in pieces: each result is a row of a JSON file, and a row that is there is not
made again.

A broken-off call goes on where it stopped, and the same command may run several times side by side:
each takes pieces that no other one works at.  ``insert`` puts a table into a page of the docs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Pieces:
    """Rows of a results file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, **key: Any) -> list[Row]:
        """Those that have these values."""
        if not self.path.exists():
            return []
        return [row for row in json.loads(self.path.read_text()) if key.items() <= row.items()]

    def add(self, row: Row) -> None:
        """Add a row; other processes may do the same."""
        with lock(self.path.parent):
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps([*self.rows(), row], indent=1) + "\n")
            new.replace(self.path)
        print(json.dumps(row), flush=True)

    @contextmanager
    def claimed(self, folder: Path, **key: Any) -> Iterator[bool]:
        """Whether the piece is to be made here: not there, and nobody else is at work in its
        folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, wait=False) as free:
            yield free and not self.rows(**key)


@contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder against other processes; the system lets it go if this one is killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(handle)


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between the comments ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    old = page.read_text()
    if not pattern.search(old):
        raise SystemExit(f"{page.name} has no comments {begin.strip()} and {end}")
    page.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n\n{end}", old))
