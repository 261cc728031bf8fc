"""The process of a run is looked after from its start to its end, by real processes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune._flower import superexec
from fedtune._flower.superexec import Care

BEAT_S = 0.05


class Task:
    """What the SuperLink knows of a task."""

    def __init__(self) -> None:
        self.beats: list[float] = []
        self.over = False
        self.told: list[str] = []
        self.trouble: Exception | None = None

    def SendTaskHeartbeat(self, request: Any) -> Any:
        self.beats.append(time.monotonic())
        if self.trouble:
            raise self.trouble
        if self.over:
            request = httpx.Request("POST", "http://superlink")
            raise httpx.HTTPStatusError("", request=request, response=httpx.Response(401))
        return type("Response", (), {"success": True})

    def PushTaskOutput(self, request: Any) -> None:
        self.told.append(f"{request.sub_status}: {request.details}")

    def close(self) -> None:
        self.over = True


def care(code: str, task: Task, output: Path, **more: Any) -> Care:
    with output.open("wb") as handle:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=handle, stderr=handle)
    return Care(process, task, output, beat_s=BEAT_S, **more)


def test_signs_of_life_from_the_start_to_the_end(tmp_path: Path) -> None:
    task, output = Task(), tmp_path / "out"
    began = time.monotonic()
    care("import time; time.sleep(1)", task, output).run()  # as imports that take a minute
    ended = time.monotonic()
    times = [began, *task.beats, ended]
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) < (ended - began) / 2
    assert len(task.beats) >= 5
    assert task.told == []
    assert not output.exists()


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("import no_such_module", "ended with status 1: .*No module named 'no_such_module'"),
    ],
)
def test_an_end_without_a_word_is_told(code: str, how: str, tmp_path: Path) -> None:
    task, output = Task(), tmp_path / "out"
    care(code, task, output).run()
    (told,) = task.told
    assert told.startswith("failed: the server's process ")
    assert re.search(how, told)
    assert output.exists()


def test_a_superlink_that_is_busy_is_no_end(tmp_path: Path) -> None:
    task = Task()
    task.trouble = httpx.ReadTimeout("busy")
    looked_after = care("import time; time.sleep(0.5)", task, tmp_path / "out")
    looked_after.run()
    assert looked_after.process.returncode == 0
    assert len(task.beats) > 2


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_process_whose_task_is_over_does_not_stay(
    stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superexec, "ASKED_S", 0.3)
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if stubborn else "pass"
    ready = tmp_path / "ready"
    code = f"import signal, time; {ignore}; open({str(ready)!r}, 'w'); time.sleep(60)"
    task = Task()
    looked_after = care(code, task, tmp_path / "out", after_s=0.3)
    while not ready.exists():
        time.sleep(0.02)
    task.over = True  # as after fedtune stop --now
    looked_after.run()
    assert looked_after.process.returncode == (-9 if stubborn else -15)
    assert task.told == []
