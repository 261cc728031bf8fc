"""`fedtune certs`: who may be the server, who may be a site. One folder per role.

DIR/ca/      ca.key, ca.crt           stays with the coordinator; signs further servers
DIR/server/  server.key, server.crt, ca.crt, sites/<site>.pub     for `fedtune up`
DIR/submit/  ca.crt                   for `fedtune submit`, `status`, `stop`, `logs`
DIR/<site>/  site.key, site.pub, ca.crt                           for `fedtune join` at that site

Running it again adds sites and host names. A key that is there is never replaced; a site's private
key may be deleted here once the site has it.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import ConfigError
from fedtune.files import write_text

__all__ = [
    "ServerFolder",
    "SiteFolder",
    "add_arguments",
    "ca_certificate",
    "make_certs",
    "run",
    "server_folder",
    "site_folder",
]

CA, CA_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY, SITES = "server.crt", "server.key", "sites"
SITE_KEY, SITE_PUB = "site.key", "site.pub"
RESERVED = ("ca", "server", "submit")
ALWAYS = ("localhost", "127.0.0.1", "::1")  # Flower's programs on the server talk over loopback
SITE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")
HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9_-]+)*")
MAX_DAYS = 3650
CA_DAYS = MAX_DAYS + 30
RENEW_BEFORE = timedelta(days=30)

Key = ec.EllipticCurvePrivateKey


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
        return _hosts(_load_certificate(self.certificate))


@dataclass(frozen=True)
class SiteFolder:
    """What `fedtune join --tls` needs; `name` is the one that `fedtune certs` gave the site."""

    name: str
    key: Path
    public: Path
    ca: Path


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


def server_folder(path: Path) -> ServerFolder:
    """The server's folder; raises ConfigError when `path` is none, or its certificate is over."""
    _check_role(path, "server", (SERVER, SERVER_KEY, CA))
    certificate = _load_certificate(path / SERVER)
    if certificate.not_valid_after_utc < _now():
        raise ConfigError(
            f"--tls: {path / SERVER} ended on {certificate.not_valid_after_utc:%Y-%m-%d}. Run "
            "fedtune certs again and use its new server folder."
        )
    key = _load(load_pem_private_key, path / SERVER_KEY, "a private key in PEM", None)
    if _public_bytes(key) != _public_bytes(certificate):
        raise ConfigError(
            f"--tls: {path / SERVER_KEY} is not the key of {path / SERVER}. Copy the whole folder "
            "that fedtune certs made."
        )
    try:
        certificate.verify_directly_issued_by(_load_certificate(path / CA))
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(
            f"--tls: {path / SERVER} was not signed by {path / CA}. Copy the whole folder that "
            "fedtune certs made."
        ) from None
    sites = {file.stem: file for file in sorted((path / SITES).glob("*.pub"))}
    return ServerFolder(path / SERVER, path / SERVER_KEY, path / CA, sites)


def site_folder(path: Path) -> SiteFolder:
    """A site's folder; raises ConfigError when `path` is none."""
    _check_role(path, "site", (SITE_KEY, SITE_PUB, CA))
    _load(load_ssh_private_key, path / SITE_KEY, "a private SSH key", None)
    words = (path / SITE_PUB).read_text(encoding="utf-8").split()
    name = words[2] if len(words) == 3 else path.resolve().name
    return SiteFolder(name, path / SITE_KEY, path / SITE_PUB, path / CA)


def ca_certificate(path: Path) -> Path:
    """ca.crt of any role's folder; raises ConfigError when there is none."""
    _check_role(path, "submit", (CA,))
    _load_certificate(path / CA)
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


