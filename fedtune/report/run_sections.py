"""How the run went, in the report: rounds, refusals, clients, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.report import figures
from fedtune.report.blocks import Cell, Section, Table, cells, shares
from fedtune.report.curves import COMPARE_TONES
from fedtune.report.ending import last_refusals
from fedtune.results.round_record import RoundRecord
from fedtune.results.series import final
from fedtune.results.summary import ClientData, Summary

__all__ = ["clients", "details", "last_refused", "refused", "rounds"]

CLASSES = len(COMPARE_TONES)  # labels with a colour of their own; the rest are one share
OWNED = 5  # values of the partition column that are named
REFUSALS = ("Round", "Client", "Reason")


def rounds(summary: Summary, records: Sequence[RoundRecord], seed: str | None) -> Section | None:
    """Time split and one line per round."""
    split = shares(summary.verdict.time_split)
    if not records:
        note = "Where the wall time of the run went."
        return Section("Time", note, shares=split) if split else None
    residual = any(row.residual is not None for row in records)
    parts = list(dict.fromkeys(part for row in records for part in row.time))
    heads = ["Round", "#Loss", "#Replies", "#Refused", "#Update norm", "#Client drift"]
    heads += [*(["#Residual"] if residual else []), *(f"#{part}" for part in parts)]
    rows = []
    for row in records:
        norms = (row.update_norm, row.client_drift, *((row.residual,) if residual else ()))
        rows.append(
            [
                Cell(_number(row), sub=f"try {row.attempt}" if (row.attempt or 1) > 1 else ""),
                *cells([figures.loss(row.eval_loss), str(len(row.replies))]),
                Cell(str(len(row.refusals)), "n bad" if row.refusals else "n"),
                *cells([figures.plain(norm) for norm in norms]),
                *cells([figures.seconds(row.time.get(part)) for part in parts]),
                *cells([figures.megabytes(row.traffic.up), figures.megabytes(row.traffic.down)]),
            ]
        )
    note = f"Seed {seed}. " if seed else ""
    note += "Replies are updates that were used; times are in seconds."
    return Section("Rounds", note, [Table([*heads, "#MB up", "#MB down"], rows)], split)


def _number(row: RoundRecord) -> str:
    return figures.DASH if row.round is None else str(row.round)


def refused(records: Sequence[RoundRecord]) -> Section | None:
    """Who was refused, when and why."""
    rows = [
        [
            Cell(_number(row), sub=f"try {attempt}" if attempt > 1 else ""),
            Cell(refusal.who or figures.DASH, "name"),
            Cell(refusal.reason or figures.DASH, "long"),
        ]
        for row in records
        for attempt, refusal in row.refusals
    ]
    note = "These updates were left out of the round; nothing in them reached the model."
    return Section("Refused replies", note, [Table(REFUSALS, rows)]) if rows else None


def last_refused(summary: Summary) -> Section | None:
    """Who was refused in the round that ended the run; a reason that came again is told once."""
    tries: dict[tuple[str, str, str], list[str]] = {}
    for number, one in last_refusals(summary):
        told = (number, one.refusal.who, one.refusal.reason)
        tries.setdefault(told, []).append(str(one.attempt))
    rows = [
        [
            Cell(number, sub=f"try {', '.join(attempts)}"),
            Cell(who or figures.DASH, "name"),
            Cell(reason or figures.DASH, "long"),
        ]
        for (number, who, reason), attempts in tries.items()
    ]
    title = "Refused in the round that did not come about"
    note = "These updates were refused; without them the round had too few."
    return Section(title, note, [Table(REFUSALS, rows)]) if rows else None


def clients(summary: Summary) -> Section | None:
    """What each client owns, and what it gains over training alone."""
    if not summary.clients:
        return None
    labels = list(dict.fromkeys(name for client in summary.clients for name in client.labels))
    totals = {n: sum(client.labels.get(n, 0) for client in summary.clients) for n in labels}
    shown = sorted(labels, key=lambda name: -totals[name])[: CLASSES - (len(labels) > CLASSES)]
    alone = _alone(summary)
    rows = [
        [
            Cell(client.client, "name", _owned(client)),
            *cells([figures.count(client.rows), figures.count(client.tokens)]),
            *(cells(alone[index]) if alone else ()),
            *([_labels(client, shown)] if labels else ()),
        ]
        for index, client in enumerate(summary.clients)
    ]
    heads = ["Client", "#Rows", "#Tokens", *(["#Alone", "#Gain"] if alone else [])]
    heads += ["Labels"] if labels else []
    note = "Rows and tokens each client trains on."
    if alone:
        note += " Alone: its final held-out loss without the federation, and how much lower the "
        note += "federated loss is."
    return Section("Clients", note, [Table(heads, rows)], warnings=summary.notes)


def _alone(summary: Summary) -> list[tuple[str, str]]:
    """Final loss of each client's own model and the federated gain over it."""
    local = summary.arms["local"].clients if "local" in summary.arms else {}
    if len(local) != len(summary.clients):
        return []
    us = final(summary.federated.mean.eval_loss)
    pairs = []
    for client in local.values():
        own = final(client.eval_loss)
        gain = 100 * (own - us) / own if own and us is not None else None
        pairs.append((figures.loss(own), figures.percent(gain, signed=True)))
    return pairs


def _owned(client: ClientData) -> str:
    shown = ", ".join(client.owned[:OWNED])
    more = len(client.owned) - OWNED
    return f"{shown} and {more} more" if more > 0 else shown


def _labels(client: ClientData, shown: Sequence[str]) -> Cell:
    """Shares of the labels; the same label has the same colour for every client."""
    counts = {name: client.labels.get(name, 0.0) for name in shown}
    other = sum(client.labels.values()) - sum(counts.values())
    if not sum(client.labels.values()):
        return Cell(figures.DASH, "long")
    words = ", ".join(f"{name} {figures.count(n)}" for name, n in counts.items() if n)
    words += f", other {figures.count(other)}" if other else ""
    return Cell("", "long", words, shares=shares({**counts, "other": other}))


def details(values: Mapping[str, Any]) -> Table:
    """A table of names and values."""
    return Table(["Name", "Value"], [cells(pair, "") for pair in figures.flat(values)])
