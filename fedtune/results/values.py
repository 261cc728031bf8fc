"""Values out of a JSON file that may be damaged: each is of its type, or empty."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["count", "items", "listed", "mapping", "number"]


def number(value: object) -> float | None:
    """A finite number as it is, an int as an int; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an int beyond all floats
        return None


def count(value: object) -> int | None:
    """A finite number without its fraction, else None."""
    found = number(value)
    return None if found is None else int(found)


def mapping(value: object) -> dict[str, Any]:
    """A JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """A JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def listed(value: Any) -> Any:
    """The value with lists in place of tuples, as JSON gives it back."""
    if isinstance(value, dict):
        return {name: listed(one) for name, one in value.items()}
    return [listed(one) for one in value] if isinstance(value, list | tuple) else value
