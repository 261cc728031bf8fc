from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.report import load_summary, render_report, write_report
from tests.report.made_up import HOSTILE, made_up_rounds, made_up_summary, write_run

FETCHING = re.compile(
    r"(src|href|action|data)\s*=|@import|url\s*\(|<(script|link|iframe|img)", re.I
)


class Tags(HTMLParser):
    """Tags that were opened and not closed, in an HTML parser's view."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append((tag, attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> Tags:
    ET.fromstring(page)  # well-formed, down to every attribute
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    for tag, attrs in tags.seen:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base"}
        for name, _ in attrs:
            assert name not in {"src", "href", "srcset", "action", "data", "poster"}
            assert not name.startswith("on")
    (sheet,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert not FETCHING.search(sheet)
    assert "http" not in sheet
    return tags


def words(page: str) -> str:
    body = ET.fromstring(page).find("body")
    assert body is not None
    return " ".join("".join(body.itertext()).split())


def test_report_is_self_contained_and_well_formed(run_dir: Path):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = path.read_text(encoding="utf-8")
    check_page(page)
    assert "default-src 'none'" in page
    assert [p.name for p in run_dir.glob(".report*")] == []


def test_report_says_what_matters(run_dir: Path):
    text = words(render_report(run_dir))
    for part in (
        "above centralized at equal samples",
        "Gap to centralized",
        "Gain over local only",
        "One-client parity",
        "fedprox+fedadam",
        "± ",
        "Refused replies",
        "update has NaN in base_model.model.lm_head",
        "try 2",
        "clinic-b",
        "clinic-d, node 4",
        "neutral 450",
        "Configuration",
        "federation.num_clients",
        "2.13.0",
    ):
        assert part in text, part


def test_hostile_names_are_text(run_dir: Path):
    page = render_report(run_dir)
    assert HOSTILE not in page
    assert "<img" not in page
    assert HOSTILE in words(page)
    assert "<img src=x onerror=alert(1)>" in words(page)


def test_every_text_is_escaped_wherever_it_comes_from(tmp_path: Path):
    evil = '"><b onclick=x>&\x00\x1b[31m\ud800'
    raw = made_up_summary(2)
    raw["strategy"] = raw["codec"] = evil
    raw["config"] = {evil: {evil: [evil]}, "model_name_or_path": evil}
    raw["versions"] = {evil: evil}
    raw["verdict"]["time_split"] = {evil: 1.0}
    raw["arms"][evil] = raw["arms"].pop("centralized_large_batch")
    raw["data"]["clients"][0] = {"client": evil, "labels": {evil: 3}, "owned": [evil]}
    rounds = made_up_rounds(raw)
    raw["arms"]["federated"][evil] = [0.5, 0.6, 0.7]
    rounds[0] |= {"refused": [{"node": evil, "reason": evil}], "time": {evil: 1.0}}
    page = render_report(write_run(tmp_path / "a&b<i>", raw, rounds))
    check_page(page)
    assert "<b onclick" not in page


@pytest.mark.parametrize("rounds", [1, 3, 60])
def test_any_number_of_rounds(tmp_path: Path, rounds: int):
    raw = made_up_summary(rounds)
    check_page(render_report(write_run(tmp_path / "run", raw, made_up_rounds(raw))))


@pytest.mark.parametrize(
    "missing",
    [
        ["centralized"],
        ["local", "fixed_global"],
        ["centralized", "centralized_large_batch", "local", "fixed_global"],
    ],
)
def test_missing_arms(tmp_path: Path, missing: list[str]):
    raw = made_up_summary()
    for arm in missing:
        del raw["arms"][arm]
    raw["verdict"] = {} if len(missing) == 4 else raw["verdict"]
    page = render_report(write_run(tmp_path / "run", raw, made_up_rounds(raw)))
    check_page(page)
    assert "Held-out loss" in page


@pytest.mark.parametrize(
    "federated",
    [
        {"eval_loss": [2.9, 2.5], "train_loss": [None, None]},
        {"eval_loss": [2.9, float("nan"), 2.5]},
        {"eval_loss": [None, None]},
        {"eval_loss": [2.9]},
    ],
)
def test_missing_numbers_are_dashes(tmp_path: Path, federated: dict[str, Any]):
    raw = {"arms": {"federated": federated}, "verdict": {"parity": None}}
    rounds = [{"round": 1, "eval_loss": None, "update_norm": float("nan"), "bytes_up": None}, {}]
    page = render_report(write_run(tmp_path / "run", raw, rounds))
    check_page(page)
    assert "–" in words(page)
    assert not re.search(r"\b(nan|None|null|inf)\b", words(page))


def test_no_rounds_file_and_rounds_of_a_seed(tmp_path: Path):
    run = write_run(tmp_path / "run", made_up_summary(), [])
    (run / "rounds.jsonl").unlink()
    page = render_report(run)
    check_page(page)
    assert "<h2>Rounds</h2>" not in page
    write_run(run / "seeds" / "7", {}, [{"round": 1}])
    assert "Seed 7." in words(render_report(run))


def test_many_labels_are_few_colours(tmp_path: Path):
    raw = made_up_summary()
    labels = {f"label-{n}": n + 1 for n in range(20)}
    raw["data"]["clients"] = [{"client": "a", "rows": 9, "tokens": 9, "labels": labels}]
    text = words(render_report(write_run(tmp_path / "run", raw, [])))
    assert "other 120" in text


def test_no_summary_no_report(tmp_path: Path):
    with pytest.raises(FedtuneError, match="found no summary"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rendering_does_not_change_the_summary(run_dir: Path):
    before = load_summary(run_dir)
    render_report(run_dir)
    assert load_summary(run_dir) == before
