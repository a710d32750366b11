"""Strict typed configuration: YAML to pydantic models, overrides ``a.b=c``, and answers to misspelt keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

C = TypeVar("C", bound="Config")

MAX_YAML_BYTES = 1_000_000


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the key and the remedy."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of plain data: no tags, no aliases (a few lines of them can stand for gigabytes)."""
    path = Path(path)
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES} bytes; this is not a configuration")
    text = path.read_text(encoding="utf-8")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{path}: aliases (*name) are not allowed; write the value out")
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' pairs at the top, found a {type(content).__name__}")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy of ``content`` with ``a.b=value`` applied; the value is read as YAML."""
    result: dict[str, Any] = {key: value for key, value in content.items()}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"'{override}' is not an override; write key.subkey=value")
        node = result
        *parents, leaf = path.split(".")
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, Mapping) else {}
            node = node[parent]
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"'{override}': the value is not valid YAML: {error}") from None
    return result


def parse(config_class: type[C], content: Mapping[str, Any], source: str = "configuration") -> C:
    """Validate ``content``; all errors at once, with the nearest name for each unknown key."""
    try:
        return config_class.model_validate(content)
    except ValidationError as error:
        names = list(_dotted_names(config_class))
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                close = difflib.get_close_matches(key, names, n=1, cutoff=0.6) or [
                    name
                    for leaf in difflib.get_close_matches(
                        key.rsplit(".", 1)[-1], [n.rsplit(".", 1)[-1] for n in names], n=1, cutoff=0.6
                    )
                    for name in names
                    if name.rsplit(".", 1)[-1] == leaf
                ]
                hint = f", did you mean '{close[0]}'?" if close else ""
                lines.append(f"unknown option '{key}'{hint}")
            elif item["type"] == "missing":
                lines.append(f"option '{key}' is required")
            else:
                lines.append(f"option '{key}': {item['msg']} (got {item['input']!r})")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _dotted_names(config_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in config_class.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _dotted_names(kind, prefix + name + ".")
