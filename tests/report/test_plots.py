from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedtune.report import Summary, draw_compare, draw_loss, load_summary, render_report
from fedtune.report.curves import compare_curves, gap_curves, loss_curves, traffic_curves
from fedtune.report.plots import drawn
from fedtune.report.svg import nice_ticks, spread_out
from tests.report.made_up import made_up_summary, write_run


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)[:, :, :3]


def has_color(image: Any, color: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(image - np.array(to_rgb(color))).max(axis=2) < 0.02).sum() > 50)


def test_the_figure_shows_every_arm_in_its_colour(run_dir: Path, tmp_path: Path):
    image = pixels(draw_loss(load_summary(run_dir), tmp_path / "loss.png"))
    assert image.shape[1] >= 1800
    for color in ("#0072b2", "#d55e00", "#b98200", "#009e73", "#7b8490"):
        assert has_color(image, color)


@pytest.mark.parametrize("rounds", [1, 2, 60])
def test_any_number_of_rounds(tmp_path: Path, rounds: int):
    run = write_run(tmp_path / "run", made_up_summary(rounds), [])
    assert has_color(pixels(draw_loss(load_summary(run), tmp_path / "loss.png")), "#0072b2")


@pytest.mark.parametrize(
    "federated",
    [
        {"eval_loss": [2.9, 2.5]},
        {"eval_loss": [2.9, None, 2.5], "samples": [0, 10, 20]},
        {"eval_loss": [None, None]},
        {"eval_loss": [2.0, 2.0, 2.0], "bytes_up": [0, None, 5], "samples": [0, None, 20]},
        {"eval_loss": [2.0]},
    ],
)
def test_gaps_and_missing_series(tmp_path: Path, federated: dict[str, Any]):
    run = write_run(tmp_path / "run", {"arms": {"federated": federated}}, [])
    image = pixels(draw_loss(load_summary(run), tmp_path / "loss.png"))
    assert image.min() < 0.5


def test_a_curve_that_diverged_says_so(tmp_path: Path):
    arms = {"federated": {"eval_loss": [2.9, 2.5]}, "centralized": {"eval_loss": [2.9, None]}}
    summary = load_summary(write_run(tmp_path / "run", {"arms": arms}, []))
    ends = {curve.label: curve.end(str) for curve in loss_curves(summary)}
    assert ends == {"federated": "2.5", "centralized": "diverged"}
    assert gap_curves(summary) == []


def test_compare_draws_one_curve_per_directory(tmp_path: Path):
    summaries = [
        load_summary(write_run(tmp_path / f"${name}_run", made_up_summary(), []))
        for name in ("a", "b", "c")
    ]
    image = pixels(draw_compare(summaries, tmp_path / "compare.png"))
    for color in ("#0072b2", "#d55e00", "#009e73"):
        assert has_color(image, color)


def test_runs_that_coincide_are_all_seen(tmp_path: Path):
    """Left of their labels, where a line drawn over another would hide it."""
    summaries = [load_summary(write_run(tmp_path / n, made_up_summary(), [])) for n in "abc"]
    image = pixels(draw_compare(summaries, tmp_path / "compare.png"))[:, :1400]
    for color in ("#0072b2", "#d55e00", "#009e73"):
        assert has_color(image, color)


def test_local_is_drawn_at_its_rounds_with_best_and_worst(run_dir: Path):
    summary = load_summary(run_dir)
    curves = {curve.tone: curve for curve in loss_curves(summary)}
    local = curves["local"]
    assert local.x == curves["federated"].x
    finals = [client.eval_loss[-1] for client in summary.arms["local"].clients.values()]
    assert (local.low[-1], local.high[-1]) == (min(finals), max(finals))


def test_band_is_lowest_and_highest_of_the_seeds(run_dir: Path):
    summary = load_summary(run_dir)
    curve = loss_curves(summary)[0]
    finals = [run.eval_loss[-1] for run in summary.federated.runs]
    assert (curve.low[-1], curve.high[-1]) == (min(finals), max(finals))


