"""The section ``wrapper`` of a training's configuration: what is put around the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Union

from pydantic import Field, create_model

from mlip.config import Config, ConfigError


class WrapperConfig(Config):
    """What is put around the model; its own options stand in the same section."""

    name: str = Field(description="one of the wrappers of this package")


def section(name: str | None) -> Any:
    """Type of the section for the named wrapper, or for any; None is always allowed."""
    from mlip.wrappers import WRAPPERS

    if name is not None and name not in WRAPPERS:
        raise ConfigError(
            f"option 'wrapper.name': unknown wrapper {name!r}; there are {', '.join(WRAPPERS)}"
        )
    sections = []
    for known in [name] if name else list(WRAPPERS):
        options = WRAPPERS[known][1]
        fields: dict[str, Any] = {"name": (Literal[known], Field(description="the wrapper"))}
        made = create_model(
            f"{options.__name__.removesuffix('Config')}Section",
            __base__=(options, WrapperConfig),
            __doc__="What is put around the model.",
            **fields,
        )
        sections.append(made)
    return Union[*sections, None]


def with_section(content: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], str | None]:
    """The content with the wrapper as a section, where it was only a name, and this name."""
    given = content.get("wrapper")
    if isinstance(given, str):  # "wrapper: frame_averaging"
        given = {"name": given}
    if given is None:
        return content, None
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError(f"{source}: option 'wrapper.name' is required (got {given!r:.80})")
    return {**content, "wrapper": given}, name
