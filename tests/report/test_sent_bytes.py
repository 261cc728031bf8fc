"""Bytes sent and raw: by direction, by client, by run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.report import load_rounds, load_summary, render_report, traffic_table, verdict_lines
from fedtune.report.sent_bytes import codec_of, total_traffic
from fedtune.results.round_record import WireBytes
from tests.report.made_up import HOSTILE, write_run
from tests.report.test_page import check_page, words

MB = 1_000_000
SERIES = {
    "eval_loss": [2.9, 2.6, 2.5],
    "bytes_up": [0, MB, MB],
    "bytes_down": [2 * MB, MB, MB],
    "bytes_up_raw": [0, 10 * MB, 10 * MB],
    "bytes_down_raw": [4 * MB, 10 * MB, 10 * MB],
}


def summary_of(codec: str = "int8", **settings: Any) -> dict[str, Any]:
    return {"arms": {"federated": SERIES}, "codec": codec, **settings}


def traffic(up: int, down: int) -> dict[str, int]:
    return {"bytes_up": up, "bytes_down": down, "bytes_up_raw": 4 * up, "bytes_down_raw": 2 * down}


def rounds_of(**clients: int) -> list[dict[str, Any]]:
    """Two rounds; in the first only the first client takes part."""
    first = dict(list(clients.items())[:1])
    return [
        {"round": number, "clients": {name: traffic(n, n) for name, n in part.items()}}
        for number, part in ((1, first), (2, clients))
    ]


def section(page: str) -> str:
    """Words of the section `Transport`."""
    (found,) = [part for part in page.split("<section>") if part.startswith("<h2>Transport")]
    body = found.split("</section>")[0].replace("</td>", "</td> ").replace("</th>", "</th> ")
    return words(f"<html><body>{body}</body></html>")


def test_totals_of_a_run(tmp_path: Path):
    summary = load_summary(write_run(tmp_path, summary_of(), []))
    assert total_traffic(summary) == WireBytes(
        up=2 * MB, down=4 * MB, up_raw=20 * MB, down_raw=24 * MB
    )
    assert (total_traffic(summary).sent, total_traffic(summary).raw) == (6 * MB, 44 * MB)


def test_a_row_per_direction(tmp_path: Path):
    settings = {"codec_on": "delta", "codec_direction": "both", "error_feedback": True}
    page = render_report(write_run(tmp_path, summary_of(**settings), []))
    check_page(page)
    text = section(page)
    assert "up int8 20.0 2.00 10.0 % down int8 24.0 4.00 16.7 % both int8 44.0 6.00 13.6 %" in text
    assert "writes differences; what it loses of an update goes with the next one." in text
    assert "Clients" not in text


@pytest.mark.parametrize(("direction", "other"), [("up", "down"), ("down", "up")])
def test_the_other_direction_has_no_codec(tmp_path: Path, direction: str, other: str):
    settings = {"codec_direction": direction, "codec_on": "weights", "error_feedback": False}
    text = section(render_report(write_run(tmp_path, summary_of(**settings), [])))
    assert f"{direction} int8 " in text
    assert f"{other} none " in text
    assert "writes the values themselves. Raw" in text


def test_a_row_per_client(tmp_path: Path):
    rounds = rounds_of(**{HOSTILE: MB, "clinic-b": 3 * MB})
    page = render_report(write_run(tmp_path, summary_of(), rounds))
    check_page(page)
    assert HOSTILE not in page
    text = section(page)
    assert "Clients, rounds 1 to 2" in text
    assert f"{HOSTILE} 8.00 2.00 4.00 2.00 33.3 %" in text
    assert "clinic-b 12.0 3.00 6.00 3.00 33.3 %" in text


def test_rounds_of_a_seed_are_named(tmp_path: Path):
    write_run(tmp_path, summary_of(), [])
    (tmp_path / "rounds.jsonl").unlink()
    write_run(tmp_path / "seeds" / "7", {}, rounds_of(a=MB))
    assert "Clients, rounds 1 to 2 of seed 7" in section(render_report(tmp_path))


@pytest.mark.parametrize("setting", [{"codec": "none"}, {}])
def test_no_section_without_a_codec(tmp_path: Path, setting: dict[str, str]):
    raw = {"arms": {"federated": SERIES}, **setting}
    run = write_run(tmp_path, raw, rounds_of(a=MB))
    summary = load_summary(run)
    assert codec_of(summary) is None
    assert "<h2>Transport</h2>" not in render_report(run)
    assert traffic_table([summary, summary]) == ""
    assert "raw" not in "\n".join(verdict_lines(summary))


def test_bytes_that_nobody_counted_are_dashes(tmp_path: Path):
    raw = {"arms": {"federated": {"eval_loss": [2.9, 2.5]}}, "codec": "nf4"}
    run = write_run(tmp_path, raw, [{"round": 1, "clients": {"a": {"bytes_up": None}, "b": 3}}])
    page = render_report(run)
    check_page(page)
    text = section(page)
    assert "both nf4 – – –" in text
    assert "a – – – – –" in text
    assert load_rounds(run)[0].clients == {"a": WireBytes(), "b": WireBytes()}


def test_the_end_of_a_run_says_the_share(tmp_path: Path):
    run = write_run(tmp_path, summary_of(), [])
    assert "codec int8: 6.00 MB (13.6 % of raw)" in verdict_lines(load_summary(run))
    assert "13.6 % of raw" in words(render_report(run)).replace("\N{NO-BREAK SPACE}", " ")


def test_plot_of_several_runs_prints_a_row_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = {**SERIES, "bytes_up": SERIES["bytes_up_raw"], "bytes_down": SERIES["bytes_down_raw"]}
    write_run(tmp_path / "plain", {"arms": {"federated": plain}, "codec": "none"}, [])
    write_run(tmp_path / "small", summary_of("nf4"), [])
    runs = [str(tmp_path / name) for name in ("plain", "small")]
    assert main(["plot", *runs, "--output", str(tmp_path / "compare.png")]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()[-4:]
    assert head.split("  ")[0] == "run"
    assert [" ".join(line.split()) for line in lines] == [
        "plain none 20.0 24.0 100.0 % 2.500",
        "small nf4 20.0 -> 2.00 24.0 -> 4.00 13.6 % 2.500",
    ]
