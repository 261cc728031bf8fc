"""A site behind an HTTP proxy that alone knows the server's name."""

from __future__ import annotations

import os
import sys

import pytest

from fedtune import doctor
from fedtune.deploy.address import Address
from fedtune.deploy.certs import make_certs
from fedtune.deploy.probe import NotYet, probe
from fedtune.deploy.proxy import Proxy, environment, proxy_of
from fedtune.errors import DeployError
from fedtune.processes.supervisor import free_port
from fedtune.proxies import shown
from tests.conftest import REPOSITORY
from tests.deploy.forwarding import forwarding
from tests.deploy.test_connection import web_server
from tests.processes.programs import Program, up

SECRET = "s3cr:t"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def proxy():
    with forwarding() as made:
        yield made


def through(proxy, user=""):
    return Proxy(f"http://{user}127.0.0.1:{proxy.port}", "http_proxy")


def test_without_tls_it_is_asked_for_the_whole_address(proxy):
    with web_server() as server:
        probe(Address("fed.example.org", server.port), None, proxy=through(proxy))
    assert proxy.asked == [f"GET http://fed.example.org:{server.port}/health"]
    assert "cache-control: no-cache" in proxy.heads[0].lower()


def test_with_tls_it_connects_and_the_server_is_checked_by_its_own_name(proxy, certs, tmp_path):
    ca = certs / "submit" / "ca.crt"
    with web_server(certs / "server") as server:
        probe(Address("fed.example.org", server.port), ca, proxy=through(proxy))
        with pytest.raises(DeployError, match=r"its certificate is not for other\.example\.org"):
            probe(Address("other.example.org", server.port), ca, proxy=through(proxy))
        make_certs(tmp_path, ["x"])
        with pytest.raises(DeployError, match="was not signed by"):
            probe(
                Address("fed.example.org", server.port),
                tmp_path / "submit" / "ca.crt",
                proxy=through(proxy),
            )
    assert {line.split()[0] for line in proxy.asked} == {"CONNECT"}


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (
            "403 Forbidden",
            DeployError,
            r"not let it through \(403 Forbidden\)\. Have it",
        ),
        ("407 Proxy Authentication Required", DeployError, "wants a user name and a password"),
        ("502 Bad Gateway", NotYet, "cannot reach it: 502 Bad Gateway"),
        ("503 Service Unavailable", NotYet, "cannot reach it: 503"),
    ],
)
def test_what_the_proxy_refuses_is_said_to_be_its_own(proxy, certs, tls, answer, kind, words):
    proxy.answer = answer
    ca = certs / "submit" / "ca.crt" if tls else None
    with pytest.raises(kind, match=words) as caught:
        probe(Address("fed.example.org", 8000), ca, proxy=through(proxy, f"me:{SECRET}@"))
    assert type(caught.value) is kind
    assert f"the proxy http://127.0.0.1:{proxy.port} (http_proxy)" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "proxy-authorization: basic" in proxy.heads[0].lower()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:s3cr:t@127.0.0.1:{port}", "nothing listens there. Check http_proxy"),
        ("http://me:s3cr:t@no-such-host.invalid:1", "the name of it is unknown. Check http_proxy"),
        ("socks9://me:s3cr:t@127.0.0.1:1", "cannot be used. Set it to http://HOST:PORT"),
        ("http://me:s3cr:t@127.0.0.1:x", "cannot be used"),
    ],
)
def test_a_proxy_that_cannot_be_is_named_without_its_password(url, words):
    wrong = Proxy(url.format(port=free_port()), "http_proxy")
    with pytest.raises(DeployError) as caught:
        probe(Address("fed.example.org", 8000), None, proxy=wrong)
    assert words in str(caught.value)
    assert "proxy" in str(caught.value)
    assert SECRET not in str(caught.value) + repr(wrong) + str(wrong)


