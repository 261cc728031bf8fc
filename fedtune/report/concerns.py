"""What a run must not be praised for: arms that training made worse, and arms past their best."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.report import figures
from fedtune.report.rows import ArmRow, arm_rows, same
from fedtune.results.summary import Summary

__all__ = ["concerns", "made_worse"]

# The gaps between arms and methods are of this size: an arm so far above its own best says as much
# about when it was stopped as about how it was trained.
PAST_BEST_PCT = 2.0
CONTROLS = ("fixed_global",)  # trains for nothing on purpose


def made_worse(summary: Summary) -> str | None:
    """The sentence of it where the federated arm ends above the model that nobody tuned."""
    above = [row for row in _above(summary) if row.arm in ("federated", "centralized")]
    return _worse(summary, above) if above and above[0].arm == "federated" else None


def concerns(summary: Summary) -> list[str]:
    """One line each; empty where every arm ends below its start and near its best."""
    rows, above = _trained(summary), _above(summary)
    lines = [_worse(summary, above)] if above else []
    lines += [f"{row.label}: {words}" for row in rows if (words := _past_best(row))]
    if summary.rounds and rows[0].best_round == 0:
        lines.append("best round: 0 (initial adapter), which no round beat")
    lines += [f"{row.label}: diverged, no final loss" for row in rows[1:] if row.final is None]
    return lines


def _trained(summary: Summary) -> list[ArmRow]:
    return [row for row in arm_rows(summary) if row.arm not in CONTROLS]


def _untuned(summary: Summary, row: ArmRow) -> float | None:
    """The loss without any tuning: the base model's where it was scored, else the arm's first."""
    return row.before if summary.base_loss is None else summary.base_loss


def _above(summary: Summary) -> list[ArmRow]:
    """The arms that end above the untuned model, the federated one first."""
    return [row for row in _trained(summary) if _is_above(row.final, _untuned(summary, row))]


def _is_above(value: float | None, other: float | None) -> bool:
    return value is not None and other is not None and value > other and not same(value, other)


def _worse(summary: Summary, above: Sequence[ArmRow]) -> str:
    """`training made it worse: base model 4.760, federated 7.100, centralized 7.098`."""
    start, first = _untuned(summary, above[0]), above[0].before
    name = "initial adapter" if summary.base_loss is None else "base model"
    ends = ", ".join(f"{row.arm.replace('_', ' ')} {figures.loss(row.final)}" for row in above)
    words = f"{name} {figures.loss(start)}, {ends}"
    if start is None or first is None or same(first, start):
        return f"training made it worse: {words}"
    # A fresh prompt does harm, which training may lessen without ever making up for it.
    helped = not any(_is_above(row.final, first) for row in above)
    verb = "tuning did not help" if helped else "training made it worse"
    return f"{verb}: {words} (initial adapter {figures.loss(first)})"


def _past_best(row: ArmRow) -> str | None:
    """Whether an arm has gone on after its best round, and how far it went up again."""
    if row.final is None or not row.best_round or row.best is None or row.best <= 0:
        return None
    above = 100 * (row.final / row.best - 1)
    if above < PAST_BEST_PCT:
        return None
    best = f"{figures.loss(row.best)} in round {row.best_round}"
    return f"ends at {figures.loss(row.final)}, {figures.percent(above)} above its best, {best}"
