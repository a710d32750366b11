"""Strict typed configuration: YAML to pydantic models, overrides ``a.b=c``, hints on errors."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

C = TypeVar("C", bound="Config")

MAX_YAML_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_SHOWN = 80  # characters of a wrong value in a message


class Config(BaseModel):
    """Base of every configuration: immutable, finite numbers, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the key and the remedy."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of plain data: no tags, no aliases (a few lines of them can stand for
    gigabytes).

    Raises
    ------
    FileNotFoundError, ConfigError
        With the name of the file; also for a key that is given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    with open(path, "rb") as file:
        raw = file.read(MAX_YAML_BYTES + 1)
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_YAML_BYTES} bytes; this is not a configuration"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error})") from None
    content = _plain_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected 'key: value' pairs at the top, found a {type(content).__name__}"
        )
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy of ``content`` with ``a.b=value`` applied; the value is read as YAML."""
    result: dict[str, Any] = dict(content)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(f"'{override}' is not an override; write key.subkey=value")
        node = result
        *parents, leaf = path.split(".")
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, Mapping) else {}
            node = node[parent]
        node[leaf] = _plain_yaml(text, f"override '{override}'")
    return result


def parse(config_class: type[C], content: Mapping[str, Any], source: str = "configuration") -> C:
    """Validate ``content``; all errors at once, with the nearest name for each unknown key."""
    try:
        return config_class.model_validate(dict(content))
    except ValidationError as error:
        names = list(dotted_names(config_class))
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                lines.append(f"unknown option '{key}'{_hint(key, names)}")
            elif item["type"] == "missing":
                lines.append(f"option '{key}' is required")
            else:
                shown = repr(item["input"])
                shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."
                reason = item["msg"].removeprefix("Value error, ")
                lines.append(f"option '{key}': {reason} (got {shown})")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def dotted_names(config_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All options of a configuration with its sections: ``data``, ``data.train``, ..."""
    for name, field in config_class.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from dotted_names(kind, prefix + name + ".")


def _hint(key: str, names: Sequence[str]) -> str:
    """The nearest option: by the whole name, else by its last part, in whatever section."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    if not close:
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        near = difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)
        close = [leaves[leaf] for leaf in near] or difflib.get_close_matches(key, names, n=1)
    return f", did you mean '{close[0]}'?" if close else ""


class _Loader(yaml.SafeLoader):
    """Plain data; a key given twice is an error instead of a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    where = key_node.start_mark.line + 1
                    raise yaml.YAMLError(f"key '{key_node.value}' is given twice (line {where})")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _plain_yaml(text: str, source: str) -> Any:
    try:
        depth = 0  # a thousand brackets would keep the reader busy for minutes
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{source}: aliases (*name) are not allowed; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"{source}: nested too deeply for a configuration")
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply for a configuration") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
