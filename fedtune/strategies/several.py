"""`--strategy a,b,c`: which of the settings in `--strategy_args` each method takes."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.errors import ConfigError
from fedtune.lists import split_names, strategy_settings
from fedtune.nearest import nearest
from fedtune.strategies.registry import METHODS, STOCK, setting_names

__all__ = ["args_of_each"]


def args_of_each(strategies: Sequence[str], strategy_args: str | None) -> list[str | None]:
    """`--strategy_args` for each of several strategies; names that are no method take none.

    `lr=0.1` goes to every one that has `lr`, `fedadam.lr=0.1` to those with fedadam in them.

    Raises:
        ConfigError: a setting that none of them has.
    """
    if len(strategies) < 2:
        return [strategy_args for _ in strategies]
    strategy_settings(strategy_args)  # that it can be read
    taken: list[list[str]] = [[] for _ in strategies]
    for pair in split_names(strategy_args):
        name = pair.partition("=")[0].strip()
        takers = [index for index, one in enumerate(strategies) if _has(one, name)]
        for index in takers:
            stock = strategies[index].startswith(STOCK)
            taken[index].append(pair.removeprefix(f"{strategies[index]}.") if stock else pair)
        if not takers:
            known = [item for one in strategies for item in _settings(one)]
            hint = nearest(name.rpartition(".")[2], known) if known else "Leave it out."
            raise ConfigError(
                f"--strategy_args: {name!r} is no setting of any of {', '.join(strategies)}. {hint}"
            )
    return [",".join(pairs) or None for pairs in taken]


def _has(strategy: str, name: str) -> bool:
    method, _, setting = name.rpartition(".")
    if strategy.startswith(STOCK):  # what it takes is known when it is built
        return method == strategy
    names = [one for one in strategy.split("+") if method in ("", one)]
    return any(setting in setting_names(one) for one in names if one in METHODS)


def _settings(strategy: str) -> list[str]:
    return [name for one in strategy.split("+") if one in METHODS for name in setting_names(one)]
