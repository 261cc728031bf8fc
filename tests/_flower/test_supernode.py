"""fedtune's node against a real SuperLink: what it runs, how fast, and how it ends."""

import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from fedtune._flower.executor import ATTEMPTS
from fedtune._flower.version import TESTED
from fedtune.deploy.bundle import app_hash
from fedtune.processes import parent
from tests._flower.federations import ECHO, Federation, family, kill, lives, until


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    federation = Federation(tmp_path_factory.mktemp("federation"))
    try:
        federation.start_superlink()
        yield federation
    finally:
        federation.stop()


@pytest.fixture(scope="module")
def node(federation):
    return federation.start_node("node")


@pytest.fixture
def extra_node(federation):
    """A second node for a test that ends it; nobody else may count on its number."""
    started = []

    def start(name, **more):
        started.append(federation.start_node(name, **more))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def executor_of(node):
    (child,) = until(lambda: psutil.Process(node.pid).children(), "executor")
    return child.pid


def test_there_and_back(federation, node):
    rounds = federation.finish(federation.submit(nodes=1, rounds=3, arrays=40))
    replies = [reply for each in rounds for reply in each["replies"]]
    assert [reply["right"] for reply in replies] == [True] * 3
    assert {reply["parent"] for reply in replies} == {executor_of(node)}
    assert len({reply["pid"] for reply in replies}) == 3
    assert {reply["site"] for reply in replies} == {str(federation.folder / "node")}
    assert not any(reply["torch"] for reply in replies)
    # Flower's own node is never below 3 s; here it takes 0.6 s, more on a machine that is busy.
    assert min(each["seconds"] for each in rounds) < 2.0, federation.tails()


def test_a_killed_clientapp_is_replaced(federation, node):
    out = federation.submit(nodes=1, rounds=1, think=1.0)
    marks = until(lambda: federation.marks(out, 1), "first ClientApp")
    ((name, (first,)),) = marks.items()
    kill(first)
    (only,) = federation.finish(out)
    (reply,) = only["replies"]
    assert reply["right"]
    assert federation.marks(out, 1) == {name: [first, reply["pid"]]}
    assert only["seconds"] < 15  # Flower alone: 64 s, then an error


def test_a_message_that_kills_is_given_up_and_the_node_goes_on(federation, node):
    out = federation.submit(nodes=1, rounds=2, kind="query.die")
    for each in federation.finish(out):
        (reply,) = each["replies"]
        assert f"{ATTEMPTS} processes were killed over this message" in reply["error"]
    ((pids),) = federation.marks(out, "die").values()
    assert len(pids) == 2 * ATTEMPTS
    (again,) = federation.finish(federation.submit(nodes=1, rounds=1))
    assert again["replies"][0]["right"]


def test_foreign_code_is_refused_and_never_run(federation, node, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(ECHO, foreign, ignore=shutil.ignore_patterns("__pycache__"))
    trap = tmp_path / "trap"
    client = foreign / "echo_app" / "client.py"
    client.write_text(f"open({str(trap)!r}, 'w')\n{client.read_text()}")
    (only,) = federation.finish(federation.submit(app=foreign, nodes=1, rounds=1))
    (reply,) = only["replies"]
    for part in (app_hash(ECHO), app_hash(foreign), "Install the same fedtune version"):
        assert part in reply["error"]
    assert not trap.exists()
    assert not list((federation.folder / "node").glob("**/*.py"))


def test_sigterm_leaves_no_process(federation, node, extra_node):
    second = extra_node("stopped")
    out = federation.submit(nodes=2, rounds=1, think=2.0)
    until(lambda: len(federation.marks(out, 1)) == 2, "both at work")
    pids = family(second)
    assert len(pids) == 3  # SuperNode, executor, ClientApp
    second.send_signal(signal.SIGTERM)
    assert second.wait(10) == 0
    until(lambda: not any(map(lives, pids)), f"end of {pids}", 5)
    assert list((federation.folder / "stopped").iterdir()) == []  # no secret, no journal
    replies = federation.finish(out)[0]["replies"]
    # a node of an earlier test may still be known, and is as lost as this one
    assert {reply.get("right", False) for reply in replies} == {False, True}


@pytest.mark.parametrize("victim", ["supernode", "executor", "parent"])
def test_no_part_outlives_another(federation, node, extra_node, victim):
    if victim == "parent":
        helper = _start_below_a_helper(federation)
        top = until(lambda: psutil.Process(helper.pid).children(), "node below its parent")[0]
        supernode = top.pid
    else:
        supernode = extra_node(victim).pid
    executor = until(lambda: psutil.Process(supernode).children(), "executor")[0].pid
    log = federation.log("helped" if victim == "parent" else victim)
    until(lambda: "SuperNode ID" in log.read_text(), "connection")
    kill({"supernode": supernode, "executor": executor}.get(victim) or helper.pid)
    until(lambda: not lives(supernode) and not lives(executor), "end of both", 10)
    if victim == "executor":
        assert "executor: expected it to run, it is gone" in log.read_text()


def _start_below_a_helper(federation):
    """A node started as `fedtune join` starts it, by a process that can be killed."""
    site = federation.folder / "helped"
    site.mkdir()
    command = [sys.executable, "-m", "fedtune.deploy.node", "--insecure", "--site", str(site)]
    command += ["--superlink", f"127.0.0.1:{federation.port}"]
    program = (
        "import os, subprocess, sys\n"
        f"launcher = [sys.executable, '-I', '-S', {parent.__file__!r}, str(os.getpid())]\n"
        f"subprocess.Popen([*launcher, *{command!r}]).wait()\n"
    )
    return federation.start("helped", [sys.executable, "-c", program])


def test_an_untested_flower_is_refused_unless_allowed(federation, extra_node):
    refused = extra_node("refused", flower="1.99.0")
    assert refused.wait(30) == 1
    assert (
        f"flwr: expected {' or '.join(TESTED)}, received 1.99.0"
        in federation.log("refused").read_text()
    )
    assert "--allow_untested_flwr" in federation.log("refused").read_text()

    allowed = extra_node("allowed", flower="1.99.0", allow_untested=True)
    log = federation.log("allowed")
    until(lambda: "SuperNode ID" in log.read_text(), "Flower's own node")
    assert "run unchecked" in log.read_text()
    assert any("flower-supernode" in word for word in psutil.Process(allowed.pid).cmdline())
    pids = family(allowed)
    allowed.terminate()
    allowed.wait(20)
    until(lambda: not any(map(lives, pids)), "end of Flower's own node", 20)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --root_certificates or --insecure"),
        (["--insecure", "--root_certificates", "ca.crt"], "either --root_certificates or"),
        (["--insecure", "--private_key", "key"], "--private_key: needs TLS"),
        (["--root_certificates", "absent.crt"], "there is no file absent.crt"),
        (["--insecure", "--site", "absent"], "there is no directory absent"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, capsys, monkeypatch):
    from fedtune.deploy.node import main

    monkeypatch.chdir(tmp_path)
    assert main(["--superlink", "127.0.0.1:1", "--site", str(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_node_loads_no_torch():
    code = "import sys, fedtune.deploy.node, fedtune.relay.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
