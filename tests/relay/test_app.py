"""The relay's ClientApp, called as Flower calls it, with a trainer behind a real socket."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedtune.errors import SiteError
from fedtune.relay import app
from fedtune.relay.folder import Over, Progress, RunFolder, SitePlan
from fedtune.relay.frames import Frame, encode
from fedtune.relay.limits import Limits
from fedtune.relay.site import ENVIRONMENT, NODE_CONFIG, SiteFolder
from tests.conftest import REPOSITORY
from tests.relay.asking import PLAN, finish, plan, send, train
from tests.relay.trainers import trainer, worked


@pytest.fixture
def site(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteFolder:
    monkeypatch.setenv(ENVIRONMENT, str(short_path))
    return SiteFolder.create(short_path, "site-a", Limits(start_timeout_s=5.0))


@pytest.fixture
def begun(site: SiteFolder) -> RunFolder:
    """Run 7 has begun."""
    return site.begin(SitePlan("7", "site-a", 3, 5, 0.0, True, 1, 60.0), "1")


def limit(site: SiteFolder, **limits: float) -> None:
    (site.path / "site.json").unlink()
    site.runs.rmdir()
    SiteFolder.create(site.path, "site-a", Limits(**limits))  # type: ignore[arg-type]


def test_a_plan_starts_the_script_and_waits_for_it(site: SiteFolder) -> None:
    folder = RunFolder(site.runs / "7")
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(plan)
        deadline = time.monotonic() + 5
        while folder.plan is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert folder.plan == SitePlan("7", "site-a", 3, 5, 0.0, True, 1, 60.0)
        assert not reply.done()
        with trainer(folder):
            assert reply.result(5).config_records["config"]["client"] == "fake"
    assert worked(folder) == ["query.plan/0"]


@pytest.mark.parametrize("kind", ["query.initial", "query.setup", "train", "evaluate"])
def test_messages_are_handed_on(begun: RunFolder, kind: str) -> None:
    with trainer(begun):
        reply = send(kind, {"run": "7", "round": 2, "manifest": "m"})
    assert worked(begun) == [f"{kind}/2"]
    assert reply.config_records["config"]["client"] == "fake"
    if kind in ("train", "evaluate"):
        np.testing.assert_array_equal(reply.array_records["arrays"]["w"].numpy(), [0, 1, 2, 3])


def test_progress_is_noted(begun: RunFolder) -> None:
    with trainer(begun):
        train(1)
        assert begun.progress == Progress(1)
        train(2)
        finish(2, reason="stopped")
    assert begun.progress == Progress(2, True, "stopped")


def test_a_finish_that_failed_is_no_end(begun: RunFolder) -> None:
    with (
        trainer(begun, lambda request: encode(request.kind, error="no")),
        pytest.raises(SiteError, match="site site-a: no"),
    ):
        finish(1)
    assert not begun.progress.finished


def test_a_refusal_of_the_trainer_names_the_site(begun: RunFolder) -> None:
    def refuse(request: Frame) -> bytes:
        return encode(request.kind, error="base model differs")

    with (
        trainer(begun, refuse),
        pytest.raises(SiteError, match="^site site-a: base model differs$"),
    ):
        train(1)


def test_the_same_plan_again_finds_the_same_run(site: SiteFolder, begun: RunFolder) -> None:
    key = begun.authkey
    with trainer(begun):
        plan()
        train(1)
        plan()  # the node has a new id after a restart, the trainer lives
        train(1)
    assert begun.authkey == key
    assert worked(begun) == ["query.plan/0", "train/1"]


def test_a_continued_run_finds_the_script_that_waits(site: SiteFolder, begun: RunFolder) -> None:
    """Its server was lost: Flower counts another run, and a new limit of time may come with it."""
    with trainer(begun):
        train(1)
        plan(flower_run=2, idle_timeout_s=90.0)
        train(1)
    assert worked(begun) == ["train/1", "query.plan/0"]
    assert site.run("7").flower_run == "2"


def test_a_continued_run_starts_a_script_that_has_ended(site: SiteFolder, begun: RunFolder) -> None:
    begun.write_exit_status(1, "it crashed")
    with pytest.raises(SiteError, match="it crashed"):
        plan()  # the same of Flower's runs: once more would end as before
    with pytest.raises(SiteError, match="a reply within 0.3 s"):  # nobody starts a script here
        plan(flower_run=2, ttl=0.3)
    assert site.run("7").exit_status is None


def test_a_script_that_is_still_ending_keeps_its_folder(site: SiteFolder, begun: RunFolder) -> None:
    begun.write_progress(Progress(3, finished=True))
    with pytest.raises(SiteError, match="script is still ending. It is asked again"):
        plan(flower_run=2)
    assert site.run("7").progress.finished


def test_kept_replies_do_not_speak_for_a_script_that_has_ended(begun: RunFolder) -> None:
    with trainer(begun):
        plan()
    begun.write_exit_status(1, "it crashed")
    with pytest.raises(SiteError, match="script ended with status 1"):
        plan()


def test_the_same_run_with_another_plan(begun: RunFolder) -> None:
    with pytest.raises(SiteError, match="with another plan"):
        plan(num_rounds=4)


def test_a_second_run_is_refused_while_the_first_goes_on(begun: RunFolder) -> None:
    with trainer(begun):
        train(2)
    with pytest.raises(SiteError, match=r"site site-a: run 8: .*busy with run 7 \(round 2\)"):
        plan("8")
    assert not (begun.path.parent / "8").exists()


@pytest.mark.parametrize("how", ["finished", "ended"])
def test_a_second_run_is_accepted_once_the_first_is_over(
    site: SiteFolder, begun: RunFolder, how: str
) -> None:
    if how == "finished":
        with trainer(begun):
            finish(3)
    else:
        begun.write_exit_status(1, "it crashed")
    with pytest.raises(SiteError, match="a reply within 0.3 s"):  # nobody starts a script here
        plan("8", ttl=0.3)
    assert [folder.path.name for folder in site.planned()] == ["7", "8"]
    with pytest.raises(SiteError, match="busy with run 8"):
        plan("9")


@pytest.mark.parametrize(
    ("limits", "asked", "message"),
    [
        ({"max_rounds": 2}, {}, "num_rounds: this site allows at most 2, received 3. Submit"),
        ({"max_steps": 14}, {}, "at most 14 in a run, received 3 rounds x 5 = 15. Submit"),
        ({}, {"num_rounds": 0}, "num_rounds: expected at least 1, received 0"),
        ({}, {"steps": -1}, "steps: expected at least 0, received -1"),
    ],
    ids=str,
)
def test_limits(
    site: SiteFolder, limits: dict[str, float], asked: dict[str, object], message: str
) -> None:
    limit(site, **limits)
    with pytest.raises(SiteError, match=message):
        plan(**asked)
    assert site.planned() == []


@pytest.mark.parametrize("asked", [{}, {"steps": 0, "epochs": 9.0}], ids=str)
def test_plans_within_the_limits(site: SiteFolder, asked: dict[str, object]) -> None:
    """Epochs become steps in the trainer, which finds the limit in its plan."""
    limit(site, max_rounds=3, max_steps=15)
    with pytest.raises(SiteError, match="a reply within"):
        plan(ttl=0.2, **asked)
    (folder,) = site.planned()
    assert folder.plan is not None
    assert folder.plan.max_steps == 15


@pytest.mark.parametrize("change", [{"steps": "many"}, {"num_rounds": None}], ids=str)
def test_a_plan_that_is_none(site: SiteFolder, change: dict[str, object]) -> None:
    config = {k: v for k, v in {**PLAN, **change}.items() if v is not None}
    with pytest.raises(SiteError, match="plan: expected numbers.*same fedtune"):
        send("query.plan", config)
    assert site.planned() == []


@pytest.mark.parametrize("kind", ["query.setup", "train", "evaluate"])
def test_a_run_that_has_not_begun(site: SiteFolder, kind: str) -> None:
    with pytest.raises(SiteError, match="site site-a: run 7: has not begun"):
        send(kind, {"run": "7", "round": 1})
    assert list(site.runs.iterdir()) == []


def test_a_script_that_starts_slowly_keeps_nobody_waiting(
    begun: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "PATIENCE_S", 0.2)
    for _ in range(2):
        config = plan().config_records["config"]
        assert dict(config) == {"client": "site-a", "starting": True}
    with trainer(begun):
        assert dict(plan().config_records["config"]) == {"client": "fake"}
        train(1)
    assert begun.over is None


def test_asking_again_gives_a_script_no_more_time_than_it_has(
    begun: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "PATIENCE_S", 0.2)
    begun.note_start()
    begin = time.time() - 4.5
    os.utime(begun.path / "started", (begin, begin))
    assert plan().config_records["config"]["starting"]
    os.utime(begun.path / "started", (begin - 1, begin - 1))
    with pytest.raises(SiteError, match="a Trainer patched by fedtune within 5 s"):
        plan()
    begun.note_start()  # `fedtune join` has started it again
    assert plan().config_records["config"]["starting"]


def test_the_end_of_a_run_whose_trainer_has_not_come(site: SiteFolder, begun: RunFolder) -> None:
    finish(0, reason="failed: nobody came")
    assert begun.over == Over("1", "failed: nobody came", at_once=True)
    assert not begun.progress.finished
    begun.write_flower_run("2")  # it is continued
    assert begun.over is None


def test_the_end_of_a_run_that_never_began_here(site: SiteFolder) -> None:
    finish(0)
    assert site.planned() == []


def test_another_run_takes_the_place_of_one_whose_server_is_gone(
    site: SiteFolder, begun: RunFolder
) -> None:
    with trainer(begun):
        train(2)
    begun.write_over(Over("1", "it has ended at the server", at_once=False))
    with pytest.raises(SiteError, match=r"ends the script of run 7, .* It is asked again"):
        plan("8")
    assert begun.over == Over("1", "it has ended at the server", at_once=True)


def test_the_time_to_live_of_a_message_is_the_limit(begun: RunFolder) -> None:
    started = time.monotonic()
    with pytest.raises(SiteError, match="a reply within 0.3 s"):
        send("train", {"run": "7", "round": 1}, ttl=0.3)
    assert time.monotonic() - started < 2


def test_a_script_that_does_not_start_in_time(site: SiteFolder) -> None:
    limit(site, start_timeout_s=0.2)
    with pytest.raises(SiteError, match=r"within 0.2 s.*fedtune.patch\(trainer\)"):
        plan()


def test_a_node_that_was_started_by_hand(
    begun: RunFolder, site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT)
    config = {"run": "7", "round": 1}
    with trainer(begun):
        assert send("train", config, node_config={NODE_CONFIG: str(site.path)})
    with pytest.raises(SiteError, match=f"expected {ENVIRONMENT} or node config {NODE_CONFIG}"):
        send("train", config)
    with pytest.raises(SiteError, match="a directory made by fedtune join, received /nowhere"):
        send("train", config, node_config={NODE_CONFIG: "/nowhere"})


LIGHT = """
import sys
from tests.relay.asking import train
train(1)
loaded = [name for name in ("torch", "transformers", "peft", "pandas") if name in sys.modules]
peak_kb = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(loaded, peak_kb)
"""


def test_a_relay_is_light(begun: RunFolder, site: SiteFolder) -> None:
    with trainer(begun):
        done = subprocess.run(
            [sys.executable, "-c", LIGHT],
            cwd=REPOSITORY,
            env={**os.environ, ENVIRONMENT: str(site.path)},
            capture_output=True,
            text=True,
            check=True,
        )
    loaded, peak_kb = done.stdout.rsplit(maxsplit=1)
    assert loaded == "[]"
    assert int(peak_kb) < 200_000  # 70 MB here


def test_contents_are_not_looked_into(begun: RunFolder) -> None:
    """A codec's own records pass, whatever they hold."""
    odd = RecordDict({"config": ConfigRecord({"anything": [1, 2], "x": "y"})})
    with trainer(begun, lambda request: encode(request.kind, odd)):
        assert send("evaluate", {"run": "7"}) == odd


def test_a_full_disk_at_the_site(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SiteError, match=r"^site site-a: /.*/runs/7/.*json: No space left on"):
        plan()
