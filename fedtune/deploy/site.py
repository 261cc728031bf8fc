"""`fedtune join`: a site's node, and its own training script whenever a run begins.

join --- node (Flower) --- relay, one process a message --- socket --- script, one process a run

A private directory holds what node, relay and script share (`relay/site.py`); it goes when join
ends, and so does every process.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedtune.deploy import certs
from fedtune.deploy.connection import Address, flower_environment, probe
from fedtune.deploy.processes import Part, Stopped, Supervisor
from fedtune.deploy.script import LogLines, Script
from fedtune.errors import ConfigError
from fedtune.relay.limits import Limits
from fedtune.relay.site import SiteFolder

__all__ = ["Settings", "add_arguments", "join", "node_command", "run"]

POLL_S = 0.1
LOOK_S = 2.0  # between looks for a SuperLink that is not there yet
# What Flower's node prints once the SuperLink has accepted it, and around each reply.
JOINED, SENDING_END, SENT = "SuperNode ID:", "Sending: query.finish", "Sent successfully"
REFUSED = "[code: 2004]"  # what it prints when its key is unknown, or connected already
DELIVER_S = 10.0  # for the node to send its last reply, before --once ends it
NODE_RESTARTS = 5  # in a row
NODE_CALM_S = 60.0  # a node that lived this long had no trouble starting
ASK_AGAIN_S = 30.0  # at most, between attempts of a node whose key is unknown
NODE_BAD_SETTING = 2  # its exit status when starting it again would not help

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """A site.

    Attributes:
        tls: the site's folder of certificates, or None for no TLS.
        command: the training script and its arguments.
        output_dir: of the logs.
        max_restarts: how often the script may be started again in one run.
        once: whether to end after one run.
    """

    name: str
    superlink: Address
    tls: certs.SiteFolder | None
    command: Sequence[str]
    output_dir: Path
    limits: Limits
    max_restarts: int
    once: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune join`."""
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="of fedtune up")
    parser.add_argument(
        "--tls", type=Path, metavar="DIR", help="this site's folder from fedtune certs"
    )
    parser.add_argument("--name", metavar="SITE", help="default: that of --tls, or the host's")
    parser.add_argument(
        "--once", action="store_true", help="end after one run, with the script's status"
    )
    parser.add_argument(
        "--max_rounds", type=int, default=0, metavar="N", help="refuse runs of more rounds"
    )
    parser.add_argument(
        "--max_steps", type=int, default=0, metavar="N", help="refuse runs of more optimizer steps"
    )
    parser.add_argument(
        "--start_timeout_s",
        type=float,
        default=600.0,
        metavar="S",
        help="how long the script may take until its Trainer is there (600)",
    )
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=3,
        metavar="N",
        help="how often a killed or failed script is started again in a run (3)",
    )
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="of the logs; default: outputs/<name>"
    )
    parser.add_argument(
        "script",
        nargs=argparse.REMAINDER,
        metavar="-- python train.py ...",
        help="your training script, with fedtune.patch(trainer) in it",
    )


def run(args: argparse.Namespace) -> int:
    """`fedtune join`: until Ctrl-C or SIGTERM (status 130, 143), or one run with --once."""
    return join(_settings(args))


def join(settings: Settings) -> int:
    """Take part until stopped; with `once`, end with the script's status (128 + signal).

    Raises:
        ConfigError: TMPDIR is too deep for a socket, or the output directory cannot be made.
        DeployError: the SuperLink is not what it should be, or the node keeps ending.
    """

    def say(text: str) -> None:
        print(f"{settings.name}: {text}", flush=True)

    with TemporaryDirectory(prefix="fedtune-", ignore_cleanup_errors=True) as directory:
        site = SiteFolder.create(Path(directory), settings.name, settings.limits)
        try:
            with Supervisor(settings.output_dir) as parts:
                _await_superlink(settings, say)
                return _take_part(settings, site, parts, say)
        except (KeyboardInterrupt, Stopped) as stop:
            say("stopped")
            return 130 if isinstance(stop, KeyboardInterrupt) else int(str(stop.code))


def node_command(settings: Settings, site: SiteFolder) -> list[str | Path]:
    """The program that connects to the SuperLink and runs the relay."""
    security: list[str | Path] = ["--insecure"]
    if settings.tls is not None:
        security = ["--root_certificates", settings.tls.ca, "--private_key", settings.tls.key]
    program = [sys.executable, "-m", "fedtune.deploy.node"]
    return [*program, "--superlink", str(settings.superlink), "--site", site.path, *security]


