"""What the comparison says, in numbers: the verdict rows of `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtune.results.series import Series
from fedtune.results.verdict import OwnGain, OwnRow, Parity, Spread, Verdict

__all__ = ["first_difference", "own_gain", "spread", "verdict"]


# Of two losses, None where one is not known.
Percent = Callable[[float | None, float | None], float | None]


def verdict(
    arms: Mapping[str, Sequence[Series]],
    *,
    parity: Parity | None,
    full_bytes: int,
    time_split: Mapping[str, float],
    equal_samples: Mapping[str, bool] | None = None,
    own: OwnGain | None = None,
) -> Verdict:
    """Rows over seeds. `arms` maps an arm to one series per seed, in the order of the seeds.

    Gaps and gains compare final eval losses: gap = federated / other - 1, gain = 1 - federated /
    local mean, in percent. `full_bytes` is one exchange of the full model with the same clients,
    both ways. `equal_samples`: whether an arm ends within a batch of the federated one's samples.
    `own` is what `own_gain` found.
    """
    federated = [run.eval_loss[-1] for run in arms["federated"]]

    def over_seeds(arm: str, percent: Percent) -> Spread | None:
        if arm not in arms:
            return None
        finals = zip(federated, (run.eval_loss[-1] for run in arms[arm]), strict=True)
        found = [percent(*pair) for pair in finals]
        known = [value for value in found if value is not None]  # else an arm diverged
        return spread(known) if len(known) == len(found) else Spread(None)

    run = arms["federated"][0]
    rounds = max(1, len(run.bytes_up) - 1)
    sent = sum(value or 0 for value in (*run.bytes_up[1:], *run.bytes_down[1:]))
    return Verdict(
        gap_centralized_pct=over_seeds("centralized", _gap),
        gap_large_batch_pct=over_seeds("centralized_large_batch", _gap),
        gain_over_local_pct=over_seeds("local", _gain),
        equal_samples=dict(equal_samples or {}),
        gain_over_local_own_pct=own,
        parity=parity,
        bytes_ratio_full=sent / (rounds * full_bytes) if full_bytes else None,
        time_split=dict(time_split),
    )


def own_gain(
    results: Sequence[Mapping[str, Any]], rows: Mapping[str, int] | None
) -> OwnGain | None:
    """Gain over local of each client on its own held-out rows; None without that arm, or rows.

    Losses and gains of a client are means over seeds; `mean` and `std` are over seeds, of the mean
    over clients. A client that diverged, or has no such rows, has no gain and is in no mean.
    """
    if rows is None or "local" not in results[0]:
        return None
    arms = [arm for arm in ("local", "federated", "centralized") if arm in results[0]]
    clients, gains = [], []
    for client, count in rows.items():
        losses: dict[str, list[float | None]] = {
            arm: [(result[arm].get("own") or {}).get(client) for result in results] for arm in arms
        }
        pairs = list(zip(losses["federated"], losses["local"], strict=True))
        found = [_gain(*pair) for pair in pairs]
        gain = [value for value in found if value is not None]
        gain = gain if len(gain) == len(found) else []
        if gain:
            gains.append(gain)
        means = {arm: _mean(values) for arm, values in losses.items()}
        clients.append(OwnRow(client, count, means, _mean(gain)))
    by_seed = [sum(column) / len(column) for column in zip(*gains, strict=True)]
    return OwnGain(spread(by_seed) if by_seed else Spread(None), tuple(clients))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _gap(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or other is None else 100 * (ours / other - 1)


def _gain(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or other is None else 100 * (1 - ours / other)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (n - 1) over seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Spread(mean)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance))


def first_difference(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> int | None:
    """First step at which the logged loss, LR or gradient norm of two runs differ; None if none."""
    left, right = _by_step(ours), _by_step(theirs)
    for step in sorted(left.keys() | right.keys()):
        if left.get(step) != right.get(step):
            return step
    return None


def _by_step(log_history: Sequence[Mapping[str, Any]]) -> dict[int, tuple[Any, ...]]:
    return {
        int(entry["step"]): (entry["loss"], entry.get("learning_rate"), entry.get("grad_norm"))
        for entry in log_history
        if "loss" in entry
    }
