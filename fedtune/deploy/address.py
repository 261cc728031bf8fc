"""Where a SuperLink listens, and whether one that we may trust does."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from fedtune.errors import ConfigError, DeployError

__all__ = ["Address", "absence", "probe"]

HEALTH = "/health"
PROBE_S = 5.0
HOSTNAME_MISMATCH, IP_MISMATCH, EXPIRED = 62, 64, 10  # OpenSSL's X509_V_ERR_*


@dataclass(frozen=True)
class Address:
    """Where a SuperLink listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `HOST:PORT` or `[IPV6]:PORT`; raises ConfigError."""
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        plain = bare == host and ":" in host
        number = int(port) if port.isascii() and port.isdigit() else 0
        if not (colon and bare) or plain or "/" in bare or not 0 < number < 65536:
            raise ConfigError(
                f"--superlink: expected HOST:PORT, received {text}. Example: 127.0.0.1:8000."
            )
        return cls(bare, number)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def absence(where: Address, *, timeout_s: float) -> str | None:
    """Why nobody answers there, or None; an address that will not do is left to `probe`."""
    try:
        socket.create_connection((where.host, where.port), timeout=timeout_s).close()
    except (ConnectionError, TimeoutError) as problem:
        return problem.strerror or str(problem)
    except OSError:
        return None
    return None


def probe(
    address: Address,
    ca: Path | None,
    *,
    path: str = HEALTH,
    timeout_s: float = PROBE_S,
) -> None:
    """Ask for `path` once, with TLS when `ca` is given.

    Raises:
        DeployError: what is wrong there, and what to do about it.
    """
    what = f"superlink {address}"
    connection: http.client.HTTPConnection
    try:
        if ca is None:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
        else:
            context = ssl.create_default_context(cafile=str(ca))
            connection = http.client.HTTPSConnection(
                address.host, address.port, timeout=timeout_s, context=context
            )
        with contextlib.closing(connection):
            connection.request("GET", path)
            status = connection.getresponse().status
    except ssl.SSLCertVerificationError as error:
        raise DeployError(f"{what}: {_distrust(error, address, ca)}") from None
    except ssl.SSLError as error:
        raise DeployError(
            f"{what}: expected TLS, received none ({error.reason}). Leave out --tls, or start it "
            "with fedtune up --tls."
        ) from None
    except ConnectionRefusedError:
        raise DeployError(
            f"{what}: nothing listens there. Start it with fedtune up, or check HOST:PORT."
        ) from None
    except socket.gaierror:
        raise DeployError(f"{what}: the name {address.host} is unknown. Check HOST.") from None
    except TimeoutError:
        raise DeployError(
            f"{what}: no answer in {timeout_s:g} s. Check HOST:PORT and the firewalls between."
        ) from None
    except (http.client.HTTPException, ConnectionError):
        hint = "Pass --tls DIR if it was started with it." if ca is None else "Check HOST:PORT."
        raise DeployError(f"{what}: it closed the connection without an answer. {hint}") from None
    except OSError as error:
        raise DeployError(f"{what}: {error.strerror or error}. Check HOST:PORT.") from None
    if status != 200:
        raise DeployError(
            f"{what}: expected a SuperLink, received HTTP status {status}. Check HOST:PORT."
        )


def _distrust(error: ssl.SSLCertVerificationError, address: Address, ca: Path | None) -> str:
    if error.verify_code in (HOSTNAME_MISMATCH, IP_MISMATCH):
        return (
            f"its certificate is not for {address.host}. Add it with fedtune certs DIR --host "
            f"{address.host}, and start the SuperLink again."
        )
    if error.verify_code == EXPIRED:
        return "its certificate has expired. Run fedtune certs DIR again."
    return (
        f"its certificate was not signed by {ca} ({error.verify_message}). Use folders of the same "
        "fedtune certs DIR."
    )
