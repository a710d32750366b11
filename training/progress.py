"""Progress bar of a training on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

if TYPE_CHECKING:
    from rich.console import Console

    from mlip.training.trainer import Trainer

INTERVAL = 0.25  # seconds between redraws; a step takes milliseconds


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Trainer], None]]:
    """Gives a function to call after each step; draws how far the training is, and time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    begin: list[tuple[float, float]] = []  # (clock, progress) at the first step of this process
    drawn = 0.0
    with Progress(
        *columns,
        TextColumn("{task.fields[left]}"),
        console=console,
        auto_refresh=False,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=1.0, left="")

        def on_step(trainer: Trainer) -> None:
            nonlocal drawn
            now = time.monotonic()
            if not begin:
                begin.append((trainer.clock, trainer.progress))
            if now - drawn < INTERVAL:
                return
            drawn = now
            done = trainer.progress
            clock0, done0 = begin[0]
            left = ""
            if done > done0:
                seconds = (trainer.clock - clock0) * (1 - done) / (done - done0)
                left = f"{_clock(seconds)} left"
            loss = float(trainer.loss_sum) / max(1, trainer.loss_steps)
            text = f"epoch {trainer.epoch + 1}  step {trainer.step}  loss {loss:.4g}"
            progress.update(task, completed=done, description=text, left=left)
            progress.refresh()

        yield on_step


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
