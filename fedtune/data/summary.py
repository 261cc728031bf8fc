"""Who has what: one line per client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedtune.data.columns import shown_names
from fedtune.data.silos import Silos

__all__ = ["client_table", "format_table"]

WIDTH = 100
MAX_LABELS = 6


def client_table(
    silos: Silos, token_counts: Sequence[int] | None, label_column: str | None
) -> list[dict[str, Any]]:
    """Per client: name, rows, tokens, rows per label, and column values owned; JSON-able.

    `token_counts` has one number per client, or is None where nothing is tokenized yet.

    [{"client": "client-0", "rows": 9, "tokens": 120, "labels": {"neutral": 9}, "owned": ["a"]}]
    """
    tokens = [None] * len(silos.train) if token_counts is None else list(token_counts)
    owned = silos.owned or [[] for _ in silos.train]
    return [
        {
            "client": name,
            "rows": len(rows),
            "tokens": count,
            "labels": {} if label_column is None else _counts(shown_names(rows, label_column)),
            "owned": list(values),
        }
        for name, rows, count, values in zip(silos.names, silos.train, tokens, owned, strict=True)
    ]


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """The table as aligned text of at most 100 columns; shares of the six commonest labels."""
    totals: Counter[str] = Counter()
    for row in table:
        totals.update(row["labels"])
    labels = sorted(label for label, _ in totals.most_common(MAX_LABELS))
    cells = [["client", "rows", "tokens"]]
    for row in table:
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
        cells.append([row["client"], f"{row['rows']:,}", tokens])
    widths = [max(len(line[k]) for line in cells) for k in range(3)]
    tails = [_tail_title(table, labels)]
    tails += [
        "; ".join(part for part in (_mix(row, labels), _owned(row["owned"])) if part)
        for row in table
    ]
    return "\n".join(
        _fit(f"{name:<{widths[0]}}  {rows:>{widths[1]}}  {tokens:>{widths[2]}}  {tail}".rstrip())
        for (name, rows, tokens), tail in zip(cells, tails, strict=True)
    )


def _counts(labels: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(labels).items()))


def _tail_title(table: Sequence[dict[str, Any]], labels: list[str]) -> str:
    titles = ["label mix"] if labels else []
    if any(row["owned"] for row in table):
        titles.append("owns")
    return "; ".join(titles)


def _mix(row: dict[str, Any], labels: list[str]) -> str:
    """Shares in the same order for every client: `negative  12%  neutral  59%`."""
    if not labels:
        return ""
    return "  ".join(f"{n} {100 * row['labels'].get(n, 0) / row['rows']:3.0f}%" for n in labels)


def _owned(values: list[str]) -> str:
    count = f"{len(values)} values: " if len(values) > 3 else ""
    return count + ", ".join(values)


def _fit(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
