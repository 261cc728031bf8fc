"""`fedtune join` as a process, with real scripts, real relays and a node that plays its part."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedtune.deploy import join as module
from fedtune.deploy.script import LogLines
from fedtune.errors import ConfigError, DeployError
from tests.conftest import REPOSITORY

RUN = "plan:7 train:7:1 train:7:2 train:7:3 finish:7:3"
OTHER_RUN = RUN.replace("7:", "8:").replace("plan:7", "plan:8")
SCRIPT = [sys.executable, "-m", "tests.relay.trainers"]


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def superlink() -> Iterator[str]:
    """What `join` looks for before it starts a node."""
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


class Join:
    """A running `fedtune join`."""

    def __init__(self, directory: Path, superlink: str, words: str, flags: list[str]) -> None:
        self.directory = directory
        self.temporary = directory / "t"
        self.temporary.mkdir()
        self.output = directory / "printed"
        self.mark = f"FAKE_NODE_LOG={directory / 'asked'}"
        environment = {
            **os.environ,
            "FAKE_NODE": words,
            "FAKE_NODE_LOG": str(directory / "asked"),
            "TMPDIR": str(self.temporary),
        }
        fixed = ["--superlink", superlink, "--name", "a", "--output_dir", str(directory / "logs")]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.deploy.joining", *fixed, *flags],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def printed(self) -> str:
        return self.output.read_text()

    @property
    def asked(self) -> list[dict[str, Any]]:
        log = self.directory / "asked"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def errors(self) -> list[str]:
        return [row["error"] for row in self.asked if row["error"]]

    def until(self, ready: Callable[[], Any], seconds: float = 30.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            assert time.monotonic() < deadline, self.printed
            assert self.process.poll() is None, self.printed
            time.sleep(0.02)
        return found

    def sees(self, text: str) -> None:
        self.until(lambda: text in self.printed)

    def wait(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)

    def family(self) -> list[psutil.Process]:
        """All processes of this site, join itself included: they carry its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = self.mark in (f"{k}={v}" for k, v in process.environ().items())
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def assert_nothing_is_left(self, *, files: bool = True) -> None:
        deadline = time.monotonic() + 10
        while self.family():
            assert time.monotonic() < deadline, self.family()
            time.sleep(0.05)
        if files:
            assert list(self.temporary.iterdir()) == []


Joins = Callable[..., Join]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A Unix socket's path has little room."""
    with tempfile.TemporaryDirectory(prefix="ft-") as directory:
        yield Path(directory)


@pytest.fixture
def join(short_path: Path, superlink: str) -> Iterator[Joins]:
    started: list[Join] = []

    def start(words: str, *flags: str, script: list[str] | None = None) -> Join:
        command = [*flags, "--", *(SCRIPT if script is None else script)]
        started.append(Join(short_path, superlink, words, command))
        return started[-1]

    yield start
    for made in started:
        made.process.kill()
        made.process.wait()
        for process in made.family():
            process.kill()


def test_a_whole_run(join: Joins) -> None:
    made = join(RUN, "--once", script=[*SCRIPT, "--work_s", "0.3"])
    assert made.wait() == 0
    assert made.errors == []
    assert [row["word"] for row in made.asked] == RUN.split()  # the last reply was sent, too
    lines = made.printed.splitlines()
    events = [line for line in lines if line.startswith("a: ")]
    assert events[0].startswith("a: joined 127.0.0.1:")
    assert events[1].startswith("a: run 7 begins: 3 rounds x 5 steps; log: ")
    assert [line for line in events if ": round " in line] == [
        f"a: run 7: round {k} of 3" for k in (1, 2, 3)
    ]
    assert events[-2:] == [
        "a: run 7 over after round 3 (done)",
        "a: run 7: the script ended, status 0",
    ]
    shown = [line.removeprefix("a | ") for line in lines if line.startswith("a | ")]
    assert shown == (made.directory / "logs/trainer.log").read_text().splitlines()
    assert "worked on train/2" in shown
    made.assert_nothing_is_left()


