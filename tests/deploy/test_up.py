"""A real SuperLink, with TLS in this process's care and without TLS as `fedtune up`."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import signal
import socket
import ssl
import time

import psutil
import pytest

from fedtune.deploy import logs, stop
from fedtune.deploy import status as status_command
from fedtune.deploy import up as module
from fedtune.deploy.address import Address
from fedtune.deploy.clock import CLOCK, SITE
from fedtune.deploy.connection import Connection, flower_environment, flower_program
from fedtune.deploy.gate import GATE
from fedtune.deploy.probe import probe
from fedtune.deploy.status import look
from fedtune.deploy.submitted_runs import remember_run
from fedtune.deploy.superlink_runs import list_runs
from fedtune.deploy.up import start_superlink
from fedtune.errors import ConfigError, DeployError
from fedtune.processes.supervisor import Supervisor, free_port
from tests.processes.programs import COMMAND, Program, left, up, wait_for


@pytest.fixture(scope="module")
def link(certs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("superlink")
    env = flower_environment(directory / "flower")
    with Supervisor(directory, env=env) as parts:
        yield start_superlink(parts, Address("127.0.0.1", free_port()), tls=certs / "server")
        processes = parts.processes()
    assert left(processes, within_s=0) == []


def command(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(word) for word in words]))


def status(*words):
    return command(status_command, *words)


def test_the_sites_of_the_folder_are_registered_and_the_gate_is_there(link, certs):
    assert link.sites == ["a", "b"]
    with Connection(link.address, tls=certs / "submit") as connection:
        nodes = connection.flwr("supernode", "list")["nodes"]
    assert [node["status"] for node in nodes] == ["registered", "registered"]
    probe(link.address, certs / "a" / "ca.crt", path=GATE)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_stranger_cannot_fill_its_memory(link, certs, chunked):
    """128 MiB that no known site has signed: refused at once, and dropped if they still come."""
    process, size = psutil.Process(link.part.pid), 128 << 20
    before = process.memory_info().rss
    context = ssl.create_default_context(cafile=certs / "a" / "ca.crt")
    caller = http.client.HTTPSConnection("127.0.0.1", link.address.port, context=context)
    length = {} if chunked else {"content-length": str(size)}
    headers = {"content-type": "application/x-protobuf", **length}
    pieces = (bytes(1 << 20) for _ in range(size >> 20))
    with contextlib.suppress(OSError):  # it hangs up
        caller.request("POST", "/v1/fleet/push-object", pieces, headers, encode_chunked=chunked)
        assert caller.getresponse().status == 413
    caller.close()
    assert process.memory_info().rss - before < 32 << 20


def test_status_before_the_first_run(link, certs, capsys):
    assert status("--superlink", link.address, "--tls", certs / "submit") == 0
    assert capsys.readouterr().out == (
        f"superlink {link.address}   sites: 2 registered\n\nno runs yet\n"
    )


def test_status_names_a_site_whose_clock_is_off(link, certs, capsys):
    ca = certs / "a" / "ca.crt"
    for ahead, shown in ((7200, True), (0, False)):
        probe(link.address, ca, headers={SITE: "clinic", CLOCK: f"{time.time() + ahead}"})
        assert status("--superlink", link.address, "--tls", certs / "submit") == 0
        line = "site clinic at 127.0.0.1: its clock is 2 h ahead of the server's; not let in until"
        assert (line in " ".join(capsys.readouterr().out.split())) == shown
    assert line in link.part.log.read_text()


def test_a_watch_goes_on_until_ctrl_c(link, certs):
    words = ["--superlink", link.address, "--tls", certs / "submit", "--watch", "0.1"]
    with Program(COMMAND, "fedtune.deploy.status", *words) as program:
        program.line("no runs yet")
        program.line("no runs yet")
        assert program.end(signal.SIGINT)[::2] == (0, "")


def test_a_connection_without_tls_or_to_nobody_is_one_line(link):
    with pytest.raises(DeployError, match="Pass --tls DIR"):
        status("--superlink", link.address)
    with pytest.raises(DeployError, match="nothing listens there"):
        status("--superlink", f"127.0.0.1:{free_port()}")


def test_what_flower_refuses_is_one_line(link, certs, tmp_path):
    with Connection(link.address, tls=certs / "submit") as connection:
        with pytest.raises(DeployError, match=r"flwr stop at .*Run ID not found"):
            connection.flwr("stop", "12")
        with pytest.raises(DeployError, match=r"flwr log at .*Run ID not found") as caught:
            connection.show("log", "12", "--show")
        with pytest.raises(DeployError, match=r"flwr run at .*pyproject\.toml"):
            connection.flwr("run", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_taken_port_is_named(link, tmp_path):
    with Supervisor(tmp_path) as parts, pytest.raises(DeployError, match="is in use by another"):
        start_superlink(parts, link.bound)


def test_a_superlink_that_cannot_start_shows_why(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_command", lambda *words: ["bash", "-c", "echo no disk; exit 1"])
    with (
        Supervisor(tmp_path) as parts,
        pytest.raises(DeployError, match=r"superlink: ended, status 1\..*: no disk"),
    ):
        start_superlink(parts, Address("127.0.0.1", free_port()))


def test_a_server_without_the_gate_is_refused(tmp_path, monkeypatch):
    """An untested Flower that serves in another way must not be open unnoticed."""
    stock = [flower_program("flower-superlink"), "--insecure"]
    monkeypatch.setattr(
        module,
        "_command",
        lambda bound, tls: [*stock, "--host", bound.host, "--port", str(bound.port)],
    )
    env = flower_environment(tmp_path / "flower")
    with (
        Supervisor(tmp_path, env=env) as parts,
        pytest.raises(DeployError, match="received HTTP status 404"),
    ):
        start_superlink(parts, Address("127.0.0.1", free_port()))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--host", "0.0.0.0"], "without --tls only this machine may connect"),
        (["--host", "example.org"], "without --tls only this machine may connect"),
        (["--port", "0"], "--port: expected 1 to 65535"),
        (["--port", "70000"], "--port: expected 1 to 65535"),
        (["--insecure", "--tls", "x"], "exclude each other"),
        (["--tls", "x"], "which is no directory"),
        (["--host", "192.0.2.1", "--insecure"], "cannot listen on 192.0.2.1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path, words, expected):
    words += ["--output_dir", tmp_path / "out"]
    with pytest.raises(ConfigError, match=expected) as caught:
        command(module, *words)
    assert "\n" not in str(caught.value)


def test_a_certificate_for_another_address_is_refused(tmp_path, certs):
    with Supervisor(tmp_path) as parts, pytest.raises(ConfigError, match=r"Run fedtune certs with"):
        start_superlink(parts, Address("127.0.0.2", free_port()), tls=certs / "server")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_ends_cleanly(tmp_path, number):
    port = free_port()
    with up("--port", port, "--output_dir", tmp_path / "out") as program:
        program.line("warning: no TLS and no node authentication")
        assert "fedtune join --superlink 127.0.0.1:" in program.line("at a site:")
        family = program.family()
        assert len(family) >= 4  # fedtune, its sweeper, the SuperLink, its executor
        assert program.end(number)[::2] == (0, "")
        assert left(family, within_s=0) == []
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_up_reports_a_superlink_that_died(tmp_path):
    with up("--port", free_port(), "--output_dir", tmp_path / "out") as program:
        program.line("log:")
        family = program.family()
        (killed,) = [process for process in family if "fedtune.deploy.gate" in process.cmdline()]
        killed.kill()
        _, err = program.process.communicate(timeout=20)
        assert program.process.returncode == 2
        assert left(family) == []
    assert err.startswith("error: superlink: killed by SIGKILL. End of ")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_app_outlives_up(tmp_path, app, number):
    """Flower's own end of a ServerApp waits for its main thread, which here never looks."""
    out, port = tmp_path / "out", free_port()
    with up("--port", port, "--output_dir", out) as program:
        program.line("log:")
        with Connection(Address("127.0.0.1", port)) as connection:
            connection.flwr("run", app, "--run-config", f'mark="{tmp_path / "mark"}"')
        wait_for((tmp_path / "mark").exists)
        family = program.family()
        assert any("flwr-serverapp" in " ".join(process.cmdline()) for process in family)
        status, _, _ = program.end(number)
        assert status == (0 if number == signal.SIGTERM else -number)
        assert left(family) == []


