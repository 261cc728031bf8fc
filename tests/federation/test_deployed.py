"""The ServerApp of a deployment: what it reads, what it leaves, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from fedtune.adapters import load_exported
from fedtune.compare.settle import settle
from fedtune.config import FederationArguments, TransportArguments
from fedtune.deploy.submit import facts_of
from fedtune.errors import ConfigError, RoundError
from fedtune.files import read_json, write_json
from fedtune.output_dir import write_marker
from fedtune.report import load_summary, render_report
from fedtune.report.findings import headline
from fedtune.server import deployed
from fedtune.server.checkpoint import load_latest
from fedtune.server.deployed import app
from fedtune.server.submission import FEDERATION, STOP, Submission
from fedtune.transport.settings import CodecSettings
from tests.federation.scripted import ScriptedGrid, in_a_task
from tests.federation.test_membership import Deployment


def submission(directory: Path, **changes: Any) -> Submission:
    rounds = changes.pop("num_rounds", 3)
    federation = FederationArguments(num_rounds=rounds, steps_per_round=4)
    settings: dict[str, Any] = {"min_clients": 2, "join_timeout_s": 2.0, "seed": 1, **changes}
    return Submission("run-a", str(directory), federation, **settings)


def run(given: Submission, sites: Deployment) -> None:
    """As `fedtune submit` leaves it to the server."""
    facts = facts_of(given)
    write_marker(Path(given.directory), settings={}, data={}, code={}, facts=facts)
    with in_a_task():
        context = Context(7, 1, {}, RecordDict(), {"settings": str(given.write())})
        app(ScriptedGrid(sites.app(), 2), context)


def stopping(directory: Path, value: float) -> Callable[[dict[str, torch.Tensor]], float]:
    """An evaluation in which somebody asks the run to stop, once `b` is `value` (1.5 a round)."""

    def evaluate(params: dict[str, torch.Tensor]) -> float:
        if params["b"][0] == value:
            (directory / STOP).touch()
        return 1.0

    return evaluate


def test_a_submission_is_read_as_it_was_written(tmp_path: Path) -> None:
    transport = TransportArguments(codec="nf4", error_feedback=False, codec_args="min_size=9")
    given = submission(tmp_path, track=("tensorboard",), init_adapter="a/b", transport=transport)
    assert Submission.read(given.write()) == given


def test_a_submission_from_before_there_were_codecs_has_none(tmp_path: Path) -> None:
    path = submission(tmp_path).write()
    plain = read_json(path)
    del plain["transport"]
    write_json(path, plain)
    assert Submission.read(path).transport == TransportArguments()


def test_the_server_gets_the_codec_of_the_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[CodecSettings] = []
    monkeypatch.setattr(deployed, "serve", lambda grid, run: seen.append(run.codec))
    run(submission(tmp_path, transport=TransportArguments(codec="int8")), Deployment())
    run(submission(tmp_path), Deployment())
    assert seen == [CodecSettings(codec="int8"), CodecSettings()]


def test_a_run_leaves_what_any_run_leaves(tmp_path: Path) -> None:
    given, sites = submission(tmp_path), Deployment()
    run(given, sites)
    state = read_json(tmp_path / FEDERATION)
    assert (state["state"], state["round"], state["run"]) == ("done", 3, "7")
    assert [row["client"] for row in state["clients"]] == ["client-0", "client-1"]
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 3
    assert torch.equal(load_exported(tmp_path / "adapter")[0]["b"], torch.full((3,), 4.5))
    assert {task.run for _, task in sites.tasks} == {"run-a"}
    assert {reason for _, reason in sites.finished.values()} == {"done"}
    settle(tmp_path)
    summary = load_summary(tmp_path)
    assert summary.status == "completed"
    assert len(summary.federated.mean.eval_loss) == 4
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "loss.png").is_file()


def test_the_stop_file_ends_the_run_after_its_round(tmp_path: Path) -> None:
    sites = Deployment(eval_loss=stopping(tmp_path, 1.5))
    run(submission(tmp_path), sites)
    state = read_json(tmp_path / FEDERATION)
    assert state["state"] == "stopped"
    assert state["error"] == "stopped after round 1; continue with --resume."
    settle(tmp_path)
    summary = load_summary(tmp_path)
    assert (summary.status, summary.rounds) == ("interrupted", 1)
    assert headline(summary) == "Interrupted in round 2 of 3."
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / STOP).exists()
    assert {reason for _, reason in sites.finished.values()} == {"stopped"}


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Rounds 1 in one process and 2, 3 in the next give what one process gives."""
    first = Deployment(eval_loss=stopping(tmp_path, 1.5))
    run(submission(tmp_path), first)
    second = Deployment()
    run(submission(tmp_path, resume=True), second)
    assert [task.round for _, task in second.tasks] == [2, 2, 3, 3]
    state = load_latest(tmp_path / "checkpoints")
    assert state is not None
    assert torch.equal(state.params["b"], torch.full((3,), 4.5))
    assert [record["round"] for record in state.history] == [0, 1, 2, 3]


def test_a_stop_after_the_last_round_is_too_late(tmp_path: Path) -> None:
    run(submission(tmp_path, num_rounds=2), Deployment(eval_loss=stopping(tmp_path, 3.0)))
    assert read_json(tmp_path / FEDERATION)["state"] == "done"
    assert not (tmp_path / STOP).exists()


def test_a_failure_is_the_last_word(tmp_path: Path) -> None:
    sites = Deployment()
    sites.refuse = {"client-1": "the disk is full"}
    with pytest.raises(RoundError, match="the disk is full"):
        run(submission(tmp_path, join_timeout_s=0.2), sites)
    state = read_json(tmp_path / FEDERATION)
    assert state["state"] == "failed"
    assert "the disk is full" in state["error"]
    settle(tmp_path)
    summary = load_summary(tmp_path)
    assert (summary.status, summary.rounds) == ("failed", 0)
    assert "the disk is full" in render_report(tmp_path)


def test_without_settings_nothing_runs(tmp_path: Path) -> None:
    with in_a_task(), pytest.raises(ConfigError, match="expected the file that fedtune submit"):
        app(ScriptedGrid(Deployment().app(), 1), Context(7, 1, {}, RecordDict(), {}))


def undefined(client: str) -> dict[str, float]:
    """client-1 has no row of a class: its F1 is no number."""
    value = float("nan") if client == "client-1" else 0.5
    return {"eval_f1": value, "eval_ratio": 1 / value if client == "client-0" else float("inf")}


def test_a_metric_that_is_undefined_at_one_site_is_null(tmp_path: Path) -> None:
    run(submission(tmp_path), Deployment(scores=undefined))
    assert read_json(tmp_path / FEDERATION)["state"] == "done"
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines] == [1.0] * 3
    assert lines[0]["eval_metrics"] == {"eval_f1": None, "eval_ratio": None}
    own = {row["client"]: row["eval_f1"] for row in lines[0]["eval_clients"]}
    assert own == {"client-0": 0.5, "client-1": None}
    run(submission(tmp_path, resume=True, num_rounds=4), Deployment(scores=undefined))
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 4
    settle(tmp_path)
    assert "NaN" not in (tmp_path / "summary.json").read_text()
