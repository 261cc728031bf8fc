"""A whole federation of patched Trainers: the real server, each site's script in a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from flwr.app import Context, Message
from transformers import Trainer

import fedtune
from fedtune._flower.task_message import task_identity
from fedtune.engines.inline import InlineGrid
from fedtune.errors import RoundError
from fedtune.relay.folder import ENVIRONMENT, RunFolder
from fedtune.relay.frames import encode
from fedtune.server.app import ServerRun, server_app
from fedtune.server.checkpoint import ServerState
from tests.client.driver import planned, send
from tests.federation.small import PLAN, result_of

# Makes the Trainer of a site; called again for a script that is started again.
Script = Callable[[str, Path], Trainer]


class Killed(Exception):
    """Ends a script from within."""


@dataclass
class Site:
    """One site: its folder, its script, and what became of its Trainer.

    Messages come one at a time and the first one starts the script, so that one script at most is
    busy: what Accelerate shares is shared by all threads.
    """

    name: str
    folder: RunFolder
    output: Path
    script: Script
    trainer: Trainer | None = None
    starts: int = 0
    problem: BaseException | None = None
    thread: threading.Thread | None = None

    def answer(self, message: Message) -> Message:
        """What the site's script says."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        frame = send(self.folder, encode(message.metadata.message_type, message.content))
        if frame.error is not None:
            raise RoundError(frame.error)
        return Message(frame.content, reply_to=message)

    def end(self) -> None:
        """Wait for the script; raises what it has raised."""
        assert self.thread is not None
        self.thread.join(60.0)
        assert not self.thread.is_alive(), f"{self.name} did not end"
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        try:
            while not self._once():
                pass
        except BaseException as error:
            self.problem = error

    def _once(self) -> bool:
        self.starts += 1
        with patch.dict(os.environ, {ENVIRONMENT: str(self.folder.path)}):
            self.trainer = fedtune.patch(self.script(self.name, self.output))
        try:
            self.trainer.train()
        except Killed:
            return False
        fedtune.unpatch(self.trainer)
        return True


def federate_sites(
    run: ServerRun, directory: Path, script: Script
) -> tuple[ServerState, list[Site]]:
    """Run the rounds over `run.min_clients` sites; the last state, and the sites at their end."""
    sites = play_sites(run, directory, script)
    for site in sites:
        site.end()
    return result_of(run), sites


def play_sites(run: ServerRun, directory: Path, script: Script) -> list[Site]:
    """The same, however it ends: `run.error` and `problem` of the sites say it."""
    run.deployed = True
    with TemporaryDirectory(prefix="ft-") as short:
        sites = []
        for number in range(run.min_clients):
            folder = RunFolder.create(Path(short) / str(number))
            name = f"client-{number}"
            planned(folder, run=PLAN.run, client=name, num_rounds=run.plan.num_rounds)
            sites.append(Site(name, folder, directory / name, script))

        def client(message: Message, context: Context) -> Message:
            return sites[int(context.node_config["partition-id"])].answer(message)

        with task_identity(1, 1):
            grid = InlineGrid(client, len(sites))  # type: ignore[arg-type]
            server_app(run)(grid, grid._contexts[2])
        for site in sites:
            if site.thread is not None:
                site.thread.join(60.0)
    return sites
