"""Settings that hold a list, or `name=value` pairs, in one text."""

from __future__ import annotations

import math

from fedtune.errors import ConfigError

__all__ = ["split_ints", "split_names", "split_numbers", "strategy_settings"]


def split_names(text: str | None) -> list[str]:
    """`"a, b"` -> `["a", "b"]`; None and the empty string give an empty list."""
    return [name for name in (part.strip() for part in (text or "").split(",")) if name]


def split_ints(text: str, flag: str) -> list[int]:
    """`"1,2"` -> `[1, 2]`; raises ConfigError that names the flag."""
    try:
        return [int(part) for part in str(text).split(",")]
    except ValueError:
        raise ConfigError(
            f"{flag}: expected whole numbers joined by commas, received {text!r}. Example: 1,2,3"
        ) from None


def split_numbers(text: str, flag: str) -> list[float]:
    """`"1,2.5"` -> `[1.0, 2.5]`; raises ConfigError that names the flag."""
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError:
        raise ConfigError(
            f"{flag}: expected numbers joined by commas, received {text!r}. Example: 1,1,2.5"
        ) from None


def strategy_settings(text: str | None) -> dict[str, float]:
    """`--strategy_args` as numbers; "mu=0.1,tau=5" -> {"mu": 0.1, "tau": 5.0}."""
    settings: dict[str, float] = {}
    for pair in split_names(text):
        name, _, value = (part.strip() for part in pair.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise ConfigError(
                f"--strategy_args: expected name=number,..., received {pair!r}. Example: mu=0.1"
            )
        if name in settings:
            raise ConfigError(f"--strategy_args: {name} is given twice. Keep one of them.")
        settings[name] = number
    return settings
