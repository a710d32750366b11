"""A training run from its configuration: data, statistics, model, training, final tables and plots.

Everything that is global to a process is set here and nowhere else: allocator, threads, seeds,
matrix precision, signal handlers.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mlip import checkpoint
from mlip.allocator import tune_allocator
from mlip.data.dataset import HDF5Dataset, split, split_by_file
from mlip.data.duplicates import find_duplicates
from mlip.data.loader import GraphLoader
from mlip.data.statistics import Statistics, compute_statistics, format_statistics, require_elements
from mlip.data.transforms import Compose, RandomReflection, RandomRotation, SeveralViews, Transform
from mlip.evaluation.evaluate import Pairs, evaluate
from mlip.evaluation.metrics import UNITS, Errors, grouped_table, table
from mlip.evaluation.symmetry import SymmetryReport, sampled_symmetry_errors
from mlip.models import build
from mlip.nn.cohesion import Cohesion
from mlip.nn.zbl import ZBL
from mlip.potential import Potential
from mlip.training import denoising, distributed, warm_start
from mlip.training.config import DataConfig, TrainConfig, hyperparameters, to_yaml
from mlip.training.log import read_rows, require_loggers
from mlip.training.loss import Objective
from mlip.training.sampling import AdaptiveSampling
from mlip.training.signals import StopSignals
from mlip.training.symmetry_losses import symmetry_terms
from mlip.training.trainer import BEST, LAST, STATE, Trainer
from mlip.wrappers import wrap

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

TRAIN_SAMPLE = 2000  # training structures in the final table; evenly chosen from larger sets
COHESION_FRAMES = 500  # structures in the fit of the energies of cohesion


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Train a potential as configured; under ``torchrun`` together with the other processes.

    Parameters
    ----------
    config : of ``parse_training`` or ``load_training``
    console : where a progress bar is drawn; none without

    Returns
    -------
    Path
        The best model, ``run_dir/best.safetensors``.

    Raises
    ------
    ValueError, OSError
        Naming the option, file, frame or element, before the training begins where possible.
    Interrupted
        After SIGTERM or Ctrl-C, with the state saved; its code is 143 or 130.
    """
    config = denoising.with_loss(config)
    require_loggers(config.logging)
    if config.runtime.tune_allocator:
        tune_allocator()
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    with (
        StopSignals() as signals,
        distributed.process_group(config.runtime.device) as device,
        _log_file(config),
    ):
        resume = _wants_resume(config)
        data = prepare_data(config)
        config, potential = make_potential(config, data)
        potential.to(device)
        # From here on processes may differ, for example in dropout.
        torch.manual_seed(config.seed + 1 + distributed.rank())
        if distributed.rank() == 0:
            (config.run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        loader = _train_loader(config.data, data.train, config.seed, pin=device.type == "cuda")
        has_stress = data.statistics.num_labels.get("stress", 0) > 0
        objective = Objective.from_config(config.loss, has_stress=has_stress)
        if config.symmetry.active:
            given = is_uniform(config)
            objective = objective.extended(
                *symmetry_terms(config.symmetry, potential, data.valid[0], given=given)
            )
        sampling = None
        if config.sampling is not None:
            sampling = AdaptiveSampling(config.sampling, data.train, data.valid)
        bar = _progress_bar(config, console)
        with bar as on_step:
            trainer = Trainer(
                potential,
                objective,
                loader,
                data.valid,
                config,
                signals=signals,
                fingerprint=_fingerprint(config, data),
                sampling=sampling,
                on_step=on_step,
            )
            if resume:
                trainer.resume()
            signals.polite = True
            trainer.fit()
            signals.polite = False
        if signals.received:
            raise SystemExit(128 + signals.received)
        if distributed.rank() == 0:
            report(config, data, device)
    return config.run_dir / BEST


@dataclass(frozen=True)
class RunData:
    """The data sets of a run."""

    train: HDF5Dataset  # without isolated atoms
    valid: HDF5Dataset
    tests: dict[str, HDF5Dataset]
    statistics: Statistics
    sha256: dict[str, str]  # of the files


def prepare_data(config: TrainConfig) -> RunData:
    """Open and divide the data, compute statistics, refuse elements that the training set lacks."""
    d = config.data
    cutoff = float(getattr(config.model, "cutoff"))  # noqa: B009 (a field of the model's own section)
    whole = HDF5Dataset(d.train, cutoff, cache=True, seed=config.seed)
    if d.valid is not None:
        train_set, valid = whole, HDF5Dataset(d.valid, cutoff, cache=True)
    elif d.split_file is not None:
        train_set, valid = split_by_file(whole, d.split_file)
    else:
        train_set, valid = split(whole, d.valid_fraction, d.split_seed, by=d.split_by)
    tests = {path.stem: HDF5Dataset(path, cutoff) for path in d.test}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they come back as text in the statistics
        e0 = None if d.e0 == "auto" else d.e0
        e0 = e0 if config.denoising is None else denoising.NO_ENERGIES
        statistics = compute_statistics(train_set, e0)
    for note in statistics.warnings:
        logger.warning("%s", note)
    logger.info("%s", _text(format_statistics(statistics)))
    for part in (valid, *tests.values()):
        require_elements(statistics, part)
    valid = _without_isolated(valid, "validation set")
    train_set = _without_isolated(train_set, "training set")
    unlabelled = statistics.num_labels["energy"] == statistics.num_labels["forces"] == 0
    if unlabelled and config.denoising is None:
        raise ValueError(
            f"{d.train}: neither energies nor forces to train on; without labels there is "
            "pre-training by the section denoising, {sigma: 0.05}"
        )
    if distributed.rank() == 0:
        duplicates = find_duplicates({"train": train_set, "valid": valid, **tests})
        if duplicates.across:
            logger.warning("%s", duplicates.describe())
    tests = {name: _without_isolated(part, "test set") for name, part in tests.items()}
    train_set.transform = augmentation(d)
    if config.denoising is not None:
        noise = denoising.displacement(config.denoising, cutoff)
        for part in (valid, *tests.values()):
            part.transform = noise
        turn = train_set.transform
        train_set.transform = noise if turn is None else Compose(noise, turn)
    logger.info("%d structures to train on, %d to validate", len(train_set), len(valid))
    files = {str(path): path for path in (d.train, d.valid, *d.test) if path is not None}
    return RunData(
        train_set,
        valid,
        tests,
        statistics,
        {name: file_sha256(path) for name, path in files.items()},
    )


def augmentation(d: DataConfig) -> Transform | None:
    """What is done to a training structure each time it is read."""
    if d.augment == "none":
        return None
    transform: Transform = (
        RandomReflection()
        if d.augment == "reflections"
        else RandomRotation(reflect=d.augment == "rotations")
    )
    return SeveralViews(transform, d.views) if d.views > 1 else transform


def is_uniform(config: TrainConfig) -> bool:
    """Whether augmented structures are uniform draws from the group of the symmetry terms."""
    rotations_too = not config.symmetry.reflect and config.data.augment == "proper_rotations"
    return config.data.augment == "rotations" or rotations_too


def make_potential(config: TrainConfig, data: RunData) -> tuple[TrainConfig, Potential]:
    """Untrained potential, and the configuration completed by what the data say."""
    s = data.statistics
    torch.manual_seed(config.seed)
    old = None if config.init_from is None else checkpoint.load(config.init_from)
    decided: dict[str, Any] = {
        "avg_num_neighbors": max(s.avg_num_neighbors, 1.0),
        "elements": tuple(s.elements),
    }
    if old is not None and config.init_from is not None:
        decided |= warm_start.decided(old, s.elements, config.init_from)
    own = hyperparameters(config, **decided)
    known = {key: own[key] for key in decided if key in own}
    config = config.model_copy(update={"model": config.model.model_copy(update=known)})
    scale = next(x for x in (s.rms_force, s.energy_std, 1.0) if math.isfinite(x) and x > 0)
    if config.denoising is not None:
        scale = denoising.typical_force(config.denoising)
    attributes = data.train.file.attributes
    metadata: dict[str, Any] = {
        "level_of_theory": attributes.get("level_of_theory") or None,
        "training": {
            "data": config.data.train.name,
            "sha256": data.sha256[str(config.data.train)],
            "source": attributes.get("source") or None,
            "structures": len(data.train),
            "seed": config.seed,
            "objective": None if config.denoising is None else denoising.NAME,
        },
        "citation": config.citation,
        "licence": config.licence,
    }
    metadata["training"] = {k: v for k, v in metadata["training"].items() if v is not None}
    repulsion = ZBL() if config.model.repulsion == "zbl" else None
    model = build(config.model.name, **own)
    if config.wrapper is not None:
        if model.exact_symmetry:
            logger.warning(
                "wrapper: rotations and reflections are exact for %s by construction; %s changes "
                "nothing and costs several times as much. Leave the section out",
                config.model.name,
                config.wrapper.name,
            )
        model = wrap(model, **config.wrapper.model_dump())
    cohesion = None if "least squares" in s.e0_source else fit_cohesion(data.train, s.e0)
    metadata = {k: v for k, v in metadata.items() if v is not None}
    potential = Potential(model, s.e0, scale, repulsion, cohesion, metadata)
    potential.to(torch.float64 if config.precision.dtype == "float64" else torch.float32)
    if old is not None and config.init_from is not None:
        warm_start.start_from(potential, old, config.init_from)
        if warm_start.leaves_a_constant(old):
            potential.cohesion = fit_cohesion(data.train, s.e0, potential)
    number = sum(p.numel() for p in potential.parameters())
    logger.info("%s: %d parameters, energies in units of %.4g eV", config.model.name, number, scale)
    return config, potential


def fit_cohesion(train: HDF5Dataset, e0: Tensor, start: Potential | None = None) -> Cohesion | None:
    """Mean energies of cohesion by least squares, where reference energies are those of atoms.

    Solves E_k - sum_i e0 = sum_i s_i D[Z_i] per atom over a sample of the training set, with the
    energy of the potential ``start`` in place of e0 if it is given; None without energies.
    """
    cohesion = Cohesion(torch.zeros(119))
    rows, targets = [], []
    for k in range(0, len(train), -(-len(train) // COHESION_FRAMES)):
        graph = train[k]
        graph = graph.replace(vectors=graph.edge_vectors())
        known = e0[graph.atomic_numbers].sum() if start is None else start(graph)["energy"].detach()
        energy = graph.energy - known
        if energy.isfinite():
            saturation = cohesion.saturation(graph)
            row = energy.new_zeros(119).index_add(0, graph.atomic_numbers, saturation)
            rows.append(row / len(saturation))
            targets.append(energy / len(saturation))
    if not rows:
        return None
    solution = np.linalg.lstsq(torch.stack(rows).numpy(), torch.cat(targets).numpy(), rcond=1e-8)
    return Cohesion(torch.from_numpy(solution[0]))


def report(config: TrainConfig, data: RunData, device: torch.device) -> dict[str, Errors]:
    """Errors of the best model by data set and config type, with its symmetry error: tables, plots,
    and in the model file."""
    path = config.run_dir / BEST
    if not path.is_file():
        logger.warning("no validation was finite; reporting the last model instead of the best")
        path = config.run_dir / LAST
    potential = checkpoint.load(path, device=device)
    sample = data.train.subset(range(0, len(data.train), -(-len(data.train) // TRAIN_SAMPLE)))
    sample.transform = data.valid.transform  # without augmentation
    totals: dict[str, Errors] = {}
    symmetry: dict[str, SymmetryReport] = {}
    points = {}
    texts = []
    for name, part in {"train": sample, "valid": data.valid, **data.tests}.items():
        pairs = Pairs()
        sums = evaluate(
            potential, part, batch_size=config.data.valid_batch_size, on_batch=pairs.add
        )
        totals[name] = sums.total()
        symmetry[name] = sampled_symmetry_errors(potential, part, stress="stress" in totals[name])
        points[name] = pairs.arrays()
        texts.append(grouped_table(totals[name], sums.kinds(), title=name))
    lines = [f"{name}: {report.text()}" for name, report in symmetry.items()]
    texts.append("\n".join([table(totals, title=path.name), *lines]))
    text = "\n\n".join(texts)
    logger.info("%s", text)
    (config.run_dir / "errors.txt").write_text(text + "\n", encoding="utf-8")
    checkpoint.save(
        potential, path, errors={name: _described(e, symmetry[name]) for name, e in totals.items()}
    )
    if config.logging.plots:
        from mlip.evaluation.plots import learning_curve, parity_plot

        parity_plot(points, config.run_dir / "parity.png")
        learning_curve(read_rows(config.run_dir), config.run_dir / "learning_curve.png")
    logger.info("%s", path)
    return totals


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wants_resume(config: TrainConfig) -> bool:
    """Whether to continue what run_dir holds; the folder is made."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    state = config.run_dir / STATE
    if config.resume == "never" and state.is_file():
        raise ValueError(
            f"{config.run_dir} holds a training run; continue it with --resume, "
            "or choose another run_dir"
        )
    if config.resume == "must" and not state.is_file():
        raise ValueError(
            f"{state}: no saved state to continue; resume: auto starts where there is none"
        )
    return state.is_file()


def _fingerprint(config: TrainConfig, data: RunData) -> dict[str, Any]:
    """What decides the course of a training besides its state; its length may change."""
    dump = config.model_dump(mode="json")
    # What is off is left out: states from before the option was there stay readable.
    optional: dict[str, Any] = {"symmetry": dump["symmetry"]} if config.symmetry.active else {}
    if config.data.views > 1:
        optional["views"] = config.data.views
    for section in ("sampling", "denoising"):
        if dump[section] is not None:
            optional[section] = dump[section]
    if config.wrapper is not None:
        optional["wrapper"] = dump["wrapper"]
    keys = (
        "batch_size",
        "max_atoms",
        "max_edges",
        "valid_fraction",
        "split_seed",
        "split_by",
        "e0",
        "augment",
    )
    return {
        "model": dump["model"],
        "data": {key: dump["data"][key] for key in keys},
        "files": sorted(data.sha256[str(p)] for p in (config.data.train, config.data.valid) if p),
        "frames": hashlib.sha256(data.train.indices.tobytes()).hexdigest()[:16],
        "precision": dump["precision"]["dtype"],
        "optimizer": dump["optimizer"]["name"],
        "ema": dump["optimizer"]["ema_decay"] is not None,
        "seed": config.seed,
        "processes": distributed.world_size(),
        **optional,
    }


def _train_loader(d: DataConfig, dataset: HDF5Dataset, seed: int, pin: bool) -> GraphLoader:
    size, batch = distributed.world_size(), d.batch_size
    if batch is not None:
        share = -(-batch // size)
        if share * size != batch:
            logger.warning(
                "data.batch_size=%d cannot be shared by %d processes, taking %d",
                batch, size, share * size,
            )  # fmt: skip
        batch = share
    return GraphLoader(
        dataset,
        batch_size=batch,
        max_atoms=d.max_atoms,
        max_edges=d.max_edges,
        shuffle=True,
        seed=seed,
        num_workers=d.num_workers,
        rank=distributed.rank(),
        world_size=size,
        pin_memory=pin,
    )


def _without_isolated(dataset: HDF5Dataset, name: str) -> HDF5Dataset:
    isolated = dataset.isolated
    if isolated.all():
        raise ValueError(f"{dataset.path}: the {name} has no structures besides isolated atoms")
    return dataset.subset(~isolated)


def _described(errors: Errors, symmetry: SymmetryReport) -> dict[str, float]:
    milli = {
        f"{q} {kind.upper()} / {UNITS[q]}": 1000 * e[kind]
        for q, e in errors.items()
        for kind in ("mae", "rmse")
    }
    milli |= {
        f"{q} symmetry error / {UNITS[q]}": 1000 * e.rms
        for q, e in symmetry.errors.items()
        if q in errors
    }
    return {name: float(f"{value:.4g}") for name, value in milli.items()}


def _text(renderable: Any) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=110, color_system=None).print(renderable)
    return buffer.getvalue().rstrip()


@contextmanager
def _log_file(config: TrainConfig) -> Iterator[None]:
    """What the package says goes into run_dir/train.log as well."""
    package = logging.getLogger("mlip")
    if distributed.rank() > 0:
        yield
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(config.run_dir / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


def _progress_bar(config: TrainConfig, console: Console | None) -> Any:
    if console is None or not config.logging.progress or not console.is_terminal:
        return nullcontext(None)
    if distributed.rank() > 0:
        return nullcontext(None)
    from mlip.training.progress import progress_bar

    return progress_bar(console)
