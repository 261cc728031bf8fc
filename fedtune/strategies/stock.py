"""A strategy of Flower as a method: `--strategy flwr:FedMedian --strategy_args ...`.

    x <- strategy.aggregate_train(round, replies)

The workflow samples clients, checks updates and weighs them as ever. The strategy sees every good
update as a reply with the parameters and one metric, the weight. Its `configure_train` is called
with no client to ask: that is where Flower's server optimizers note the parameters that a round
starts from. Replies are sorted by what is in them: the order of arrival does not matter.

Limits: combines with no other method; fp16, fp32 and fp64 only, which numpy has. What a strategy
remembers of earlier rounds is in the object, of which a run has one, and is not saved: FedAdam and
the like refuse to go on in a resumed run. Server memory: clients x parameters.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from torch import Tensor

from fedtune.adapters import Entry
from fedtune.errors import ConfigError, RoundError, private
from fedtune.nearest import nearest
from fedtune.strategies.base import ANY_ROUND, Properties, Round, Rule
from fedtune.transport.messages import TRAIN, pack
from fedtune.transport.records import params_of, to_arrays

__all__ = ["Stock", "stock_rule"]

REFUSED = {
    "FedProx": "its proximal term acts at clients that do not know of it. Use fedprox",
    "FedXgbBagging": "it aggregates trees, not tensors",
    "FedXgbCyclic": "it aggregates trees, not tensors",
    "QFedAvg": "it weighs clients by their losses, which a rule does not see here",
}
WRAPPER = "it wraps another strategy and splits one mechanism between server and clients"
NUMPY = (torch.float16, torch.float32, torch.float64)
# The workflow's: sampling has its own flags.
SAMPLING = ("fraction_", "min_")


@dataclass(frozen=True, kw_only=True)
class Stock(Rule):
    """One of Flower's strategies, which aggregates.

    Attributes:
        name: of its class.
        strategy: it, with its memory of earlier rounds.
    """

    name: str
    strategy: flower.FedAvg = field(repr=False, compare=False)

    properties = Properties(combines=False, sum_suffices=False)

    def least_updates(self) -> int:
        """4 f + 3 for Bulyan, which returns nothing below; 2 f + 3 for Krum, as in its paper."""
        if isinstance(self.strategy, flower.Bulyan):
            return 4 * self.strategy.num_malicious_nodes + 3
        if isinstance(self.strategy, flower.Krum | flower.MultiKrum):
            return 2 * self.strategy.num_malicious_nodes + 3
        return 1

    def fold(self, now: Round = ANY_ROUND) -> StockFold:
        """Keeps all updates, for one call of the strategy."""
        if now.number > 1 and _has_forgotten(self.strategy):
            raise ConfigError(
                f"--strategy flwr:{self.name}: expected a run from its first round, received round "
                f"{now.number}: what it remembers of earlier rounds is not saved. Start again "
                "without --resume."
            )
        return StockFold(self, now)


class StockFold:
    """Replies of one round, handed to the strategy all at once."""

    def __init__(self, method: Stock, now: Round) -> None:
        self._method, self._now = method, now
        self._updates: list[tuple[dict[str, Tensor], float]] = []
        self._check(now.reference)

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Keep one client's parameters; raises ConfigError for a dtype that numpy has not."""
        self._check(params)
        # Sorted: FedAvgM pairs arrays by their place.
        self._updates.append(({name: params[name] for name in sorted(params)}, weight))

    def result(self) -> dict[str, Tensor]:
        """What the strategy makes of them.

        Raises:
            RoundError: it failed, or returned something else than these parameters.
        """
        if not self._updates:
            raise ValueError("no update was folded")
        strategy, number = self._method.strategy, self._now.number
        first = self._updates[0][0]
        start = {name: self._now.reference[name] for name in first if name in self._now.reference}
        replies = [self._reply(*update) for update in sorted(self._updates, key=_fingerprint)]
        before = copy.deepcopy(vars(strategy))
        try:
            # No grid: with a share of 0 it only notes the arrays.
            strategy.configure_train(number, to_arrays(start), ConfigRecord(), None)  # type: ignore[arg-type]
            arrays, _ = strategy.aggregate_train(number, replies)
        except (AggregationError, InconsistentMessageReplies) as error:
            raise RoundError(f"{self._where}: {private(' '.join(str(error).split()))}") from error
        found = {} if arrays is None else params_of(arrays)
        for name in sorted({*first, *found}):
            got = tuple(found[name].shape) if name in found else "none"
            if name not in first or got != tuple(first[name].shape):
                raise RoundError(
                    f"{self._where}: `{name}`: expected {_shape_of(first, name)}, received {got}. "
                    "Use a method of fedtune."
                )
        result = {name: found[name].to(tensor.dtype) for name, tensor in first.items()}
        if not all(bool(torch.isfinite(value).all()) for value in result.values()):
            vars(strategy).update(before)  # the attempt fails, and may be made again
        return result

    @property
    def _where(self) -> str:
        return f"--strategy flwr:{self._method.name}"

    def _reply(self, params: dict[str, Tensor], weight: float) -> Message:
        metrics = {self._method.strategy.weighted_by_key: weight}
        return Message(pack(arrays=params, metrics=metrics), 0, TRAIN)

    def _check(self, params: Mapping[str, Tensor]) -> None:
        for name, tensor in params.items():
            if tensor.dtype not in NUMPY:
                raise ConfigError(
                    f"{self._where}: `{name}`: expected float16, float32 or float64, received "
                    f"{Entry.of(tensor)}. Use a method of fedtune, or train in float32."
                )


