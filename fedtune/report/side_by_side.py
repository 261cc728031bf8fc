"""Several runs side by side: one row each, with the difference to the first, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.report.curves import run_names
from fedtune.report.intervals import Interval, t_interval
from fedtune.report.rows import arm_rows, total
from fedtune.report.unlike import differing
from fedtune.results.series import final
from fedtune.results.summary import Summary

__all__ = ["RunRow", "run_rows"]


@dataclass(frozen=True)
class RunRow:
    """One run; losses are held-out, of the federated arm, means over `seeds`.

    Attributes:
        settings: those that differ between the runs, by flag name.
        difference: to the first run's final loss, over the seeds that both have.
        difference_pct: the same in percent of the first run's.
        bytes_up: of all rounds and clients; `bytes_down` and `seconds` too.
    """

    run: str
    directory: Path
    strategy: str
    settings: Mapping[str, str]
    status: str
    reason: str | None
    seeds: tuple[str, ...]
    rounds: int
    samples: float | None
    base_loss: float | None
    first_loss: float | None
    final_losses: tuple[float, ...]
    final_loss: float | None
    best_loss: float | None
    best_round: int | None
    difference: Interval | None
    difference_pct: Interval | None
    bytes_up: float | None
    bytes_down: float | None
    seconds: float | None


def run_rows(summaries: Sequence[Summary]) -> list[RunRow]:
    """A row per run, in order."""
    settings = differing(summaries)
    return [
        _row(summary, name, summaries[0], {key: settings[key][index] for key in settings})
        for index, (summary, name) in enumerate(zip(summaries, run_names(summaries), strict=True))
    ]


def _row(summary: Summary, name: str, first: Summary, settings: Mapping[str, str]) -> RunRow:
    arm, series = arm_rows(summary)[0], summary.federated.mean
    ours, theirs = _finals(summary), _finals(first)
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if summary is first:
        pairs = []
    positive = all(there > 0 for _, there in pairs)
    return RunRow(
        run=name,
        directory=summary.directory,
        strategy=summary.setting("strategy") or "",
        settings=settings,
        status=summary.status,
        reason=summary.ending.reason,
        seeds=summary.seed_names,
        rounds=summary.rounds,
        samples=final(series.samples),
        base_loss=summary.base_loss,
        first_loss=arm.before,
        final_losses=tuple(ours.values()),
        final_loss=arm.final,
        best_loss=arm.best,
        best_round=arm.best_round,
        difference=_over([here - there for here, there in pairs]),
        difference_pct=_over([100 * (here / there - 1) for here, there in pairs if positive]),
        bytes_up=total(series.bytes_up),
        bytes_down=total(series.bytes_down),
        seconds=total(series.wall_s),
    )


def _over(values: Sequence[float]) -> Interval | None:
    return t_interval(values) if values else None


def _finals(summary: Summary) -> dict[str, float]:
    """Seed -> final loss; seeds without one are left out."""
    runs = summary.federated.runs or (summary.federated.mean,)
    finals = zip(summary.seed_names, (final(run.eval_loss) for run in runs), strict=False)
    return {seed: loss for seed, loss in finals if loss is not None}
