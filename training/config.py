"""Configuration of a training run: sections of a YAML file, presets, and MACE's habitual names.

``parse_training`` makes a ``TrainConfig`` of plain content.  Its section ``model`` has the
hyperparameters of the named model beside ``name``, ``size`` and ``repulsion``, so that every key of
the file is checked before any data are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, create_model, model_validator

from mlip.config import Config, ConfigError, apply_overrides, parse, read_yaml
from mlip.training import wrapper_config
from mlip.training.denoising_config import DenoisingConfig
from mlip.training.sampling_config import SamplingConfig
from mlip.training.sizes import RATES, SIZES
from mlip.training.symmetry_config import SymmetryConfig

# The habitual flat names of MACE's command line; documented in docs/training.md.
ALIASES: dict[str, str] = {
    "train_file": "data.train",
    "valid_file": "data.valid",
    "test_file": "data.test",
    "valid_fraction": "data.valid_fraction",
    "batch_size": "data.batch_size",
    "valid_batch_size": "data.valid_batch_size",
    "num_workers": "data.num_workers",
    "E0s": "data.e0",
    "r_max": "model.cutoff",
    "num_channels": "model.channels",
    "num_interactions": "model.num_layers",
    "max_L": "model.lmax",
    "max_ell": "model.max_ell",
    "correlation": "model.correlation",
    "hidden_irreps": "model.hidden_irreps",
    "num_radial_basis": "model.num_basis",
    "num_cutoff_basis": "model.envelope_power",
    "radial_MLP": "model.radial_hidden",
    "loss": "loss.kind",
    "huber_delta": "loss.delta",
    "energy_weight": "loss.energy",
    "forces_weight": "loss.forces",
    "stress_weight": "loss.stress",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "amsgrad": "optimizer.amsgrad",
    "clip_grad": "optimizer.clip_grad",
    "ema_decay": "optimizer.ema_decay",
    "max_num_epochs": "schedule.max_epochs",
    "patience": "schedule.early_stop",
    "default_dtype": "precision.dtype",
    "device": "runtime.device",
    "work_dir": "run_dir",
}

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0, "": 1.0}


def seconds(value: Any) -> Any:
    """Seconds of ``"30m"``, ``"1h30m"``, ``"90s"`` or a number; anything else passes through."""
    if not isinstance(value, str):
        return value
    parts = re.findall(r"(\d+(?:\.\d*)?)\s*(d|h|min|m|s|)\s*", value.strip())
    if not parts or "".join(re.split(r"\s+", value)) != "".join(n + u for n, u in parts):
        raise ValueError("write a time such as 30m, 1h30m, 90s, or a number of seconds")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _paths(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def _reference(value: Any) -> Any:
    """Reference energies: how to get them, or a table by symbol."""
    from ase.data import atomic_numbers, chemical_symbols

    if isinstance(value, str):
        value = {"IsolatedAtom": "isolated", "average": "least_squares"}.get(value, value)
        choices = ("auto", "isolated", "least_squares")
        if value not in choices:
            raise ValueError(f"write one of {', '.join(choices)}, or a table such as {{Si: -0.81}}")
        return value
    if not isinstance(value, Mapping):
        raise ValueError("write auto, isolated, least_squares, or a table such as {Si: -0.81}")
    table = {}
    for symbol, energy in value.items():
        if isinstance(symbol, int) and 0 < symbol < len(chemical_symbols):  # MACE's keys
            symbol = chemical_symbols[symbol]
        if symbol not in atomic_numbers or symbol == "X":
            raise ValueError(f"'{symbol}' is not the symbol of an element")
        try:
            table[str(symbol)] = float(energy)
        except (TypeError, ValueError):
            table[str(symbol)] = math.nan
        if not math.isfinite(table[str(symbol)]):
            raise ValueError(f"the energy of {symbol} is not a finite number in eV: {energy!r}")
    return table


Seconds = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
Reference = Annotated[Any, BeforeValidator(_reference)]
Paths = Annotated[list[Path], BeforeValidator(_paths)]


class DataConfig(Config):
    """What is trained on."""

    train: Path = Field(description="training set, HDF5 made by 'mlip convert'")
    valid: Path | None = Field(None, description="validation set; null: split off from train")
    test: Paths = Field([], description="test sets, one file or a list, for the final table")
    valid_fraction: float = Field(
        0.1, gt=0, lt=1, description="share that is split off where valid is null"
    )
    split_seed: int = Field(0, ge=0)
    split_by: Literal["group", "config_type"] | None = Field(
        None, description="keep structures with the same value on one side"
    )
    split_file: Path | None = Field(
        None, description="text file with the numbers of the validation structures"
    )
    batch_size: int | None = Field(5, ge=1, description="structures in a batch, over all processes")
    max_atoms: int | None = Field(
        None, ge=1, description="atoms in a batch of each process at most"
    )
    max_edges: int | None = Field(None, ge=1, description="the same for neighbour pairs")
    valid_batch_size: int = Field(16, ge=1)
    num_workers: int = Field(0, ge=0, le=256, description="processes that read ahead")
    e0: Reference = Field(
        "auto",
        description="energies of isolated atoms: auto (isolated-atom frames, else least squares), "
        "isolated, least_squares, or a table by symbol in eV",
    )
    augment: Literal["none", "rotations", "proper_rotations", "reflections"] = Field(
        "none",
        description="show training structures rotated and mirrored at random, rotated only, or "
        "mirrored only",
    )
    views: int = Field(
        1,
        ge=1,
        le=64,
        description="how often each structure is in its batch, each time augmented anew; limits "
        "of the batch count it once",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.batch_size is None and self.max_atoms is None and self.max_edges is None:
            raise ValueError("give at least one of batch_size, max_atoms and max_edges")
        if self.views > 1 and self.augment == "none":
            raise ValueError("several views are all the same without augment: rotations")
        if self.valid is not None and self.split_file is not None:
            raise ValueError("give either valid or split_file")
        return self


class ModelConfig(Config):
    """Which model; its own hyperparameters stand in the same section."""

    name: str = Field("facet", description="one of the models of this package")
    size: Literal["small", "medium", "large"] | None = Field(
        None, description="preset of the hyperparameters that are not given"
    )
    repulsion: Literal["zbl"] | None = Field(
        None, description="zbl: add the nuclear repulsion at short distances"
    )


class StageTwoConfig(Config):
    """Other weights towards the end of the training."""

    start: float = Field(
        0.75, ge=0, lt=1, description="share of the training after which it begins"
    )
    energy: float | None = Field(None, ge=0, description="null: as before")
    forces: float | None = Field(None, ge=0, description="null: as before")
    stress: float | None = Field(None, ge=0, description="null: as before")


class LossConfig(Config):
    """Weights of the terms, residuals in eV/atom, eV/angstrom and eV/angstrom^3."""

    kind: Literal["mse", "mae", "huber"] = Field("huber", description="of each residual")
    delta: float = Field(0.01, gt=0, description="huber: quadratic below, linear above")
    energy_delta: float | None = Field(
        None, gt=0, description="huber: the same for energies per atom; null: delta"
    )
    l2: bool = Field(False, description="forces: norm of each atom's error vector, not components")
    energy: float = Field(10.0, ge=0, description="weight of the energy per atom")
    forces: float = Field(10.0, ge=0)
    stress: float = Field(
        200.0, ge=0, description="without effect where the training set has no stress"
    )
    stage_two: StageTwoConfig | None = Field(
        None, description="other weights at the end: {start: 0.75, energy: 10}"
    )

    @model_validator(mode="after")
    def _some_weight(self) -> LossConfig:
        if self.energy == self.forces == self.stress == 0:
            raise ValueError("all weights are zero; there is nothing to train on")
        return self


class OptimizerConfig(Config):
    """How the weights move."""

    name: Literal["adamw", "muon"] = Field(
        "muon", description="muon: orthogonalised momentum for matrices, AdamW for the rest"
    )
    lr: float = Field(0.003, gt=0, description="learning rate at the top of the schedule")
    weight_decay: float = Field(1e-4, ge=0, description="not on biases, norms and embeddings")
    betas: tuple[float, float] = Field((0.9, 0.99))
    amsgrad: bool = False
    momentum: float = Field(0.95, ge=0, lt=1, description="of muon")
    muon_lr: float = Field(0.005, gt=0, description="of muon's matrices; 0.01 for runs of minutes")
    clip_grad: float | None = Field(10.0, gt=0, description="norm of the gradient at most")
    ema_decay: float | None = Field(
        0.99,
        gt=0,
        lt=1,
        description="average of the weights that is validated and saved; null: none",
    )

    @model_validator(mode="after")
    def _betas(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        return self


class ScheduleConfig(Config):
    """How long, and how the learning rate goes."""

    kind: Literal["cosine", "plateau", "constant"] = "cosine"
    max_epochs: int | None = Field(100, ge=1)
    max_time: Seconds | None = Field(
        None,
        description="such as 30m or 1h30m: ends then, with the schedule stretched to end with it; "
        "with max_epochs what is reached first",
    )
    warmup: float = Field(
        0.02, ge=0, lt=1, description="share of the training, learning rate from 0"
    )
    final: float = Field(0.0, ge=0, le=1, description="cosine: learning rate at the end, relative")
    factor: float = Field(0.5, gt=0, lt=1, description="plateau: reduction")
    plateau_patience: int = Field(
        10, ge=1, description="plateau: validations without improvement before a reduction"
    )
    early_stop: int | None = Field(
        None, ge=1, description="stop after so many validations without improvement"
    )
    valid_every: int = Field(1, ge=1, description="epochs between validations")

    @model_validator(mode="after")
    def _bounded(self) -> ScheduleConfig:
        if self.max_epochs is None and self.max_time is None:
            raise ValueError("give max_epochs or max_time")
        return self


class PrecisionConfig(Config):
    """Number formats."""

    dtype: Literal["float32", "float64"] = "float32"
    tf32: bool = Field(False, description="faster, less exact matrix products on a GPU")


class RuntimeConfig(Config):
    """The machine."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1"
    )
    num_threads: int | None = Field(None, ge=1, description="null: torch's choice")
    tune_allocator: bool = Field(
        True, description="keep freed memory in the process: up to 3 times faster on a CPU"
    )
    save_interval: Seconds = Field(60.0, description="time between saved training states")
    compile: bool = Field(
        False,
        description="steps as one compiled program, after some minutes up to twice as fast; for "
        "environment, escaip, facet, gaunt, mace, ponita, transip",
    )


