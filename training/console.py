"""Training from the command line: log lines go to the terminal, above a progress bar."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mlip.training.config import TrainConfig

if TYPE_CHECKING:
    from logging import LogRecord


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def train_on_console(config: TrainConfig) -> Path:
    """``mlip.training.run.train`` with progress on the terminal."""
    from mlip.training.run import train

    console = Console()
    package = logging.getLogger("mlip")
    handler = _ConsoleHandler(console)
    package.addHandler(handler)
    # Of several processes the first one speaks.
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        return train(config, console)
    finally:
        package.removeHandler(handler)
