"""What travelled: bytes sent against the same records without a codec ("raw")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple

from fedtune.report import figures
from fedtune.report.blocks import Cell, Section, Table, cells
from fedtune.report.rows import total
from fedtune.results.round_record import RoundRecord, WireBytes
from fedtune.results.summary import Summary

__all__ = ["codec_of", "of_raw", "section", "total_traffic"]


def codec_of(summary: Summary) -> str | None:
    """The codec of a run; None without one."""
    name = summary.setting("codec")
    return None if name == "none" else name


def total_traffic(summary: Summary) -> WireBytes:
    """Of the federated arm: all rounds, all clients."""
    mean = summary.federated.mean
    up, down = total(mean.bytes_up), total(mean.bytes_down)
    return WireBytes(up, down, total(mean.bytes_up_raw), total(mean.bytes_down_raw))


def of_raw(sent: float | None, raw: float | None) -> str:
    """`13.0 %`."""
    return figures.percent(100 * sent / raw if raw and sent is not None else None)


def section(summary: Summary, rounds: Sequence[RoundRecord], seed: str | None) -> Section | None:
    """By direction, and by client where the rounds say it; nothing without a codec."""
    codec, everything = codec_of(summary), total_traffic(summary)
    if codec is None:
        return None
    one_way = {"up": "down", "down": "up"}.get(summary.setting("codec_direction") or "")
    rows = [
        [
            Cell(direction, "name"),
            Cell("none" if direction == one_way else codec),
            *_figures(raw, sent),
        ]
        for direction, raw, sent in (
            ("up", everything.up_raw, everything.up),
            ("down", everything.down_raw, everything.down),
            ("both", everything.raw, everything.sent),
        )
    ]
    ways = Table(["Direction", "Codec", "#MB raw", "#MB sent", "#Of raw"], rows)
    by_client = _by_client(rounds, seed)
    tables = [ways, *([by_client] if by_client.rows else [])]
    return Section("Transport", _note(summary), tables)


def _note(summary: Summary) -> str:
    weights = summary.setting("codec_on") == "weights"
    words = f"The codec writes {'the values themselves' if weights else 'differences'}"
    if summary.setting("error_feedback") == "True":
        words += "; what it loses of an update goes with the next one"
    return f"{words}. Raw: the same records without it; manifests and numbers are in both."


def _by_client(rounds: Sequence[RoundRecord], seed: str | None) -> Table:
    names = dict.fromkeys(name for row in rounds for name in row.clients)
    rows = []
    for name in names:
        traffic = _sum(row.clients[name] for row in rounds if name in row.clients)
        up, down = _figures(traffic.up_raw, traffic.up), _figures(traffic.down_raw, traffic.down)
        share = Cell(of_raw(traffic.sent, traffic.raw), "n")
        rows.append([Cell(name, "name"), *up[:2], *down[:2], share])
    heads = ["Client", "#MB up, raw", "#Sent", "#MB down, raw", "#Sent", "#Of raw"]
    title = f"Clients, rounds 1 to {len(rounds)}{f' of seed {seed}' if seed else ''}"
    return Table(heads, rows, title)


def _figures(raw: float | None, sent: float | None) -> list[Cell]:
    return cells([figures.megabytes(raw), figures.megabytes(sent), of_raw(sent, raw)])


def _sum(rounds: Iterable[WireBytes]) -> WireBytes:
    return WireBytes(*(total(values) for values in zip(*map(astuple, rounds), strict=True)))
