"""Flower's SuperExec beside the SuperLink, with one process a run however slow the host.

Flower takes a claimed task back after 30 s without a sign of life, and gives it to another process;
a ServerApp gives its first one after its imports. So on a slow host the same run was started again
and again beside itself. Here the process that has claimed the task gives the signs of life, from
the start of the ServerApp to its end, and tells an end that the ServerApp did not tell itself.

    python -P -m fedtune._flower.superexec [flower-superexec's arguments]
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedtune._flower.version import flower_version, is_tested

__all__ = ["BEAT_S", "Care", "launch_runs_once", "main"]

BEAT_S = 5.0  # Flower's patience is 30 s with a task that starts, 60 s with one that runs
AFTER_S = 60.0  # for the process to end once its task is over; it still says goodbye to the sites
ASKED_S = 10.0  # from being asked to end to being killed
TAIL_LINES, TAIL_BYTES = 3, 4096

log = logging.getLogger(__name__)


@dataclass
class Care:
    """Looks after the process of one task until both have ended.

    Args:
        client: of the Runtime API, entitled to this task.
        output: what the process prints; deleted when it ends well.
    """

    process: subprocess.Popen[bytes]
    client: Any
    output: Path
    beat_s: float = BEAT_S
    after_s: float = AFTER_S

    def run(self) -> None:
        """Give signs of life; returns when the process has ended."""
        while self._is_wanted() and not self._ends():
            pass
        if self.process.poll() is None:
            self._end()
            well = True  # somebody else has said why the task is over
        else:
            well = self.process.returncode == 0 or not self._is_wanted()
        if well:
            self.output.unlink(missing_ok=True)
        else:
            self._tell()
        self.client.close()

    def _ends(self) -> bool:
        """Whether the process ends before the next sign of life is due."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.beat_s)
            return True
        return False

    def _is_wanted(self) -> bool:
        """Give a sign of life; False when the task is over."""
        import httpx
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        try:
            return bool(self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except httpx.HTTPStatusError as refusal:
            return refusal.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
        except httpx.TransportError:
            return True  # the SuperLink is busy; this process ends with it

    def _end(self) -> None:
        """A task is over that was stopped, or whose process is about to end."""
        for wait_s, number in ((self.after_s, signal.SIGTERM), (ASKED_S, signal.SIGKILL)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait_s)
                return
            self.process.send_signal(number)
        self.process.wait()

    def _tell(self) -> None:
        import httpx
        from flwr.common.constant import SubStatus
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        status = self.process.returncode
        how = f"was killed by {_name(-status)}" if status < 0 else f"ended with status {status}"
        said = _tail(self.output)
        details = f"the server's process {how}" + (
            f": {said} (all of it: {self.output})" if said else ""
        )
        log.error("%s", details)
        with contextlib.suppress(httpx.HTTPError):
            self.client.PushTaskOutput(
                PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details)
            )


def launch_runs_once() -> None:
    """In the SuperLink's process: let it start this SuperExec; not with an untested Flower."""
    if not is_tested(flower_version()):
        return
    cli = import_module("flwr.superlink.cli.flower_superlink")
    command = vars(cli)["_get_superexec_command"]

    def replaced(*args: Any, **kw: Any) -> list[str]:
        return [sys.executable, "-P", "-m", __name__, *command(*args, **kw)[1:]]

    vars(cli)["_get_superexec_command"] = replaced


def main() -> None:
    """Run `flower-superexec` with an executor that looks after what it starts."""
    from flwr.supercore.cli.flower_superexec import flower_superexec

    loop = import_module("flwr.supercore.superexec.run_superexec")
    if "get_executor" not in vars(loop):  # not the Flower this was written for
        raise AttributeError("flwr.supercore.superexec.run_superexec.get_executor")
    vars(loop)["get_executor"] = lambda *_, **__: _executor()
    flower_superexec()


def _executor() -> Any:
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
    from flwr.supercore.superexec.executor.types import LaunchResult

    class Once(SubprocessExecutor):
        def launch(self, spec: Any) -> Any:
            output = Path(os.environ.get("FLWR_HOME", ".")) / f"task-{spec.task_id}.log"
            try:
                care = Care(_start(spec, output), _client(spec), output)
            except (OSError, ValueError) as error:
                return LaunchResult.failed(str(error))
            threading.Thread(target=care.run, daemon=True).start()
            return LaunchResult.accepted()

    return Once()


def _start(spec: Any, output: Path) -> subprocess.Popen[bytes]:
    """Flower's own program for the task, by this Python, without names of the working directory."""
    from flwr.supercore.constant import TASK_TYPE_TO_APPIO_API_ADDRESS_ARG, TASK_TYPE_TO_COMMAND

    program = Path(sys.executable).with_name(TASK_TYPE_TO_COMMAND[spec.task_type])
    words = [sys.executable, "-P", str(program)]
    words += [TASK_TYPE_TO_APPIO_API_ADDRESS_ARG[spec.task_type], spec.runtime_api_address]
    words += ["--token", spec.token, "--parent-pid", str(os.getpid())]
    ca = ["--root-certificates", str(spec.root_certificates_path)]
    words += ["--insecure"] if spec.insecure else ca
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as handle:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT
        )


def _client(spec: Any) -> Any:
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient

    certificates = None if spec.insecure else spec.root_certificates_path
    return RuntimeHttpClient.from_server_address(
        spec.runtime_api_address,
        spec.insecure,
        certificates,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            RuntimeTokenHttpInterceptor(spec.token),
        ],
    )


def _tail(output: Path) -> str:
    """The last lines of a file, on one line."""
    try:
        with output.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = handle.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    words = [" ".join(line.split()) for line in lines if line.strip()]
    return " | ".join(words[-TAIL_LINES:])


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    main()
