"""Talk to a SuperLink through Flower's own `flwr` command, without touching the user's settings."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedtune.deploy.certs import ca_certificate
from fedtune.deploy.parent import die_with_parent
from fedtune.deploy.processes import COLOURS
from fedtune.errors import ConfigError, DeployError
from fedtune.files import read_json, write_json

__all__ = [
    "Address",
    "Connection",
    "flower_environment",
    "flower_program",
    "known_runs",
    "probe",
    "remember_run",
]

NAME = "fedtune"  # of the connection in the private config.toml
HEALTH = "/health"
PROBE_S = 5.0
COMMAND_S = 120.0  # Flower's own requests give up after 30 s
KEPT_RUNS = 200
SAID = 500  # characters of what Flower says
PREAMBLE = ("Using SuperLink: ", "INFO ")
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


class Connection:
    """`flwr` pointed at one SuperLink, with settings in a directory that lives as long as this.

    with Connection(Address.parse("127.0.0.1:8000"), tls=Path("certs/submit")) as link:
        link.flwr("list")["runs"]

    Args:
        tls: a folder that `fedtune certs` made, for its ca.crt; None: no TLS.

    Raises:
        ConfigError: `tls` has no ca.crt.
    """

    def __init__(self, address: Address, *, tls: Path | None = None) -> None:
        self.address = address
        self.ca = None if tls is None else ca_certificate(tls)
        self._home = tempfile.TemporaryDirectory(prefix="fedtune-")  # made with mode 0700
        self.home = Path(self._home.name)
        (self.home / "config.toml").write_text(self._config(), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._home.cleanup()

    @property
    def env(self) -> dict[str, str]:
        """Environment in which Flower's commands find this connection, as their default."""
        return flower_environment(self.home)

    def probe(self) -> None:
        """As the function `probe`."""
        probe(self.address, self.ca)

    def flwr(self, *words: str | Path) -> dict[str, Any]:
        """Run `flwr WORDS --format json`; returns what it prints.

        Raises:
            DeployError: no SuperLink there, TLS on one side only, another CA, or Flower refuses.
        """
        self.probe()
        try:
            done = self._run(*words, "--format", "json", capture_output=True, timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            raise DeployError(
                f"flwr {words[0]}: no answer from {self.address} in {COMMAND_S:g} s."
            ) from None
        try:
            reply = json.loads(done.stdout)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._failed(words, done.stderr or done.stdout)
        if not reply.get("success"):
            raise self._failed(words, str(reply.get("error-message", "")))
        return reply

    def show(self, *words: str | Path) -> None:
        """Run `flwr WORDS` and print what it prints; raises DeployError as `flwr` does."""
        self.probe()
        command = self._command(*words)
        with subprocess.Popen(
            command,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                if not line.startswith("Using SuperLink: "):
                    print(line, end="", flush=True)
            errors = process.stderr.read()
        if process.returncode:
            raise self._failed(words, errors)

    def _run(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command(*words), env=self.env, text=True, **options)

    def _command(self, *words: str | Path) -> list[str]:
        return [flower_program("flwr"), *(os.fspath(word) for word in words)]

    def _config(self) -> str:
        security = "insecure = true" if self.ca is None else f"root-certificates = {_toml(self.ca)}"
        return (
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\n'
            f'address = "{self.address}"\n{security}\n'
        )

    def _failed(self, words: tuple[str | Path, ...], text: str) -> DeployError:
        said = " ".join(line for line in map(_without_frame, text.splitlines()) if _tells(line))
        return DeployError(f"flwr {words[0]} at {self.address}: {said[:SAID] or 'no reason given'}")


def flower_environment(home: Path) -> dict[str, str]:
    """This environment, with Flower quiet, offline, and keeping its files in `home`.

    Programs next to this Python come first in PATH, because Flower's programs start one another by
    name; proxies are not asked for addresses of this machine.
    """
    env = dict(os.environ)
    env.update(
        FLWR_HOME=str(home),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.05",
        PYTHONUNBUFFERED="1",
        PATH=os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
    )
    env.pop("FORWARDED_ALLOW_IPS", None)  # it would let a client choose its own address
    here = "localhost,127.0.0.1,::1"
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = f"{env[name]},{here}" if env.get(name) else here
    return env


def flower_program(name: str) -> str:
    """Path of one of Flower's programs; the one beside this Python comes first."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name}: not found beside {sys.executable}. pip install flwr.")
    return found


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


def remember_run(run: str, output_dir: Path) -> None:
    """Write down where run `run` leaves its results, for `fedtune status`."""
    file = _runs_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_name(".runs.lock")):
        runs = {**_read_runs(file), run: str(output_dir.absolute())}
        write_json(file, dict(list(runs.items())[-KEPT_RUNS:]))


def known_runs() -> dict[str, Path]:
    """Run id -> output directory, of the runs submitted by this user on this machine."""
    return {run: Path(path) for run, path in _read_runs(_runs_file()).items()}


def _runs_file() -> Path:
    home = os.environ.get("FLWR_HOME")
    return (Path(home) if home else Path.home() / ".fedtune") / "runs.json"


def _read_runs(file: Path) -> dict[str, str]:
    try:
        runs = read_json(file)
    except (OSError, ValueError):
        return {}
    return runs if isinstance(runs, dict) else {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _without_frame(line: str) -> str:
    return COLOURS.sub("", line).strip("\u2502\u256d\u256e\u2570\u256f\u2500 ")


def _tells(line: str) -> bool:
    """Whether a line of Flower's is more than what it is about to do."""
    return bool(line) and line != "Error" and not line.startswith(PREAMBLE) and line[-3:] != "..."


def _toml(path: Path) -> str:
    return json.dumps(str(path.absolute()), ensure_ascii=False)  # a TOML basic string


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