def test_gap_is_relative_to_centralized(run_dir: Path):
    summary = load_summary(run_dir)
    (curve,) = gap_curves(summary)
    ours, theirs = (
        summary.federated.mean.eval_loss[-1],
        summary.arms["centralized"].mean.eval_loss[-1],
    )
    assert curve.y[-1] == pytest.approx(100 * (ours / theirs - 1))
    assert curve.y[0] == 0


def test_traffic_is_cumulative_mb(run_dir: Path):
    summary = load_summary(run_dir)
    curves = {curve.label: curve for curve in traffic_curves(summary)}
    assert set(curves) == {"up", "up, no codec", "down", "down, no codec"}
    assert curves["down"].y[-1] == pytest.approx(sum(summary.federated.mean.bytes_down) / 1e6)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.42, 2.93), (-3, 1e-3), (1e-9, 2e-9), (0, 1e9), (5, 5.0001)]
)
def test_ticks_are_inside_and_few(low: float, high: float):
    ticks = nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 8
    assert low - 1e-9 <= ticks[0] <= ticks[-1] <= high * (1 + 1e-9) + 1e-9
    assert nice_ticks(0, 3, 7, whole=True) == [0, 1, 2, 3]


def test_labels_are_moved_apart_in_order():
    placed = spread_out([50, 51, 49, 90], gap=10, low=0, high=95)
    assert placed[2] < placed[0] < placed[1] < placed[3]
    ordered = sorted(placed)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert max(placed) <= 95


def test_labels_say_what_differs(tmp_path: Path):
    def label(name: str, **settings: str) -> Summary:
        return load_summary(write_run(tmp_path / name, made_up_summary(1) | settings, []))

    same = [label("a/run"), label("b/run"), label("a-rather-long-name-of-a-directory-2")]
    assert [c.label for c in compare_curves(same)] == [
        "a/run",
        "b/run",
        "a-rather-lo...-directory-2",
    ]
    codecs = [label("x", codec="int8"), label("nf4", codec="nf4")]
    assert [c.label for c in compare_curves(codecs)] == ["x (int8)", "nf4"]


def in_a_process(code: str, *words: str | Path, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_backend_that_is_not_there_does_not_matter(run_dir: Path):
    """Notebooks name theirs in the environment of what they start."""
    code = """
import os, sys
from pathlib import Path
from fedtune.report import draw_loss, load_summary
directory = Path(sys.argv[1])
draw_loss(load_summary(directory), directory / "loss.png")
assert os.environ["MPLBACKEND"] == sys.argv[2]
"""
    in_a_process(code, run_dir, "module://no.such.backend", MPLBACKEND="module://no.such.backend")
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_a_warning(run_dir: Path):
    """`fedtune plot` without matplotlib: the report is there, the earlier picture stays."""
    (run_dir / "loss.png").write_text("earlier")
    code = """
import sys
sys.modules["matplotlib"] = None
from fedtune.cli import main
assert main(["plot", sys.argv[1]]) == 0
"""
    in_a_process(code, run_dir)
    assert (run_dir / "report.html").is_file()
    assert (run_dir / "loss.png").read_text() == "earlier"


def test_half_a_picture_is_none(run_dir: Path, caplog: pytest.LogCaptureFixture):
    """A disk that is full."""

    def full(figure: Figure, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    with mock.patch.object(Figure, "savefig", full):
        assert drawn(draw_loss, load_summary(run_dir), run_dir / "loss.png") is None
    assert "loss.png could not be drawn: No space left on device" in caplog.text
    assert not [path for path in run_dir.iterdir() if path.name.endswith((".png", ".tmp"))]


def test_before_a_round_is_scored_there_is_no_curve(tmp_path: Path):
    summary = made_up_summary(rounds=0)
    ended = {"status": "failed", "where": "in round 1 of 10", "reason": "round 1 failed 3 times: x"}
    directory = write_run(tmp_path / "run", {**summary, **ended}, [])
    loaded = load_summary(directory)
    assert loss_curves(loaded) == traffic_curves(loaded) == []
    draw_loss(loaded, directory / "loss.png")
    nothing = {**summary, **ended, "arms": {}, "verdict": {}}
    loaded = load_summary(write_run(tmp_path / "nothing", nothing, []))
    draw_loss(loaded, tmp_path / "loss.png")
    assert "Failed in round 1 of 10: x." in render_report(tmp_path / "nothing")
