"""What the comparison says, in numbers: the verdict rows of `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtune.compare.series import SeriesDict

__all__ = ["first_difference", "spread", "verdict"]


def verdict(
    arms: Mapping[str, Sequence[SeriesDict]],
    *,
    parity: dict[str, Any] | None,
    full_bytes: int,
    time_split: Mapping[str, float],
    equal_samples: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Rows over seeds. `arms` maps an arm to one series per seed, in the order of the seeds.

    Gaps and gains compare final eval losses: gap = federated / other - 1, gain = 1 - federated /
    local mean, in percent. `full_bytes` is one exchange of the full model with the same clients,
    both ways. `equal_samples`: whether an arm ends within a batch of the federated one's samples.
    """
    federated = [run["eval_loss"][-1] for run in arms["federated"]]

    def over_seeds(
        arm: str, percent: Callable[[float, float], float]
    ) -> dict[str, float | None] | None:
        if arm not in arms:
            return None
        others = [run["eval_loss"][-1] for run in arms[arm]]
        if None in others:  # that arm diverged
            return {"mean": None, "std": None}
        return spread([percent(*pair) for pair in zip(federated, others, strict=True)])

    run = arms["federated"][0]
    rounds = max(1, len(run["bytes_up"]) - 1)
    sent = sum(run["bytes_up"][1:]) + sum(run["bytes_down"][1:])
    return {
        "gap_centralized_pct": over_seeds("centralized", _gap),
        "gap_large_batch_pct": over_seeds("centralized_large_batch", _gap),
        "gain_over_local_pct": over_seeds("local", _gain),
        "equal_samples": dict(equal_samples or {}),
        "parity": parity,
        "bytes_ratio_full": sent / (rounds * full_bytes) if full_bytes else None,
        "time_split": dict(time_split),
    }


def _gap(ours: float, other: float) -> float:
    return 100 * (ours / other - 1)


def _gain(ours: float, other: float) -> float:
    return 100 * (1 - ours / other)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1) over seeds; `std` is None for one seed."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "std": None}
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": mean, "std": math.sqrt(variance)}


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