@pytest.mark.slow
def test_a_run_is_shown_stopped_and_its_log_printed(link, certs, app, tmp_path, capfd):
    words = ["--superlink", link.address, "--tls", certs / "submit"]
    with Connection(link.address, tls=certs / "submit") as connection:
        failed = connection.flwr("run", app, "--run-config", 'mode="raise"')["run-id"]
        run = connection.flwr("run", app)["run-id"]
        remember_run(run, tmp_path)
        wait_for(lambda: list_runs(connection)[0].status == "running")
        wait_for(lambda: not look(connection, failed).shown.is_active)
        assert look(connection).shown.id == run  # the active one
    state = {"state": "running", "num_rounds": 3, "round": 1}
    (tmp_path / "federation.json").write_text(json.dumps(state))
    (tmp_path / "rounds.jsonl").write_text('{"round": 0, "eval_loss": 2.5}\n{"round": 1, "eval_l')
    capfd.readouterr()
    status(*words)
    shown = capfd.readouterr().out
    assert "0/3 rounds done, in round 1" in shown
    assert "2.500" in shown
    status(failed, *words)
    assert "ServerApp failed" in capfd.readouterr().out
    command(stop, *words)
    assert "ends after the current round" in capfd.readouterr().out
    assert (tmp_path / "stop").exists()
    command(stop, *words, "--now")
    assert capfd.readouterr().out == f"run {run}: stopped\n"
    with pytest.raises(ConfigError, match="none is active"):
        command(stop, *words)
    with pytest.raises(ConfigError, match="expected an active run, received one finished:stopped"):
        command(stop, run, *words)
    with pytest.raises(ConfigError, match="the SuperLink does not know it"):
        status("12", *words)
    command(logs, run, *words)
    assert "here we are" in capfd.readouterr().out
