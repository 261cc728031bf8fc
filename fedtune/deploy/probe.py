"""Whether a SuperLink that we may trust answers, asked as Flower's programs ask it."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx

from fedtune.deploy.address import Address
from fedtune.deploy.clock import Offset, offset_of
from fedtune.deploy.proxy import Proxy
from fedtune.errors import DeployError
from fedtune.proxies import shown

__all__ = ["HEALTH", "Answer", "NotYet", "probe"]

HEALTH = "/health"
PROBE_S = 5.0
MOST_SAID = 64 << 10  # bytes of an answer
HOSTNAME_MISMATCH, IP_MISMATCH, EXPIRED, TOO_EARLY = 62, 64, 10, 9  # OpenSSL's X509_V_ERR_*
AWAY = (502, 503, 504)  # what a proxy says of a server that is not there
MUST_SIGN_IN = 407


class Answer(NamedTuple):
    """What a SuperLink says, and how far this host's clock is from its own, if it tells that."""

    offset: Offset | None
    body: bytes


class NotYet(DeployError):
    """Nobody answers there now; waiting may help. `reason`: why, in a few words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def probe(
    address: Address,
    ca: Path | None,
    *,
    path: str = HEALTH,
    timeout_s: float = PROBE_S,
    proxy: Proxy | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Ask for `path` once, with TLS when `ca` is given.

    Raises:
        NotYet: nobody is there, or the server's certificate is not valid yet.
        DeployError: what else is wrong there, and what to do about it.
    """
    what = f"superlink {address}"
    given = {"cache-control": "no-cache", **(headers or {})}
    url = f"{'http' if ca is None else 'https'}://{address}{path}"
    try:
        with _client(ca, proxy, timeout_s) as client:
            asked = time.time()
            with client.stream("GET", url, headers=given) as response:
                answered = time.time()
                said = next(response.iter_bytes(MOST_SAID), b"")
    except httpx.ProxyError as error:
        raise _proxy_failed(what, address, proxy, str(error)) from None
    except httpx.TransportError as error:
        raise _failed(what, address, ca, proxy, timeout_s, error) from None
    except (ValueError, ImportError, httpx.InvalidURL):
        raise DeployError(
            f"{what}: {proxy} cannot be used. Set it to http://HOST:PORT, or to nothing."
        ) from None
    _check(what, address, proxy, response.status_code, response.reason_phrase, said)
    return Answer(offset_of(asked, answered, response.headers), said)


def _client(ca: Path | None, proxy: Proxy | None, timeout_s: float) -> httpx.Client:
    trusted = True if ca is None else ssl.create_default_context(cafile=str(ca))
    through = None if proxy is None else proxy.url
    return httpx.Client(verify=trusted, proxy=through, trust_env=False, timeout=timeout_s)


def _check(
    what: str, address: Address, proxy: Proxy | None, status: int, phrase: str, body: bytes
) -> None:
    if status == 200:
        return
    if status == httpx.codes.FORBIDDEN and (said := _detail(body)):
        raise DeployError(f"{what}: {said}")
    if proxy is not None:
        raise _proxy_failed(what, address, proxy, f"{status} {phrase}")
    raise DeployError(
        f"{what}: expected a SuperLink, received HTTP status {status}. Check HOST:PORT."
    )


def _detail(body: bytes) -> str | None:
    """What Flower, or the gate before it, says of a refusal."""
    try:
        found = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _proxy_failed(what: str, address: Address, proxy: Proxy | None, said: str) -> DeployError:
    """`said` begins with the status that the proxy gave, if it gave one."""
    assert proxy is not None
    code = said.split(" ", 1)[0]
    if code == str(MUST_SIGN_IN):
        return DeployError(
            f"{what}: {proxy} wants a user name and a password ({said}). Set "
            f"{proxy.variable}=http://USER:PASSWORD@{shown(proxy.url).partition('://')[2]}."
        )
    if code in map(str, AWAY):
        reason = f"{proxy} cannot reach it: {said}"
        return NotYet(reason, f"{what}: {reason}. Start it with fedtune up, or check HOST:PORT.")
    return DeployError(
        f"{what}: {proxy} does not let it through ({said}). Have it allow {address} (many allow "
        f"port 443 alone), or add {address.host} to no_proxy if it can be reached without."
    )


def _failed(
    what: str,
    address: Address,
    ca: Path | None,
    proxy: Proxy | None,
    timeout_s: float,
    error: httpx.TransportError,
) -> DeployError:
    cause = _cause(error)
    there = what if proxy is None else f"{what}: {proxy}"
    host = address.host if proxy is None else "of it"
    check = "Check HOST:PORT." if proxy is None else f"Check {proxy.variable}."
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _distrust(what, cause, address, ca)
    if isinstance(cause, ssl.SSLError):
        return DeployError(
            f"{what}: expected TLS, received none ({cause.reason}). Leave out --tls, or start it "
            "with fedtune up --tls."
        )
    if isinstance(cause, socket.gaierror):
        return DeployError(f"{there}: the name {host} is unknown. {check}")
    if isinstance(error, httpx.TimeoutException):
        reason = f"no answer in {timeout_s:g} s"
        return NotYet(reason, f"{there}: {reason}. {check[:-1]} and the firewalls between.")
    if isinstance(cause, ConnectionRefusedError):
        fix = "Start it with fedtune up, or check HOST:PORT." if proxy is None else check
        return NotYet(cause.strerror or "refused", f"{there}: nothing listens there. {fix}")
    if isinstance(cause, OSError) and isinstance(error, httpx.ConnectError):
        return NotYet(cause.strerror or str(cause), f"{there}: {cause.strerror or cause}. {check}")
    hint = "Pass --tls DIR if it was started with it." if ca is None else check
    return DeployError(f"{there}: it closed the connection without an answer. {hint}")


def _cause(error: BaseException) -> BaseException:
    """What the system said, which two libraries have wrapped."""
    cause = error
    while not isinstance(cause, OSError):
        below = cause.__cause__ or cause.__context__
        if below is None:
            return error
        cause = below
    return cause


def _distrust(
    what: str, error: ssl.SSLCertVerificationError, address: Address, ca: Path | None
) -> DeployError:
    now = f"this host's clock, {datetime.now(UTC):%Y-%m-%d}"
    if error.verify_code in (HOSTNAME_MISMATCH, IP_MISMATCH):
        return DeployError(
            f"{what}: its certificate is not for {address.host}. Add it with fedtune certs DIR "
            f"--host {address.host}, and start the SuperLink again."
        )
    if error.verify_code == TOO_EARLY:
        reason = f"its certificate is not valid yet by {now}"
        return NotYet(reason, f"{what}: {reason}. Set the clock (NTP).")
    if error.verify_code == EXPIRED:
        return DeployError(
            f"{what}: its certificate has expired by {now}. Set the clock if it is wrong, or run "
            "fedtune certs DIR again and start the SuperLink again."
        )
    return DeployError(
        f"{what}: its certificate was not signed by {ca} ({error.verify_message}). Use folders of "
        "the same fedtune certs DIR."
    )
