"""`fedtune compare` on made-up runs: figures against their definitions, in every format."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.report import load_summary
from fedtune.report.intervals import t_interval
from fedtune.report.side_by_side import run_rows
from tests.report.made_up import write_run

FIRST, SECOND = {1: 2.0, 2: 2.2, 3: 2.1}, {3: 2.0, 1: 1.9, 2: 2.3}


def a_run(finals: dict[int, float], strategy: str = "fedavg", **settings: Any) -> dict[str, Any]:
    """One run over seeds: two rounds, the first of which is worse than the second."""
    runs = [
        {
            "eval_loss": [4.0, end + 0.5, end],
            "samples": [0, 40, 80],
            "bytes_up": [0, 1_000_000, 1_000_000],
            "bytes_down": [500_000, 1_000_000, 1_000_000],
            "wall_s": [0.5, 10, 10],
        }
        for end in finals.values()
    ]
    mean = {key: [statistics.fmean(column) for column in zip(*(r[key] for r in runs), strict=True)]
            for key in runs[0]}  # fmt: skip
    return {
        "strategy": strategy,
        "seeds": list(finals),
        "arms": {"federated": {**mean, "runs": runs}},
        "config": {"federation": {"num_rounds": 2}, "training": settings},
        "data": {"held_out": {"rows": 20, "sha256": "ab" * 32}},
    }


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two methods over the same seeds, which stand in another order."""
    return [
        write_run(tmp_path / "avg", a_run(FIRST, learning_rate=0.1), []),
        write_run(tmp_path / "adam", a_run(SECOND, "fedadam", learning_rate=0.2), []),
    ]


