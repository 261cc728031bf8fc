"""Signals at every stage of `up`, `join` and `submit`: what they end with, and what they leave.

SIGNAL_TABLE=signals.md python -m pytest tests/deployment/test_signals.py -s writes the table.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedtune.files import read_json
from fedtune.lock import holder
from tests.deploy.test_join import RUN, SCRIPT, Join, Joins, join, short_path, superlink
from tests.deployment.parts import Deployment, Program, placed

__all__ = ["join", "short_path", "superlink"]

SIGNALS = {
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
    "SIGTERM": (signal.SIGTERM,),
    "SIGHUP": (signal.SIGHUP,),
}
AGAIN_S = 0.2  # from the first Ctrl-C to the second


@dataclass(frozen=True)
class Row:
    """A cell of the table."""

    command: str
    stage: str
    sent: str
    status: int
    line: str
    left: str


ROWS: list[Row] = []


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    yield
    lines = ["| command | stage | sent | status | last line | left |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.command} | {row.stage} | {row.sent} | {row.status} | `{row.line}` | {row.left} |"
        for row in ROWS
    ]
    print("\n" + "\n".join(lines))
    if "SIGNAL_TABLE" in os.environ:
        Path(os.environ["SIGNAL_TABLE"]).write_text("\n".join(lines) + "\n")


def cells(command: str, stages: Any, *, quick: tuple[str, ...] = ()) -> Any:
    """Parameters of a test: every signal at every stage; slow but for stages that are quick."""
    found = []
    for stage in stages:
        for sent in SIGNALS:
            marks = () if stage in quick and sent != "SIGINT twice" else pytest.mark.slow
            found.append(pytest.param(stage, sent, marks=marks, id=f"{command}-{stage}-{sent}"))
    return pytest.mark.parametrize(("stage", "sent"), found)


def listens(pid: int) -> bool:
    """Whether the process has its handlers: before that Python is only loading."""
    text = Path(f"/proc/{pid}/status").read_text()
    caught = int(
        next(line for line in text.splitlines() if line.startswith("SigCgt")).split()[1], 16
    )
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def send(pid: int, sent: str) -> int:
    """Send the signals; returns the first one."""
    numbers = SIGNALS[sent]
    for place, number in enumerate(numbers):
        time.sleep(AGAIN_S if place else 0)
        if psutil.pid_exists(pid):
            os.kill(pid, number)
    return numbers[0]


def last_line(printed: str) -> str:
    return next((line for line in reversed(printed.splitlines()) if line.strip()), "")


def noted(command: str, stage: str, sent: str, status: int, printed: str, left: list[Any]) -> Row:
    line = last_line(printed).replace("|", "\\|")
    line = re.sub(r"127\.0\.0\.1:\d+", "HOST:PORT", line)
    ROWS.append(Row(command, stage, sent, status, line, ", ".join(map(str, left)) or "nothing"))
    return ROWS[-1]


# A site. Its node is played, so that only the stage differs.

JOIN = {
    "starting": ("", []),
    "connecting": ("", []),
    "waiting": ("", []),
    "script loading": (RUN, ["--start_s", "60"]),
    "training": (RUN, ["--work_s", "60", "--child", "CHILD"]),
    "between rounds": ("plan:7 train:7:1", []),
    "finishing": (RUN, ["--linger_s", "60"]),
}


def reach(made: Join, stage: str, child: Path) -> None:
    """Wait until a site is at its stage."""
    ready: dict[str, Callable[[], Any]] = {
        "starting": lambda: listens(made.process.pid),
        "connecting": lambda: "waiting for a SuperLink" in made.printed,
        "waiting": lambda: "joined" in made.printed,
        "script loading": lambda: "| script" in made.printed,
        "training": child.exists,
        "between rounds": lambda: len(made.asked) == 2,
        "finishing": lambda: "run 7 over" in made.printed,
    }
    made.until(ready[stage])


@cells("join", JOIN, quick=("waiting",))
def test_join(join: Joins, short_path: Path, superlink: str, stage: str, sent: str) -> None:
    words, flags = JOIN[stage]
    child = short_path / "child"
    script = [*SCRIPT, *(str(child) if flag == "CHILD" else flag for flag in flags)]
    where = ["--superlink", "127.0.0.1:1"] if stage == "connecting" else []
    made = join(words, *where, script=script)
    reach(made, stage, child)
    number = send(made.process.pid, sent)
    status = made.wait(60)
    left = [*settled(made.family), *made.temporary.iterdir()]
    row = noted("join", stage, sent, status, made.printed, left)
    assert left == []
    assert status == 128 + number
    assert row.line in ("a: stopped", f"interrupted by {number.name}")
    assert "Traceback" not in made.printed


# The server.


@pytest.fixture
def alone() -> Iterator[Deployment]:
    """A deployment with its own temporary directory."""
    with placed("signals-", tls=False) as deployment:
        try:
            yield deployment
        finally:
            deployment.close()


def start_up(deployment: Deployment) -> Program:
    flags = ["--port", deployment.address.rpartition(":")[2]]
    return deployment.start("up", "up", *flags, "--output_dir", deployment.directory / "superlink")


@cells("up", ("starting", "idle", "with a run"))
def test_up(alone: Deployment, stage: str, sent: str) -> None:
    up = start_up(alone)
    if stage == "starting":
        alone.until(lambda: listens(up.process.pid))
    else:
        up.sees("Ctrl-C stops it.")
    submit = None
    if stage == "with a run":
        submit = alone.submit("run", "--min_clients", 1, "--num_rounds", 1, "--steps_per_round", 1)
        alone.until((alone.directory / "run/federation.json").exists)
    number = send(up.process.pid, sent)
    status = up.wait(60)
    if submit is not None:
        assert submit.wait(120) == 1, submit.printed
        assert holder(alone.directory / "run") is None
    left = [*settled(alone.processes), *Path(alone.env["TMPDIR"]).iterdir()]
    row = noted("up", stage, sent, status, up.printed, left)
    assert left == []
    if stage == "starting":
        assert status == 128 + number
        begun = ("superlink: stopped as it began", f"interrupted by {number.name}")
        assert row.line in begun
    else:
        assert (status, row.line) == (0, "superlink: stopped")
    assert "Traceback" not in up.printed


# Whoever starts a run, at a server and a site that stay for all of these.


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    with placed("signals-", tls=False) as deployment:
        try:
            deployment.up()
            yield deployment
        finally:
            assert deployment.close() == []
        assert list(Path(deployment.env["TMPDIR"]).iterdir()) == []


@pytest.fixture(scope="module")
def site(served: Deployment) -> Program:
    """One site, whose steps take their time."""
    joined = served.join("a", "--step_s", 0.3)
    joined.sees("joined")
    return joined


LONG = ["--min_clients", 1, "--num_rounds", 200, "--steps_per_round", 2]
NOBODY = ["--min_clients", 2, "--num_rounds", 1, "--steps_per_round", 1]


def state(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(directory / "federation.json")
    except (OSError, ValueError):
        return {}
    return found


def stop(served: Deployment, *flags: str) -> Program:
    program = served.start("stop", "stop", "--superlink", served.address, *flags)
    assert program.wait(60) == 0, program.printed
    return program


def ended(served: Deployment, submit: Program, directory: Path, before: set[Path]) -> list[Any]:
    """What a submit has left: its processes, its folders, its lock once the run is over too."""
    left = [f"process {process.pid}" for process in settled(submit.family)]
    left += sorted(set(Path(served.env["TMPDIR"]).iterdir()) - before)
    return left + (["lock"] if held_by(directory, submit) else [])


def held_by(directory: Path, submit: Program) -> bool:
    return holder(directory) == submit.process.pid


@cells("submit", ("starting", "waiting for sites", "in rounds", "at the end"))
def test_submit(served: Deployment, request: pytest.FixtureRequest, stage: str, sent: str) -> None:
    if stage in ("in rounds", "at the end"):
        request.getfixturevalue("site").sees("joined")
    directory = served.directory / f"{stage}-{sent}".replace(" ", "-")
    before = set(Path(served.env["TMPDIR"]).iterdir())
    plans = {"waiting for sites": NOBODY, "in rounds": LONG}
    submit = served.submit(directory.name, *plans.get(stage, [*LONG, "--num_rounds", 1]))
    ready: dict[str, Callable[[], Any]] = {
        "starting": lambda: listens(submit.process.pid),
        "waiting for sites": lambda: state(directory).get("state") == "waiting for sites",
        "in rounds": lambda: state(directory).get("round", 0) >= 1,
        "at the end": lambda: state(directory).get("state") == "done",
    }
    served.until(ready[stage])
    number = send(submit.process.pid, sent)
    status = submit.wait(60)
    row = noted(
        "submit", stage, sent, status, submit.printed, ended(served, submit, directory, before)
    )
    assert row.left == "nothing"
    assert "Traceback" not in submit.printed
    goes_on = stage in ("waiting for sites", "in rounds")
    if goes_on:
        assert "left; the run goes on" in row.line
        assert holder(directory) is not None
        stop(served, "--now")
        served.until(lambda: holder(directory) is None)
    elif stage == "starting":
        begun = ("interrupted before the run began", f"interrupted by {number.name}")
        assert row.line.startswith(begun)
        assert holder(directory) is None
    assert status == 128 + number or (stage == "at the end" and status == 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["waiting for sites", "in rounds", "in rounds --now"])
def test_stop(served: Deployment, request: pytest.FixtureRequest, stage: str) -> None:
    waits = stage == "waiting for sites"
    joined = None if waits else request.getfixturevalue("site")
    directory = served.directory / f"stop-{stage}".replace(" ", "-")
    before = set(Path(served.env["TMPDIR"]).iterdir())
    submit = served.submit(directory.name, *(NOBODY if waits else LONG))
    wanted = (lambda: state(directory)) if waits else (lambda: state(directory).get("round"))
    served.until(wanted)
    stop(served, *(["--now"] if stage.endswith("--now") else []))
    status = submit.wait(120)
    served.until(lambda: holder(directory) is None, 60)
    left = ended(served, submit, directory, before)
    row = noted(
        "submit",
        stage.removesuffix(" --now"),
        f"fedtune stop{stage[9:]}" if not waits else "fedtune stop",
        status,
        submit.printed,
        left,
    )
    assert row.left == "nothing"
    assert status == 1
    assert "stopped" in row.line
    assert "Traceback" not in submit.printed
    if joined is not None and not stage.endswith("--now"):
        joined.sees("waiting for the next run")


def settled(family: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    """What still lives a moment later."""
    deadline = time.monotonic() + 10
    while (living := family()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return living
