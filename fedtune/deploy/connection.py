"""Talk to a SuperLink through Flower's own `flwr` command, without touching the user's settings."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedtune._flower.command_errors import reason_in
from fedtune.deploy.address import Address
from fedtune.deploy.gate import GATE
from fedtune.deploy.probe import probe
from fedtune.deploy.proxy import LOCAL, environment
from fedtune.deploy.roles import ca_certificate
from fedtune.errors import ConfigError, DeployError
from fedtune.processes.parent import die_with_parent
from fedtune.processes.signals import held

__all__ = ["Connection", "flower_environment", "flower_program"]

NAME = "fedtune"  # of the connection in the private config.toml
SAY_S = 30.0
COMMAND_S = 120.0  # Flower's own requests give up after 30 s
SAID = 500  # characters of what Flower says
# They would let a client choose its own address, and open ports that have no gate.
OPEN_DOORS = (
    "FORWARDED_ALLOW_IPS",
    "FLWR_INTERNAL_GRPC_CONTROL_API",
    "FLWR_INTERNAL_GRPC_FLEET_API",
)


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
        with held():
            self._home.cleanup()

    @property
    def env(self) -> dict[str, str]:
        """Environment in which Flower's commands find this connection, as their default.

        Only this host may ask a SuperLink for what they ask, so never through a proxy.
        """
        return flower_environment(self.home) | environment(None)

    def probe(self) -> list[str]:
        """As the function `probe`; whether this user may start and end runs there, too.

        Returns a line for each site whose clock has differed lately.
        """
        return list(json.loads(probe(self.address, self.ca, path=GATE).body)["clocks"])

    def flwr(self, *words: str | Path) -> dict[str, Any]:
        """Run `flwr WORDS --format json`; returns what it prints.

        Raises:
            DeployError: no SuperLink there, TLS on one side only, another CA, or Flower refuses.
        """
        self.probe()
        try:
            said, errors = self._run(*words, "--format", "json")
        except subprocess.TimeoutExpired:
            raise DeployError(
                f"flwr {words[0]}: no answer from {self.address} in {COMMAND_S:g} s."
            ) from None
        try:
            reply = json.loads(said)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._failed(words, errors or said)
        if not reply.get("success"):
            raise self._failed(words, str(reply.get("error-message", "")))
        return reply

    def show(self, *words: str | Path) -> None:
        """Run `flwr WORDS` and print what it prints; raises DeployError as `flwr` does."""
        self.probe()
        with self._start(self._command(*words)) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                if not line.startswith("Using SuperLink: "):
                    print(line, end="", flush=True)
            errors = process.stderr.read()
        if process.returncode:
            raise self._failed(words, errors)

    def _run(self, *words: str | Path) -> tuple[str, str]:
        """What it prints, out and error; says every `SAY_S` seconds that it is waited for.

        In a process group of its own: Ctrl-C in a terminal is for this process to act upon.

        Raises:
            TimeoutExpired: after `COMMAND_S`.
        """
        command = self._command(*words)
        with self._start(command, process_group=0) as process:
            began = time.monotonic()
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.communicate(timeout=SAY_S)
                    waited = time.monotonic() - began
                    if waited >= COMMAND_S:
                        raise subprocess.TimeoutExpired(command, COMMAND_S)
                    limits = f"{waited:.0f} s so far, at most {COMMAND_S:g} s"
                    what = f"flwr {words[0]} at {self.address}"
                    print(f"waiting: {what} ({limits})", file=sys.stderr, flush=True)
            except BaseException:
                process.kill()
                raise

    def _start(self, command: list[str], process_group: int | None = None) -> subprocess.Popen[str]:
        """Start it with its output in pipes; it ends with this process."""
        return subprocess.Popen(
            command,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=process_group,
            preexec_fn=die_with_parent,
        )

    def _command(self, *words: str | Path) -> list[str]:
        return [flower_program("flwr"), *(os.fspath(word) for word in words)]

    def _config(self) -> str:
        security = "insecure = true" if self.ca is None else f"root-certificates = {_toml(self.ca)}"
        return (
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\n'
            f'address = "{self.address}"\n{security}\n'
        )

    def _failed(self, words: tuple[str | Path, ...], text: str) -> DeployError:
        said = reason_in(text)[:SAID] or "no reason given"
        return DeployError(f"flwr {words[0]} at {self.address}: {said}")


def flower_environment(home: Path, *near: str) -> dict[str, str]:
    """This environment, with Flower quiet, offline, and keeping its files in `home`.

    Programs next to this Python come first in PATH, because Flower's programs start one another by
    name; proxies are not asked for addresses of this machine, nor for hosts that are `near`.
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
    for name in OPEN_DOORS:
        env.pop(name, None)
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = ",".join(filter(None, [env.get(name), LOCAL, *near]))
    return env


def flower_program(name: str) -> str:
    """Path of one of Flower's programs; the one beside this Python comes first."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name}: not found beside {sys.executable}. pip install flwr.")
    return found


def _toml(path: Path) -> str:
    return json.dumps(str(path.absolute()), ensure_ascii=False)  # a TOML basic string
