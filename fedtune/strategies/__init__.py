"""Federated methods: `METHODS` names them, `build_method` makes one from `--strategy`."""

from __future__ import annotations

from fedtune.config import FederationArguments
from fedtune.lists import strategy_settings
from fedtune.strategies.base import ClientStats, Correction, Fold, Properties, Rule
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fixed_global import fixed_global
from fedtune.strategies.mean import RunningMean
from fedtune.strategies.method import Method
from fedtune.strategies.registry import METHODS, build_method, for_mixed_ranks, setting_names
from fedtune.strategies.server_step import ServerOptimizer

__all__ = [
    "METHODS",
    "ClientStats",
    "Correction",
    "FedAvg",
    "Fold",
    "Method",
    "Properties",
    "Rule",
    "RunningMean",
    "ServerOptimizer",
    "build_method",
    "fixed_global",
    "for_mixed_ranks",
    "setting_names",
    "strategy_of",
]


def strategy_of(federation: FederationArguments) -> Method:
    """The method that `--strategy`, `--strategy_args` and `--weight_by` name."""
    return build_method(
        federation.strategy,
        weight_by=federation.weight_by,
        settings=strategy_settings(federation.strategy_args),
    )
