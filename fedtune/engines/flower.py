"""The flower engine: a real SuperLink, and for each client a SuperNode and a trainer process.

Everything runs on this machine's loopback, started and reaped by this process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedtune.deploy.address import Address
from fedtune.deploy.connection import Connection, flower_environment
from fedtune.deploy.follow import follow
from fedtune.deploy.submit import run_problem, start_run
from fedtune.deploy.up import start_superlink
from fedtune.errors import DeployError
from fedtune.processes.supervisor import Part, Supervisor, free_port
from fedtune.server.submission import Submission

__all__ = ["run_flower"]

END_S = 600.0  # for the scripts to end after the last round: they may save, or evaluate


def run_flower(
    submission: Submission, *, clients: Sequence[str], command: Sequence[str], logs: Path
) -> None:
    """Run `submission` with one site per client; each starts `command` when the run begins.

    Raises:
        DeployError: a part does not start or ends too early; its log is in `logs`.
        RoundError: the run failed.
    """
    address = Address("127.0.0.1", free_port())
    with Supervisor(logs, env=flower_environment((logs / "flower").absolute())) as parts:
        start_superlink(parts, address)
        sites = [_join(parts, name, address, command, logs) for name in clients]
        with Connection(address) as link:
            started = time.time()
            run_id = start_run(link, submission)
            follow(
                Path(submission.directory),
                submission.federation.num_rounds,
                lambda: _problem(parts, link, run_id),
                since=started,
            )
        _await_end(sites)


def _join(
    parts: Supervisor, name: str, address: Address, command: Sequence[str], logs: Path
) -> Part:
    words = [sys.executable, "-P", "-m", "fedtune.cli", "join", "--superlink", str(address)]
    words += ["--name", name, "--once", "--output_dir", str(logs / name), "--", *command]
    return parts.start(name, words)


def _problem(parts: Supervisor, link: Connection, run_id: str) -> str | None:
    try:
        parts.check()
    except DeployError as error:
        return str(error)
    return run_problem(link, run_id)


def _await_end(sites: Sequence[Part]) -> None:
    deadline = time.monotonic() + END_S
    for site in sites:
        while site.status is None:
            if time.monotonic() > deadline:
                raise DeployError(f"{site.name}: still there {END_S:.0f} s after the last round.")
            time.sleep(0.05)
        if site.status:
            raise site.ended()
