"""`fedtune certs`: who may be the server, who may be a site. One folder per role (`roles.py`).

Running it again adds sites and host names. A key that is there is never replaced; a site's private
key may be deleted here once the site has it.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from fedtune.deploy import keys
from fedtune.deploy.roles import (
    CA,
    CA_KEY,
    SERVER,
    SERVER_KEY,
    SITE_KEY,
    SITE_NAME,
    SITE_PUB,
    SITES,
    server_folder,
)
from fedtune.errors import ConfigError
from fedtune.files import write_text

__all__ = ["add_arguments", "make_certs", "run"]

RESERVED = ("ca", "server", "submit")
ALWAYS = ("localhost", "127.0.0.1", "::1")  # Flower's programs on the server talk over loopback
HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9_-]+)*")
MAX_DAYS = 3650
CA_DAYS = MAX_DAYS + 30
RENEW_BEFORE = timedelta(days=30)


class _Ca(NamedTuple):
    """Its certificate, and where its key is (or was: signing asks for it)."""

    certificate: keys.Certificate
    key: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune certs`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="one folder per role goes here")
    parser.add_argument(
        "--sites", default="", metavar="A,B", help="names of new sites; needed the first time"
    )
    parser.add_argument(
        "--host",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME_OR_IP",
        help="how sites reach the server; localhost always is one",
    )
    parser.add_argument(
        "--days", type=int, default=365, help="how long the server's certificate lasts (365)"
    )


def run(args: argparse.Namespace) -> int:
    """`fedtune certs`: print what each folder is for."""
    sites = [name.strip() for name in args.sites.split(",") if name.strip()]
    made = make_certs(args.directory, sites, hosts=args.host, days=args.days)
    server = server_folder(args.directory / "server")
    print(f"{args.directory}/server: for fedtune up --tls; valid for {', '.join(server.hosts)}")
    print(f"{args.directory}/submit: for fedtune submit, status, stop and logs --tls")
    for name in server.sites:
        note = "new" if name in made else "kept"
        print(f"{args.directory}/{name}: for fedtune join --tls at {name} ({note})")
    print(f"{args.directory}/ca: keep it to yourself; it signs further server certificates")
    return 0


def make_certs(
    directory: Path, sites: Sequence[str], *, hosts: Sequence[str] = (), days: int = 365
) -> list[str]:
    """Write what is missing in `directory`; returns the names of the new sites.

    The server's certificate is signed again, for the same key, when `hosts` has a name that it
    lacks or when it ends within 30 days.

    Raises:
        ConfigError: a name or `days` is unfit, or `directory` holds half of an earlier set.
    """
    if sites or not (directory / "server").is_dir():
        _check_sites(sites)
    wanted = [_check_host(host) for host in hosts]
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"--days: expected 1 to {MAX_DAYS}, received {days}.")
    try:
        _make_folder(directory)
        ca = _make_ca(directory)
        _make_server(directory, ca, wanted, timedelta(days=days))
        _make_role(directory / "submit", ca)
        return [name for name in dict.fromkeys(sites) if _make_site(directory, name, ca)]
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot write {error.filename}: {error.strerror}. Choose another "
            "directory, or change its permissions."
        ) from None


def _check_sites(sites: Sequence[str]) -> None:
    if not sites:
        raise ConfigError("--sites: expected at least one name, received none.")
    for name in sites:
        if not SITE_NAME.fullmatch(name):
            raise ConfigError(
                f"--sites: expected names of 1 to 32 letters, digits, _ . - that do not start with "
                f". or -, received {name!r}."
            )
        if name in RESERVED:
            raise ConfigError(f"--sites: {name} is a folder of its own. Choose another name.")


def _check_host(host: str) -> str:
    try:
        return str(ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not HOST_NAME.fullmatch(host) or host.replace(".", "").isdigit():
        raise ConfigError(
            f"--host: expected a host name or IP address without a port, received {host!r}."
        )
    return host


def _make_ca(directory: Path) -> _Ca:
    folder = directory / "ca"
    certificate_file, key_file = folder / CA, folder / CA_KEY
    if certificate_file.exists():
        certificate = keys.load_certificate(certificate_file)
        if certificate.not_valid_after_utc < keys.now():
            raise ConfigError(f"{certificate_file}: has ended. Make a new set in a new directory.")
        return _Ca(certificate, key_file)
    if (directory / "server" / CA).exists() or key_file.exists():
        raise ConfigError(
            f"{certificate_file}: is missing from an earlier set. Put it back, or make a new set "
            "in a new directory."
        )
    _make_folder(folder)
    certificate, key = keys.new_ca(timedelta(days=CA_DAYS))
    _write_new(key_file, keys.pem(key), 0o600)
    _write_new(certificate_file, keys.pem(certificate), 0o644)
    return _Ca(certificate, key_file)


def _make_server(directory: Path, ca: _Ca, hosts: Sequence[str], life: timedelta) -> None:
    folder = directory / "server"
    _make_role(folder, ca)
    _make_folder(folder / SITES)
    certificate_file, key_file = folder / SERVER, folder / SERVER_KEY
    known = list(ALWAYS)
    if certificate_file.exists():
        old = keys.load_certificate(certificate_file)
        known = keys.hosts_of(old)
        if set(hosts) <= set(known) and old.not_valid_after_utc > keys.now() + RENEW_BEFORE:
            return
    if not key_file.exists():
        _write_new(key_file, keys.pem(keys.new_key()), 0o600)
    key = keys.load_key(key_file)
    if not ca.key.exists():
        raise ConfigError(
            f"{ca.key}: is missing, and the server's certificate must be signed. Put it back, or "
            "make a new set in a new directory."
        )
    names = list(dict.fromkeys([*known, *hosts]))
    certificate = keys.sign_server(ca.certificate, keys.load_key(ca.key), key, names, life)
    write_text(certificate_file, keys.pem(certificate).decode())


def _make_site(directory: Path, name: str, ca: _Ca) -> bool:
    """Whether the site is new. Its public key at the server says whether it is known."""
    folder, registered = directory / name, directory / "server" / SITES / f"{name}.pub"
    key_file, public_file = folder / SITE_KEY, folder / SITE_PUB
    if registered.exists() and not key_file.exists():
        return False  # the key has gone to the site
    _make_role(folder, ca)
    new = not key_file.exists()
    if new:
        _write_new(key_file, keys.new_ssh_key(), 0o600)
    key = keys.load_ssh_key(key_file)
    for file in (public_file, registered):
        if not file.exists():
            _write_new(file, keys.public_ssh(key) + f" {name}\n".encode(), 0o644)
        elif keys.public_bytes(keys.load_public_ssh(file)) != keys.public_bytes(key):
            raise ConfigError(
                f"{file}: is not the public key of {key_file}. Put the right one back, or choose "
                "another site name."
            )
    return new


def _make_role(folder: Path, ca: _Ca) -> None:
    _make_folder(folder)
    if not (folder / CA).exists():
        _write_new(folder / CA, keys.pem(ca.certificate), 0o644)


def _make_folder(folder: Path) -> None:
    """Private, unless it is there already: then its owner has decided."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)


def _write_new(file: Path, data: bytes, mode: int) -> None:
    """Whole or absent, and never over a file that is there."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            os.fchmod(handle.fileno(), mode)
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.link(temporary, file)
    finally:
        temporary.unlink()
