"""The verdict of a run in words and numbers: what terminal and report both say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.report import text
from fedtune.report.curves import ARM_LABELS
from fedtune.report.records import Spread, Summary, Values, final, last

__all__ = [
    "ArmRow",
    "Check",
    "Gap",
    "arm_rows",
    "checks",
    "gaps",
    "headline",
    "metric_names",
    "spread_text",
    "total",
]


@dataclass(frozen=True)
class Gap:
    """One comparison; a positive gap is worse for federated, a positive gain is better."""

    arm: str
    title: str
    other: float | None
    spread: Spread
    good: bool  # federated is at least as good

    @property
    def within_noise(self) -> bool:
        """The difference is smaller than its own spread over seeds."""
        return bool(self.spread.std) and abs(self.spread.mean or 0) <= (self.spread.std or 0)


@dataclass(frozen=True)
class Check:
    """A control: whether it holds, and what that shows."""

    title: str
    holds: bool
    words: str


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


def gaps(summary: Summary) -> list[Gap]:
    """Federated against each arm it was compared with, in the order of the verdict."""
    verdict = summary.verdict
    rows = []
    for arm, title, spread, sign in (
        ("centralized", "Gap to centralized", verdict.gap_centralized_pct, -1),
        ("centralized_large_batch", "Gap to large batch", verdict.gap_large_batch_pct, -1),
        ("local", "Gain over local only", verdict.gain_over_local_pct, 1),
    ):
        if spread is not None and spread.mean is not None:
            other = final(summary.arms[arm].mean.eval_loss) if arm in summary.arms else None
            rows.append(Gap(arm, title, other, spread, sign * spread.mean >= 0))
    return rows


def arm_rows(summary: Summary) -> list[ArmRow]:
    """Before, after and cost of every arm."""
    rows = []
    for name in [*ARM_LABELS, *(name for name in summary.arms if name not in ARM_LABELS)]:
        if name not in summary.arms:
            continue
        arm = summary.arms[name]
        series = arm.mean
        best_round = _best_round(series.eval_loss)
        members = arm.clients if name == "local" and arm.clients else arm.runs
        finals = [v for run in members if (v := final(run.eval_loss)) is not None]
        rows.append(
            ArmRow(
                arm=name,
                label=ARM_LABELS.get(name, name),
                before=series.eval_loss[0] if series.eval_loss else None,
                final=final(series.eval_loss),
                final_range=(min(finals), max(finals)) if len(set(finals)) > 1 else None,
                best=None if best_round is None else series.eval_loss[best_round],
                best_round=best_round,
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


def headline(summary: Summary) -> str:
    """The one sentence to remember."""
    series = summary.federated.mean.eval_loss
    before, after = series[0], last(series[1:])
    rounds = f"{summary.rounds} round{'' if summary.rounds == 1 else 's'}"
    if after is None:
        return f"No held-out loss was recorded in {rounds}."
    gap = next((gap for gap in gaps(summary) if gap.arm == "centralized"), None)
    if gap is not None and gap.spread.mean is not None:
        size = text.percent(abs(gap.spread.mean))
        if gap.within_noise:
            return f"No measurable gap to centralized: {size}, less than the seeds differ."
        side = "below" if gap.good else "above"
        return f"Federated loss ends {size} {side} centralized at equal samples."
    if before is None:
        return f"Federated training reaches a held-out loss of {text.loss(after)} in {rounds}."
    verb = "lowers" if after < before else "does not lower"
    return (
        f"Federated training {verb} held-out loss: "
        f"{text.loss(before)} to {text.loss(after)} in {rounds}."
    )


def checks(summary: Summary) -> list[Check]:
    """The controls that were run."""
    found = (_fixed_global(summary), _parity(summary))
    return [check for check in found if check is not None]


def spread_text(spread: Spread, seeds: int) -> str:
    """`± 0.4 over 3 seeds`, or `1 seed`."""
    if seeds < 2 or spread.std is None:
        return "1 seed" if seeds < 2 else f"{seeds} seeds"
    digits = 1 if spread.std >= 0.1 or spread.std == 0 else 2
    return f"\N{PLUS-MINUS SIGN} {spread.std:.{digits}f} over {seeds} seeds"


def total(values: Values) -> float | None:
    """Sum of the known values; None where nothing was counted."""
    known = [value for value in values if value is not None]
    return sum(known) if any(known) else None


def _best_round(values: Values) -> int | None:
    """Round with the lowest loss, round 0 excluded."""
    known = [(value, index) for index, value in enumerate(values) if index and value is not None]
    return min(known)[1] if known else None


def _fixed_global(summary: Summary) -> Check | None:
    title = "Fixed-global control"
    arm = summary.arms.get("fixed_global")
    known = [value for value in arm.mean.eval_loss if value is not None] if arm else []
    if len(known) < 2:
        return None
    moved, rounds = max(known) - min(known), len(known) - 1
    if moved:  # equal to the last bit, or something other than the global parameters is used
        words = f"moves by {moved:.2g}: clients do not use what the server sends"
        return Check(title, False, words)
    times = f"all {rounds} rounds" if rounds > 1 else "1 round"
    words = f"flat at {text.loss(known[0])} over {times}: clients use what the server sends"
    return Check(title, True, words)


def _parity(summary: Summary) -> Check | None:
    parity = summary.verdict.parity
    if parity is None:
        return None
    if parity.identical:
        return Check("One-client parity", True, "identical to the plain Trainer at every step")
    step = "an unknown step" if parity.first_diff_step is None else f"step {parity.first_diff_step}"
    words = f"differs from the plain Trainer, first at {step}"
    return Check("One-client parity", False, words)
