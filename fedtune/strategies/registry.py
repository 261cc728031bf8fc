"""From `--strategy fedprox+fedadam --strategy_args mu=0.1,lr=0.03` to a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field
from numbers import Real
from typing import Any

from fedtune.errors import ConfigError
from fedtune.nearest import nearest
from fedtune.strategies.base import Method
from fedtune.strategies.combined import Combined
from fedtune.strategies.diloco import DiLoCo
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedavgm import FedAvgM
from fedtune.strategies.fedbuff import FedBuff
from fedtune.strategies.fednova import FedNova
from fedtune.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedtune.strategies.fedprox import FedProx
from fedtune.strategies.krum import Krum, MultiKrum
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.median import Median
from fedtune.strategies.pairs import why_not
from fedtune.strategies.scaffold import Scaffold
from fedtune.strategies.settings import settings_of
from fedtune.strategies.trimmed_mean import TrimmedMean

__all__ = ["METHODS", "build_method", "for_mixed_ranks", "name_of", "setting_names"]

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    # corrections at the client
    "fedprox": FedProx,
    "scaffold": Scaffold,
    # rules: how updates become one
    "fedbuff": FedBuff,
    "fednova": FedNova,
    "krum": Krum,
    "median": Median,
    "multikrum": MultiKrum,
    "trimmed_mean": TrimmedMean,
    **LORA_RULES,
    # server optimizers
    "diloco": DiLoCo,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedavgm": FedAvgM,
    "fedyogi": FedYogi,
}

MEMBERS = {"correction": "client", "rule": "rule", "server_optimizer": "server"}
STOCK = "flwr:"


def for_mixed_ranks() -> str:
    """Names of the methods whose clients may have different LoRA ranks."""
    return ", ".join(name for name, method in METHODS.items() if method.properties.mixed_ranks)


def setting_names(name: str) -> list[str]:
    """Names that `--strategy_args` may set for a method."""
    return list(settings_of(METHODS[name]))


def name_of(method: Method) -> str:
    """As `--strategy` spells it; a combined method by its rule."""
    rule = method.rule if isinstance(method, Combined) else method
    return next((name for name, cls in METHODS.items() if cls is type(rule)), type(rule).__name__)


def build_method(
    strategy: str, *, weight_by: str, settings: Mapping[str, float] | None = None
) -> Method:
    """The method that `strategy` names, or several joined by `+`, at most one of each axis.

    A setting goes to the method that has it; `fedadam.lr` says which where several do. `flwr:NAME`
    is a strategy of Flower (`stock.py`).

    Raises:
        ConfigError: a method or setting is unknown, an axis is taken twice, methods do not go
            together, a setting is ambiguous or out of range.
    """
    if strategy.startswith(STOCK) and "+" not in strategy:
        from fedtune.strategies.stock import stock_method  # Flower, only where it is asked for

        return stock_method(strategy.removeprefix(STOCK), weight_by, settings or {})
    names = strategy.split("+")
    _check_names(strategy, names)
    routed = _route(strategy, names, settings or {})
    built: dict[str, Any] = {
        name: METHODS[name](weight_by=weight_by, **routed[name])  # type: ignore[arg-type]
        for name in names
    }
    if len(names) == 1:
        method: Method = built[strategy]
        return method
    _check_pairs(strategy, built)
    members = dict.fromkeys(MEMBERS.values(), FedAvg(weight_by=weight_by))  # type: ignore[arg-type]
    members |= {MEMBERS[str(METHODS[name].properties.axis)]: built[name] for name in names}
    return Combined(weight_by=weight_by, **members)  # type: ignore[arg-type]


def _check_names(strategy: str, names: list[str]) -> None:
    for name in names:
        if name.startswith(STOCK):
            raise ConfigError(f"--strategy {strategy}: {name} combines with no other method.")
        if name not in METHODS:
            raise ConfigError(f"--strategy: unknown method {name!r}. {nearest(name, METHODS)}")
    axes = [METHODS[name].properties.axis for name in names]
    for name, axis in zip(names, axes, strict=True):
        if len(names) > 1 and (axis is None or axes.count(axis) > 1):
            reason = "combines with no other method" if axis is None else f"is a second {axis}"
            raise ConfigError(
                f"--strategy {strategy}: {name} {reason}. Use one method of each axis."
            )


def _check_pairs(strategy: str, built: Mapping[str, Method]) -> None:
    rules = [name for name in built if built[name].properties.axis == "rule"]
    for rule in rules:
        for name, method in built.items():
            reason = None if name == rule else why_not(method, built[rule])
            if reason is not None:
                raise ConfigError(
                    f"--strategy {strategy}: {name} does not go with {rule}: {reason}. "
                    "Leave one of them out."
                )


def _route(
    strategy: str, names: list[str], settings: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Method -> its share of the settings."""
    routed: dict[str, dict[str, float]] = {name: {} for name in names}
    for given, value in settings.items():
        method, _, setting = given.rpartition(".")
        owners = [name for name in names if method in ("", name) and setting in setting_names(name)]
        if not owners:
            known = [known for name in names for known in setting_names(name)]
            hint = nearest(setting, known) if known else "It has none: leave it out."
            raise ConfigError(f"--strategy_args: {given!r} is no setting of {strategy}. {hint}")
        if len(owners) > 1:
            raise ConfigError(
                f"--strategy_args: {given!r} is a setting of {' and of '.join(owners)}. "
                f"Write {' or '.join(f'{owner}.{setting}' for owner in owners)}."
            )
        if setting in routed[owners[0]]:
            raise ConfigError(f"--strategy_args: {setting} is given twice. Keep one of them.")
        item = settings_of(METHODS[owners[0]])[setting]
        routed[owners[0]][setting] = _checked(given, value, item)
    return routed


def _checked(given: str, value: float, item: Field[Any]) -> float:
    """In its range, and whole where the default is."""
    allowed = item.metadata.get("range")
    finite = isinstance(value, Real) and math.isfinite(value)
    if allowed is not None and not (finite and allowed.holds(value)):
        raise ConfigError(
            f"--strategy_args: {given}: expected {allowed.expected}, received {value!r}."
        )
    return int(value) if isinstance(item.default, int) else value
