"""One round of updates, as the server aggregates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat

from torch import Tensor

from fedtune.strategies import ClientStats, Method
from fedtune.strategies.aggregator import Aggregation, Aggregator, Contribution
from fedtune.strategies.base import Round
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.names import lora_modules
from fedtune.strategies.memory import ServerMemory
from fedtune.strategies.method import Part
from tests.methods import method_of

Params = Mapping[str, Tensor]
State = dict[str, dict[str, Tensor]]

SCALING = 2.0


def stats_of(steps: int = 1, weight: int = 1) -> ClientStats:
    """`weight` rows and tokens, `steps` steps."""
    return ClientStats(num_examples=weight, num_tokens=weight, num_steps=steps)


def begun(
    method: Method | Part,
    old: Params,
    updates: Sequence[Params],
    stats: Sequence[ClientStats],
    number: int,
    memory: ServerMemory | None,
) -> Aggregation:
    """A round with all updates in it."""
    who = list(stats) or list(repeat(stats_of(), len(updates)))
    now = Round(number, old, dict.fromkeys(lora_modules(updates[0]), SCALING))
    aggregation = Aggregator(method_of(method)).begin(now, memory)
    for update, one in zip(updates, who, strict=True):
        aggregation.add(Contribution(update, one))
    return aggregation


def one_fold(
    method: Method | Part,
    old: Params,
    updates: Sequence[Params],
    stats: Sequence[ClientStats] = (),
    number: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """What the rule makes of the updates, and what it adds to the base."""
    found = begun(method, old, updates, stats, number, None)
    return found.result, dict(found.terms)


def one_round(
    method: Method | Part,
    old: Params,
    updates: Sequence[Params],
    stats: Sequence[ClientStats] = (),
    state: State | None = None,
    number: int = 1,
) -> tuple[dict[str, Tensor], State]:
    """The next global parameters and the method's state; by default all clients weigh the same."""
    memory = ServerMemory(state or {})
    found = begun(method, old, updates, stats, number, memory).finish(len(updates))
    return found.params, found.memory.method_state