class LoggingConfig(Config):
    """Where the course of the training is written besides log.csv and log.jsonl."""

    progress: bool = Field(True, description="progress bar, on a terminal only")
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "mlip"
    plots: bool = Field(True, description="learning curve and parity plots at the end")


class TrainConfig(Config):
    """A training run."""

    run_dir: Path = Field(Path("run"), description="folder of everything that is written")
    seed: int = Field(0, ge=0, lt=2**31, description="of weights and of the order of the data")
    resume: Literal["auto", "never", "must"] = Field(
        "never",
        description="continue what run_dir holds: if there is something, never, or else fail",
    )
    init_from: Path | None = Field(
        None,
        description="model file whose weights are the first ones, for example of a training with "
        "model.direct_forces; heads that only one of them has are left out",
    )
    citation: str | None = Field(None, description="goes into the model file")
    licence: str | None = Field(None, description="goes into the model file")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    wrapper: wrapper_config.WrapperConfig | None = Field(
        None,
        description="put around the model, such as {name: frame_averaging, kind: local}",
    )
    loss: LossConfig = LossConfig()
    symmetry: SymmetryConfig = SymmetryConfig()
    sampling: SamplingConfig | None = Field(
        None, description="show groups by their learning curves: {by: config_type}"
    )
    denoising: DenoisingConfig | None = Field(
        None, description="pre-training without labels: {sigma: [0.05]}"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    logging: LoggingConfig = LoggingConfig()


def config_class(name: str, wrapper: str | None = None) -> type[TrainConfig]:
    """``TrainConfig`` whose section ``model`` has the hyperparameters of the named model, and
    ``wrapper`` the options of the named one, or of any."""
    from mlip.models import MODELS

    if name not in MODELS:
        raise ConfigError(
            f"option 'model.name': unknown model {name!r}; there are {', '.join(MODELS)}"
        )
    hyperparameters = MODELS[name][1]
    fields: dict[str, Any] = {"name": (Literal[name], Field(name, description="the model"))}
    if "avg_num_neighbors" in hyperparameters.model_fields:
        text = "scale of sums over neighbours; null: of the training set"
        fields["avg_num_neighbors"] = (float | None, Field(None, gt=0, description=text))
    section = create_model(
        "ModelConfig", __base__=(hyperparameters, ModelConfig), __doc__="The model.", **fields
    )
    sections: dict[str, Any] = {
        "model": (section, section()),
        "wrapper": (wrapper_config.section(wrapper), TrainConfig.model_fields["wrapper"]),
    }
    return create_model(
        "TrainConfig", __base__=TrainConfig, __doc__=TrainConfig.__doc__, **sections
    )


def hyperparameters(config: TrainConfig, **decided: Any) -> dict[str, Any]:
    """What ``mlip.models.build`` takes, of the section ``model``; ``decided``, such as
    ``avg_num_neighbors=18.0``, in place of what is not given."""
    own = {
        key: value
        for key, value in config.model.model_dump().items()
        if key not in ModelConfig.model_fields
    }
    own |= {key: value for key, value in decided.items() if own.get(key, 0) is None}
    if own.get("avg_num_neighbors", 0) is None:
        del own["avg_num_neighbors"]
    return own


def parse_training(content: Mapping[str, Any], source: str = "configuration") -> TrainConfig:
    """Check the content of a configuration file, and fill in the presets of the model."""
    content = _without_aliases(content, source)
    model = content.get("model", {})
    if model is None or isinstance(model, str):  # "model: facet"
        model = {"name": model} if model else {}
    if isinstance(model, Mapping):
        name = model.get("name", "facet")
        if not isinstance(name, str):
            raise ConfigError(f"{source}: option 'model.name' is not a name (got {name!r})")
        config_class(name)  # what is said of an unknown model comes before its size
        preset = SIZES.get(name, {}).get(str(model.get("size")), {})
        if model.get("size") is not None and name not in SIZES:
            raise ConfigError(f"{source}: option 'model.size': {name} has no presets of size")
        model = {**preset, **model}
        given = content.get("optimizer") or {}
        if isinstance(given, Mapping):
            rates = RATES.get(name, {}).get(str(given.get("name", OptimizerConfig().name)), {})
            content = {**content, "optimizer": {**rates, **given}}
    else:
        name = "facet"
    content, wrapper = wrapper_config.with_section(content, source)
    config = parse(config_class(name, wrapper), {**content, "model": model}, source)
    own = hyperparameters(config)
    from mlip.models import MODELS

    parse(MODELS[name][1], own, f"{source}: section 'model'")  # conditions between hyperparameters
    return config


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration file and apply overrides ``a.b=c``; relative paths are relative to the
    working folder.

    Raises
    ------
    FileNotFoundError, ConfigError
        Naming the file, the option and the nearest existing one.
    """
    content = apply_overrides(_without_aliases(read_yaml(path), str(path)), [])
    flat = [_override_alias(override) for override in overrides]
    return parse_training(apply_overrides(content, flat), str(path))


def _override_alias(override: str) -> str:
    key, equals, value = override.partition("=")
    return ALIASES.get(key, key) + equals + value if key != "loss" else override


def _without_aliases(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """MACE's flat names moved to their sections; a section of the same name (``loss``) stays."""
    result = dict(content)
    for key in content:
        if key not in ALIASES or (isinstance(content[key], Mapping) and key == "loss"):
            continue
        value = result.pop(key)
        section, _, leaf = ALIASES[key].rpartition(".")
        if section:
            old = result.get(section, {})
            if isinstance(old, str) and section == "model":
                old = {"name": old}
            if old is not None and not isinstance(old, Mapping):
                raise ConfigError(f"{source}: '{section}' is not a section (got {old!r})")
            table = dict(old or {})
        else:
            table = result
        if leaf in table:
            raise ConfigError(
                f"{source}: '{key}' and '{ALIASES[key]}' are the same; give one of them"
            )
        table[leaf] = value
        if section:
            result[section] = table
    return result


def to_yaml(config: BaseModel) -> str:
    """The configuration as YAML with each option's meaning as a comment."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(config: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            if not indent:
                yield ""
            doc = " ".join((type(value).__doc__ or "").split())
            yield f"{indent}{name}:  # {doc}" if doc else f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
            continue
        plain = config.model_dump(mode="json", include={name})[name]
        text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
        line = f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}"
        yield f"{line}  # {field.description}" if field.description else line


def preset(name: str = "facet", size: str = "medium", train: str = "train.h5") -> TrainConfig:
    """The defaults with a preset of size, as ``mlip config`` prints them."""
    return parse_training({"data": {"train": train}, "model": {"name": name, "size": size}})


def json_schema(name: str = "facet") -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return config_class(name).model_json_schema()
