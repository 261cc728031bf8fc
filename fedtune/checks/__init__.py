"""Which settings go together: ranges of single settings (`ranges.py`), then `RULES` over several.

A rule is a small function that returns what is wrong, ending with the fix, or None. The first
problem is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedtune.checks.method import lora_rule, of_method, strategy
from fedtune.checks.model import adapter, data, quantized
from fedtune.checks.run import (
    compare,
    delays,
    engine,
    min_replies,
    one_budget,
    output,
    seeds,
    track,
)
from fedtune.checks.transport import codec, error_feedback
from fedtune.config import Arguments
from fedtune.errors import ConfigError
from fedtune.ranges import Range, federation_ranges, ranges

__all__ = ["check_arguments", "check_federation"]

Rule = Callable[[Arguments], str | None]

RULES: tuple[Rule, ...] = (
    one_budget,
    min_replies,
    seeds,
    quantized,
    adapter,
    data,
    compare,
    track,
    codec,
    of_method(strategy, lora_rule, error_feedback),
    delays,
    engine,
    output,
)

# A deployment, whose sites bring all the rest.
FEDERATION_RULES: tuple[Rule, ...] = (
    one_budget,
    track,
    codec,
    of_method(strategy, error_feedback),
    output,
)


def check_arguments(args: Arguments) -> None:
    """Raise `ConfigError`, one line, for the first setting that cannot work."""
    _check(args, ranges(args), RULES)


def check_federation(args: Arguments) -> None:
    """`check_arguments` of the federation and its transport alone."""
    _check(args, federation_ranges(args.federation), FEDERATION_RULES)


def _check(args: Arguments, rows: Iterable[Range], rules: Iterable[Rule]) -> None:
    for flag, value, holds, expected in rows:
        if value is not None and not holds:
            raise ConfigError(f"--{flag}: expected {expected}, received {value}.")
    for rule in rules:
        problem = rule(args)
        if problem:
            raise ConfigError(problem)
