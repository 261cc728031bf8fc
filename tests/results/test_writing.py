"""What is read and written again is the same text: names, order and kinds of numbers stay."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.files import to_json
from fedtune.results.round_record import RoundRecord
from fedtune.results.series import Series
from fedtune.results.summary import Ending, LastRefusal, Summary, load_summary
from tests.report.made_up import made_up_summary, write_run

FIRST = (
    '{"round": 0, "eval_loss": 3.1, "eval_metrics": {"eval_f1": 0.5}, "train_loss": null, '
    '"samples": 0, "tokens": 0, "bytes_up": 0, "bytes_down": 7, "bytes_up_raw": 0, '
    '"bytes_down_raw": 9, "wall_s": 1.25, "time": {"train": 0.0, "wait": 0.0, "codec": 0.0, '
    '"aggregate": 0.0, "evaluate": 1.2}}'
)
LATER = (
    '{"round": 2, "attempt": 2, "eval_loss": null, "eval_metrics": {"eval_f1": null}, '
    '"eval_clients": [{"client": "a", "eval_loss": 2.0}], "train_loss": 2.5, "samples": 16, '
    '"tokens": 160, "bytes_up": 5, "bytes_down": 6, "bytes_up_raw": 7, "bytes_down_raw": 8, '
    '"clients": {"a": {"bytes_up": 5, "bytes_down": 6, "bytes_up_raw": 7, "bytes_down_raw": 8}}, '
    '"wall_s": 10.2546, "replies": [{"client": "a", "round": 2, "examples": 8, "norm": 0.5}], '
    '"refused": [{"node": 4, "client": "b", "reason": "NaN in x"}], "failed_attempts": '
    '[{"reason": "1 of 2 needed updates", "refused": [{"node": 4, "client": "b", "reason": '
    '"late"}]}], "update_norm": 0.25, "client_drift": null, "server_rate": 1.5, "residual": 0.001, '
    '"residual_fedavg": 0.28, "base_rank": 8, "base_error": 0.0, "time": {"train": 8.1088, "wait": '
    '0.0, "codec": 0.5, "aggregate": 0.2396, "evaluate": 1.8364}}'
)


def test_a_round_is_one_line_in_the_same_order() -> None:
    for line in (FIRST, LATER):
        assert to_json(RoundRecord.from_json(json.loads(line)).to_json()) == line
    record = RoundRecord.from_json(json.loads(LATER))
    assert [(attempt, one.reason) for attempt, one in record.refusals] == [
        (1, "late"),
        (2, "NaN in x"),
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(json.loads(LATER))), JSON))
def test_any_json_is_a_round_with_what_fits_in_it(raw: dict[str, object]) -> None:
    once = RoundRecord.from_json(raw).to_json()
    assert RoundRecord.from_json(once).to_json() == once
    Series.of_history([raw])


def test_a_summary_is_the_same_file(tmp_path: Path) -> None:
    raw = made_up_summary()
    summary = load_summary(write_run(tmp_path / "a", raw, []))
    again = load_summary(write_run(tmp_path / "a", summary.to_json(), []))
    assert again == summary
    told = summary.to_json()
    for name in ("federated", "centralized", "fixed_global"):
        assert json.dumps(told["arms"][name]) == json.dumps(raw["arms"][name])
    for key in ("gap_centralized_pct", "gain_over_local_pct", "parity", "time_split"):
        assert told["verdict"][key] == raw["verdict"][key]
    assert [told[key] for key in ("data", "config", "versions")] == [
        raw[key] for key in ("data", "config", "versions")
    ]


def test_how_seeds_ended_is_kept(tmp_path: Path) -> None:
    refused = LastRefusal.from_json(
        {"round": 2, "attempt": 1, "node": 3, "client": "b", "reason": "late"}
    )
    failed = Ending("failed", "round 2 failed", "in round 2 of 5", (refused,))
    endings = {7: failed, 8: Ending("not run")}
    told = Summary(ending=Ending("failed", "x"), endings=endings, over=[], asked_seeds=[7, 8])
    plain = told.to_json()
    assert list(plain)[:4] == ["status", "reason", "runs", "means_over_seeds"]
    assert plain["runs"] == [
        {
            "seed": 7,
            "status": "failed",
            "reason": "round 2 failed",
            "where": "in round 2 of 5",
            "refused": [{"round": 2, "attempt": 1, "node": 3, "client": "b", "reason": "late"}],
        },
        {"seed": 8, "status": "not run"},
    ]
    assert (plain["arms"], plain["verdict"]) == ({}, {})
    assert load_summary(write_run(tmp_path, plain, [])).endings == endings
