"""The course of a training: log.csv, log.jsonl, and TensorBoard or W&B where asked for."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.evaluation.metrics import QUANTITIES
from mlip.training.config import LoggingConfig, TrainConfig

COLUMNS = (
    "epoch",
    "step",
    "seconds",
    "learning_rate",
    *(
        name
        for part in ("train", "valid")
        for name in (
            f"{part}_loss",
            *(f"{part}_{q}_{kind}" for q in QUANTITIES for kind in ("mae", "rmse")),
        )
    ),
    *(f"valid_symmetry_{q}_rms" for q in ("energy", "forces")),
)


class RunLog:
    """Writes one row per epoch; energies in eV/atom, forces in eV/angstrom, stress in
    eV/angstrom^3.

    Parameters
    ----------
    run_dir : folder of the run
    rows : epochs that the continued run has behind it; later rows, of a run that was killed, are
        dropped
    """

    def __init__(self, run_dir: Path, config: TrainConfig, rows: int = 0) -> None:
        self.csv, self.jsonl = run_dir / "log.csv", run_dir / "log.jsonl"
        old = read_rows(run_dir)[:rows]
        self._rewrite(old)
        self._tensorboard = _tensorboard(config.logging, run_dir, rows)
        self._wandb = _wandb(config, run_dir, rows)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the row of an epoch."""
        with open(self.csv, "a", encoding="utf-8", newline="") as file:
            file.write(_csv_row(row))
        with open(self.jsonl, "a", encoding="utf-8") as file:
            file.write(_json_row(row))
        numbers = {k: v for k, v in row.items() if k != "epoch" and v is not None}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key.replace("_", "/", 1), value, row["epoch"])
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(row), step=row["epoch"])

    def close(self) -> None:
        """End the sessions of TensorBoard and W&B."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        texts = {
            self.csv: ",".join(COLUMNS) + "\n" + "".join(map(_csv_row, rows)),
            self.jsonl: "".join(map(_json_row, rows)),
        }
        for path, text in texts.items():
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of log.jsonl; a last line cut short by a kill is left out."""
    path = run_dir / "log.jsonl"
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _csv_row(row: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    values = [row.get(name) for name in COLUMNS]
    csv.writer(buffer, lineterminator="\n").writerow(["" if v is None else v for v in values])
    return buffer.getvalue()


def _json_row(row: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite) + "\n"


def require_loggers(config: LoggingConfig) -> None:
    """Complain of a logger that is asked for and not installed, before any work is done.

    Raises
    ------
    ValueError
        With the command that installs it.
    """
    for wanted, module, extra in (
        (config.tensorboard, "tensorboard", "tensorboard"),
        (config.wandb, "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"logging.{extra} is on, but {module} is not installed: "
                f"pip install 'eqmlip[{extra}]'"
            )


def _tensorboard(config: LoggingConfig, run_dir: Path, rows: int) -> Any:
    if not config.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=rows or None)


def _wandb(config: TrainConfig, run_dir: Path, rows: int) -> Any:
    if not config.logging.wandb:
        return None
    import wandb  # type: ignore[import-not-found, unused-ignore]

    noted = run_dir / "wandb_id.txt"  # a continued run goes on under its first number
    run = wandb.init(
        project=config.logging.wandb_project,
        name=run_dir.resolve().name,
        id=noted.read_text(encoding="utf-8") if rows and noted.exists() else None,
        resume="allow",
        dir=str(run_dir),
        config=config.model_dump(mode="json"),
    )
    noted.write_text(run.id, encoding="utf-8")
    return run
