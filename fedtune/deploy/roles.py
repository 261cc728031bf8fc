"""The folders that `fedtune certs` makes, one per role, as the other commands read them.

DIR/ca/      ca.key, ca.crt           stays with the coordinator; signs further servers
DIR/server/  server.key, server.crt, ca.crt, sites/<site>.pub     for `fedtune up`
DIR/submit/  ca.crt                   for `fedtune submit`, `status`, `stop`, `logs`
DIR/<site>/  site.key, site.pub, ca.crt                           for `fedtune join` at that site
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from fedtune.deploy import keys
from fedtune.errors import ConfigError

__all__ = [
    "ServerFolder",
    "SiteFolder",
    "ca_certificate",
    "server_folder",
    "site_folder",
]

CA, CA_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY, SITES = "server.crt", "server.key", "sites"
SITE_KEY, SITE_PUB = "site.key", "site.pub"
SITE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")


@dataclass(frozen=True)
class ServerFolder:
    """What `fedtune up --tls` needs. `sites`: name -> public key of each site."""

    certificate: Path
    key: Path
    ca: Path
    sites: dict[str, Path]

    @property
    def hosts(self) -> list[str]:
        """Names and addresses that the certificate is for."""
        return keys.hosts_of(keys.load_certificate(self.certificate))


@dataclass(frozen=True)
class SiteFolder:
    """What `fedtune join --tls` needs; `name` is the one that `fedtune certs` gave the site."""

    name: str
    key: Path
    public: Path
    ca: Path


def server_folder(path: Path) -> ServerFolder:
    """The server's folder; raises ConfigError when it is none, or its certificate not in force."""
    _check_role(path, "server", (SERVER, SERVER_KEY, CA))
    certificate = keys.load_certificate(path / SERVER)
    if certificate.not_valid_before_utc > keys.now():
        raise ConfigError(
            f"--tls: {path / SERVER} begins on {certificate.not_valid_before_utc:%Y-%m-%d}, which "
            f"is not yet by the clock of this host ({keys.now():%Y-%m-%d}). Set it (NTP)."
        )
    if certificate.not_valid_after_utc < keys.now():
        raise ConfigError(
            f"--tls: {path / SERVER} ended on {certificate.not_valid_after_utc:%Y-%m-%d}. Run "
            "fedtune certs again and use its new server folder."
        )
    key = keys.load_key(path / SERVER_KEY)
    if keys.public_bytes(key) != keys.public_bytes(certificate):
        raise ConfigError(
            f"--tls: {path / SERVER_KEY} is not the key of {path / SERVER}. Copy the whole folder "
            "that fedtune certs made."
        )
    try:
        certificate.verify_directly_issued_by(keys.load_certificate(path / CA))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise ConfigError(
            f"--tls: {path / SERVER} was not signed by {path / CA}. Copy the whole folder that "
            "fedtune certs made."
        ) from None
    sites = {file.stem: file for file in sorted((path / SITES).glob("*.pub"))}
    return ServerFolder(path / SERVER, path / SERVER_KEY, path / CA, sites)


def site_folder(path: Path) -> SiteFolder:
    """A site's folder; raises ConfigError when `path` is none."""
    _check_role(path, "site", (SITE_KEY, SITE_PUB, CA))
    keys.load_ssh_key(path / SITE_KEY)
    keys.load_public_ssh(path / SITE_PUB)
    words = (path / SITE_PUB).read_text(encoding="utf-8", errors="replace").split()
    named = len(words) == 3 and SITE_NAME.fullmatch(words[2])
    name = words[2] if named else path.resolve().name
    return SiteFolder(name, path / SITE_KEY, path / SITE_PUB, path / CA)


def ca_certificate(path: Path) -> Path:
    """ca.crt of any role's folder; raises ConfigError when there is none."""
    _check_role(path, "submit", (CA,))
    keys.load_certificate(path / CA)
    return path / CA


def _check_role(path: Path, role: str, files: Sequence[str]) -> None:
    missing = [name for name in files if not (path / name).is_file()]
    if not missing:
        return
    own = {"server": SERVER, "site": SITE_PUB}.get(role, CA)
    if not path.is_dir():
        is_what, fix = "is no directory", "Make it with fedtune certs."
    elif own not in missing:
        is_what, fix = f"lacks {missing[0]}", "Copy the whole folder that fedtune certs made."
    elif (path / "server" / SERVER).is_file():
        inside = {"site": "<site>"}.get(role, role)
        is_what, fix = "holds the folders of all roles", f"Give {path / inside}."
    elif (path / SERVER).is_file():
        is_what, fix = "is the server's folder", f"Give the {role}'s."
    elif (path / SITE_PUB).is_file():
        is_what, fix = "is a site's folder", f"Give the {role}'s."
    elif (path / CA).is_file():
        is_what, fix = "has only ca.crt", f"Give the {role}'s folder."
    else:
        is_what, fix = "has none of them", "Make it with fedtune certs."
    raise ConfigError(f"--tls: expected {', '.join(files)} in {path}, which {is_what}. {fix}")
