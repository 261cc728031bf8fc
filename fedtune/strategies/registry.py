"""From `--strategy fedprox+fedadam --strategy_args mu=0.1,lr=0.03` to a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field
from numbers import Real
from typing import Any

from fedtune.errors import ConfigError
from fedtune.extensions import Extensions
from fedtune.nearest import nearest
from fedtune.strategies.base import Rule
from fedtune.strategies.compatibility import why_not
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
from fedtune.strategies.method import FIELDS, Method, Part
from fedtune.strategies.scaffold import Scaffold
from fedtune.strategies.settings import settings_of
from fedtune.strategies.trimmed_mean import TrimmedMean

__all__ = ["METHODS", "build_method", "for_mixed_ranks", "name_of", "setting_names"]

BUILT_IN: dict[str, type[Part]] = {
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
METHODS: Extensions[type[Part]] = Extensions("fedtune.methods", "--strategy", BUILT_IN)

STOCK = "flwr:"


def for_mixed_ranks() -> str:
    """Names of the methods whose clients may have different LoRA ranks."""
    return ", ".join(
        name
        for name, part in METHODS.items()
        if issubclass(part, Rule) and part.properties.mixed_ranks
    )


def setting_names(name: str) -> list[str]:
    """Names that `--strategy_args` may set for a method."""
    return list(settings_of(METHODS[name]))


def name_of(method: Method) -> str:
    """As `--strategy` spells it; by its rule, or by what stands alone."""
    parts = (method.rule, method.correction, method.optimizer)
    named = {type(part): part for part in parts if part and type(part) is not FedAvg}
    kind = next(iter(named), FedAvg)
    return next((name for name, cls in METHODS.items() if cls is kind), kind.__name__)


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
        from fedtune.strategies.stock import stock_rule  # Flower, only where it is asked for

        return Method(stock_rule(strategy.removeprefix(STOCK), weight_by, settings or {}))
    names = strategy.split("+")
    _check_names(strategy, names)
    routed = _route(strategy, names, settings or {})
    parts: list[Any] = [FedAvg(weight_by=weight_by)]  # type: ignore[arg-type]
    for name in names:
        cls: Any = METHODS[name]
        weighing = {"weight_by": weight_by} if cls.axis == "rule" else {}
        parts.append(cls(**weighing, **routed[name]))
    method = Method.of(*parts)
    _check_pairs(strategy, names, method)
    return method


def _check_names(strategy: str, names: list[str]) -> None:
    for name in names:
        if name.startswith(STOCK):
            raise ConfigError(f"--strategy {strategy}: {name} combines with no other method.")
        if name not in METHODS:
            raise ConfigError(f"--strategy: unknown method {name!r}. {nearest(name, METHODS)}")
    axes = [METHODS[name].axis for name in names]
    for name, axis in zip(names, axes, strict=True):
        cls = METHODS[name]
        alone = issubclass(cls, Rule) and not cls.properties.combines
        if len(names) > 1 and (alone or axes.count(axis) > 1):
            reason = "combines with no other method" if alone else f"is a second {axis}"
            raise ConfigError(
                f"--strategy {strategy}: {name} {reason}. Use one method of each axis."
            )


def _check_pairs(strategy: str, names: list[str], method: Method) -> None:
    rule = next((name for name in names if METHODS[name].axis == "rule"), "fedavg")
    for name in names:
        reason = why_not(getattr(method, FIELDS[METHODS[name].axis]), method.rule)
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
