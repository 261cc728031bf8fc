from __future__ import annotations

import signal
import socket
import sys

import psutil
import pytest

from fedtune.errors import ConfigError, DeployError
from fedtune.processes.supervisor import Supervisor, free_port
from tests.processes.programs import Program, left, lives, wait_for

# Its children: one in a session of its own, one without our mark, one orphan; it ignores SIGTERM.
STUBBORN = """
trap '' TERM
setsid sleep 1001 &
env -i sleep 1002 &
(setsid sleep 1003 &)
echo started
sleep 1004; true
"""

SUPERVISOR = """
import sys
from pathlib import Path
from fedtune.processes.supervisor import Supervisor
with Supervisor(Path(sys.argv[1]), grace_s=0.3) as parts:
    parts.start("stubborn", ["bash", "-c", sys.argv[2]])
    while len(parts.processes()) < 5:
        pass
    print("pids", *[process.pid for process in parts.processes()], flush=True)
    parts.watch()
"""


def sleepers(parts, count):
    return wait_for(lambda: (found := parts.processes()) and len(found) == count and found)


def test_leaving_the_block_ends_every_process(tmp_path):
    with Supervisor(tmp_path, grace_s=0.3) as parts:
        parts.start("stubborn", ["bash", "-c", STUBBORN])
        family = sleepers(parts, 5)
    assert left(family, within_s=0) == []
    assert (tmp_path / "stubborn.log").read_text() == "started\n"


def test_an_exception_in_the_block_ends_every_process(tmp_path):
    with pytest.raises(ZeroDivisionError), Supervisor(tmp_path) as parts:  # noqa: PT012
        part = parts.start("part", ["sleep", "1000"])
        raise ZeroDivisionError
    assert part.status == -signal.SIGTERM


def test_a_process_of_nobody_is_left_alone(tmp_path):
    with Program("import time; print('up', flush=True); time.sleep(1000)") as other:
        other.line("up")
        with Supervisor(tmp_path) as parts:
            parts.start("part", ["sleep", "1000"])
        assert lives(psutil.Process(other.process.pid))


def test_one_part_can_be_stopped(tmp_path):
    with Supervisor(tmp_path) as parts:
        first = parts.start("first", ["sleep", "1000"])
        second = parts.start("second", ["sleep", "1000"])
        parts.stop(first)
        parts.check()
        assert first.status is not None
        assert second.status is None


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_signal_to_the_supervisor_ends_every_process(tmp_path, number, status):
    with Program(SUPERVISOR, tmp_path, STUBBORN) as program:
        pids = program.line("pids").split()[1:]
        # The sweeper too, and not only what the supervisor itself lists.
        family = {*program.family(), *(psutil.Process(int(pid)) for pid in pids)}
        if number == signal.SIGKILL:  # leaves one without a mark and outside of its part's session
            family -= {process for process in family if process.cmdline()[1:] == ["1002"]}
        assert program.end(number)[0] == status
        assert left(family) == []
    for process in psutil.process_iter():
        if process.pid in map(int, pids):
            process.kill()


def test_ctrl_c_is_an_ordinary_keyboard_interrupt(tmp_path):
    with Program(SUPERVISOR, tmp_path, STUBBORN) as program:
        pids = [psutil.Process(int(pid)) for pid in program.line("pids").split()[1:]]
        status, _, err = program.end(signal.SIGINT)
        assert status == -signal.SIGINT
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert left(pids, within_s=0) == []


def test_the_end_of_a_part_says_how_and_shows_its_last_words(tmp_path):
    script = "import sys; print('a'); print('\\x1b[91mERROR\\x1b[0m: no disk'); sys.exit(3)"
    with pytest.raises(DeployError) as caught, Supervisor(tmp_path) as parts:  # noqa: PT012
        parts.start("node", [sys.executable, "-c", script])
        parts.watch(poll_s=0.02)
    log = tmp_path / "node.log"
    assert str(caught.value) == f"node: ended, status 3. End of {log}: a | ERROR: no disk"


def test_a_killed_part_is_named_with_its_signal_and_only_this_start_is_shown(tmp_path):
    (tmp_path / "node.log").write_text("of an earlier start\n")
    with pytest.raises(DeployError) as caught, Supervisor(tmp_path) as parts:  # noqa: PT012
        parts.start("node", ["bash", "-c", "kill -KILL $$"])
        parts.watch(poll_s=0.02)
    log = tmp_path / "node.log"
    assert str(caught.value) == f"node: killed by SIGKILL. End of {log}: (empty)"


def test_a_part_that_does_not_get_ready_is_named(tmp_path):
    with Supervisor(tmp_path) as parts:
        part = parts.start("node", ["bash", "-c", "echo hm; sleep 1000"])
        wait_for(lambda: part.log.read_text())
        with pytest.raises(DeployError, match=r"node: not ready after 0\.2 s\. .*node\.log: hm"):
            parts.wait_ready(part, lambda: False, timeout_s=0.2)
        parts.wait_ready(part, lambda: True)


def test_a_part_that_ends_before_it_is_ready_is_named(tmp_path):
    with Supervisor(tmp_path) as parts:
        part = parts.start("node", ["bash", "-c", "exit 4"])
        with pytest.raises(DeployError, match=r"node: ended, status 4"):
            parts.wait_ready(part, lambda: False)


def test_an_unknown_program_and_a_directory_that_cannot_be(tmp_path):
    with Supervisor(tmp_path) as parts, pytest.raises(ConfigError, match="no program nosuch"):
        parts.start("part", ["nosuch"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"), Supervisor(tmp_path / "file" / "x"):
        pass


def test_environment_and_handlers(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Supervisor(tmp_path, env={"PATH": "/bin:/usr/bin", "ONE": "1"}) as parts:
        part = parts.start("part", ["bash", "-c", "echo $ONE$TWO"], env={"TWO": "2"})
        assert wait_for(lambda: part.log.read_text()) == "12\n"
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_free_port_is_free():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
