"""The results in the report: cards, verdict, arms. Text from files passes through `esc`."""

from __future__ import annotations

from fedtune.report import text
from fedtune.report.markup import cell, low_high, section, sub, table, unbroken
from fedtune.report.own_rows import gaining, own_rows_table
from fedtune.report.rows import ArmRow, arm_rows, metric_names
from fedtune.report.svg import esc
from fedtune.report.transport import codec_of, moved, of_raw
from fedtune.report.verdict import checks, gaps, spread_text
from fedtune.results.summary import Summary

__all__ = ["arms_section", "cards", "verdict_section"]


def cards(summary: Summary) -> str:
    """The few numbers to read first."""
    us = arm_rows(summary)[0]
    base, own = summary.base_loss, gaining(summary)
    start = f"{summary.start} {text.loss(us.before)}" if base is None else ""
    items = [_card("Held-out loss", text.loss(us.final), start or f"base model {text.loss(base)}")]
    for gap in gaps(summary):
        if gap.arm == "centralized_large_batch":
            continue
        tone = "" if gap.within_noise else "good" if gap.good else ""
        tone = "bad" if gap.arm == "local" and not gap.good and not gap.within_noise else tone
        note = spread_text(gap.spread, summary.seeds)
        if gap.arm == "local" and own:
            note = f"on the pooled rows; on their own {own} gain"
        items.append(_card(gap.title, gap.size, note, tone))
    parity = summary.verdict.parity
    if parity is not None:
        big = "identical" if parity.identical else "differs"
        step = "" if parity.first_diff_step is None else f" from step {parity.first_diff_step}"
        note = "to the plain Trainer" if parity.identical else f"from the plain Trainer{step}"
        items.append(_card("One-client parity", big, note, "good" if parity.identical else "bad"))
    if len(items) == 1:  # nothing was compared
        items.append(_card("Best round", text.loss(us.best), _round(us) or text.DASH))
        items.append(_card("Time", f"{text.seconds(us.wall_s)} s", "of all rounds"))
    items.append(_traffic_card(summary))
    return f'<div class="cards">{"".join(items)}</div>'


def _round(row: ArmRow) -> str:
    if row.best_round is None:
        return ""
    return f"round {row.best_round}" if row.best_round else "round 0 (initial adapter)"


def _card(label: str, big: str, note: str, tone: str = "") -> str:
    return (
        f'<div class="card {tone}"><p>{esc(label)}</p><p class="big">{esc(unbroken(big))}</p>'
        f"<p>{esc(unbroken(note))}</p></div>"
    )


def _traffic_card(summary: Summary) -> str:
    traffic, ratio = moved(summary), summary.verdict.bytes_ratio_full
    notes = []
    if codec_of(summary):
        notes.append(f"{of_raw(traffic.sent, traffic.raw)} of raw")
    if ratio is not None:
        notes.append(f"{text.percent(100 * ratio)} of full-model exchange")
    size = f"{text.megabytes(traffic.sent)} MB" if traffic.sent else text.DASH
    return _card("Traffic", size, ", ".join(notes) or "up and down, all clients")


def verdict_section(summary: Summary) -> str:
    """Comparisons and controls, with the spread."""
    final = text.loss(arm_rows(summary)[0].final)
    ranges = {row.arm: row.final_range for row in arm_rows(summary)}
    rows = []
    for gap in gaps(summary):
        reading = "within the seeds' spread" if gap.within_noise else ""
        rows.append(
            [
                cell(gap.title, "name"),
                f'<td class="n">{text.loss(gap.other)}{low_high(ranges.get(gap.arm))}</td>',
                f'<td class="n"><b>{gap.size}</b>'
                f'<span class="sub wrap">{esc(spread_text(gap.spread, summary.seeds))}</span>'
                f"{sub(reading)}</td>",
            ]
        )
    more = own_rows_table(summary) + _controls(summary)
    if not rows:
        return section("Verdict", "", more) if more else ""
    note = (
        f"Federated ends at {final}. A gap is how much higher that is than the other arm; "
        "a gain is how much lower. Small print: lowest and highest over seeds, or over clients for "
        "local only."
    )
    heads = ["Question", "#Other arm", "#Difference"]
    return section("Verdict", note, table(heads, rows) + more)


def _controls(summary: Summary) -> str:
    rows = [
        [
            cell(check.title, "name"),
            cell("holds" if check.holds else "fails", "good" if check.holds else "bad"),
            cell(check.words, "long"),
        ]
        for check in checks(summary)
    ]
    body = table(["Control", "", "What it shows"], rows)
    return f'<h3 class="later">Controls</h3>{body}' if rows else ""


def arms_section(summary: Summary) -> str:
    """Every arm at the end of the run."""
    heads = ["Arm", "#Initial", "#Final", "#Best", "#Samples", "#MB up", "#MB down", "#Seconds"]
    arms = arm_rows(summary)
    metrics = metric_names(arms)
    heads += [f"#{name}" for name in metrics]
    rows, classes = [], []
    for row in arms:
        best = _round(row)
        classes.append("us" if row.arm == "federated" else "")
        rows.append(
            [
                cell(row.label, "name"),
                cell(text.loss(row.before), "n"),
                f'<td class="n">{text.loss(row.final)}{low_high(row.final_range)}</td>',
                f'<td class="n">{text.loss(row.best)}{sub(best)}</td>',
                cell(text.count(row.samples), "n"),
                cell(text.megabytes(row.bytes_up), "n"),
                cell(text.megabytes(row.bytes_down), "n"),
                cell(text.seconds(row.wall_s), "n"),
                *(cell(text.loss(row.metrics.get(name)), "n") for name in metrics),
            ]
        )
    note = "Held-out loss per token with its range over seeds (local only: clients), and cost."
    if summary.base_loss is not None:
        note += f" The base model alone has {text.loss(summary.base_loss)}."
    return section("Arms", note, table(heads, rows, classes))
