"""The base model's line, and who gains on rows of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.report import Summary, load_summary, render_report, verdict_lines
from fedtune.report.curves import loss_curves
from tests.report.made_up import HOSTILE, made_up_rounds, made_up_summary, write_run


def made_up(*gains: float | None) -> dict[str, Any]:
    """A run with `gains` of its clients; None: no rows of its own."""
    raw = made_up_summary()
    names = [client["client"] for client in raw["data"]["clients"]]
    raw["data"]["clients"][1]["owned"] = ["cardiology", "x-ray"]
    raw["base_loss"] = 2.75
    clients = [
        {
            "client": name,
            "rows": 0 if gain is None else 12,
            "local": None if gain is None else 2.0,
            "federated": None if gain is None else 2.0 * (1 - gain / 100),
            "centralized": None if gain is None else 1.5,
            "gain_pct": gain,
        }
        for name, gain in zip(names, gains, strict=True)
    ]
    known = [gain for gain in gains if gain is not None]
    mean = sum(known) / len(known) if known else None
    raw["verdict"]["gain_over_local_own_pct"] = {"mean": mean, "std": None, "clients": clients}
    return raw


def load(directory: Path, raw: dict[str, Any]) -> Summary:
    return load_summary(write_run(directory, raw, made_up_rounds(raw)))


def test_the_line_names_who_loses_most(tmp_path: Path) -> None:
    lines = verdict_lines(load(tmp_path, made_up(5.0, -44.0, -1.0, None)))
    assert (
        "on each client's own held-out rows: 1 of 3 clients gain over local only; clinic-b "
        "(cardiology, x-ray) loses most: federated 2.880 vs alone 2.000 (-44.0 %)" in lines
    )
    assert any(
        line.startswith("federated") and "on the pooled rows: gain" in line for line in lines
    )


def test_where_all_gain_it_names_who_gains_least(tmp_path: Path) -> None:
    lines = verdict_lines(load(tmp_path, made_up(5.0, 44.0, 1.0, 3.0)))
    (line,) = [line for line in lines if "own held-out rows" in line]
    assert "4 of 4 clients gain over local only; clinic-c gains least" in line


def test_without_own_rows_nothing_is_said(tmp_path: Path) -> None:
    raw = made_up_summary()
    lines = verdict_lines(load(tmp_path, raw))
    assert not any("own" in line or "pooled" in line for line in lines)
    raw = made_up(None, None, None, None)
    assert not any("own" in line for line in verdict_lines(load(tmp_path, raw)))


def test_the_page(tmp_path: Path) -> None:
    """A card, a table with every client, and a dash where there are no rows."""
    load(tmp_path, made_up(5.0, -44.0, -1.0, None))
    page = render_report(tmp_path)
    assert "on the pooled rows; on their own 1 of 3 clients gain" in page
    table = page.partition("Each client on its own held-out rows")[2].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 4
    assert "cardiology, x-ray" in table
    assert "-44.0 %" in table
    assert HOSTILE not in page
    assert "base model" in page
    assert "The base model alone has 2.750" in page
    assert "initial adapter 2.912" in page
    assert "untuned" not in page


def test_the_base_model_is_a_line_over_the_whole_width(tmp_path: Path) -> None:
    summary = load(tmp_path, made_up(1.0, 1.0, 1.0, 1.0))
    *arms, base = loss_curves(summary)
    assert (base.label, base.y) == ("base model", (2.75, 2.75))
    assert base.x == (0, max(x for curve in arms for x in curve.x if x is not None))
    raw = made_up_summary()
    assert all(curve.label != "base model" for curve in loss_curves(load(tmp_path, raw)))