def stock_rule(name: str, weight_by: str, settings: Mapping[str, float]) -> Stock:
    """Flower's strategy `name`, with numbers of `--strategy_args` for its constructor.

    Raises:
        ConfigError: there is no such strategy, it cannot work here, or a number is not its.
    """
    classes = {key: getattr(flower, key) for key in flower.__all__}
    known = {
        key: cls
        for key, cls in classes.items()
        if issubclass(cls, flower.FedAvg) and key not in REFUSED
    }
    if name not in known:
        wraps = name in classes and "strategy" in inspect.signature(classes[name]).parameters
        reason = WRAPPER if wraps else REFUSED.get(name)
        if reason is not None:
            raise ConfigError(f"--strategy flwr:{name}: {reason}. Known: {', '.join(known)}.")
        raise ConfigError(
            f"--strategy: unknown strategy of Flower {name!r}. {nearest(name, known)}"
        )
    try:
        strategy = known[name](**_numbers(name, known[name], settings))
    except ValueError as error:
        raise ConfigError(f"--strategy_args: flwr:{name}: {error}") from error
    strategy.fraction_train = 0.0  # the workflow asks the clients
    return Stock(weight_by=weight_by, name=name, strategy=strategy)  # type: ignore[arg-type]


def _numbers(name: str, cls: type, settings: Mapping[str, float]) -> dict[str, float]:
    """The settings as the constructor takes them; whole where its default is."""
    defaults: dict[str, Any] = {
        key: parameter.default
        for key, parameter in inspect.signature(cls).parameters.items()
        if isinstance(parameter.default, int | float) and not key.startswith(SAMPLING)
    }
    for key, value in settings.items():
        if key not in defaults:
            hint = nearest(key, defaults) if defaults else "It has none: leave it out."
            raise ConfigError(f"--strategy_args: {key!r} is no setting of flwr:{name}. {hint}")
        if isinstance(defaults[key], int) and value % 1:
            raise ConfigError(f"--strategy_args: {key}: expected a whole number, received {value}.")
    return {key: type(defaults[key])(value) for key, value in settings.items()}


def _has_forgotten(strategy: flower.FedAvg) -> bool:
    """Whether a memory that the first round fills is empty."""
    if isinstance(strategy, flower.FedAvgM):
        return strategy.server_momentum > 0 and strategy.momentum_vector is None
    return getattr(strategy, "m_t", ()) is None


def _shape_of(params: Mapping[str, Tensor], name: str) -> object:
    return tuple(params[name].shape) if name in params else "none"


def _fingerprint(update: tuple[dict[str, Tensor], float]) -> tuple[float, ...]:
    params, weight = update
    return weight, *(float(tensor.sum(dtype=torch.float64)) for tensor in params.values())
