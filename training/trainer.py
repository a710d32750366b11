"""One training loop for all models.

An epoch is: steps over all batches, then validation with the averaged weights, then one line in the
log.  Everything that decides how the training goes on is in one file, ``state.safetensors``, so
that a continued run is identical to the bit to one that was never interrupted; only a limit of time
(``max_time``) makes a run depend on the clock, and a GPU on the order in which it happens to add.

    step:  g = d loss / d weights, summed over processes; clip; optimizer; average of weights

Files in the run's folder: ``best.safetensors`` and ``last.safetensors`` (potentials with averaged
weights), ``state.safetensors`` (raw weights, averages, optimizers, random states, position),
``log.csv``, ``log.jsonl``.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip import checkpoint
from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.data.loader import GraphLoader
from mlip.evaluation.evaluate import Breakdown, evaluate
from mlip.evaluation.metrics import Errors, ErrorSums, flat, line
from mlip.evaluation.symmetry import SymmetryReport, sampled_symmetry_errors
from mlip.potential import Potential
from mlip.training import distributed, state
from mlip.training.compiled_steps import compiled_steps, require_compilable
from mlip.training.config import TrainConfig
from mlip.training.log import RunLog
from mlip.training.loss import Objective
from mlip.training.optimizer import AveragedWeights, Plateau, learning_rate, make_optimizers
from mlip.training.sampling import AdaptiveSampling
from mlip.training.signals import StopSignals

logger = logging.getLogger(__name__)

STATE, BEST, LAST = "state.safetensors", "best.safetensors", "last.safetensors"
DIVERGED = 1e12  # a loss or gradient of this size is as bad as NaN: weights that explode in float64
SYMMETRY_STRUCTURES, SYMMETRY_COPIES = 8, 4  # of the symmetry error in the log
CHECK_EVERY = 16  # steps between looks at the loss on a GPU, which each look makes wait


class DivergenceError(ValueError):
    """The loss is no longer finite; the text names the step and the structures of the batch."""


class Interrupted(SystemExit):
    """Stopped by a signal after the state was saved; exit code 128 + number of the signal."""


class Trainer:
    """Train a potential.

    Parameters
    ----------
    potential : on its device and in its dtype
    objective : the loss
    train : batches of this process
    valid : the whole validation set
    config : of it optimizer, schedule, sizes of batches and run_dir are used
    signals : a noted signal ends the training after the current step
    fingerprint : what a continuation must have in common with the run, plain JSON
    sampling : shows structures as often as the validations make it worth; evenly without
    on_step : called after each step, for example to move a progress bar
    """

    def __init__(
        self,
        potential: Potential,
        objective: Objective,
        train: GraphLoader,
        valid: HDF5Dataset,
        config: TrainConfig,
        *,
        signals: StopSignals | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        sampling: AdaptiveSampling | None = None,
        on_step: Callable[[Trainer], None] | None = None,
    ) -> None:
        self.potential, self.objective = potential, objective
        self.train_loader, self.valid = train, valid
        self.config, self.schedule = config, config.schedule
        self.run_dir = Path(config.run_dir)
        self.signals = signals or StopSignals()
        # Through JSON, so that it compares equal to what a file gives back.
        self.fingerprint = json.loads(json.dumps(fingerprint or {}))
        self.sampling = sampling
        self.on_step = on_step
        self.device = potential.e0.device
        self.stepped = potential  # what steps evaluate: with runtime.compile a compiled one
        if config.runtime.compile:
            require_compilable(potential)
        distributed.broadcast(potential.state_dict().values())
        distributed.broadcast(objective.modules.state_dict().values())
        self.parameters = [p for p in potential.parameters() if p.requires_grad]
        self.trained = [*self.parameters, *objective.modules.parameters()]
        self.optimizers = make_optimizers(
            torch.nn.ModuleList([potential, objective.modules]), config.optimizer
        )
        decay = config.optimizer.ema_decay
        self.ema = None if decay is None else AveragedWeights(self.parameters, decay)
        self.plateau = Plateau(self.schedule.factor, self.schedule.plateau_patience)
        self.norm_limit = config.optimizer.clip_grad or math.inf
        # A look at the loss costs nothing on a CPU and between processes that wait for each other
        # anyhow.
        self.check_every = (
            CHECK_EVERY if self.device.type == "cuda" and distributed.world_size() == 1 else 1
        )

        self.epoch = self.step = 0  # completed ones
        self.epoch_trained = False  # the steps of this epoch are done, its validation is due
        self.clock = 0.0  # seconds of training on which all processes agree, interruptions left out
        self.rate = 1.0  # learning rate of the last step, relative to its top
        self.valid_seconds = 0.0
        self.best, self.best_epoch, self.waited = math.inf, -1, 0
        self.valid_errors: Errors = {}
        self.valid_sums = Breakdown(valid, self.device)
        self.symmetry: SymmetryReport | None = None  # of the first process
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_steps = 0
        self.sums = ErrorSums(device=self.device)
        self.log: RunLog | None = None
        self._unchecked: list[tuple[Tensor, Tensor]] = []  # (frames, loss + norm of the gradient)
        self._started = self._saved_at = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the training that is done, by epochs or by time, whichever is further."""
        share = 0.0
        if self.schedule.max_epochs is not None:
            share = (self.epoch + self._share_of_epoch()) / self.schedule.max_epochs
        if self.schedule.max_time is not None:
            budget = self.schedule.max_time - self.valid_seconds  # kept for the last validation
            share = max(share, self.clock / max(budget, 1e-3))
        return min(share, 1.0)

    def _share_of_epoch(self) -> float:
        if self.epoch_trained:
            return 1.0
        loader = self.train_loader
        return loader.position / len(loader) if loader.epoch == self.epoch else 0.0

    @property
    def finished(self) -> bool:
        """Whether epochs, time or patience are used up."""
        patience = self.schedule.early_stop
        return self.progress >= 1 or (patience is not None and self.waited >= patience)

    def fit(self) -> None:
        """Train to the end of the schedule.

        Raises
        ------
        DivergenceError
            At the first loss or gradient that is not finite; saved state and best model are from
            before.
        Interrupted
            After a signal; the state is saved.
        """
        self._started, self._saved_at = time.monotonic() - self.clock, time.monotonic()
        if distributed.rank() == 0:
            self.log = RunLog(self.run_dir, self.config, rows=self.epoch)
        try:
            while True:
                if not self.epoch_trained:
                    if not self.finished:
                        self._train_epoch()
                    elif self._share_of_epoch() == 0:
                        break
                    self.epoch_trained = True
                self._end_epoch()
            self.save()
        finally:
            if self.log is not None:
                self.log.close()

    def _train_epoch(self) -> None:
        self.train_loader.set_epoch(self.epoch)
        self.potential.train()
        batches = iter(self.train_loader)
        while True:
            try:
                graph = next(batches)
            except StopIteration:
                break
            except RuntimeError:
                if self.signals.received:  # the processes that read ahead got the signal, too
                    self._interrupt(self.signals.received)
                raise
            # Page-locked batches are sent while the step before is still computed.
            locked = graph.positions.is_pinned()
            self._step(graph.to(self.device, non_blocking=locked))
            if self.on_step is not None:
                self.on_step(self)
            if self.progress >= 1:  # time is up
                break
        self._check()

    def _step(self, graph: AtomicGraph) -> None:
        progress = self.progress
        if self.schedule.max_epochs is not None:  # the middle of the step: the first one moves, too
            progress = max(progress - 0.5 / len(self.train_loader) / self.schedule.max_epochs, 0.0)
        self.rate = learning_rate(self.schedule, progress, self.plateau.reduction)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * self.rate
            optimizer.zero_grad(set_to_none=True)

        try:
            if self.config.runtime.compile and self.stepped is self.potential:
                self.stepped = compiled_steps(self.potential, graph)
            out = self.stepped(graph, stress=self.objective.needs_stress)
            loss = self.objective(self.potential, graph, out, progress)
            loss.backward()
        except torch.OutOfMemoryError:
            raise MemoryError(
                f"{self.device} is out of memory at step {self.step} with {graph.num_structures} "
                f"structures, {len(graph.positions)} atoms, {graph.edge_index.shape[1]} "
                "neighbour pairs in a batch; lower data.batch_size or data.max_atoms "
                f"(the saved state in {self.run_dir} is intact)"
            ) from None
        distributed.sum_gradients(self.trained)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.norm_limit)
        loss = loss.detach()
        self._unchecked.append((graph.frame, loss + norm))
        if len(self._unchecked) >= self.check_every:
            self._check()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema is not None:
            self.ema.update()
        if self.objective.acts_on_weights:
            if self.objective.after_step(self.potential):
                self.best = math.inf
            if self.ema is not None:
                with self.averaged():
                    self.objective.after_step(self.potential)

        self.step += 1
        self.loss_sum += loss
        self.loss_steps += 1
        self.sums.add(graph, out)
        self._agree()

    def _agree(self) -> None:
        """Between steps: all processes learn the time, and whether to stop or to save."""
        now = time.monotonic()
        overdue = now - self._saved_at > self.config.runtime.save_interval
        stop, self.clock, save = distributed.all_max(
            [self.signals.received, now - self._started, overdue], self.device
        )
        if stop:
            self._interrupt(int(stop))
        if save:
            self.save()

    def _check(self) -> None:
        unchecked, self._unchecked = self._unchecked, []
        for k, (frames, value) in enumerate(unchecked):
            number = float(value)
            if not abs(number) < DIVERGED:
                step = self.step - len(unchecked) + 1 + k
                raise DivergenceError(
                    f"step {step} (epoch {self.epoch + 1}): loss and gradient are {number}; "
                    f"the batch was frames {', '.join(map(str, frames.tolist()))} of "
                    f"{self.train_loader.dataset.path}. Look at these structures, or lower "
                    f"optimizer.lr; the best model so far in {self.run_dir} is untouched"
                )

    def _end_epoch(self) -> None:
        """Validate, log, and go to the next epoch."""
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "seconds": round(self.clock, 3),
            "learning_rate": self.optimizers[-1].param_groups[0]["top_lr"] * self.rate,
        }
        if (self.epoch + 1) % self.schedule.valid_every == 0 or self.progress >= 1:
            self._validate()
            row |= {
                "valid_loss": self.score(self.valid_errors),
                **flat(self.valid_errors, "valid_"),
                **(self.symmetry.flat("valid_") if self.symmetry else {}),
            }
        if self.sampling is not None:
            row |= self._sample_anew(self.sampling, validated="valid_loss" in row)
        loss = float(distributed.all_sum(self.loss_sum)) / max(1, self.loss_steps)
        totals = ErrorSums(device=self.device)
        totals.sums = distributed.all_sum(self.sums.sums)
        row |= {"train_loss": loss, **flat(totals.total(), "train_"), **self.objective.numbers()}
        if self.log is not None:
            self.log.write(row)
        text = f"epoch {self.epoch + 1:4d}  loss {loss:.4g}  train {line(totals.total())}"
        if "valid_loss" in row:
            text += f"  valid {line(self.valid_errors)}"
            text += f"  symmetry {self.symmetry.line()}" if self.symmetry else ""
            text += "  *" if self.best_epoch == self.epoch else ""
        logger.info("%s  lr %.2g  %.0f s", text, row["learning_rate"], self.clock)

        self.epoch += 1
        self.epoch_trained = False
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.loss_steps = 0
        self.sums = ErrorSums(device=self.device)
        self.train_loader.set_epoch(self.epoch)
        self._agree()

    def _sample_anew(self, sampling: AdaptiveSampling, validated: bool) -> dict[str, float]:
        """Note what the epoch showed, and weigh the structures of the next one."""
        sampling.add_epoch(self.train_loader.times_shown(self.epoch))
        if validated:
            errors = self.valid_sums.kinds()[sampling.config.by]
            sampling.update({name: self.score(e) for name, e in errors.items()})
            self.train_loader.set_weights(sampling.of_structures())
        return sampling.flat()

    def _validate(self) -> None:
        start = time.monotonic()
        size, number = distributed.world_size(), distributed.rank()
        share = self.valid.subset(range(number, len(self.valid), size)) if size > 1 else self.valid
        data = self.config.data
        sums = self.valid_sums = Breakdown(self.valid, self.device)
        with self.averaged():
            evaluate(
                self.potential,
                share,
                batch_size=data.valid_batch_size,
                stress=self.objective.needs_stress,
                stop=lambda: bool(self.signals.received),
                sums=sums,
            )
            if distributed.rank() == 0 and not self.signals.received:
                self.symmetry = sampled_symmetry_errors(
                    self.potential,
                    self.valid,
                    structures=SYMMETRY_STRUCTURES,
                    copies=SYMMETRY_COPIES,
                )
            for part in (sums, sums.groups, sums.elements):
                part.sums = distributed.all_sum(part.sums)
            stop, seconds = distributed.all_max(
                [self.signals.received, time.monotonic() - start], self.device
            )
            if not stop:
                self.valid_seconds, self.valid_errors = seconds, sums.total()
                score = self.score(self.valid_errors)
                improved = score < self.best
                self.waited = 0 if improved else self.waited + 1
                if improved:
                    self.best, self.best_epoch = score, self.epoch
                    self._save_potential(BEST)
                if self.schedule.kind == "plateau":
                    self.plateau.update(improved)
        if stop:  # an incomplete validation counts for nothing and is repeated
            self._interrupt(int(stop))

    def score(self, errors: Errors) -> float:
        """Validation loss: weighted MAE (MSE for ``mse``) with the weights of the last stage."""
        loss = self.config.loss
        total = 0.0
        for quantity, weight in self.objective.at(1.0).items():
            if weight > 0 and quantity in errors:
                e = errors[quantity]
                total += weight * (e["rmse"] ** 2 if loss.kind == "mse" else e["mae"])
        return total

    def averaged(self) -> AbstractContextManager[None]:
        """Block in which the potential has the weights that are validated and saved."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _interrupt(self, number: int) -> None:
        self.save()
        logger.info("stopped by signal %d at step %d; state saved", number, self.step)
        raise Interrupted(128 + number)

    def _save_potential(self, name: str) -> None:
        if distributed.rank() == 0:
            training = {**self.potential.metadata.get("training", {})}
            training |= {"epochs": self.epoch + 1, "steps": self.step, "seconds": round(self.clock)}
            checkpoint.save(self.potential, self.run_dir / name, training=training)

    def save(self) -> None:
        """Write state and potential, each in one atomic step; all processes have to call this."""
        self._check()
        random = state.random_tensors(self.device)
        sums, loss = distributed.all_sum(self.sums.sums), distributed.all_sum(self.loss_sum)
        if distributed.rank() == 0:
            tensors = {
                **state.prefixed("potential", self.potential.state_dict()),
                **state.prefixed("objective", self.objective.modules.state_dict()),
                **state.optimizer_tensors(self.optimizers),
                **random,
                "loss_sum": loss,
                "sums": sums,
            }
            if self.sampling is not None:
                tensors |= self.sampling.tensors()
            if self.ema is not None:
                tensors |= {f"ema.{k}": t for k, t in enumerate(self.ema.averages)}
            checkpoint.write_tensors(self.run_dir / STATE, tensors, self._numbers())
            with self.averaged():
                self._save_potential(LAST)
        self._saved_at = time.monotonic()

    def _numbers(self) -> dict[str, Any]:
        return {
            "kind": "training state",
            "format": state.FORMAT,
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "step": self.step,
            "epoch_trained": self.epoch_trained,
            "clock": self.clock,
            "rate": self.rate,
            "valid_seconds": self.valid_seconds,
            "best": None if math.isinf(self.best) else self.best,
            "best_epoch": self.best_epoch,
            "waited": self.waited,
            "valid_errors": self.valid_errors,
            "loss_steps": self.loss_steps,
            "ema_steps": 0 if self.ema is None else self.ema.steps,
            "plateau": self.plateau.state_dict(),
            "loader": self.train_loader.state_dict(),
        }

    def resume(self, path: Path | None = None) -> None:
        """Continue from a saved state.

        Raises
        ------
        ValueError, OSError
            If the file is damaged, or of a run with other data, model or optimizer.
        """
        path = path or self.run_dir / STATE
        tensors, numbers = checkpoint.read_tensors(path)
        if numbers.get("kind") != "training state":
            raise ValueError(f"{path}: not the state of a training")
        if numbers.get("format") != state.FORMAT:
            raise ValueError(
                f"{path}: state of format {numbers.get('format')}, this version reads 1"
            )
        changed = state.differences(numbers["fingerprint"], self.fingerprint)
        if changed:
            raise ValueError(
                f"{path}: cannot continue this run, {'; '.join(changed)}; "
                "put it back, or take another run_dir"
            )
        self.potential.load_state_dict(state.part("potential", tensors))
        self.objective.modules.load_state_dict(state.part("objective", tensors))
        state.load_optimizers(self.optimizers, tensors)
        if self.ema is not None and "ema.0" in tensors:
            self.ema.averages = [
                tensors[f"ema.{k}"].to(self.device) for k in range(len(self.parameters))
            ]
            self.ema.steps = int(numbers["ema_steps"])
        state.load_random(tensors, self.device)
        # Sums over all processes are given to the first one, where they are added up again.
        share = 1.0 if distributed.rank() == 0 else 0.0
        self.loss_sum = tensors["loss_sum"].to(self.device) * share
        self.sums.sums = tensors["sums"].to(self.device) * share
        for name in ("epoch", "step", "best_epoch", "waited", "loss_steps"):
            setattr(self, name, int(numbers[name]))
        self.epoch_trained = bool(numbers["epoch_trained"])
        self.clock, self.valid_seconds = float(numbers["clock"]), float(numbers["valid_seconds"])
        self.rate = float(numbers["rate"])
        self.best = math.inf if numbers["best"] is None else float(numbers["best"])
        self.valid_errors = numbers["valid_errors"]
        self.plateau.load_state_dict(numbers["plateau"])
        self.train_loader.load_state_dict(numbers["loader"])
        if self.sampling is not None:
            self.sampling.load(tensors)
            if len(self.sampling.history):
                self.train_loader.set_weights(self.sampling.of_structures())
        logger.info("continuing %s at epoch %d, step %d", path, self.epoch + 1, self.step)