def test_the_script_is_run_as_by_hand(join: Joins) -> None:
    """With the modules beside it, though the node searches no directory of the site's."""
    script = [sys.executable, "-c", "import sys; print('safe', sys.flags.safe_path)"]
    made = join(RUN, "--once", script=script)
    made.wait()
    assert "a | safe False\n" in made.printed


def test_the_status_of_the_script(join: Joins) -> None:
    made = join(RUN, "--once", script=[*SCRIPT, "--status", "5"])
    assert made.wait() == 5
    assert made.errors == []  # the run itself went well
    assert "error: run 7: it failed after the run. trainer: ended, status 5" in made.printed


def test_the_next_run_finds_a_new_script(join: Joins) -> None:
    made = join(f"{RUN} {OTHER_RUN}", script=[*SCRIPT, "--linger_s", "0.3"])
    made.until(lambda: len(made.asked) == 10)
    assert made.errors == []
    made.sees("a: run 8: the script ended, status 0")
    log = (made.directory / "logs/trainer.log").read_text().splitlines()
    assert [line for line in log if line == "script ends"] == ["script ends"] * 2
    assert len({line for line in log if line.endswith("begins")}) == 2
    first_end = log.index("script ends")
    assert log[first_end + 1].endswith("begins")  # one after the other, though 8 was asked earlier
    made.process.terminate()
    assert made.wait() == 143
    made.assert_nothing_is_left()


def test_what_a_run_leaves_is_removed_when_it_ends(join: Joins) -> None:
    made = join(RUN, script=[*SCRIPT, "--work_s", "0.5"])
    made.sees("a: run 7: round 1 of 3")
    (folder,) = made.temporary.glob("fedtune-*/runs/7")
    (folder / "replies" / "large").write_bytes(bytes(10**5))
    (folder / "transport").mkdir()
    (folder / "transport" / "version-1.safetensors").write_bytes(bytes(10**5))
    made.sees("a: run 7: the script ended, status 0")
    made.sees("a: waiting for the next run")
    made.until(lambda: not (folder / "replies" / "large").exists())
    made.until(lambda: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 5000)
    assert json.loads((folder / "progress.json").read_text())["finished"]


LOADS = "import time; print('loading', flush=True); time.sleep(600)"


@pytest.mark.parametrize("how", ["finish:7:0", "over:7"])
def test_a_run_that_ends_while_the_script_loads_sets_the_site_free(join: Joins, how: str) -> None:
    made = join(f"brief plan:7 {how}", script=[sys.executable, "-c", LOADS])
    made.sees("a | loading")
    reason = "done" if how.startswith("finish") else "it has ended at the server"
    made.sees(f"a: run 7 over before its first round here ({reason}); the script was ended")
    made.sees("a: waiting for the next run")
    assert made.errors == []
    assert [p for p in made.family() if p.cmdline()[-1:] == [LOADS]] == [psutil.Process(made.pid)]
    made.process.terminate()
    assert made.wait() == 143
    made.assert_nothing_is_left()


def test_a_run_whose_server_is_gone_gives_way_to_another(join: Joins) -> None:
    made = join("plan:7 train:7:1 over:7 plan:8", script=[*SCRIPT, "--linger_s", "600"])
    made.until(lambda: len(made.asked) == 4)
    assert "ends the script of run 7, which is over. It is asked again" in made.errors[0]
    made.sees("a: run 7 over after round 1 (it has ended at the server); the script was ended")


def test_a_second_run_is_refused_meanwhile(join: Joins) -> None:
    made = join("plan:7 train:7:1 plan:8 train:7:2 finish:7:2 plan:9 finish:9:0")
    made.until(lambda: len(made.asked) == 7)
    assert [bool(row["error"]) for row in made.asked] == [False, False, True, *[False] * 4]
    assert "site a: run 8: this site is busy with run 7 (round 1)" in made.errors[0]
    assert "run 8 begins" not in made.printed


@pytest.mark.parametrize("at", ["query.plan/0", "train/2", "query.finish/3"])
def test_a_killed_script_is_started_again(join: Joins, at: str) -> None:
    made = join(RUN, "--once", script=[*SCRIPT, "--kill_at", at])
    assert made.wait() == 0
    assert made.errors == []
    assert "trainer restarted (1 of 3). trainer: killed by SIGKILL. End of " in made.printed
    assert f"killed at {at}" in made.printed
    assert made.printed.count("run 7 begins") == 1
    made.assert_nothing_is_left()


