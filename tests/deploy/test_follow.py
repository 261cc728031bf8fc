"""A run is followed by its files; whether its server lives is asked, not too often."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedtune.deploy import follow as module
from fedtune.deploy.follow import follow
from fedtune.errors import RoundError
from fedtune.files import write_json
from fedtune.server.submission import FEDERATION


def say(directory: Path, state: str) -> None:
    facts = {"state": state, "min_clients": 1, "clients": [], "time": time.time()}
    write_json(directory / FEDERATION, facts)


@pytest.mark.parametrize("left", [False, True])
def test_where_asking_is_slow_it_is_done_seldom_unless_the_server_may_be_gone(
    left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALIVE_S", 0.2)
    pauses: list[float] = []
    asked = time.monotonic()

    def problem() -> None:
        nonlocal asked
        pauses.append(time.monotonic() - asked)
        time.sleep(0.5)  # a busy host
        asked = time.monotonic()
        if len(pauses) == 3:
            say(tmp_path, "done")

    say(tmp_path, "waiting for sites")
    follow(tmp_path, 3, problem, since=0.0, left=lambda: left)
    assert [pause >= 4 * 0.5 for pause in pauses[1:]] == [not left] * 2


def test_an_end_without_a_word_is_told_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALIVE_S", 0.2)
    killed = "the server's process was killed by SIGKILL."
    said = r"in round 1 without a word \(the server's process was killed by SIGKILL\)\.$"
    say(tmp_path, "running")
    with pytest.raises(RoundError, match=said):
        follow(tmp_path, 3, lambda: killed, since=0.0)
    with pytest.raises(RoundError, match="before it had started without a word"):
        follow(tmp_path, 3, lambda: killed, since=time.time() + 60)
    with pytest.raises(RoundError, match="^stopped in round 1 by fedtune stop; begin again with"):
        follow(tmp_path, 3, lambda: "finished:stopped", since=0.0)


def test_the_base_model_is_said_once_and_cannot_write_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"state": "done", "clients": [], "base_model": "some/base\x1b[2J", "time": time.time()}
    write_json(tmp_path / FEDERATION, facts)
    follow(tmp_path, 3, lambda: None, since=0.0)
    said = [line for line in capsys.readouterr().out.splitlines() if "base model" in line]
    assert said == [
        'base model: "some/base\\u001b[2J", as the site that the run starts from calls it'
    ]
