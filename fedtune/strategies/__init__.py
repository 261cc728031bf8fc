"""Federated methods: `METHODS` names them, `build_method` makes one from `--strategy`."""

from __future__ import annotations

from dataclasses import fields

from fedtune.config import FederationArguments, strategy_settings
from fedtune.errors import ConfigError
from fedtune.strategies.base import ClientStats, Fold, Method, Properties
from fedtune.strategies.fedavg import FedAvg, FixedGlobal
from fedtune.strategies.mean import RunningMean

__all__ = [
    "METHODS",
    "ClientStats",
    "FedAvg",
    "FixedGlobal",
    "Fold",
    "Method",
    "Properties",
    "RunningMean",
    "build_method",
    "setting_names",
    "strategy_of",
]

METHODS: dict[str, type[Method]] = {"fedavg": FedAvg}


def setting_names(name: str) -> list[str]:
    """Names that `--strategy_args` may set for a method."""
    return [item.name for item in fields(METHODS[name]) if item.name != "weight_by"]


def build_method(name: str, *, weight_by: str, settings: dict[str, float] | None = None) -> Method:
    """The method called `name`; raises ConfigError for an unknown name or setting."""
    if name not in METHODS:
        raise ConfigError(
            f"--strategy: expected one of {', '.join(sorted(METHODS))}, received {name!r}."
        )
    unknown = sorted(set(settings or {}) - set(setting_names(name)))
    if unknown:
        known = ", ".join(setting_names(name)) or "none"
        raise ConfigError(
            f"--strategy_args: expected settings of {name} ({known}), received {unknown[0]!r}."
        )
    return METHODS[name](weight_by=weight_by, **(settings or {}))  # type: ignore[arg-type]


def strategy_of(federation: FederationArguments) -> Method:
    """The method that `--strategy`, `--strategy_args` and `--weight_by` name."""
    return build_method(
        federation.strategy,
        weight_by=federation.weight_by,
        settings=strategy_settings(federation.strategy_args),
    )