def shown(capsys: Any, *argv: object) -> tuple[str, str]:
    assert main(["compare", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_differences_are_paired_by_seed(two: list[Path]):
    first, second = run_rows([load_summary(directory) for directory in two])
    assert first.difference is None
    loss = [SECOND[seed] - FIRST[seed] for seed in FIRST]
    share = [100 * (SECOND[seed] / FIRST[seed] - 1) for seed in FIRST]
    assert second.difference == pytest.approx(t_interval(loss))
    assert second.difference_pct == pytest.approx(t_interval(share))
    assert second.seeds == ("3", "1", "2")


def test_only_common_seeds_are_paired(tmp_path: Path):
    runs = ({1: 2.0, 2: 3.0}, {2: 3.3, 5: 1.0}, {7: 1.0})
    places = [write_run(tmp_path / str(n), a_run(run), []) for n, run in enumerate(runs)]
    rows = run_rows([load_summary(place) for place in places])
    assert rows[1].difference == (pytest.approx(0.3), None, None, 1)
    assert rows[2].difference is None


def test_a_loss_that_is_not_positive_has_no_percentage(tmp_path: Path):
    places = [write_run(tmp_path / str(n), a_run({1: end}), []) for n, end in enumerate((-1, -2))]
    row = run_rows([load_summary(place) for place in places])[1]
    assert (row.difference, row.difference_pct) == ((-1.0, None, None, 1), None)


def test_the_table(two: list[Path], capsys: Any):
    out, err = shown(capsys, *two)
    head, rule, avg, adam = out.splitlines()[:4]
    assert head.split("  ")[0] == "run"
    assert set(rule) == {"-"}
    for word in ("avg", "fedavg", "0.1", "2.100 ± 0.100", "2.100 (2)", "–", "4.50", "20.5"):
        assert word in avg
    for word in ("adam", "fedadam", "0.2", "2.067 ± 0.208", "-1.74 [-1"):
        assert word in adam
    assert "vs avg %" in head
    assert "settings differ too: learning_rate (0.1, 0.2)" in out
    assert err == ""
    assert max(map(len, (head, avg, adam))) <= 100


def test_one_seed_is_said(tmp_path: Path, capsys: Any):
    places = [write_run(tmp_path / n, a_run({1: end}), []) for n, end in (("a", 2.0), ("b", 2.5))]
    out, _ = shown(capsys, *places)
    assert "+25.00 (1 seed)" in out
    assert "±" not in out


def test_csv_and_json_have_every_figure_in_full(two: list[Path], capsys: Any):
    out, err = shown(capsys, *two, "--format", "csv")
    table = list(csv.DictReader(io.StringIO(out)))
    records = json.loads(shown(capsys, *two, "--format", "json")[0])["runs"]
    assert "warning: settings differ too: learning_rate" in err
    share = t_interval([100 * (SECOND[seed] / FIRST[seed] - 1) for seed in FIRST])
    for row in (table[1], records[1]):
        assert float(row["final_loss"]) == pytest.approx(statistics.fmean(SECOND.values()))
        assert float(row["final_loss_std"]) == statistics.stdev(SECOND.values())
        assert float(row["difference_pct_low"]) == pytest.approx(share.low)
        assert (float(row["mb_up"]), float(row["mb_down"])) == (2.0, 2.5)
        assert (row["run"], row["strategy"], row["status"]) == ("adam", "fedadam", "completed")
    assert table[1]["setting_learning_rate"] == "0.2"
    assert table[1]["seeds"] == "3 1 2"
    assert records[1]["settings"] == {"learning_rate": "0.2"}
    assert records[1]["final_losses"] == list(SECOND.values())


def test_markdown_and_latex(tmp_path: Path, capsys: Any):
    runs = {"a_1 & 2%": a_run({1: 2.0, 2: 2.1}), "b|c": a_run({1: 2.2, 2: 2.0}, "fedprox+fedadam")}
    places = [write_run(tmp_path / name, run, []) for name, run in runs.items()]
    lines = shown(capsys, *places, "--format", "markdown")[0].splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert set(lines[1]) == {"|", " ", "-", ":"}
    assert "| b\\|c" in lines[3]
    out = shown(capsys, *places, "--format", "latex")[0]
    assert out.startswith("\\begin{tabular}{lrrrrr")
    assert "a\\_1 \\& 2\\% & fedavg" in out
    assert "$\\pm$" in out
    assert out.count("\\\\") == 3


def test_runs_that_did_not_complete(tmp_path: Path, capsys: Any):
    failed = {**a_run({1: 2.0}), "status": "failed", "reason": "round 2 failed 3 times"}
    nothing = {"arms": {"federated": {"eval_loss": [None, None]}}, "status": "killed"}
    done = write_run(tmp_path / "done", a_run({1: 2.0}), [])
    runs = (write_run(tmp_path / "bad", failed, []), write_run(tmp_path / "none", nothing, []))
    out, _ = shown(capsys, done, *runs)
    assert "failed" in out.splitlines()[3]
    assert "killed" in out.splitlines()[4]
    assert "not all completed: done completed, bad failed (round 2 failed 3 times)" in out
    for style in ("csv", "json", "latex", "markdown"):
        shown(capsys, done, *runs, "--format", style)


def test_a_run_of_an_earlier_version(tmp_path: Path, capsys: Any):
    """Losses alone: no seeds, no settings, no hashes."""
    places = [
        write_run(tmp_path / n, {"arms": {"federated": {"eval_loss": [4.0, end]}}}, [])
        for n, end in (("a", 2.0), ("b", 3.0))
    ]
    out, _ = shown(capsys, *places)
    assert "+50.00 (1 seed)" in out
    assert "held-out rows not recorded: a and b" in out


def test_one_run_of_several_strategies_stands_for_all(tmp_path: Path, capsys: Any):
    for name, end in (("zeta", 2.0), ("alpha", 3.0)):
        place = write_run(tmp_path / "top" / "strategies" / name, a_run({1: end}, name), [])
        (place / "run.json").write_text("{}")
    asked = {"settings": {"strategy": "zeta,alpha,never"}}
    (tmp_path / "top" / "run.json").write_text(json.dumps(asked))
    out, _ = shown(capsys, tmp_path / "top")
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["zeta", "alpha"]


def test_plot_of_several_prints_the_table(two: list[Path], capsys: Any, tmp_path: Path):
    assert main(["plot", *map(str, two), "--output", str(tmp_path / "c.png")]) == 0
    out = capsys.readouterr().out
    assert "2.100 ± 0.100" in out
    assert "settings differ too: learning_rate" in out
    assert (tmp_path / "c.png").is_file()
