"""One row per arm: before, after, best and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.report.curves import ARM_LABELS
from fedtune.results.series import Values, final, last
from fedtune.results.summary import Summary

__all__ = ["ArmRow", "arm_rows", "best_round", "metric_names", "same", "total"]


@dataclass(frozen=True)
class ArmRow:
    """One arm at the end of the run."""

    arm: str
    label: str
    before: float | None
    final: float | None
    final_range: tuple[float, float] | None
    best: float | None
    best_round: int | None
    samples: float | None
    bytes_up: float | None
    bytes_down: float | None
    wall_s: float | None
    metrics: Mapping[str, float | None]


def arm_rows(summary: Summary) -> list[ArmRow]:
    """Before, after and cost of every arm."""
    rows = []
    for name in [*ARM_LABELS, *(name for name in summary.arms if name not in ARM_LABELS)]:
        if name not in summary.arms:
            continue
        arm = summary.arms[name]
        series = arm.mean
        best = best_round(series.eval_loss)
        finals = [v for run in arm.members(name) if (v := final(run.eval_loss)) is not None]
        rows.append(
            ArmRow(
                arm=name,
                label=ARM_LABELS.get(name, name),
                before=series.eval_loss[0] if series.eval_loss else None,
                final=final(series.eval_loss),
                final_range=(min(finals), max(finals)) if len(set(finals)) > 1 else None,
                best=None if best is None else series.eval_loss[best],
                best_round=best,
                samples=last(series.samples),
                bytes_up=total(series.bytes_up),
                bytes_down=total(series.bytes_down),
                wall_s=total(series.wall_s),
                metrics={name: last(values) for name, values in series.metrics.items()},
            )
        )
    return rows


def metric_names(rows: Sequence[ArmRow]) -> list[str]:
    """Task metrics of any arm, in order of first sight."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def total(values: Values) -> float | None:
    """Sum of the known values; None where nothing was counted."""
    known = [value for value in values if value is not None]
    return sum(known) if any(known) else None


def best_round(values: Values) -> int | None:
    """Round with the lowest loss, the first of equals; 0 is the initial adapter."""
    known = [(value, index) for index, value in enumerate(values) if value is not None]
    return min(known)[1] if known else None


def same(one: float, other: float) -> bool:
    """Whether two losses differ by less than a percentage shows (0.005 % of the second)."""
    return abs(one - other) < 5e-5 * abs(other) or one == other
