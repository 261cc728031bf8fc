"""Each tracker is read back with its own reader."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.report import open_trackers, trackers

CONFIG = {"federation": {"strategy": "fedavg", "num_rounds": 2}, "model": None, "long": "x" * 9000}
SCALARS = [{"eval_loss": 2.5, "bytes_up": 100, "train_loss": None}, {"eval_loss": 2.25}]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def record(names: list[str], directory: Path) -> None:
    with open_trackers(names, directory, "demo run", CONFIG) as tracker:
        assert tracker.names == names
        for number, scalars in enumerate(SCALARS, start=1):
            tracker.log(number, scalars)
        assert tracker.names == names


def test_tensorboard_can_be_read_back(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(["tensorboard"], tmp_path)
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard" / "demo_run"))
    events.Reload()
    values = [(e.step, round(e.value, 6)) for e in events.Scalars("eval_loss")]
    assert values == [(1, 2.5), (2, 2.25)]
    assert [e.step for e in events.Scalars("bytes_up")] == [1]
    assert "train_loss" not in events.Tags()["scalars"]


def test_mlflow_can_be_read_back_and_leaves_nothing_behind(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):  # the second run must not end up in the first's store
        record(["mlflow"], directory)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert mlflow.active_run() is None
    for directory in (first, second):
        client = mlflow.MlflowClient(f"sqlite:///{directory}/logs/mlflow.db")
        experiment = client.get_experiment_by_name("fedtune")
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "eval_loss")
        assert [(m.step, m.value) for m in history] == [(1, 2.5), (2, 2.25)]
        assert run.info.run_name == "demo run"
        assert run.info.status == "FINISHED"
        assert run.data.params["federation.strategy"] == "fedavg"


def test_wandb_writes_an_offline_run(tmp_path: Path):
    pytest.importorskip("wandb")
    record(["wandb"], tmp_path)
    (file,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb")
    # wandb has no reader of its own files; a key is followed by a short tag and its JSON value.
    # Its service process writes the end of the file just after `finish` has returned.
    deadline = time.monotonic() + 30
    while not (found := re.findall(rb"eval_loss.{3}([0-9.]+)", file.read_bytes(), re.DOTALL)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(dict.fromkeys(found)) == [b"2.5", b"2.25"]
    assert re.search(rb'federation.strategy.{1,4}"fedavg"', file.read_bytes(), re.DOTALL)


def test_accelerate_state_is_not_touched(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from accelerate.state import PartialState

    before = dict(PartialState._shared_state)
    record(["tensorboard"], tmp_path)
    assert dict(PartialState._shared_state) == before


def test_a_failing_tracker_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def broken(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", broken)
    tracker = open_trackers(["tensorboard"], tmp_path, "demo", {})
    with caplog.at_level(logging.WARNING):
        tracker.log(1, {"eval_loss": 1.0})
        tracker.log(2, {"eval_loss": 1.0})
    tracker.close()
    tracker.close()
    assert tracker.names == []
    assert caplog.text.count("No space left on device") == 1


def test_no_tracker_writes_nothing(tmp_path: Path):
    with open_trackers([], tmp_path, "demo", {}) as tracker:
        tracker.log(1, {"eval_loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_unknown_tracker():
    with pytest.raises(ConfigError, match="expected tensorboard, mlflow, wandb, received 'tb'"):
        open_trackers(["tb"], Path(), "demo", {})


def test_missing_package_names_the_fix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "fedtune\[tracking\]"'):
        open_trackers(["mlflow"], Path(), "demo", {})
