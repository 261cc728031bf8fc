"""A SuperLink, nodes of fedtune and runs of the echo app, all real, on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ECHO = Path(__file__).parent / "echo"
REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 60.0  # Flower's processes start in 2 s on an idle core, in far more on a busy one
NODE = """
from pathlib import Path
from fedtune.deploy.node import run_node
from fedtune._flower.supernode import NodeOptions
options = NodeOptions({superlink!r}, None, None, Path({folder!r}))
run_node(options, app=Path({echo!r}), client="echo_app.client:app", **{more!r})
"""


def until(what: Callable[[], Any], why: str, seconds: float = PATIENCE_S) -> Any:
    """The first true value of `what()`."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {why}"
        time.sleep(0.05)
    return value


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Federation:
    """Starts processes and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ECHO}{os.pathsep}{REPOSITORY}",
            "FLWR_HOME": str(folder / "home"),
        }
        self.port = _free_port()
        self._runs = 0

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start_superlink(self) -> None:
        home = self.folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )
        self.start(
            "superlink",
            [
                *(str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1"),
                *("--port", str(self.port), "--disable-runtime-dependency-installation"),
            ],
        )
        until(self._answers, "SuperLink")

    def start_node(self, name: str, **more: Any) -> subprocess.Popen[bytes]:
        """A node that takes the echo app for fedtune's own."""
        site = self.folder / name
        site.mkdir()
        program = NODE.format(
            superlink=f"127.0.0.1:{self.port}", folder=str(site), echo=str(ECHO), more=more
        )
        return self.start(name, [sys.executable, "-c", program])

    def submit(self, *, app: Path = ECHO, **config: Any) -> Path:
        """Start a run; returns the directory that its parts write to."""
        self._runs += 1
        out = self.folder / f"run-{self._runs}"
        out.mkdir()
        settings = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        subprocess.run(
            [BIN / "flwr", "run", str(app), "here", "--run-config", f'out="{out}" {settings}'],
            env=self.environment,
            check=True,
            capture_output=True,
            timeout=PATIENCE_S,
        )
        return out

    def finish(self, out: Path) -> list[dict[str, Any]]:
        """What the run's server wrote down of its rounds."""
        done = out / "done.json"
        until(done.exists, f"end of the run\n{self.tails()}", 2 * PATIENCE_S)
        rounds: list[dict[str, Any]] = json.loads(done.read_text())
        return rounds

    def marks(self, out: Path, number: int | str) -> dict[str, list[int]]:
        """Process ids that worked on a round, by node."""
        return {
            path.name.split("-")[0]: [int(line) for line in path.read_text().split()]
            for path in out.glob(f"*-{number}")
        }

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def tails(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log")
        )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                return True
        except OSError:
            return False


def family(process: subprocess.Popen[bytes]) -> list[int]:
    """Ids of a process and all it started."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [process.pid, *(child.pid for child in children)]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