@pytest.mark.parametrize(
    ("variables", "host", "tls", "expected"),
    [
        ({}, "fed.example.org", True, None),
        ({"http_proxy": "http://p:1"}, "fed.example.org", False, "http://p:1"),
        ({"http_proxy": "http://p:1"}, "fed.example.org", True, None),
        ({"HTTPS_PROXY": "p:1"}, "fed.example.org", True, "http://p:1"),
        ({"all_proxy": "http://p:1"}, "fed.example.org", True, "http://p:1"),
        ({"https_proxy": "http://p:1", "no_proxy": "example.org"}, "fed.example.org", True, None),
        ({"https_proxy": "http://p:1", "no_proxy": "*"}, "fed.example.org", True, None),
        ({"https_proxy": "http://p:1", "NO_PROXY": "10.0.0.5"}, "10.0.0.5", True, None),
        ({"https_proxy": "http://p:1", "no_proxy": "10.0.0.5:8000"}, "10.0.0.5", True, None),
        ({"https_proxy": "http://p:1", "no_proxy": "x.org"}, "10.0.0.5", True, "http://p:1"),
        ({"http_proxy": "http://p:1"}, "127.0.0.1", False, None),
        ({"http_proxy": "http://p:1"}, "::1", False, None),
    ],
)
def test_the_environment_says_which(monkeypatch, variables, host, tls, expected):
    """And the node, whose environment is made of it, is led the same way by Flower's client."""
    from httpx._utils import get_environment_proxies

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = proxy_of(Address(host, 8000), tls=tls)
    assert (found and found.url) == expected
    for name, value in environment(found).items():
        monkeypatch.setenv(name, value)
    again = proxy_of(Address(host, 8000), tls=tls)
    assert (again and again.url) == expected
    led = get_environment_proxies()
    assert led.get("https://" if tls else "http://") == expected
    assert (f"all://*{host}" in led, f"all://{host}" in led) == (False, False) or not expected


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://me:pw@p.example:3128/", "http://p.example:3128"),
        ("p.example:3128", "http://p.example:3128"),
        ("me:p@w@p.example:3128", "http://p.example:3128"),
        ("http://[::1]:3128", "http://[::1]:3128"),
        ("http://me:pw@p:port", "(not an address)"),
    ],
)
def test_a_proxy_is_shown_without_its_password(url, text):
    assert shown(url) == text


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True])
def test_a_site_joins_through_it(certs, proxy, tmp_path, monkeypatch, tls):
    port, variable = free_port(), "https_proxy" if tls else "http_proxy"
    server = ["--tls", certs / "server"] if tls else []
    url = f"http://me:{SECRET}@127.0.0.1:{proxy.port}"
    with up("--port", port, "--output_dir", tmp_path / "up", *server) as superlink:
        superlink.line("log:")
        monkeypatch.setenv(variable, url)
        words = ["join", "--superlink", f"fed.example.org:{port}", "--name", "a"]
        words += ["--tls", str(certs / "a")] if tls else []
        words += ["--output_dir", str(tmp_path / "logs"), "--", "true"]
        command = [sys.executable, "-m", "fedtune.cli", *words]
        with Program(command=command, cwd=REPOSITORY) as site:
            way = f"a: through the proxy http://127.0.0.1:{proxy.port} ({variable})"
            assert site.line("a: ") == way
            site.line(f"a: joined fed.example.org:{port}")
            assert site.end()[0] == 143
    assert SECRET not in (tmp_path / "logs" / "node.log").read_text()
    assert len(proxy.asked) > 1


def test_the_doctor_shows_them_without_their_passwords(monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@p.example:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    text = doctor.render(list(doctor._proxies()))
    assert "https_proxy  http://p.example:3128  with a user name, which is not shown" in text
    assert "no_proxy     example.org" in text
    assert SECRET not in text
    monkeypatch.delenv("https_proxy")
    monkeypatch.delenv("no_proxy")
    assert list(doctor._proxies()) == [doctor.Row("ok", "proxy", "none")]
