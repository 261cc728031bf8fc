"""`fedtune join`: a site's node, and its own training script whenever a run begins.

join --- node (Flower) --- relay, one process a message --- socket --- script, one process a run

A private directory holds what node, relay and script share (`relay/site.py`); it goes when join
ends, and so does every process.
"""

from __future__ import annotations

import argparse
import errno
import re
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedtune.deploy import roles
from fedtune.deploy.address import Address
from fedtune.deploy.connection import flower_environment
from fedtune.deploy.lookout import Lookout, Say
from fedtune.deploy.proxy import environment, proxy_of
from fedtune.deploy.script import Script
from fedtune.deploy.site_node import POLL_S, SiteNode
from fedtune.errors import ConfigError, DeployError
from fedtune.processes.last_line import say_last
from fedtune.processes.signals import Stopped, status_of
from fedtune.processes.supervisor import Supervisor
from fedtune.relay.limits import Limits
from fedtune.relay.site import SiteFolder

__all__ = ["Settings", "add_arguments", "join", "node_command", "run"]

TIDY_S = 30.0
FULL = (errno.ENOSPC, errno.EDQUOT)


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
    tls: roles.SiteFolder | None
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
                return _take_part(settings, site, parts, say)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DeployError(
                f"{error.filename or directory}: {error.strerror}. Free some there, or set TMPDIR "
                "and --output_dir to a larger disk."
            ) from None
        except (KeyboardInterrupt, Stopped) as stop:
            say_last(f"{settings.name}: stopped", sys.stdout)
            return status_of(stop)


def node_command(settings: Settings, site: SiteFolder) -> list[str | Path]:
    """The program that connects to the SuperLink and runs the relay."""
    security: list[str | Path] = ["--insecure"]
    if settings.tls is not None:
        security = ["--root_certificates", settings.tls.ca, "--private_key", settings.tls.key]
    program = [sys.executable, "-P", "-m", "fedtune.deploy.node"]
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
    tls = None if args.tls is None else roles.site_folder(args.tls.absolute())
    name = args.name or (tls.name if tls else _host_name())
    if not roles.SITE_NAME.fullmatch(name):
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


def _take_part(settings: Settings, site: SiteFolder, parts: Supervisor, say: Say) -> int:
    tls = settings.tls
    ca, key = (None, None) if tls is None else (tls.ca, tls.public)
    proxy = proxy_of(settings.superlink, tls=tls is not None)
    if proxy is not None:
        say(f"through {proxy}")
    node = SiteNode(
        parts,
        node_command(settings, site),
        flower_environment(site.path / "flower") | environment(proxy),
        superlink=settings.superlink,
        lookout=Lookout(settings.superlink, ca, proxy, name=settings.name, say=say),
        key=key,
        say=say,
    )
    script: Script | None = None
    tidy_at = 0.0
    try:
        while True:
            node.step()
            if time.monotonic() >= tidy_at:
                site.tidy()
                tidy_at = time.monotonic() + TIDY_S
            if script is None:
                script = _begin(settings, site, parts, say)
            elif (status := script.step()) is not None:
                if settings.once:
                    if script.finished:
                        node.deliver()
                    return status if status >= 0 else 128 - status
                script, tidy_at = None, 0.0
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
