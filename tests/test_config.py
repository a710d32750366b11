"""Configurations are checked before anything else; wrong ones are answered with the right key."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from mlip.config import Config, ConfigError, apply_overrides, parse, read_yaml
from mlip.models import MODELS
from mlip.training.config import (
    ALIASES,
    hyperparameters,
    json_schema,
    load_training,
    parse_training,
    preset,
    seconds,
    to_yaml,
)
from mlip.training.sizes import SIZES

DATA = {"data": {"train": "absent.h5"}}


class Inner(Config):
    weight_decay: float = Field(0.0, ge=0)


class Outer(Config):
    optimizer: Inner = Inner()
    channels: int = Field(3, ge=1)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"chanels": 3}, "unknown option 'chanels', did you mean 'channels'?"),
        ({"optimizer": {"wieght_decay": 1}}, "did you mean 'optimizer.weight_decay'?"),
        ({"weight_decay": 1}, "did you mean 'optimizer.weight_decay'?"),
        ({"channels": "many"}, "option 'channels': Input should be a valid integer"),
        ({"channels": 2.5}, "option 'channels'"),
        ({"channels": 0}, "option 'channels': Input should be greater than or equal to 1"),
        ({"optimizer": {"weight_decay": float("nan")}}, "option 'optimizer.weight_decay'"),
        ({"optimizer": {"weight_decay": float("inf")}}, "option 'optimizer.weight_decay'"),
        ({"optimizer": 3}, "option 'optimizer'"),
        ({"channels": "x" * 10**6}, r"\.\.\.\)$"),
    ],
)
def test_wrong_options_are_named(content: dict[str, Any], answer: str) -> None:
    pattern = answer if answer.startswith("\\") else answer.replace("?", r"\?")
    with pytest.raises(ConfigError, match=pattern) as error:
        parse(Outer, content)
    assert len(str(error.value)) < 400


def test_all_errors_come_at_once() -> None:
    with pytest.raises(ConfigError, match=r"weight_decay.*chanels"):
        parse(Outer, {"chanels": 1, "optimizer": {"weight_decay": -1}})


def test_overrides_leave_the_content_alone() -> None:
    content = {"a": {"b": 1}}
    assert apply_overrides(content, ["a.b=2", "a.c.d=[1, 2]", "e=x"]) == {
        "a": {"b": 2, "c": {"d": [1, 2]}},
        "e": "x",
    }
    assert content == {"a": {"b": 1}}
    for bad in ("a.b", "=3", "a..b=1", "a=[1", "a=*b"):
        with pytest.raises(ConfigError):
            apply_overrides(content, [bad])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!python/object/apply:os.system ['echo hello']", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: !tag x", "not valid YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("a: &a [*a]", "aliases"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "key 'b' is given twice"),
        ("[" * 50000, "nested too deeply|not valid YAML"),
        ("a: {" * 20000, "nested too deeply|not valid YAML"),
        ("- 1\n- 2", "found a list"),
        ("a: [1", "not valid YAML"),
        ("a: " + "9" * 10000, "not valid YAML"),
        ("a: " + "x" * 1_000_001, "larger than"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused_at_once(text: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=reason) as error:
        read_yaml(path)
    assert time.process_time() - start < 1
    assert "c.yaml" in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        read_yaml(tmp_path / "absent.yaml")
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\x89HDF\r\n\xff\xfe")
    with pytest.raises(ConfigError, match=r"b\.yaml: not UTF-8"):
        read_yaml(binary)
    assert read_yaml(write(tmp_path / "empty.yaml", "# nothing")) == {}


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"data": {"trian": "a.h5"}}, "did you mean 'data.train'?"),
        ({**DATA, "model": {"cutof": 5}}, "did you mean 'model.cutoff'?"),
        ({**DATA, "model": {"cutoff": -1}}, "option 'model.cutoff': .* greater than 0"),
        ({**DATA, "model": {"cutoff": "far"}}, "option 'model.cutoff'"),
        ({**DATA, "model": {"name": "facette"}}, "unknown model 'facette'"),
        ({**DATA, "model": {"size": "huge"}}, "option 'model.size'"),
        ({**DATA, "model": 3}, "option 'model'"),
        ({**DATA, "optimizer": {"name": "adam"}}, "'adamw' or 'muon'"),
        ({**DATA, "optimizer": {"betas": [0.9, 1.0]}}, "betas must lie"),
        ({**DATA, "schedule": {"max_epochs": None}}, "give max_epochs or max_time"),
        ({**DATA, "schedule": {"max_time": "soon"}}, "write a time such as 30m"),
        ({**DATA, "schedule": {"max_time": "-3m"}}, "write a time such as 30m"),
        ({**DATA, "loss": {"energy": 0, "forces": 0, "stress": 0}}, "all weights are zero"),
        ({"data": {"train": "a", "e0": {"Qq": 1}}}, "'Qq' is not the symbol"),
        ({"data": {"train": "a", "e0": {"Si": "x"}}}, "energy of Si is not a finite number"),
        ({"data": {"train": "a", "e0": {"Si": float("nan")}}}, "energy of Si"),
        ({"data": {"train": "a", "e0": "guess"}}, "write one of auto"),
        ({"data": {"train": "a", "valid": "b", "split_file": "c"}}, "either valid or split_file"),
        ({**DATA, "r_max": 5, "model": {"cutoff": 4}}, "'r_max' and 'model.cutoff'"),
        ({**DATA, "lr": 1, "optimizer": 3}, "'optimizer' is not a section"),
        ({**DATA, "lr": 0}, "option 'optimizer.lr'"),
        ({}, "option 'data' is required"),
    ],
)
def test_training_options_are_checked_without_data(content: dict[str, Any], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer.replace("?", r"\?")):
        parse_training(content)


def test_habitual_names_are_understood() -> None:
    config = parse_training(
        {
            "train_file": "a.h5",
            "r_max": 6,
            "loss": "mse",
            "lr": "1e-3",
            "max_num_epochs": 7,
            "E0s": "average",
            "model": "facet",
        }
    )
    assert (config.model.cutoff, config.loss.kind, config.optimizer.lr) == (6, "mse", 1e-3)  # type: ignore[attr-defined]
    assert (config.schedule.max_epochs, config.data.e0) == (7, "least_squares")
    from mlip.config import dotted_names
    from mlip.training.config import config_class

    config = parse_training({"train_file": "a.h5", "E0s": {14: -0.8, 8: -2}, "device": "cpu"})
    assert (config.data.e0, config.runtime.device) == ({"Si": -0.8, "O": -2.0}, "cpu")
    with pytest.raises(ConfigError, match="'119' is not the symbol"):
        parse_training({"train_file": "a.h5", "E0s": {119: -0.8}})
    known = {name for model in MODELS for name in dotted_names(config_class(model))}
    assert set(ALIASES.values()) - {"model.hidden_irreps"} <= known
    irreps = {"train_file": "a.h5", "model": "mace", "hidden_irreps": "64x0e + 64x1o"}
    model: Any = parse_training(irreps).model
    assert (model.channels, model.lmax) == (64, 1)


@pytest.mark.parametrize("size", [None, "small"])
def test_an_unknown_model_is_answered_with_the_names(size: str | None) -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'fasset'.*facet"):
        parse_training({"data": {"train": "a.h5"}, "model": {"name": "fasset", "size": size}})


def test_times() -> None:
    assert [seconds(t) for t in ("30m", "1h30m", "90s", "1h 5min", "12", 7)] == [
        1800,
        5400,
        90,
        3900,
        12,
        7,
    ]


def test_overrides_from_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "data: {train: a.h5}\nmodel: {size: small}\n")
    config = load_training(path, ["model.channels=12", "lr=0.5", "loss.kind=mae", "r_max=4.5"])
    assert config.model.channels == 12  # type: ignore[attr-defined]
    assert (config.optimizer.lr, config.loss.kind) == (0.5, "mae")
    assert config.model.cutoff == 4.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_presets_survive_a_file(name: str, size: str, tmp_path: Path) -> None:
    config = preset(name, size)
    again = load_training(write(tmp_path / "c.yaml", to_yaml(config)))
    assert again == config or again.model_dump() == config.model_dump()
    for key, value in SIZES[name][size].items():
        assert hyperparameters(again)[key] == value


def test_an_explicit_option_goes_before_the_preset() -> None:
    config = parse_training({**DATA, "model": {"size": "large", "channels": 24}})
    assert config.model.channels == 24  # type: ignore[attr-defined]


def test_every_section_is_in_the_schema() -> None:
    text = json.dumps(json_schema())
    for word in ("weight_decay", "cutoff", "max_time", "avg_num_neighbors", "additionalProperties"):
        assert word in text


def test_shipped_configurations_are_valid() -> None:
    folder = Path(__file__).resolve().parents[1] / "configs"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        config = load_training(file)
        assert yaml.safe_load(to_yaml(config))


def test_learning_rates_are_those_that_the_model_needs() -> None:
    """Weights of MACE are of size one: the default steps are far too small for them."""
    plain, mace = (parse_training({**DATA, "model": name}).optimizer for name in ("facet", "mace"))
    assert (mace.name, mace.muon_lr, mace.lr) == ("muon", 10 * plain.muon_lr, 10 * plain.lr)
    named = {**DATA, "model": "mace", "optimizer": {"name": "adamw"}}
    assert parse_training(named).optimizer.lr == 0.01
    given = {**DATA, "model": "mace", "lr": 0.02}
    assert parse_training(given).optimizer.lr == 0.02
