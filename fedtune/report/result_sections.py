"""The results in the report: cards, verdict, arms."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.report import figures
from fedtune.report.blocks import Cell, Section, Table, cells, low_high
from fedtune.report.findings import Gap, checks, gaps, spread_text
from fedtune.report.own_gain import gaining, own_rows_table
from fedtune.report.rows import ArmRow, arm_rows, metric_names
from fedtune.report.sent_bytes import codec_of, of_raw, total_traffic
from fedtune.results.summary import Summary

__all__ = ["Card", "arms", "cards", "verdict"]


@dataclass(frozen=True)
class Card:
    """One of the few numbers to read first."""

    label: str
    big: str
    note: str
    tone: str = ""


def cards(summary: Summary) -> list[Card]:
    """The few numbers to read first."""
    us, base = arm_rows(summary)[0], summary.base_loss
    start = f"{summary.start} {figures.loss(us.before)}" if base is None else ""
    found = [
        Card("Held-out loss", figures.loss(us.final), start or f"base model {figures.loss(base)}")
    ]
    found += [
        _gap_card(summary, gap) for gap in gaps(summary) if gap.arm != "centralized_large_batch"
    ]
    parity = summary.verdict.parity
    if parity is not None:
        step = "" if parity.first_diff_step is None else f" from step {parity.first_diff_step}"
        words = ("identical", "to the plain Trainer", "good")
        if not parity.identical:
            words = ("differs", f"from the plain Trainer{step}", "bad")
        found.append(Card("One-client parity", *words))
    if len(found) == 1:  # nothing was compared
        found.append(Card("Best round", figures.loss(us.best), _round(us) or figures.DASH))
        found.append(Card("Time", f"{figures.seconds(us.wall_s)} s", "of all rounds"))
    return [*found, _traffic_card(summary)]


def _gap_card(summary: Summary, gap: Gap) -> Card:
    tone = "good" if gap.good else "bad" if gap.arm == "local" else ""
    own, note = gaining(summary), spread_text(gap.spread, summary.seeds)
    if gap.arm == "local" and own:
        note = f"on the pooled rows; on their own {own} gain"
    return Card(gap.title, gap.size, note, "" if gap.within_noise else tone)


def _round(row: ArmRow) -> str:
    if row.best_round is None:
        return ""
    return f"round {row.best_round}" if row.best_round else "round 0 (initial adapter)"


def _traffic_card(summary: Summary) -> Card:
    traffic, ratio = total_traffic(summary), summary.verdict.bytes_ratio_full
    notes = []
    if codec_of(summary):
        notes.append(f"{of_raw(traffic.sent, traffic.raw)} of raw")
    if ratio is not None:
        notes.append(f"{figures.percent(100 * ratio)} of full-model exchange")
    size = f"{figures.megabytes(traffic.sent)} MB" if traffic.sent else figures.DASH
    return Card("Traffic", size, ", ".join(notes) or "up and down, all clients")


def verdict(summary: Summary) -> Section | None:
    """Comparisons and controls, with the spread."""
    final = figures.loss(arm_rows(summary)[0].final)
    ranges = {row.arm: row.final_range for row in arm_rows(summary)}
    rows = [
        [
            Cell(gap.title, "name"),
            Cell(figures.loss(gap.other), "n", low_high(ranges.get(gap.arm))),
            Cell(
                gap.size,
                "n",
                "within the seeds' spread" if gap.within_noise else "",
                spread_text(gap.spread, summary.seeds),
            ),
        ]
        for gap in gaps(summary)
    ]
    more = [table for table in (own_rows_table(summary), _controls(summary)) if table.rows]
    if not rows:
        return Section("Verdict", tables=more) if more else None
    note = (
        f"Federated ends at {final}. A gap is how much higher that is than the other arm; "
        "a gain is how much lower. Small print: lowest and highest over seeds, or over clients for "
        "local only."
    )
    heads = ["Question", "#Other arm", "#Difference"]
    return Section("Verdict", note, [Table(heads, rows), *more])


def _controls(summary: Summary) -> Table:
    rows = [
        [
            Cell(check.title, "name"),
            Cell("holds", "good") if check.holds else Cell("fails", "bad"),
            Cell(check.words, "long"),
        ]
        for check in checks(summary)
    ]
    return Table(["Control", "", "What it shows"], rows, "Controls")


def arms(summary: Summary) -> Section:
    """Every arm at the end of the run."""
    found = arm_rows(summary)
    metrics = metric_names(found)
    heads = ["Arm", "#Initial", "#Final", "#Best", "#Samples", "#MB up", "#MB down", "#Seconds"]
    rows = [
        [
            Cell(row.label, "name"),
            Cell(figures.loss(row.before), "n"),
            Cell(figures.loss(row.final), "n", low_high(row.final_range)),
            Cell(figures.loss(row.best), "n", _round(row)),
            *cells(
                [
                    figures.count(row.samples),
                    *map(figures.megabytes, (row.bytes_up, row.bytes_down)),
                ]
            ),
            Cell(figures.seconds(row.wall_s), "n"),
            *cells([figures.loss(row.metrics.get(name)) for name in metrics]),
        ]
        for row in found
    ]
    note = "Held-out loss per token with its range over seeds (local only: clients), and cost."
    if summary.base_loss is not None:
        note += f" The base model alone has {figures.loss(summary.base_loss)}."
    heads += [f"#{name}" for name in metrics]
    return Section("Arms", note, [Table(heads, rows, ours_first=True)])
