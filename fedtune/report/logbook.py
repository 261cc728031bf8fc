"""How the run went, in the report: rounds, refusals, clients, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.report import text
from fedtune.report.curves import COMPARE_TONES
from fedtune.report.ending import last_refusals
from fedtune.report.markup import bar, cell, section, sub, table
from fedtune.report.svg import esc
from fedtune.results.round_record import RoundRecord
from fedtune.results.series import final
from fedtune.results.summary import Arm, ClientData, Summary

__all__ = [
    "clients_section",
    "details",
    "last_refused_section",
    "refused_section",
    "rounds_section",
]

CLASSES = len(COMPARE_TONES)  # labels with a colour of their own; the rest are one share
OWNED = 5  # values of the partition column that are named


def rounds_section(summary: Summary, rounds: Sequence[RoundRecord], seed: str | None) -> str:
    """Time split and one line per round."""
    split = bar(summary.verdict.time_split)
    if not rounds:
        return section("Time", "Where the wall time of the run went.", split) if split else ""
    residual = any(row.residual is not None for row in rounds)
    parts = list(dict.fromkeys(part for row in rounds for part in row.time))
    heads = ["Round", "#Loss", "#Replies", "#Refused", "#Update norm", "#Client drift"]
    heads += [*(["#Residual"] if residual else []), *(f"#{part}" for part in parts)]
    rows = []
    for row in rounds:
        values = [
            text.loss(row.eval_loss),
            str(len(row.replies)),
            str(len(row.refusals)),
            text.plain(row.update_norm),
            text.plain(row.client_drift),
            *([text.plain(row.residual)] if residual else []),
            *(text.seconds(row.time.get(part)) for part in parts),
            text.megabytes(row.traffic.up),
            text.megabytes(row.traffic.down),
        ]
        cells = [cell(value, "n") for value in values]
        if row.refusals:
            cells[2] = cell(len(row.refusals), "n bad")
        rows.append([f"<td>{_number(row)}{_try(row.attempt)}</td>", *cells])
    note = f"Seed {seed}. " if seed else ""
    note += "Replies are updates that were used; times are in seconds."
    return section("Rounds", note, split + table([*heads, "#MB up", "#MB down"], rows))


def _tries(attempts: Sequence[int]) -> str:
    return f"try {', '.join(map(str, attempts))}"


def _number(row: RoundRecord) -> str:
    return text.DASH if row.round is None else str(row.round)


def _try(attempt: int | None) -> str:
    return sub(f"try {attempt}") if (attempt or 1) > 1 else ""


def refused_section(rounds: Sequence[RoundRecord]) -> str:
    """Who was refused, when and why."""
    rows = [
        [
            f"<td>{_number(row)}{_try(attempt)}</td>",
            cell(refusal.who or text.DASH, "name"),
            cell(refusal.reason or text.DASH, "long"),
        ]
        for row in rounds
        for attempt, refusal in row.refusals
    ]
    if not rows:
        return ""
    note = "These updates were left out of the round; nothing in them reached the model."
    return section("Refused replies", note, table(["Round", "Client", "Reason"], rows))


def last_refused_section(summary: Summary) -> str:
    """Who was refused in the round that ended the run; a reason that came again is told once."""
    tries: dict[tuple[str, str, str], list[int]] = {}
    for number, one in last_refusals(summary):
        told = (number, one.refusal.who, one.refusal.reason)
        tries.setdefault(told, []).append(one.attempt)
    rows = [
        [
            f"<td>{esc(number)}{sub(_tries(attempts))}</td>",
            cell(who or text.DASH, "name"),
            cell(reason or text.DASH, "long"),
        ]
        for (number, who, reason), attempts in tries.items()
    ]
    if not rows:
        return ""
    note = "These updates were refused; without them the round had too few."
    heads = ["Round", "Client", "Reason"]
    return section("Refused in the round that did not come about", note, table(heads, rows))


def clients_section(summary: Summary) -> str:
    """What each client owns, and what it gains over training alone."""
    if not summary.clients:
        return ""
    local = summary.arms.get("local")
    labels = list(dict.fromkeys(name for client in summary.clients for name in client.labels))
    totals = {n: sum(client.labels.get(n, 0) for client in summary.clients) for n in labels}
    shown = sorted(labels, key=lambda name: -totals[name])[: CLASSES - (len(labels) > CLASSES)]
    alone = _alone(summary, local)
    heads = ["Client", "#Rows", "#Tokens", *(["#Alone", "#Gain"] if alone else [])]
    rows = []
    for index, client in enumerate(summary.clients):
        cells = [
            f'<td class="name">{esc(client.client)}{sub(_owned(client))}</td>',
            cell(text.count(client.rows), "n"),
            cell(text.count(client.tokens), "n"),
        ]
        if alone:
            cells += [cell(words, "n") for words in alone[index]]
        if labels:
            cells.append(f'<td class="long">{_label_bar(client, shown)}</td>')
        rows.append(cells)
    heads += ["Labels"] if labels else []
    note = "Rows and tokens each client trains on."
    if alone:
        note += " Alone: its final held-out loss without the federation, and how much lower the "
        note += "federated loss is."
    return section("Clients", note, _notes(summary) + table(heads, rows))


def _notes(summary: Summary) -> str:
    """Warnings about the rows, in the words of the terminal."""
    items = "".join(f"<li>{esc(note)}</li>" for note in summary.notes)
    return f'<ul class="note">{items}</ul>' if items else ""


def _alone(summary: Summary, local: Arm | None) -> list[tuple[str, str]]:
    """Final loss of each client's own model and the federated gain over it."""
    if local is None or len(local.clients) != len(summary.clients):
        return []
    us = final(summary.federated.mean.eval_loss)
    pairs = []
    for client in local.clients.values():
        own = final(client.eval_loss)
        gain = 100 * (own - us) / own if own and us is not None else None
        pairs.append((text.loss(own), text.percent(gain, signed=True)))
    return pairs


def _owned(client: ClientData) -> str:
    shown = ", ".join(client.owned[:OWNED])
    more = len(client.owned) - OWNED
    return f"{shown} and {more} more" if more > 0 else shown


def _label_bar(client: ClientData, shown: Sequence[str]) -> str:
    """Shares of the labels; the same label has the same colour for every client."""
    counts = {name: client.labels.get(name, 0.0) for name in shown}
    other = sum(client.labels.values()) - sum(counts.values())
    if not sum(client.labels.values()):
        return text.DASH
    words = ", ".join(f"{name} {text.count(n)}" for name, n in counts.items() if n)
    words += f", other {text.count(other)}" if other else ""
    return f"{bar({**counts, 'other': other}, legend=False)}{sub(words)}"


def details(title: str, values: Mapping[str, Any]) -> str:
    """A folded table of names and values."""
    rows = [[cell(name, ""), cell(value, "")] for name, value in text.flat(values)]
    if not rows:
        return ""
    return f"<details><summary>{esc(title)}</summary>{table(['Name', 'Value'], rows)}</details>"