def test_a_script_that_is_killed_again_and_again(join: Joins) -> None:
    script = [*SCRIPT, "--kill_at", "train/1", "--always"]
    made = join(RUN, "--once", "--max_restarts", "2", script=script)
    assert made.wait() == 128 + signal.SIGKILL
    assert made.printed.count("trainer restarted") == 2
    assert "error: run 7: the script failed after 2 restarts. trainer: killed" in made.printed
    made.assert_nothing_is_left()


def test_the_server_hears_of_a_script_that_failed_for_good(join: Joins) -> None:
    script = [*SCRIPT, "--kill_at", "train/2", "--always"]
    made = join(f"{RUN} {OTHER_RUN}", "--max_restarts", "0", script=script)
    made.until(lambda: len(made.asked) >= 6)
    failed = [bool(row["error"]) for row in made.asked[:6]]
    assert failed == [False, False, True, True, True, False]
    assert "site a: expected a reply, but the site's script was killed by SIGKILL" in made.errors[0]
    assert "(the script failed and may not be restarted" in made.errors[0]
    made.sees("run 8 begins")


def test_a_script_without_the_one_line(join: Joins) -> None:
    made = join(RUN, "--once", script=[sys.executable, "-c", "print('trained alone')"])
    assert made.wait() == 1
    assert "no patched Trainer trained: call fedtune.patch(trainer) before train()" in made.printed
    assert "End of" in made.printed
    assert "trained alone" in made.printed
    assert "restarted" not in made.printed


def test_a_script_that_cannot_start(join: Joins) -> None:
    made = join(RUN, "--once", "--max_restarts", "1", script=[sys.executable, "nowhere.py"])
    assert made.wait() == 2
    assert made.printed.count("trainer restarted") == 1
    assert "can't open file" in made.printed


REFUSES = """
from fedtune.errors import ManifestError
from fedtune.relay.folder import RunFolder
RunFolder.of_environment().write_refusal("adapter: expected rank 8, received 4.")
raise ManifestError("adapter: expected rank 8, received 4.")
"""


def test_a_script_that_would_be_refused_again_is_not_started_again(join: Joins) -> None:
    made = join(RUN, "--once", script=[sys.executable, "-c", REFUSES])
    assert made.wait() == 1
    assert "restarted" not in made.printed
    said = "error: run 7: this site cannot take part: adapter: expected rank 8, received 4. Log: "
    assert said in made.printed


def test_the_server_hears_why_a_site_was_refused(join: Joins) -> None:
    made = join(RUN, script=[sys.executable, "-c", REFUSES])
    made.until(lambda: made.errors)
    assert "this site cannot take part: adapter: expected rank 8, received 4." in made.errors[0]


FAILS = {
    "an exception": ("raise ValueError('no ward Jane Roe')", "ended with status 1", "ValueError"),
    "an error of fedtune": (
        "from fedtune.client.failing import note_failure\n"
        "from fedtune.errors import DataError, private\n"
        "note_failure(DataError('label: received ' + private('Jane Roe') + ' in row 3'))\n"
        "raise SystemExit(2)",
        "ended with status 2",
        "label: received … in row 3",
    ),
    "a status": ("print('Jane Roe')\nraise SystemExit(7)", "ended with status 7", ""),
    "a text as status": ("raise SystemExit('Jane Roe')", "ended with status 1", ""),
    "a signal": (
        "import os; print('Jane Roe', flush=True); os.kill(os.getpid(), 11)",
        "was killed by SIGSEGV",
        "",
    ),
}


