from __future__ import annotations

import http.server
import os
import socket
import ssl
import stat
import sys
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtune.deploy import connection, submitted_runs
from fedtune.deploy import probe as probes
from fedtune.deploy.address import Address
from fedtune.deploy.connection import Connection, flower_environment, flower_program
from fedtune.deploy.probe import probe
from fedtune.deploy.submitted_runs import known_runs, remember_run
from fedtune.errors import ConfigError, DeployError
from fedtune.processes.supervisor import free_port


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *words):
        pass


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass


@contextmanager
def web_server(tls=None):
    server = Quiet(("127.0.0.1", 0), Site)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.crt", tls / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Address("127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000),
        ("fed.example.org:1", "fed.example.org", 1),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_an_address_is_read_and_written(text, host, port):
    assert Address.parse(text) == Address(host, port)
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":8000",
        "host:0",
        "host:65536",
        "host:x",
        "::1",
        "::1:8000",
        "http://a:1",
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        Address.parse(text)


def test_loopback():
    local = [
        Address(host, 1).is_loopback for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")
    ]
    others = [Address(host, 1).is_loopback for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")]
    assert (all(local), any(others)) == (True, False)


def test_a_server_that_answers_passes(certs):
    with web_server() as address:
        probe(address, None)
    with web_server(certs / "server") as address:
        probe(address, certs / "submit" / "ca.crt")


def test_each_fault_of_a_connection_has_its_own_words(certs, tmp_path, monkeypatch):
    ca = certs / "submit" / "ca.crt"
    module_of_other = tmp_path / "other"
    from fedtune.deploy.certs import make_certs

    make_certs(module_of_other, ["x"])
    faults = {}

    def fault(name, address, ca=None, **options):
        with pytest.raises(DeployError) as caught:
            probe(address, ca, **options)
        faults[name] = str(caught.value)
        assert "\n" not in faults[name]
        assert str(address) in faults[name]

    fault("refused", Address("127.0.0.1", free_port()))
    fault("unknown", Address("no-such-host.invalid", 1))
    with web_server() as address:
        fault("plain", address, ca)
        fault("other", address, path="/elsewhere")
    with web_server(certs / "server") as address:
        fault("tls", address)
        fault("ca", address, module_of_other / "x" / "ca.crt")
        fault("name", Address("127.0.0.2", address.port), ca) if _reaches(
            "127.0.0.2", address.port
        ) else None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fault("silent", Address(*silent.getsockname()), timeout_s=0.1)
    assert "nothing listens there. Start it with fedtune up" in faults["refused"]
    assert "unknown" in faults["unknown"]
    assert "expected TLS, received none" in faults["plain"]
    assert "HTTP status 404" in faults["other"]
    assert "Pass --tls DIR" in faults["tls"]
    assert "was not signed by" in faults["ca"]
    assert "no answer in 0.1 s" in faults["silent"]


def _reaches(host, port):
    try:
        socket.create_connection((host, port), timeout=0.2).close()
    except OSError:
        return False
    return True


def test_a_name_that_the_certificate_lacks(certs):
    with web_server(certs / "server") as address:
        error = ssl.SSLCertVerificationError("x")
        error.verify_code = probes.HOSTNAME_MISMATCH
        words = str(probes._distrust("x", error, Address("fed2.org", address.port), None))
    assert words.startswith("x: its certificate is not for fed2.org. Add it with fedtune certs DIR")


def test_settings_are_private_and_go_away(certs):
    with Connection(Address("127.0.0.1", 8000), tls=certs / "submit") as link:
        home = link.home
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        config = tomllib.loads((home / "config.toml").read_text())
        assert link.env["FLWR_HOME"] == str(home)
    assert not home.exists()
    assert config["superlink"]["fedtune"] == {
        "address": "127.0.0.1:8000",
        "root-certificates": str(certs / "submit" / "ca.crt"),
    }


def test_a_folder_with_odd_letters(tmp_path, certs):
    folder = tmp_path / 'a "b" \N{LATIN SMALL LETTER E WITH ACUTE}\\'
    folder.mkdir()
    (folder / "ca.crt").write_bytes((certs / "submit" / "ca.crt").read_bytes())
    with Connection(Address("127.0.0.1", 8000), tls=folder) as link:
        config = tomllib.loads((link.home / "config.toml").read_text())
    assert config["superlink"]["fedtune"]["root-certificates"] == str(folder / "ca.crt")


def test_flower_is_quiet_and_finds_its_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    env = flower_environment(tmp_path)
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["NO_PROXY"] == "intranet,localhost,127.0.0.1,::1"
    assert "FORWARDED_ALLOW_IPS" not in env
    assert env["PATH"].split(os.pathsep)[0] == str(Path(flower_program("flwr")).parent)
    with pytest.raises(ConfigError, match="flwr-nosuch: not found"):
        flower_program("flwr-nosuch")


def test_runs_are_remembered_by_many_writers(tmp_path, monkeypatch):
    assert known_runs() == {}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: remember_run(str(n), tmp_path / str(n)), range(20)))
    assert known_runs() == {str(n): tmp_path / str(n) for n in range(20)}
    monkeypatch.chdir(tmp_path)
    remember_run("1", Path("here"))
    assert known_runs()["1"] == tmp_path / "here"
    monkeypatch.setattr(submitted_runs, "KEPT_RUNS", 2)
    remember_run("99", tmp_path)
    assert len(known_runs()) == 2
    assert known_runs()["99"] == tmp_path


def test_a_damaged_register_is_an_empty_one():
    remember_run("1", Path("x"))
    (Path(os.environ["FLWR_HOME"]) / "runs.json").write_text("{half")
    assert known_runs() == {}


def test_a_slow_command_says_what_is_waited_for_and_has_its_limit(monkeypatch, capsys):
    slow = 'import time; time.sleep(0.5); print(\'{"success": true, "runs": []}\')'
    monkeypatch.setattr(connection, "SAY_S", 0.2)
    monkeypatch.setattr(Connection, "probe", lambda self: None)
    monkeypatch.setattr(Connection, "_command", lambda self, *_: [sys.executable, "-c", slow])
    with Connection(Address("127.0.0.1", 1)) as link:
        assert link.flwr("list")["runs"] == []
        said = capsys.readouterr().err.splitlines()
        assert len(said) >= 2
        assert said[0] == "waiting: flwr list at 127.0.0.1:1 (0 s so far, at most 120 s)"
        monkeypatch.setattr(connection, "COMMAND_S", 0.3)
        with pytest.raises(DeployError, match=r"flwr list: no answer from .* in 0\.3 s"):
            link.flwr("list")
