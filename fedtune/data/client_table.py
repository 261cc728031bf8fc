"""Who has what: one line per client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedtune.aligned import aligned
from fedtune.data.columns import shown_names
from fedtune.data.silos import Silos
from fedtune.data.usage import Usage

__all__ = ["client_table", "format_table"]

WIDTH = 100
MAX_LABELS = 6


def client_table(
    silos: Silos, usages: Sequence[Usage] | None, label_column: str | None
) -> list[dict[str, Any]]:
    """Per client: name, rows, what is learned of them, rows per label, column values owned.

    `usages` has one item per client, or is None where nothing is tokenized yet. JSON-able:

    [{"client": "client-0", "rows": 9, "rows_used": 9, "rows_cut": 0, "tokens": 120,
      "label_tokens": 30, "labels": {"neutral": 9}, "owned": ["a"]}]
    """
    owned = silos.owned or [[] for _ in silos.train]
    if usages is None:
        usages = [Usage(len(rows), None, 0, None, None) for rows in silos.train]
    return [
        {
            "client": name,
            **usage.as_json(),
            "labels": {} if label_column is None else _counts(shown_names(rows, label_column)),
            "owned": list(values),
        }
        for name, rows, usage, values in zip(silos.names, silos.train, usages, owned, strict=True)
    ]


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """The table as aligned text of at most 100 columns; shares of the six commonest labels.

    `used`, the rows that something is learned from, stands there only where some are not. `label
    tokens` is the share of the tokens that the loss is on.
    """
    totals: Counter[str] = Counter()
    for row in table:
        totals.update(row["labels"])
    labels = sorted(label for label, _ in totals.most_common(MAX_LABELS))
    columns = {"client": [row["client"] for row in table]}
    columns["rows"] = [_number(row["rows"]) for row in table]
    if any(row["rows_used"] not in (None, row["rows"]) for row in table):
        columns["used"] = [_number(row["rows_used"]) for row in table]
    columns["tokens"] = [_number(row["tokens"]) for row in table]
    if any(row["label_tokens"] is not None for row in table):
        columns["label tokens"] = [_share(row["label_tokens"], row["tokens"]) for row in table]
    tails = [_tail_title(table, labels)]
    tails += [
        "; ".join(part for part in (_mix(row, labels), _owned(row["owned"])) if part)
        for row in table
    ]
    columns_of = [[title, *cells] for title, cells in columns.items()]
    lines = aligned(list(zip(*columns_of, tails, strict=True)), right=range(1, len(columns)))
    return "\n".join(map(_fit, lines))


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _share(part: int | None, whole: int | None) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.0f} %"


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
