"""The end of a run on a terminal: one table, and the verdict in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.aligned import aligned
from fedtune.report import figures
from fedtune.report.concerns import concerns, made_worse
from fedtune.report.curves import run_names
from fedtune.report.findings import checks, gaps, headline, spread_text
from fedtune.report.own_gain import own_rows_line
from fedtune.report.rows import arm_rows, metric_names
from fedtune.report.sent_bytes import codec_of, of_raw, total_traffic
from fedtune.results.series import final
from fedtune.results.summary import Summary

__all__ = ["comparison_table", "traffic_table", "verdict_lines"]

RUNS = ("run", "codec", "MB up", "MB down", "of raw", "final eval loss")
COLUMNS = ("arm", "eval loss initial", "final", "best (round)", "samples", "MB up", "down", "s")


def comparison_table(summary: Summary) -> str:
    """One line per arm; figures are right-aligned and a dash is a missing number."""
    arms = arm_rows(summary)
    metrics = metric_names(arms)
    rows = [(*COLUMNS, *metrics)]
    for row in arms:
        best = figures.DASH if row.best is None else f"{figures.loss(row.best)} ({row.best_round})"
        rows.append(
            (
                row.label,
                figures.loss(row.before),
                figures.loss(row.final),
                best,
                figures.count(row.samples),
                figures.megabytes(row.bytes_up),
                figures.megabytes(row.bytes_down),
                figures.seconds(row.wall_s),
                *(figures.loss(row.metrics.get(name)) for name in metrics),
            )
        )
    return "\n".join(aligned(rows, range(1, len(rows[0])), rule=True))


def traffic_table(summaries: Sequence[Summary]) -> str:
    """One line per run, raw MB and what was sent; empty where no run has a codec."""
    if not any(map(codec_of, summaries)):
        return ""
    rows = [RUNS]
    for summary, name in zip(summaries, run_names(summaries), strict=True):
        traffic = total_traffic(summary)
        rows.append(
            (
                name,
                codec_of(summary) or "none",
                _less(traffic.up_raw, traffic.up),
                _less(traffic.down_raw, traffic.down),
                of_raw(traffic.sent, traffic.raw),
                figures.loss(final(summary.federated.mean.eval_loss)),
            )
        )
    return "\n".join(aligned(rows, range(1, len(rows[0])), rule=True))


def _less(raw: float | None, sent: float | None) -> str:
    """`2.77 -> 0.35`."""
    words = (figures.megabytes(raw), figures.megabytes(sent))
    return " -> ".join(dict.fromkeys(words))


def verdict_lines(summary: Summary) -> list[str]:
    """What the comparison shows, one finding a line, each with its numbers."""
    ours = figures.loss(final(summary.federated.mean.eval_loss))
    lines, own = [], own_rows_line(summary)
    for gap in gaps(summary):
        other = figures.loss(gap.other)
        spread = f"({spread_text(gap.spread, summary.seeds)})"
        if gap.arm == "local":
            where = " on the pooled rows" if own else ""
            lines.append(f"federated {ours} vs local only {other}{where}: gain {gap.size} {spread}")
        else:
            name = gap.arm.replace("_", " ")
            lines.append(
                f"federated {ours} vs {name} {other} {gap.samples}: gap {gap.size} {spread}"
            )
    lines += [own] if own else []
    worries = concerns(summary)
    if not lines and not made_worse(summary):
        lines = [headline(summary)]
    found = [f"{check.title}: {check.words}" for check in checks(summary)]
    return [*worries, *lines, *found, *_cost(summary)]


def _cost(summary: Summary) -> list[str]:
    ratio, times = summary.verdict.bytes_ratio_full, summary.verdict.time_split
    lines = []
    if codec := codec_of(summary):
        traffic = total_traffic(summary)
        share = of_raw(traffic.sent, traffic.raw)
        lines.append(f"codec {codec}: {figures.megabytes(traffic.sent)} MB ({share} of raw)")
    if ratio is not None:
        lines.append(f"bytes: {figures.percent(100 * ratio)} of exchanging the full model")
    if whole := sum(times.values()):
        parts = ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in times.items())
        lines.append(f"time: {parts}")
    return lines
