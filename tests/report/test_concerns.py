"""What collapsed, overtrained and useless runs are called; all from made-up losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.report import Summary, load_summary, render_report, verdict_lines
from fedtune.report.concerns import PAST_BEST_PCT, concerns
from fedtune.report.findings import gaps, headline
from tests.report.made_up import made_up_summary, write_run


def load(directory: Path, base_loss: float | None = None, **losses: list[float | None]) -> Summary:
    return load_summary(write_run(directory, summary(base_loss, **losses), []))


def summary(base_loss: float | None = None, **losses: list[float | None]) -> dict[str, Any]:
    arms = {
        name: {"eval_loss": values, "samples": [10 * n for n in range(len(values))]}
        for name, values in losses.items()
    }
    raw: dict[str, Any] = {"arms": arms, "verdict": {}}
    if "centralized" in losses:
        ours, other = losses["federated"][-1], losses["centralized"][-1]
        raw["verdict"]["gap_centralized_pct"] = {"mean": 100 * (ours / other - 1), "std": None}
    return raw if base_loss is None else {**raw, "base_loss": base_loss}


def test_a_run_in_which_everything_collapsed_says_so_first(tmp_path: Path):
    losses = [4.76, 7.2, 7.1]
    run = load(tmp_path, 4.76, federated=losses, centralized=losses, local=losses)
    assert headline(run) == (
        "Training made it worse: base model 4.760, federated 7.100, centralized 7.100."
    )
    assert verdict_lines(run)[:2] == [
        "training made it worse: base model 4.760, federated 7.100, centralized 7.100, local 7.100",
        "best round: 0 (initial adapter), which no round beat",
    ]
    assert "gap equal (1 seed)" in "\n".join(verdict_lines(run))


def test_only_the_other_arm_got_worse(tmp_path: Path):
    run = load(tmp_path, 4.0, federated=[4.0, 3.0], centralized=[4.0, 5.0])
    assert headline(run).startswith("Federated loss ends 40.0 % below centralized")
    assert concerns(run) == ["training made it worse: base model 4.000, centralized 5.000"]


def test_without_a_base_loss_the_initial_adapter_is_the_start(tmp_path: Path):
    """As in summaries of earlier versions."""
    assert headline(load(tmp_path, federated=[4.0, 5.0])) == (
        "Training made it worse: initial adapter 4.000, federated 5.000."
    )


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([4.76, 4.285], "Tuning did not help: base model 3.750, federated 4.285"),
        ([4.76, 5.0], "Training made it worse: base model 3.750, federated 5.000"),
    ],
)
def test_a_prompt_that_never_makes_up_for_itself(tmp_path: Path, losses: list[float], words: str):
    """A fresh prompt or prefix does harm: its start is not the base model."""
    run = load(tmp_path, 3.75, federated=losses)
    assert headline(run) == f"{words} (initial adapter 4.760)."
    assert verdict_lines(run)[0].startswith(words[0].lower() + words[1:])


def test_a_run_that_helped_has_no_concern(tmp_path: Path):
    run = load(tmp_path, 3.75, federated=[4.76, 3.5, 3.2], centralized=[4.76, 3.4, 3.1])
    assert concerns(run) == []
    assert "concerns" not in render_report(tmp_path).partition("</style>")[2]


@pytest.mark.parametrize("above", [0.5, 1.5, 3.0])
def test_an_arm_that_went_on_after_its_best_round(tmp_path: Path, above: float):
    end = 2.0 * (1 + above * PAST_BEST_PCT / 100)
    found = concerns(load(tmp_path, 4.0, federated=[4.0, 2.0, end]))
    if above < 1:
        assert found == []
    else:
        share = f"{above * PAST_BEST_PCT:.1f} %"
        assert found == [f"federated: ends at {end:.3f}, {share} above its best, 2.000 in round 1"]


def test_the_control_trains_for_nothing_on_purpose(tmp_path: Path):
    run = load(tmp_path, 4.0, federated=[4.0, 3.0], fixed_global=[5.0, 5.0])
    assert concerns(run) == []


@pytest.mark.parametrize(
    "losses", [[None, None], [4.0, None], [None, 3.0], [4.0], [0.0, 0.0], [0.5, -0.5, -0.4]]
)
def test_any_losses_are_told(tmp_path: Path, losses: list[float | None]):
    """None where nobody scored; preference losses start at any number, or below zero."""
    run = load(tmp_path, federated=losses)
    assert headline(run).endswith(".")
    assert all(verdict_lines(run))


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (0.0, "ends equal to centralized"),
        (-0.0, "ends equal to centralized"),
        (-0.004, "ends equal to centralized"),
        (0.006, "ends 0.01 % above centralized"),
        (-0.006, "ends 0.01 % below centralized"),
    ],
)
def test_nothing_is_below_by_nothing(tmp_path: Path, gap: float, words: str):
    raw = made_up_summary()
    raw["verdict"]["gap_centralized_pct"] = {"mean": gap, "std": None}
    run = load_summary(write_run(tmp_path, raw, []))
    assert words in headline(run)
    shown = "equal" if "equal" in words else "0.01 %"
    assert shown in gaps(run)[0].size


@pytest.mark.parametrize(
    ("samples", "equal", "words"),
    [
        (400, {}, "at equal samples"),
        (416, {"centralized": True}, "at equal samples"),
        (384, {"centralized": True}, "at equal samples"),
        (417, {"centralized": False}, "at 400 samples against 417"),
        (200, {}, "at 400 samples against 200"),
        (None, {}, "at samples not counted"),
    ],
)
def test_equal_samples_are_said_only_where_they_are(
    tmp_path: Path, samples: int, equal: dict[str, bool], words: str
):
    """Within a batch of the other arm, as the run itself says."""
    raw = summary(federated=[4.0, 3.0], centralized=[4.0, 2.0])
    raw["arms"]["federated"]["samples"] = [0, 400]
    raw["arms"]["centralized"]["samples"] = [0, samples]
    raw["verdict"]["equal_samples"] = equal
    run = load_summary(write_run(tmp_path, raw, []))
    assert headline(run) == f"Federated loss ends 50.0 % above centralized {words}."
    assert f"vs centralized 2.000 {words}: gap" in verdict_lines(run)[0]


def test_the_report_shows_them(tmp_path: Path):
    write_run(tmp_path, summary(4.0, federated=[4.0, 5.0]), [])
    page = render_report(tmp_path)
    assert "<li>training made it worse: base model 4.000, federated 5.000</li>" in page
    assert "round 0 (initial adapter)" in page
