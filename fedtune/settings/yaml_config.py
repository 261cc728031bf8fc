"""YAML files of settings: a safe loader that reads `5e-3` as a number, and values checked by type.

PyYAML follows YAML 1.1, where a float needs a dot, and keeps the last of two equal keys silently.
"""

from __future__ import annotations

import enum
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from fedtune.errors import ConfigError

__all__ = ["NotOfType", "coerce", "load_yaml", "type_name"]

FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class NotOfType(Exception):
    """A value does not fit the type of its field."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats; a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"`{key.value}` is given twice (line {line}). Keep one of them.")
            seen.add(str(key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


# A copy: the resolver table is inherited, and SafeLoader must stay as it is for everybody else.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def load_yaml(file: Path) -> dict[str, Any]:
    """The top-level mapping of a YAML file; an empty file gives an empty one."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            f"--config: cannot read {file}: {error.strerror}. Paths start at the working directory."
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text. --config expects a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date with a 13th month
        raise ConfigError(
            f"{file} is not valid YAML: expected `name: value` lines, received an error"
            f"{_where(error)}. Correct the file."
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file}: expected `name: value` lines, received a {type(values).__name__}."
        )
    return {str(key): value for key, value in values.items()}


def _where(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    mark = error.problem_mark
    return f" at line {mark.line + 1}, column {mark.column + 1} ({error.problem})"


def coerce(hint: Any, value: Any) -> Any:
    """`value` as the type that a field is declared with; raises `NotOfType`.

    coerce(float, 1) -> 1.0;  coerce(int | None, None) -> None;  coerce(int, "1") -> NotOfType
    """
    for member in _members(hint):
        try:
            return _coerce_one(member, value)
        except NotOfType:
            continue
    raise NotOfType


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _coerce_one(hint: Any, value: Any) -> Any:
    kind = get_origin(hint) or hint
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Any:
        return value
    if kind is float and number:
        return float(value)
    if kind is int and number and isinstance(value, int):
        return value
    if kind is Literal and any(value == arg and type(value) is type(arg) for arg in get_args(hint)):
        return value
    if isinstance(kind, type) and kind not in (int, float):
        if issubclass(kind, enum.Enum) and isinstance(value, str):
            return value
        if isinstance(value, kind):
            return value
    raise NotOfType


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
}


def type_name(hint: Any) -> str:
    """What a field expects, in words: `a whole number or null`."""
    names: list[str] = []
    for member in _members(hint):
        kind = get_origin(member) or member
        if kind is Literal:
            names.extend(repr(arg) for arg in get_args(member))
        else:
            names.append(_NAMES.get(kind, "text"))
    return " or ".join(dict.fromkeys(names))
