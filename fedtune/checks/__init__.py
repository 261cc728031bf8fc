"""Which settings go together: ranges of single settings (`ranges.py`), then `RULES` over several.

A rule is a small function that returns what is wrong, ending with the fix, or None. The first
problem is raised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

from fedtune.checks.method import lora_rule, of_method, strategy
from fedtune.checks.model import adapter, data, quantized
from fedtune.checks.run import (
    compare,
    delays,
    engine,
    min_replies,
    one_budget,
    order,
    output,
    seeds,
    track,
    workflow,
)
from fedtune.checks.transport import codec, error_feedback
from fedtune.config import Arguments
from fedtune.errors import ConfigError
from fedtune.ranges import Range, federation_ranges, ranges
from fedtune.strategies.several import args_of_each

__all__ = ["check_arguments", "check_federation", "each_strategy"]

Rule = Callable[[Arguments], str | None]

RULES: tuple[Rule, ...] = (
    one_budget,
    workflow,
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
    order,
    output,
)

# A deployment, whose sites bring all the rest.
FEDERATION_RULES: tuple[Rule, ...] = (
    one_budget,
    workflow,
    track,
    codec,
    of_method(strategy, error_feedback),
    output,
)


def each_strategy(args: Arguments) -> list[Arguments]:
    """The settings of each run that `--strategy` asks for, in order.

    Raises:
        ConfigError: none or the same twice, or a setting of `--strategy_args` that none has.
    """
    names = args.strategies
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--strategy: {twice} is given twice. Every strategy is one run.")
    if len(names) < 2:
        return [args]
    runs = []
    for name, settings in zip(
        names, args_of_each(names, args.federation.strategy_args), strict=True
    ):
        one = copy.copy(args)
        one.federation = replace(args.federation, strategy=name, strategy_args=settings)
        runs.append(one)
    return runs


def check_arguments(args: Arguments) -> None:
    """Raise `ConfigError`, one line, for the first setting that cannot work."""
    for one in each_strategy(args):
        _check(one, ranges(one), RULES)


def check_federation(args: Arguments) -> None:
    """`check_arguments` of the federation and its transport alone, which has one strategy."""
    if len(args.strategies) > 1:
        raise ConfigError(
            f"--strategy: expected one method, or several joined by +, received "
            f"{args.federation.strategy}. Submit one run for each of them."
        )
    _check(args, federation_ranges(args.federation), FEDERATION_RULES)


def _check(args: Arguments, rows: Iterable[Range], rules: Iterable[Rule]) -> None:
    for flag, value, holds, expected in rows:
        if value is not None and not holds:
            raise ConfigError(f"--{flag}: expected {expected}, received {value}.")
    for rule in rules:
        problem = rule(args)
        if problem:
            raise ConfigError(problem)
