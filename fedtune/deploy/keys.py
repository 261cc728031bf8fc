"""Keys and certificates: made, signed, read back. EC keys; SHA-384; a CA that signs servers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
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

__all__ = [
    "Certificate",
    "Key",
    "hosts_of",
    "load_certificate",
    "load_key",
    "load_public_ssh",
    "load_ssh_key",
    "new_ca",
    "new_key",
    "new_ssh_key",
    "now",
    "pem",
    "public_bytes",
    "public_ssh",
    "sign_server",
]

Certificate = x509.Certificate
Key = ec.EllipticCurvePrivateKey


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


def new_key() -> Key:
    """A server's key."""
    return ec.generate_private_key(ec.SECP256R1())


def new_ssh_key() -> bytes:
    """A site's private key, as OpenSSH writes it; Flower's nodes read that."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def new_ca(life: timedelta) -> tuple[Certificate, Key]:
    """A CA that signs servers and nothing below them."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([_common_name(f"fedtune CA {secrets.token_hex(4)}")])
    builder = _builder(name, name, key, life)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    return builder.sign(key, hashes.SHA384()), key


def sign_server(
    issuer: Certificate, issuer_key: Key, key: Key, names: Sequence[str], life: timedelta
) -> Certificate:
    """A server's certificate for `names`; it ends with its issuer's at the latest."""
    life = min(life, issuer.not_valid_after_utc - now())
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


def hosts_of(certificate: Certificate) -> list[str]:
    """Names and addresses that a server's certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    found: list[str | IPv4Address | IPv6Address] = [
        *names.get_values_for_type(x509.DNSName),
        *names.get_values_for_type(x509.IPAddress),  # type: ignore[list-item]
    ]
    return [str(name) for name in found]


def public_bytes(holder: Any) -> bytes:
    """Of a private key, a certificate or a public key; equal bytes are equal keys."""
    public = holder.public_key() if hasattr(holder, "public_key") else holder
    data: bytes = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return data


def public_ssh(key: Key) -> bytes:
    """Its public key, as OpenSSH writes it."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def pem(holder: Key | Certificate) -> bytes:
    """A private key or a certificate in PEM."""
    if isinstance(holder, x509.Certificate):
        return holder.public_bytes(Encoding.PEM)
    return holder.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_certificate(file: Path) -> Certificate:
    """Of PEM; raises ConfigError, as all of these do."""
    certificate: Certificate = _load(_whole_certificate, file, "a certificate in PEM")
    return certificate


def load_key(file: Path) -> Key:
    """A private key in PEM."""
    key: Key = _load(load_pem_private_key, file, "a private key in PEM", None)
    return key


def load_ssh_key(file: Path) -> Key:
    """A site's private key."""
    key: Key = _load(load_ssh_private_key, file, "a private SSH key", None)
    return key


def load_public_ssh(file: Path) -> ec.EllipticCurvePublicKey:
    """A site's public key."""
    key: ec.EllipticCurvePublicKey = _load(load_ssh_public_key, file, "a public key")
    return key


def _whole_certificate(data: bytes) -> Certificate:
    """Parsed to its end: cryptography reads each part when it is asked for."""
    certificate = x509.load_pem_x509_certificate(data)
    try:
        certificate.public_key(), certificate.not_valid_after_utc, certificate.extensions  # noqa: B018
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(str(error)) from None
    return certificate


def _load(load: Any, file: Path, what: str, *more: Any) -> Any:
    try:
        return load(file.read_bytes(), *more)
    except (OSError, ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else "not readable as one"
        raise ConfigError(
            f"{file}: expected {what}, received: {reason}. Make it again with fedtune certs."
        ) from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, life: timedelta
) -> x509.CertificateBuilder:
    started = now()
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(started - timedelta(days=1))  # clocks differ between sites
    builder = builder.not_valid_after(started + life)
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
