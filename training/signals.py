"""SIGTERM and Ctrl-C: let the training save itself, then exit with 143 or 130."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

PATIENCE = 5.0  # seconds; launchers repeat a signal at once, a person who repeats it later means it


class StopSignals:
    """Within the block, a signal is noted in ``received`` while ``polite``, else ends the run."""

    def __init__(self) -> None:
        self.received = 0
        self.polite = False
        self._when = 0.0
        self._owner = os.getpid()
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked reader of data; its parent decides about Ctrl-C
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if not self.polite:
            raise SystemExit(128 + number)
        if not self.received:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > PATIENCE:
            raise SystemExit(128 + number)