def _make_ca(directory: Path) -> tuple[x509.Certificate, Path]:
    """The CA's certificate, and where its key is (or was: signing asks for it)."""
    folder = directory / "ca"
    certificate_file, key_file = folder / CA, folder / CA_KEY
    if certificate_file.exists():
        certificate = _load_certificate(certificate_file)
        if certificate.not_valid_after_utc < _now():
            raise ConfigError(f"{certificate_file}: has ended. Make a new set in a new directory.")
        return certificate, key_file
    if (directory / "server" / CA).exists() or key_file.exists():
        raise ConfigError(
            f"{certificate_file}: is missing from an earlier set. Put it back, or make a new set "
            "in a new directory."
        )
    _make_folder(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([_common_name(f"fedtune CA {secrets.token_hex(4)}")])
    builder = _builder(name, name, key, timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    _write_new(key_file, _pem(key), 0o600)
    _write_new(certificate_file, certificate.public_bytes(Encoding.PEM), 0o644)
    return certificate, key_file


def _make_server(
    directory: Path, ca: tuple[x509.Certificate, Path], hosts: Sequence[str], life: timedelta
) -> None:
    folder = directory / "server"
    _make_role(folder, ca)
    _make_folder(folder / SITES)
    certificate_file, key_file = folder / SERVER, folder / SERVER_KEY
    names = [*ALWAYS, *hosts]
    if certificate_file.exists():
        old = _load_certificate(certificate_file)
        names = [*_hosts(old), *hosts]
        if not set(names) - set(_hosts(old)) and old.not_valid_after_utc > _now() + RENEW_BEFORE:
            return
    if not key_file.exists():
        _write_new(key_file, _pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
    key = _load(load_pem_private_key, key_file, "a private key in PEM", None)
    certificate = _sign_server(ca, key, list(dict.fromkeys(names)), life)
    write_text(certificate_file, certificate.public_bytes(Encoding.PEM).decode())


def _sign_server(
    ca: tuple[x509.Certificate, Path], key: Key, names: Sequence[str], life: timedelta
) -> x509.Certificate:
    issuer, issuer_key_file = ca
    if not issuer_key_file.exists():
        raise ConfigError(
            f"{issuer_key_file}: is missing, and the server's certificate must be signed. Put it "
            "back, or make a new set in a new directory."
        )
    issuer_key: Key = _load(load_pem_private_key, issuer_key_file, "a private key in PEM", None)
    life = min(life, issuer.not_valid_after_utc - _now())
    builder = _builder(x509.Name([_common_name("fedtune server")]), issuer.subject, key, life)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([_general_name(name) for name in names]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, hashes.SHA384())


def _make_site(directory: Path, name: str, ca: tuple[x509.Certificate, Path]) -> bool:
    """Whether the site is new. Its public key at the server says whether it is known."""
    folder, registered = directory / name, directory / "server" / SITES / f"{name}.pub"
    key_file, public_file = folder / SITE_KEY, folder / SITE_PUB
    if registered.exists() and not key_file.exists():
        return False  # the key has gone to the site
    _make_role(folder, ca)
    new = not key_file.exists()
    if new:
        key = ec.generate_private_key(ec.SECP384R1())
        text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        _write_new(key_file, text, 0o600)
    key = _load(load_ssh_private_key, key_file, "a private SSH key", None)
    ssh = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    for file in (public_file, registered):
        if not file.exists():
            _write_new(file, ssh + f" {name}\n".encode(), 0o644)
        elif _public_bytes(_load(load_ssh_public_key, file, "a public key")) != _public_bytes(key):
            raise ConfigError(
                f"{file}: is not the public key of {key_file}. Put the right one back, or choose "
                "another site name."
            )
    return new


def _make_role(folder: Path, ca: tuple[x509.Certificate, Path]) -> None:
    _make_folder(folder)
    if not (folder / CA).exists():
        _write_new(folder / CA, ca[0].public_bytes(Encoding.PEM), 0o644)


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


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, life: timedelta
) -> x509.CertificateBuilder:
    now = _now()
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1))  # clocks differ between sites
    builder = builder.not_valid_after(now + life)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return builder.add_extension(identifier, critical=False)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(text: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.COMMON_NAME, text)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found: list[str | IPv4Address | IPv6Address] = [
        *names.get_values_for_type(x509.DNSName),
        *names.get_values_for_type(x509.IPAddress),  # type: ignore[list-item]
    ]
    return [str(name) for name in found]


def _public_bytes(holder: Any) -> bytes:
    """Of a private key, a certificate or a public key; equal bytes are equal keys."""
    public = holder.public_key() if hasattr(holder, "public_key") else holder
    data: bytes = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return data


def _load_certificate(file: Path) -> x509.Certificate:
    certificate: x509.Certificate = _load(
        x509.load_pem_x509_certificate, file, "a certificate in PEM"
    )
    return certificate


def _load(load: Any, file: Path, what: str, *more: Any) -> Any:
    try:
        return load(file.read_bytes(), *more)
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not readable as one"
        raise ConfigError(
            f"{file}: expected {what}, received: {reason}. Make it again with fedtune certs."
        ) from None


def _pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _now() -> datetime:
    return datetime.now(UTC)
