from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.report import Summary, draw_compare, draw_loss, load_summary
from fedtune.report.curves import compare_curves, gap_curves, loss_curves, traffic_curves
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
    finals = [client.eval_loss[-1] for client in summary.arms["local"].clients]
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