@pytest.mark.parametrize("way", FAILS)
def test_why_a_script_fails_leaves_the_site_as_type_and_id(join: Joins, way: str) -> None:
    """Before `patch` fedtune hears of nothing but what the script prints, and how it ends."""
    code, ended, told = FAILS[way]
    flags = ["--max_restarts", "0"]
    made = join("plan:7", *flags, script=[sys.executable, "-c", code])
    (error,) = made.until(lambda: made.errors)
    assert f"site a: expected a reply, but the site's script {ended} (" in error
    assert "Jane" not in error
    assert "class" not in error
    made.sees("a: waiting for the next run")
    (line,) = [text for text in made.printed.splitlines() if text.startswith("a: error: run 7: ")]
    assert "Jane Roe" in line
    log = (made.directory / "logs/trainer.log").read_text()
    found = re.search(r"\(id (\w{8})\)", error)
    assert bool(found) == bool(told)
    if found:
        assert f": {told} (id {found[1]})" in error
        assert f"(id {found[1]})" in line
        (logged,) = [text for text in log.splitlines() if found[1] in text]
        assert logged.startswith(f"fedtune: [id {found[1]}] ")
        assert "Jane Roe" in logged


def test_a_script_that_leaves_early(join: Joins) -> None:
    made = join(RUN, script=[*SCRIPT, "--leave_at", "train/2"])
    made.until(lambda: made.errors)
    assert "status 0 (it ended before the run was over)" in made.errors[0]
    made.sees("a: waiting for the next run")


def test_limits_reach_the_server(join: Joins) -> None:
    made = join("plan:7 plan:8", "--max_rounds", "2", "--max_steps", "9")
    made.until(lambda: len(made.asked) == 2)
    assert all("num_rounds: this site allows at most 2, received 3" in e for e in made.errors)
    assert "begins" not in made.printed


def test_a_script_that_takes_too_long(join: Joins) -> None:
    made = join("plan:7", "--start_timeout_s", "0.5", script=[*SCRIPT, "--start_s", "60"])
    made.until(lambda: made.errors)
    assert "patched by fedtune within 0.5 s" in made.errors[0]


def test_a_node_that_dies_is_started_again(join: Joins) -> None:
    made = join(f"die_once {RUN}", "--once")
    assert made.wait() == 0
    assert "a: node restarted. node: ended, status 3. End of " in made.printed
    assert "no power" in made.printed
    assert made.errors == []


def test_a_killed_node_in_a_run_loses_nothing(join: Joins) -> None:
    """The next node asks for the same run; the script has not noticed."""
    made = join(RUN, "--once", script=[*SCRIPT, "--work_s", "0.5"])
    made.sees("round 2 of 3")
    node = made.asked[0]["pid"]
    os.kill(node, signal.SIGKILL)
    assert made.wait() == 0
    assert made.errors == []
    assert made.printed.count("run 7 begins") == 1
    assert made.printed.count("worked on train/1") == 1
    made.assert_nothing_is_left()


@pytest.mark.slow
def test_a_node_that_does_not_stay(join: Joins) -> None:
    made = join("die")
    assert made.wait(60) == 2
    assert made.printed.count("node restarted") == 5
    assert "error: node: ended, status 3. End of" in made.printed
    made.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", ["idle", "in a round"])
def test_stopping(join: Joins, number: signal.Signals, moment: str, short_path: Path) -> None:
    child = short_path / "child"
    script = [*SCRIPT, "--work_s", "60", "--child", str(child)]
    made = join("" if moment == "idle" else RUN, script=script)
    made.sees("joined")
    if moment == "in a round":
        made.until(child.exists)
        assert len(made.family()) >= 4  # join, node, script, its child
    made.process.send_signal(number)
    assert made.wait() == 128 + number
    assert made.printed.endswith("a: stopped\n")
    made.assert_nothing_is_left()


def test_a_killed_join_leaves_no_process(join: Joins, short_path: Path) -> None:
    made = join(RUN, script=[*SCRIPT, "--work_s", "60"])
    made.sees("| script")
    made.process.kill()
    made.wait()
    made.assert_nothing_is_left(files=False)


def test_a_server_that_comes_later(short_path: Path, join: Joins) -> None:
    with HTTPServer(("127.0.0.1", 0), Healthy) as later:
        port = later.server_port
    made = Join(short_path, f"127.0.0.1:{port}", RUN, ["--once", "--", *SCRIPT])
    try:
        made.sees(f"waiting for a SuperLink at 127.0.0.1:{port}")
        assert made.asked == []
        with HTTPServer(("127.0.0.1", port), Healthy) as later:
            threading.Thread(target=later.serve_forever, daemon=True).start()
            assert made.wait() == 0
            later.shutdown()
    finally:
        made.process.kill()
        made.process.wait()