def _settings(args: argparse.Namespace) -> Settings:
    command = args.script[1:] if args.script[:1] == ["--"] else args.script
    if not command:
        raise ConfigError(
            "join: expected a training script, received none. Put it last: "
            "fedtune join --superlink HOST:PORT -- python train.py."
        )
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"join: there is no program {command[0]}. Put the script's program after --: "
            "-- python train.py."
        )
    for flag in ("max_rounds", "max_steps", "max_restarts"):
        if getattr(args, flag) < 0:
            raise ConfigError(f"--{flag}: expected at least 0, received {getattr(args, flag)}.")
    if not args.start_timeout_s > 0:
        raise ConfigError(f"--start_timeout_s: expected seconds, received {args.start_timeout_s}.")
    tls = None if args.tls is None else certs.site_folder(args.tls.absolute())
    name = args.name or (tls.name if tls else _host_name())
    if not certs.SITE_NAME.fullmatch(name):
        raise ConfigError(
            f"--name: expected up to 32 letters, digits, '_', '-' and '.', received {name}."
        )
    return Settings(
        name=name,
        superlink=Address.parse(args.superlink),
        tls=tls,
        command=command,
        output_dir=args.output_dir or Path("outputs") / name,
        limits=Limits(args.max_rounds, args.max_steps, args.start_timeout_s),
        max_restarts=args.max_restarts,
        once=args.once,
    )


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname()).lstrip(".-")[:32] or "site"


def _await_superlink(settings: Settings, say: Say) -> None:
    """Wait until something listens, and see that it is a SuperLink we may trust."""
    where, told = settings.superlink, False
    while (problem := _absence(where)) is not None:
        if not told:
            say(f"waiting for a SuperLink at {where} ({problem})")
        told = True
        time.sleep(LOOK_S)
    probe(where, None if settings.tls is None else settings.tls.ca)


def _absence(where: Address) -> str | None:
    """Why nobody answers there, or None; an address that will not do is left to `probe`."""
    try:
        socket.create_connection((where.host, where.port), timeout=LOOK_S).close()
    except (ConnectionError, TimeoutError) as problem:
        return problem.strerror or str(problem)
    except OSError:
        return None
    return None


def _take_part(settings: Settings, site: SiteFolder, parts: Supervisor, say: Say) -> int:
    environment = flower_environment(site.path / "flower")
    node = _Node(parts, node_command(settings, site), environment, settings, say)
    script: Script | None = None
    try:
        while True:
            node.step()
            if script is None:
                script = _begin(settings, site, parts, say)
            elif (status := script.step()) is not None:
                if settings.once:
                    if script.finished:
                        node.deliver()
                    return status if status >= 0 else 128 - status
                script = None
                say("waiting for the next run")
            time.sleep(POLL_S)
    except BaseException:
        if script is not None:
            script.abandon("the site was stopped")
        raise


def _begin(settings: Settings, site: SiteFolder, parts: Supervisor, say: Say) -> Script | None:
    """The script of the oldest run that has a plan and no end."""
    for folder in site.planned():
        if folder.exit_status is None:
            return Script(
                parts,
                settings.command,
                folder,
                max_restarts=settings.max_restarts,
                say=say,
                show=lambda line: print(f"{settings.name} | {line}", flush=True),
            )
    return None


class _Node:
    """The process that Flower knows as this site; started again when it ends."""

    def __init__(
        self,
        parts: Supervisor,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        settings: Settings,
        say: Say,
    ) -> None:
        self._parts, self._command, self._environment = parts, command, environment
        self._superlink, self._tls, self._say = settings.superlink, settings.tls, say
        self._restarts = 0
        self._start_at = 0.0
        self._part: Part | None = None
        self._joined = self._refused = False  # since it was started
        self._refusals = 0  # since it was last accepted
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
        if _absence(self._superlink) is not None:  # it would end at once
            self._start_at = now + LOOK_S
            return
        self._part = self._parts.start("node", self._command, env=self._environment)
        self._lines = LogLines(self._part.log, self._part.log_start)
        self._started = now
        self._joined = self._refused = False

    def _listen(self, *, rest: bool = False) -> None:
        for line in self._lines.read(rest=rest):
            if JOINED in line and not self._joined:
                self._joined, self._refusals = True, 0
                self._say(f"joined {self._superlink}; waiting for a run")
            elif REFUSED in line:
                self._refused = True
            elif SENDING_END in line:
                self._sending_end = True
            elif SENT in line and self._sending_end:
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
            key = "this site" if self._tls is None else f"the key {self._tls.public}"
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
