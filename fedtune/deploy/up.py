"""`fedtune up`: Flower's SuperLink, checked, with the sites' keys registered, ended cleanly."""

from __future__ import annotations

import argparse
import errno
import socket
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from fedtune.deploy.address import Address
from fedtune.deploy.connection import Connection, flower_environment
from fedtune.deploy.gate import GATE
from fedtune.deploy.opening import OPENED
from fedtune.deploy.probe import NotYet, probe
from fedtune.deploy.roles import ServerFolder, server_folder
from fedtune.errors import ConfigError, DeployError
from fedtune.processes.last_line import say_last
from fedtune.processes.signals import Stopped, status_of
from fedtune.processes.supervisor import Part, Supervisor

__all__ = ["SuperLink", "add_arguments", "run", "start_superlink"]

START_S = 600.0  # Flower's imports on a busy machine
LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink that answers.

    Attributes:
        bound: where it listens.
        address: where this machine reaches it.
        tls: its folder of certificates, or None.
        sites: names of the sites whose keys it knows.
    """

    part: Part
    bound: Address
    address: Address
    tls: Path | None
    sites: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune up`."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument(
        "--tls", type=Path, metavar="DIR", help="the server folder that fedtune certs made"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="listen beyond this machine without --tls"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/superlink"),
        help="log and Flower's files (outputs/superlink)",
    )


def run(args: argparse.Namespace) -> int:
    """`fedtune up`: until Ctrl-C, SIGTERM or SIGHUP, which is status 0 once it is up."""
    bound = Address(args.host, args.port)
    _check(bound, args.tls, insecure=args.insecure)
    env = flower_environment((args.output_dir / "flower").absolute(), args.host)
    started = False
    try:
        with Supervisor(args.output_dir, env=env) as parts:
            link = start_superlink(parts, bound, tls=args.tls)
            started = True
            print(_welcome(link), flush=True)
            parts.watch()
    except (KeyboardInterrupt, Stopped) as stop:
        say_last("superlink: stopped" if started else "superlink: stopped as it began", sys.stdout)
        return 0 if started else status_of(stop)


def start_superlink(
    parts: Supervisor, bound: Address, *, tls: Path | None = None, timeout_s: float = START_S
) -> SuperLink:
    """Start a SuperLink in `parts` and wait until it answers and knows the sites of `tls`.

    The environment of `parts` should be `flower_environment(home)`.

    Raises:
        ConfigError: `tls` is no server folder, or not for this host.
        DeployError: the port is taken, or the SuperLink does not start.
    """
    folder = None if tls is None else server_folder(tls)
    if folder is not None:
        _check_certificate(folder, bound)
    _check_free(bound)
    address = Address(LOOPBACK_OF.get(bound.host, bound.host), bound.port)
    sites = {} if folder is None else folder.sites
    opened = parts.directory / "superlink.open"
    opened.unlink(missing_ok=True)
    env = {OPENED: str(opened.absolute())} if sites else {}
    part = parts.start("superlink", _command(bound, folder), env=env)
    ca = None if folder is None else folder.ca
    parts.wait_ready(part, lambda: _answers(address, ca), timeout_s=timeout_s)
    with Connection(address, tls=tls) as connection:
        for name, key in sites.items():
            connection.flwr("supernode", "register", key, "--name", name)
    if sites:
        opened.touch()
    return SuperLink(part, bound, address, tls, list(sites))


def _check(bound: Address, tls: Path | None, *, insecure: bool) -> None:
    if not 0 < bound.port < 65536:
        raise ConfigError(f"--port: expected 1 to 65535, received {bound.port}.")
    if tls is not None and insecure:
        raise ConfigError("--insecure and --tls exclude each other. Leave one out.")
    if tls is None and not insecure and not bound.is_loopback:
        raise ConfigError(
            f"--host: without --tls only this machine may connect, received {bound.host}. Give "
            "--tls DIR (see fedtune certs), or --insecure in a network that you trust."
        )


def _check_certificate(folder: ServerFolder, bound: Address) -> None:
    """Flower's processes on the server call the bound address itself, unless it is a wildcard."""
    if bound.host not in LOOPBACK_OF and _plain(bound.host) not in map(_plain, folder.hosts):
        raise ConfigError(
            f"--host: {folder.certificate} is for {', '.join(folder.hosts)}, received "
            f"{bound.host}. Run fedtune certs with --host {bound.host}."
        )


def _check_free(bound: Address) -> None:
    try:
        kind, _, _, _, where = socket.getaddrinfo(
            bound.host, bound.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
    except socket.gaierror:
        raise ConfigError(f"--host: the name {bound.host} is unknown.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DeployError(
                f"--port: {bound} is in use by another program. Choose another --port, or end it."
            ) from None
        raise ConfigError(f"--host, --port: cannot listen on {bound}: {error.strerror}.") from None


def _command(bound: Address, folder: ServerFolder | None) -> list[str | Path]:
    security: list[str | Path] = ["--insecure"]
    if folder is not None:
        security = ["--ssl-ca-certfile", folder.ca.absolute()]
        security += ["--ssl-certfile", folder.certificate.absolute()]
        security += ["--ssl-keyfile", folder.key.absolute(), "--enable-supernode-auth"]
    return [
        *(sys.executable, "-P", "-m", "fedtune.deploy.gate"),
        *("--host", bound.host, "--port", str(bound.port)),
        "--disable-runtime-dependency-installation",
        *security,
    ]


def _answers(address: Address, ca: Path | None) -> bool:
    """Whether it listens; raises DeployError when what listens is not our SuperLink."""
    try:
        probe(address, ca, path=GATE)
    except NotYet:
        return False
    return True


def _welcome(link: SuperLink) -> str:
    """What a person needs to go on."""
    tls = link.tls is not None
    here = f"--superlink {link.address}"
    there = f"--superlink {Address(_public_name(link), link.bound.port)}"
    lines = [f"superlink: listening on {link.bound} ({'TLS' if tls else 'no TLS'})"]
    if not tls and link.bound.is_loopback:
        lines.append("warning: no TLS and no node authentication; only this machine can connect")
    elif not tls:
        lines.append("warning: no TLS and no node authentication; whoever connects can be a site")
    if tls:
        lines.append(f"sites that may join: {', '.join(link.sites) or 'none (see fedtune certs)'}")
    lines += [
        f"at a site:  fedtune join {there}{' --tls SITE_FOLDER' if tls else ''} -- python train.py",
        f"to start:   fedtune submit {here}{' --tls SUBMIT_FOLDER' if tls else ''} --num_rounds 3",
        f"to watch:   fedtune status {here}{' --tls SUBMIT_FOLDER' if tls else ''}",
        f"log: {link.part.log}",
        "Ctrl-C stops it.",
    ]
    return "\n".join(lines)


def _public_name(link: SuperLink) -> str:
    """A name by which sites may call this machine."""
    if link.bound.host not in LOOPBACK_OF:
        return link.bound.host
    if link.tls is not None:
        for name in server_folder(link.tls).hosts:
            if not Address(name, 1).is_loopback and not name.startswith("*"):
                return name
    return socket.gethostname()


def _plain(host: str) -> str:
    try:
        return str(ip_address(host))
    except ValueError:
        return host.lower()