def parse(*flags: str) -> module.Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.add_arguments(parser)
    return module._settings(parser.parse_args(flags))


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu 1.example.org")
    settings = parse("--superlink", "server:8000", "--", "python", "train.py", "--lr", "3")
    assert settings.command == ["python", "train.py", "--lr", "3"]
    assert settings.name == "gpu-1.example.org"
    assert settings.output_dir == Path("outputs/gpu-1.example.org")
    assert settings.limits == module.Limits(0, 0, 600.0)
    assert (settings.max_restarts, settings.once, settings.tls) == (3, False, None)


def test_the_script_may_have_join_flags_and_dashes_of_its_own() -> None:
    command = ["python", "train.py", "--name", "x", "--", "--once"]
    settings = parse("--superlink", "h:1", "--name", "s", "--", *command)
    assert settings.command == command
    assert (settings.name, settings.once) == ("s", False)


def test_a_site_folder_names_the_site(tmp_path: Path) -> None:
    from fedtune.deploy.certs import make_certs

    make_certs(tmp_path, ["clinic"])
    settings = parse("--superlink", "h:1", "--tls", str(tmp_path / "clinic"), "--", "python")
    assert settings.name == "clinic"
    folder = module.SiteFolder(tmp_path)
    command = module.node_command(settings, folder)
    assert command[-4:] == [
        "--root_certificates",
        tmp_path / "clinic/ca.crt",
        "--private_key",
        tmp_path / "clinic/site.key",
    ]
    plain = module.node_command(parse("--superlink", "h:1", "--", "python"), folder)
    assert plain[-5:] == ["--superlink", "h:1", "--site", tmp_path, "--insecure"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--superlink", "h:1"], "expected a training script, received none"),
        (["--superlink", "h:1", "--"], "expected a training script, received none"),
        (["--superlink", "h:1", "--", "no-such-program"], "no program no-such-program"),
        (["--superlink", "h", "--", "python"], "--superlink: expected HOST:PORT, received h"),
        (["--superlink", "h:1", "--name", "a/b", "--", "python"], "--name: expected"),
        (["--superlink", "h:1", "--name", "..", "--", "python"], "--name: expected"),
        (["--superlink", "h:1", "--max_rounds", "-1", "--", "python"], "--max_rounds: expected"),
        (["--superlink", "h:1", "--max_restarts", "-1", "--", "python"], "--max_restarts: expec"),
        (["--superlink", "h:1", "--start_timeout_s", "0", "--", "python"], "--start_timeout_s: "),
        (["--superlink", "h:1", "--tls", "/nowhere", "--", "python"], "--tls"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[2:4]),
)
def test_wrong_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"a\nb\n"], ["a", "b"]),
        ([b"a", b"b\nc", b"\n"], ["ab", "c"]),
        ([b"\r10%", b"\r50%", b"\r100%\nend\n"], ["100%", "end"]),
        ([b"10%\r", b"100%\r\n"], ["100%"]),
        ([b"x\r\ny\r\n"], ["x", "y"]),
        ([b"\xc3", b"\xa4\n"], ["ä"]),
        ([b"\xff\n"], ["\ufffd"]),
        ([b"\n\n"], ["", ""]),
        ([b"killed her"], ["killed her"]),
    ],
    ids=str,
)
def test_log_lines(tmp_path: Path, chunks: list[bytes], lines: list[str]) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    reader = LogLines(log, len(b"before\n"))
    found = []
    for chunk in chunks:
        with log.open("ab") as handle:
            handle.write(chunk)
        found += reader.read()
    assert found + reader.read(rest=True) == lines
    assert reader.read(rest=True) == []
    log.unlink()
    assert reader.read() == []


def test_a_full_disk_ends_join_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/fedtune-x/plan.json")

    monkeypatch.setattr(module, "_take_part", full)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    words = ["--superlink", "127.0.0.1:1", "--output_dir", str(tmp_path), "--", sys.executable]
    with pytest.raises(DeployError, match=r"^/run/fedtune-x/plan.json: No space left on device\."):
        module.run(parser.parse_args(words))
