"""Files of the working directory that are called like modules of Python disturb nobody."""

from __future__ import annotations

import ast
import signal
import sys
from pathlib import Path

import psutil
import pytest

import fedtune
from fedtune.deploy.address import Address
from fedtune.deploy.connection import Connection, flower_program
from fedtune.processes.supervisor import free_port
from tests.processes.programs import Program, left, wait_for

PACKAGE = Path(fedtune.__file__).parent
SAFE = {"-P", "-I"}  # the working directory is not searched for modules
# A recipe is started as people start it, with the modules beside it.
BY_HAND = {"run/launch.py"}


def command_lines(file: Path) -> list[list[ast.expr]]:
    """Lists and tuples in the source that begin with this Python."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        words = node.elts if isinstance(node, ast.List | ast.Tuple) else []
        if words and ast.unparse(words[0]) == "sys.executable":
            found.append(words)
    return found


def test_every_command_line_of_a_module_leaves_the_working_directory_out() -> None:
    lines = {
        file.relative_to(PACKAGE).as_posix(): command_lines(file) for file in PACKAGE.rglob("*.py")
    }
    found = {name: words for name, words in lines.items() if words and name not in BY_HAND}
    assert {"deploy/join.py", "deploy/up.py", "engines/flower.py"} <= set(found)
    unsafe = [
        (name, ast.unparse(words[1]))
        for name, all_words in found.items()
        for words in all_words
        if not isinstance(words[1], ast.Constant) or words[1].value not in SAFE
    ]
    assert unsafe == []


def is_safe(process: psutil.Process) -> bool:
    """Whether it takes no module from its working directory: no Python, a script, or told so."""
    words = process.cmdline()
    if not words or not Path(words[0]).name.startswith("python"):
        return True
    return words[1] in SAFE or Path(words[1]).is_file()


@pytest.mark.slow
def test_a_deployment_in_a_directory_full_of_them(app: Path, tmp_path: Path) -> None:
    for name in sys.stdlib_module_names:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the cwd')")
    port, mark = free_port(), tmp_path / "mark"
    address = f"127.0.0.1:{port}"
    run = [flower_program("fedtune"), "up", "--port", str(port)]
    with Program(command=run, cwd=tmp_path) as up:
        up.line("Ctrl-C stops it")
        join = [flower_program("fedtune"), "join", "--superlink", address, "--name", "a"]
        with Program(command=[*join, "--", "true"], cwd=tmp_path) as site:
            site.line("a: joined")
            with Connection(Address.parse(address)) as link:
                link.flwr("run", app, "--run-config", f'mark="{mark}"')
            wait_for(mark.exists, within_s=60)
            family = [*up.family(), *site.family()]
            programs = " ".join(" ".join(process.cmdline()) for process in family)
            assert "fedtune.deploy.node" in programs
            assert "flwr-serverapp" in programs
            assert [process.cmdline() for process in family if not is_safe(process)] == []
            assert site.end(signal.SIGTERM)[0] == 143
        assert up.end(signal.SIGTERM)[0] == 0
    assert left(family) == []
