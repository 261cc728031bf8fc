"""What the shell does with one round's updates, without messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat

from torch import Tensor

from fedtune.strategies import ClientStats, Method
from fedtune.strategies.base import Round
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.names import lora_modules
from fedtune.strategies.mean import toward

Params = Mapping[str, Tensor]
State = dict[str, dict[str, Tensor]]

SCALING = 2.0


def stats_of(steps: int = 1, weight: int = 1) -> ClientStats:
    """`weight` rows and tokens, `steps` steps."""
    return ClientStats(num_examples=weight, num_tokens=weight, num_steps=steps)


def one_fold(
    method: Method,
    old: Params,
    updates: Sequence[Params],
    stats: Sequence[ClientStats] = (),
    number: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """What the rule makes of the updates, and what it adds to the base."""
    who = list(stats) or list(repeat(stats_of(), len(updates)))
    now = Round(number, old, dict.fromkeys(lora_modules(updates[0]), SCALING))
    fold = method.fold(now)
    for update, one in zip(updates, who, strict=True):
        fold.add(update, method.weigh(one))
    return fold.result(), getattr(fold, "base", {})


def one_round(
    method: Method,
    old: Params,
    updates: Sequence[Params],
    stats: Sequence[ClientStats] = (),
    state: State | None = None,
    number: int = 1,
) -> tuple[dict[str, Tensor], State]:
    """The next global parameters and the method's state; by default all clients weigh the same."""
    who = list(stats) or list(repeat(stats_of(), len(updates)))
    folded, _ = one_fold(method, old, updates, who, number)
    result = toward(old, folded, method.server_rate(who))
    params: dict[str, Tensor] = {}
    after: State = {}
    for name, value in result.items():
        params[name], after[name] = method.step(old[name], value, (state or {}).get(name, {}))
    return params, after
