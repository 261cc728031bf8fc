"""A site's connection: Flower's node, listened to, and started again when it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedtune._flower.node_log import NodeEvent, event_of
from fedtune.deploy.address import Address
from fedtune.deploy.lookout import Lookout, Say
from fedtune.deploy.script import LogLines
from fedtune.errors import DeployError
from fedtune.processes.supervisor import Part, Supervisor

__all__ = ["SiteNode"]

POLL_S = 0.1
LOOK_S = 2.0  # between looks for a SuperLink that is not there yet
DELIVER_S = 10.0  # for the node to send its last reply, before --once ends it
NODE_RESTARTS = 5  # in a row
NODE_CALM_S = 60.0  # a node that lived this long had no trouble starting
ASK_AGAIN_S = 30.0  # at most, between attempts of a node whose key is unknown
NODE_BAD_SETTING = 2  # its exit status when starting it again would not help


class SiteNode:
    """The process that Flower knows as this site. Call `step` often.

    Args:
        superlink: where `command` connects to.
        lookout: asked before each start.
        key: the site's public key, or None for no TLS.
        say: tells people what happens.
    """

    def __init__(
        self,
        parts: Supervisor,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        *,
        superlink: Address,
        lookout: Lookout,
        key: Path | None,
        say: Say,
    ) -> None:
        self._parts, self._command, self._environment = parts, command, environment
        self._superlink, self._lookout, self._key, self._say = superlink, lookout, key, say
        self._restarts = 0
        self._start_at = 0.0
        self._part: Part | None = None
        self._joined = self._refused = False  # since it was started
        self._refusals = 0  # since it was last accepted
        self._has_joined = False  # ever
        self._sending_end = self._end_sent = False

    def step(self) -> None:
        """Look after it once; raises DeployError when it does not stay."""
        now = time.monotonic()
        if self._part is None:
            if now >= self._start_at:
                self._start(now)
        elif self._part.status is not None:
            self._listen(rest=True)
            self._restart(self._part, now)
        else:
            self._listen()

    def deliver(self) -> None:
        """Let it send that the run has ended here, so that the server need not wonder."""
        deadline = time.monotonic() + DELIVER_S
        while not self._end_sent and time.monotonic() < deadline:
            self.step()
            time.sleep(POLL_S)

    def _start(self, now: float) -> None:
        if not self._may_join():  # it would end at once
            return
        self._part = self._parts.start("node", self._command, env=self._environment)
        self._lines = LogLines(self._part.log, self._part.log_start)
        self._started = now
        self._joined = self._refused = False

    def _may_join(self) -> bool:
        try:
            clear = self._lookout.is_clear()
        except DeployError as problem:
            if not self._has_joined or self._restarts >= NODE_RESTARTS:
                raise
            self._say(f"{problem} Trying again.")  # whoever runs the server may mend it
            self._restarts += 1
            clear = False
        if not clear:
            self._start_at = time.monotonic() + LOOK_S * 2**self._restarts
        return clear

    def _listen(self, *, rest: bool = False) -> None:
        for line in self._lines.read(rest=rest):
            event = event_of(line)
            if event is NodeEvent.JOINED and not self._joined:
                self._joined = self._has_joined = True
                self._refusals = 0
                self._say(f"joined {self._superlink}; waiting for a run")
            elif event is NodeEvent.REFUSED:
                self._refused = True
            elif event is NodeEvent.SENDING_END:
                self._sending_end = True
            elif event is NodeEvent.SENT and self._sending_end:
                self._sending_end, self._end_sent = False, True

    def _restart(self, part: Part, now: float) -> None:
        if self._refused:
            self._start_at = now + min(ASK_AGAIN_S, 2.0**self._refusals)
            self._tell_refused()
        else:
            self._start_at = now + 0.5 * 2**self._restarts
            self._tell_ended(part, now)
        self._parts.stop(part)
        self._part = None

    def _tell_refused(self) -> None:
        self._refusals += 1
        if self._refusals == 1:
            key = "this site" if self._key is None else f"the key {self._key}"
            self._say(
                f"not accepted yet: {self._superlink} does not know {key}, or it has joined "
                "already; trying again"
            )

    def _tell_ended(self, part: Part, now: float) -> None:
        if now - self._started > NODE_CALM_S:
            self._restarts = 0
        if self._restarts >= NODE_RESTARTS or part.status == NODE_BAD_SETTING:
            raise part.ended()
        self._restarts += 1
        if self._joined and part.status == 0:  # so Flower ends a node that lost its SuperLink
            self._say(f"connection to {self._superlink} lost; joining again. Log: {part.log}")
        else:
            self._say(f"node restarted. {part.ended()}")
