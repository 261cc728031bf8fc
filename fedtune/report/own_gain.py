"""Who gains by taking part, on rows of its own: one line, one card, one table."""

from __future__ import annotations

from fedtune.report import figures
from fedtune.report.blocks import Cell, Table, cells
from fedtune.results.summary import Summary
from fedtune.results.verdict import OwnRow

__all__ = ["gaining", "own_rows_line", "own_rows_table"]

NOTE = (
    "How the last model of each arm does on the held-out rows that are like a client's own; a gain "
    "is how much lower federated is than the client alone."
)


def gaining(summary: Summary) -> str:
    """`3 of 4 clients`; empty where nobody was scored on rows of its own."""
    known = _known(summary)
    gain = sum((row.gain_pct or 0) > 0 for row in known)
    return f"{gain} of {len(known)} clients" if known else ""


def own_rows_line(summary: Summary) -> str:
    """How many clients gain on their own rows, and who loses most, or gains least."""
    known = _known(summary)
    if not known:
        return ""
    row = min(known, key=lambda row: row.gain_pct or 0)
    what = "loses most" if (row.gain_pct or 0) < 0 else "gains least"
    here, alone = (figures.loss(row.losses.get(arm)) for arm in ("federated", "local"))
    return (
        f"on each client's own held-out rows: {gaining(summary)} gain over local only; "
        f"{_name(summary, row)} {what}: federated {here} vs alone "
        f"{alone} ({figures.percent(row.gain_pct, signed=True)})"
    )


def own_rows_table(summary: Summary) -> Table:
    """One line per client; none where nobody was scored on rows of its own."""
    rows = summary.verdict.own
    arms = ["local", "federated"]
    arms += ["centralized"] * any(row.losses.get("centralized") is not None for row in rows)
    names = {"local": "#Alone", "federated": "#Federated", "centralized": "#Centralized"}
    owned = {client.client: ", ".join(client.owned) for client in summary.clients}
    body = [
        [
            Cell(row.client, "name", owned.get(row.client, "")),
            Cell(figures.count(row.rows), "n"),
            *cells([figures.loss(row.losses.get(arm)) for arm in arms]),
            Cell(figures.percent(row.gain_pct, signed=True), _tone(row.gain_pct)),
        ]
        for row in rows
    ]
    heads = ["Client", "#Own rows", *(names[arm] for arm in arms), "#Gain"]
    return Table(heads, body, "Each client on its own held-out rows", NOTE)


def _tone(gain: float | None) -> str:
    return "n" if gain is None else "n good" if gain > 0 else "n bad"


def _known(summary: Summary) -> list[OwnRow]:
    return [row for row in summary.verdict.own if row.gain_pct is not None]


def _name(summary: Summary, row: OwnRow) -> str:
    owned = next((c.owned for c in summary.clients if c.client == row.client), ())
    return f"{row.client} ({', '.join(owned)})" if owned else row.client
