"""Other users of the server's host, for real: they can be sites, and nothing else."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedtune.deploy.address import Address
from fedtune.deploy.connection import Connection
from fedtune.deploy.probe import NotYet, probe
from fedtune.processes.supervisor import free_port
from tests.deploy.users import OTHER, THIRD, as_user, needs_users
from tests.processes.programs import Program, wait_for

pytestmark = [needs_users, pytest.mark.slow]

ASK = Path(__file__).with_name("ask_paths.py")
# `which` asks what the user may do, not what this process may, whose Python may be root's alone.
FEDTUNE = """
import shutil, sys
from fedtune.cli import main
shutil.which = lambda program, **_: program
sys.exit(main(sys.argv[1:]))
"""
# The flower engine with a client that takes its time.
ENGINE = """
import sys
from pathlib import Path
from fedtune.config import FederationArguments
from fedtune.engines.flower import run_flower
from fedtune.server.submission import Submission
directory = sys.argv[1]
submission = Submission("a1", directory, FederationArguments(num_rounds=1), 1, 1, 600.0)
run_flower(submission, clients=["a"], command=["sleep", "600"], logs=Path(directory, "logs"))
"""
TRICKS = [
    *("GET /", "GET /docs", "GET /openapi.json", "GET /fedtune/gate", "POST /v1/fleet"),
    *("POST /v1/fleet/../control/start-run", "POST /v1/fleet/%2e%2e/control/start-run"),
    *("POST //v1/control/start-run", "POST /health/../v1/control/start-run"),
]


class Link:
    """A SuperLink that `owner` runs (None: root)."""

    def __init__(self, port: int, owner: int | None, tls: Path | None) -> None:
        self.address, self.owner, self.tls = Address("127.0.0.1", port), owner, tls

    def fedtune(self, uid: int | None, command: str, role: str, *words: object) -> list[str]:
        where = ["--superlink", str(self.address)]
        if self.tls is not None:
            where += ["--tls", str(self.tls / role)]
        return [*as_user(uid), sys.executable, "-c", FEDTUNE, command, *where, *map(str, words)]

    def ask(self, uid: int, lines: list[str]) -> dict[str, int]:
        ca = "-" if self.tls is None else str(self.tls / "submit" / "ca.crt")
        done = subprocess.run(
            [*as_user(uid), sys.executable, str(ASK), str(self.address.port), ca],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)


def readable(directory: Path, request: pytest.FixtureRequest) -> Path:
    """A copy that the other users may read: Flower asks whether they may."""
    copy = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(copy))
    shutil.copytree(directory, copy / "certs")
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy / "certs"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((None, True), id="root with TLS"),
        pytest.param((None, False), id="root without TLS"),
        pytest.param((OTHER, True), id="a user with TLS"),
        pytest.param((OTHER, False), id="a user without TLS"),
    ],
)
def link(request, certs, tmp_path_factory):
    owner, tls = request.param
    certs = readable(certs, request)
    port, out = free_port(), tmp_path_factory.mktemp("up") / "out"
    words = ["--port", port, "--output_dir", out, *(["--tls", certs / "server"] if tls else [])]
    run = [*as_user(owner), sys.executable, "-c", FEDTUNE, "up", *map(str, words)]
    with Program(command=run) as program:
        program.line("log:")
        yield Link(port, owner, certs if tls else None)
        assert program.end()[0] == 0


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """All users may write there."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


def test_another_user_gets_nothing_of_the_flower_engine_either(tmp_path: Path) -> None:
    with Program(ENGINE, tmp_path) as program:
        address = wait_for(lambda: superlink_of(program), within_s=60)
        link = Link(address.port, None, None)
        wait_for(lambda: answers(address), within_s=60)
        lines = routes(link)
        stranger = link.ask(OTHER, [*lines, *TRICKS])
        assert 403 not in link.ask(0, ["GET /fedtune/gate"]).values()
        assert program.process.poll() is None
        program.end()
    assert {line for line, status in stranger.items() if status != 403} == {
        line for line in lines if for_sites(line)
    }


def answers(address: Address) -> bool:
    try:
        probe(address, None)
    except NotYet:
        return False
    return True


def superlink_of(program: Program) -> Address | None:
    """Where its SuperLink listens."""
    for process in program.family():
        words = process.cmdline()
        if "fedtune.deploy.gate" in words:
            return Address("127.0.0.1", int(words[words.index("--port") + 1]))
    return None


def routes(link: Link) -> list[str]:
    """All that Flower serves there; root may ask."""
    ca = None if link.tls is None else link.tls / "submit" / "ca.crt"
    trusted = True if ca is None else ssl.create_default_context(cafile=ca)
    url = f"{'http' if ca is None else 'https'}://{link.address}/openapi.json"
    found = httpx.get(url, verify=trusted, trust_env=False)
    paths = found.json()["paths"]
    return [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]


def for_sites(line: str) -> bool:
    return line.split()[1].startswith(("/v1/fleet/", "/health"))


def test_another_user_gets_what_a_site_needs_and_nothing_else(link: Link) -> None:
    lines = routes(link)
    assert {"POST /v1/control/start-run", "POST /v1/runtime/acquire-task"} <= set(lines)
    stranger = link.ask(THIRD, [*lines, *TRICKS])
    assert {line for line, status in stranger.items() if status != 403} == {
        line for line in lines if for_sites(line)
    }
    own = link.ask(0 if link.owner is None else link.owner, lines[:5] + ["GET /fedtune/gate"])
    assert 403 not in own.values()
    assert own["GET /fedtune/gate"] == 200


def test_another_user_starts_nothing_and_is_told_why(
    link: Link, app: Path, tmp_path: Path, open_directory: Path
) -> None:
    mark = tmp_path / "mark"
    with Connection(link.address, tls=link.tls and link.tls / "submit") as connection:
        command = connection._command("run", app, "--run-config", f'mark="{mark}"')
        refused = subprocess.run(
            [*as_user(THIRD), *command], env=connection.env, capture_output=True, text=True
        )
        assert refused.returncode != 0
        said = " ".join((refused.stdout + refused.stderr).replace("\u2502", " ").split())
        assert "who runs fedtune up" in said
        assert connection.flwr("list")["runs"] == []
    assert not mark.exists()
    for command in ("status", "submit"):
        words = ["--output_dir", open_directory / "run"] if command == "submit" else []
        done = subprocess.run(
            link.fedtune(THIRD, command, "submit", *words), capture_output=True, text=True
        )
        owner = "(root)" if link.owner is None else f"(uid {OTHER}), and root"
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: superlink {link.address}: fedtune: only the user who runs fedtune up {owner} "
            "may ask for this, received uid 64002. Run submit, status, stop and logs as that "
            "user.\n"
        )
    assert not (open_directory / "run").exists()


def test_the_user_of_the_superlink_may_look(link: Link) -> None:
    look = link.fedtune(link.owner, "status", "submit")
    done = subprocess.run(look, capture_output=True, text=True, check=True)
    assert "no runs yet" in done.stdout


def test_a_site_of_another_user_joins(link: Link, tmp_path: Path) -> None:
    words = ["--name", "a", "--output_dir", tmp_path / "site", "--", "true"]
    command = link.fedtune(THIRD, "join", "a", *words)
    with Program(command=command) as site:
        assert "waiting for a run" in site.line("a: joined")
        assert site.end()[0] == 143
