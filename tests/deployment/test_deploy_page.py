"""The commands of docs/deploy.md, as they stand there, on three hosts with TLS and real trainers.

Above each block stands the host it runs on, and for one that goes on the text to wait for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.deployment.hosts import Host, hosts
from tests.deployment.parts import Deployment
from tests.docs.test_code_blocks import Block, blocks_of

PAGE = REPOSITORY / "docs" / "deploy.md"
NAMES = ("server", "clinic", "bank")
SERVER = "fed.example.org"
SCP = """#!/bin/sh
# scp -r SOURCE HOST.example.org:TARGET
exec cp -r "$2" "$HOSTS/${3%%.*}/${3#*:}"
"""
LIMIT_S = 240


class Running:
    """A block that goes on, as in a terminal of its own."""

    def __init__(self, host: Host, code: str, env: dict[str, str], output: Path) -> None:
        self.output = output
        with output.open("w") as handle:
            self.process = subprocess.Popen(
                host.words(code),
                cwd=host.directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def sees(self, text: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while text not in self.printed:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.05)

    def ctrl_c(self) -> int:
        """What a terminal does: the signal goes to the foreground group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60)


def note(block: Block, key: str) -> str:
    """What the comment `key: ...` above a block says."""
    found = [text.removeprefix(f"{key}: ") for text in block.comments if text.startswith(f"{key}:")]
    return found[0] if found else ""


def steps() -> list[Block]:
    return [block for block in blocks_of(PAGE.read_text()) if note(block, "host")]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[Deployment, dict[str, Host]]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scp").write_text(SCP)
    (programs / "scp").chmod(0o755)
    with hosts(NAMES, tmp_path, SERVER) as made:
        for host in made.values():
            (host.directory / "recipes").symlink_to(REPOSITORY / "recipes")
        deployment = Deployment(tmp_path / "env", tmp_path, tls=False)
        path = (programs, Path(sys.executable).parent, os.environ["PATH"])
        deployment.env.update(PATH=os.pathsep.join(map(str, path)), HOSTS=str(tmp_path))
        deployment.env.pop("TMPDIR")
        yield deployment, made
        assert not deployment.close()


@pytest.mark.slow
def test_the_commands_work(page: tuple[Deployment, dict[str, Host]], tmp_path: Path) -> None:
    deployment, made = page
    env = deployment.env
    running: list[Running] = []
    outputs: list[str] = []
    try:
        for number, block in enumerate(steps()):
            host = made[note(block, "host")]
            if text := note(block, "until"):
                running.append(Running(host, block.code, env, tmp_path / f"{number}.txt"))
                running[-1].sees(text)
                continue
            done = subprocess.run(
                host.words(block.code),
                cwd=host.directory,
                env=env,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
            assert done.returncode == 0, f"{block.code}{done.stdout}{done.stderr}"
            outputs.append(done.stdout)
        up, clinic, bank, submit = running
        _check_looks(outputs)
        assert submit.process.wait(60) == 1
        assert "stopped after round" in submit.printed
        adapter = made["server"].directory / "outputs" / "adapter"
        assert (adapter / "adapter_model.safetensors").is_file()
        for site, name in ((clinic, "clinic"), (bank, "bank")):
            site.sees("the script ended, status 0\n" + f"{name}: waiting for the next run")
            assert "%|" not in site.printed
            assert f"{name} | {{'loss': " in site.printed
            assert (made[name].directory / "outputs" / name / "trainer.log").is_file()
        _check_gate(made["clinic"], env)
        assert [site.ctrl_c() for site in (clinic, bank)] == [130, 130]
        assert up.ctrl_c() == 0
        deployment.until(lambda: not deployment.processes(), 10)
    finally:
        for program in running:
            program.ctrl_c()


def _check_looks(outputs: list[str]) -> None:
    certs, looks, resumed = outputs
    assert "certs/server: for fedtune up --tls; valid for localhost" in certs
    for words in ("sites: 2 online", "rounds done", "round 1: 2 replies", "ends after the current"):
        assert words in looks, looks
    assert "Federated training lowers held-out loss" in resumed


def _check_gate(site: Host, env: dict[str, str]) -> None:
    """A site cannot look at the server's runs, let alone start one."""
    code = f"fedtune status --superlink {SERVER}:8000 --tls certs"
    done = subprocess.run(
        site.words(code), cwd=site.directory, env=env, capture_output=True, text=True, check=False
    )
    if site.apart:
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_every_block_of_the_start_says_where_it_runs() -> None:
    start = PAGE.read_text().split("## What happens")[0]
    bash = [block for block in blocks_of(start) if block.language == "bash"]
    assert bash == steps()
    assert {note(block, "host") for block in bash} == set(NAMES)
