"""Settings of methods: dataclass fields that know their range, so that user input is checked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "COUNT",
    "FLAG",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SHARE",
    "Range",
    "meanings",
    "setting",
    "settings_of",
]

T = TypeVar("T", int, float)


class Range(NamedTuple):
    """Numbers a setting may take; NaN satisfies none of them."""

    expected: str
    holds: Callable[[float], bool]


POSITIVE = Range("a number > 0", lambda value: value > 0)
NOT_NEGATIVE = Range("a number >= 0", lambda value: value >= 0)
SHARE = Range("a number >= 0 and < 1", lambda value: 0 <= value < 1)
COUNT = Range("a whole number >= 0", lambda value: value >= 0 and value % 1 == 0)
FLAG = Range("0 or 1", lambda value: value in (0, 1))


def setting(default: T, allowed: Range) -> T:
    """A field that `--strategy_args` may set; the docstring of its class says what it means."""
    value: T = field(default=default, metadata={"range": allowed})
    return value


def settings_of(method: type) -> dict[str, Field[Any]]:
    """Name -> field of what `--strategy_args` may set."""
    return {item.name: item for item in fields(method) if item.name != "weight_by"}


def meanings(method: type) -> dict[str, str]:
    """Name -> meaning, as written under `Attributes:` in the docstring of the class."""
    _, _, listed = (inspect.getdoc(method) or "").partition("Attributes:\n")
    entries = re.split(r"^    (\w+): ", listed, flags=re.MULTILINE)[1:]
    pairs = zip(entries[::2], entries[1::2], strict=True)
    return {name: " ".join(text.split()).rstrip(".") for name, text in pairs}
