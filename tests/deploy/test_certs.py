from __future__ import annotations

import argparse
import os
import shutil
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedtune.deploy import certs as module
from fedtune.deploy import keys
from fedtune.deploy.certs import make_certs
from fedtune.deploy.roles import ca_certificate, server_folder, site_folder
from fedtune.errors import ConfigError


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def handshake(server, ca, host):
    """A real TLS handshake over a socket pair, checked as strictly as OpenSSL can."""
    near, far = socket.socketpair()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(server / "server.crt", server / "server.key")

    def serve():
        try:
            serving.wrap_socket(far, server_side=True).close()
        except (ssl.SSLError, OSError):
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with context.wrap_socket(near, server_hostname=host) as connection:
            return connection.version()
    finally:
        near.close()
        thread.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "fed.example.org"])
@pytest.mark.parametrize("role", ["submit", "a", "server"])
def test_every_role_trusts_the_server_by_all_its_names(certs, role, host):
    assert handshake(certs / "server", ca_certificate(certs / role), host) == "TLSv1.3"


def test_another_name_or_another_ca_is_not_trusted(certs, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'other.org'"):
        handshake(certs / "server", certs / "a" / "ca.crt", "other.org")
    make_certs(tmp_path / "other", ["x"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(certs / "server", tmp_path / "other" / "x" / "ca.crt", "localhost")


def test_what_each_folder_holds(certs):
    assert sorted(contents(certs)) == [
        *("a/ca.crt", "a/site.key", "a/site.pub", "b/ca.crt", "b/site.key", "b/site.pub"),
        *("ca/ca.crt", "ca/ca.key", "server/ca.crt", "server/server.crt", "server/server.key"),
        *("server/sites/a.pub", "server/sites/b.pub", "submit/ca.crt"),
    ]


def test_private_files_are_private(certs):
    for path in (certs, *certs.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix == ".key":
            assert mode == 0o600, path


def test_site_keys_are_what_flower_asks_for(certs):
    site, server = site_folder(certs / "a"), server_folder(certs / "server")
    key = load_ssh_private_key(site.key.read_bytes(), None)
    assert isinstance(key.curve, ec.SECP384R1)
    registered = load_ssh_public_key(server.sites["a"].read_bytes())
    assert registered == key.public_key()
    assert (site.name, list(server.sites)) == ("a", ["a", "b"])


def test_adding_a_site_changes_nothing_that_is_there(tmp_path):
    make_certs(tmp_path, ["a"])
    before = contents(tmp_path)
    assert make_certs(tmp_path, ["a", "new"]) == ["new"]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == [
        *("new/ca.crt", "new/site.key", "new/site.pub", "server/sites/new.pub")
    ]


def test_a_site_whose_key_has_gone_to_it_stays_as_it_is(tmp_path):
    make_certs(tmp_path, ["a"])
    registered = (tmp_path / "server" / "sites" / "a.pub").read_bytes()
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "ca" / "ca.key").unlink()  # not needed for sites
    assert make_certs(tmp_path, ["a", "b"]) == ["b"]
    assert (tmp_path / "server" / "sites" / "a.pub").read_bytes() == registered
    assert not (tmp_path / "a").exists()


def test_a_new_host_is_added_to_the_certificate_of_the_same_key(tmp_path):
    make_certs(tmp_path, ["a"], hosts=["one.org"])
    key = (tmp_path / "server" / "server.key").read_bytes()
    make_certs(tmp_path, ["a"], hosts=["10.0.0.5"])
    server = server_folder(tmp_path / "server")
    assert set(server.hosts) == {"localhost", "127.0.0.1", "::1", "one.org", "10.0.0.5"}
    assert server.key.read_bytes() == key
    assert handshake(tmp_path / "server", tmp_path / "a" / "ca.crt", "10.0.0.5")


def test_days_and_renewal(tmp_path):
    make_certs(tmp_path, ["a"], days=20)
    first = x509.load_pem_x509_certificate((tmp_path / "server" / "server.crt").read_bytes())
    in_20_days = datetime.now(UTC) + timedelta(days=20)
    assert abs(first.not_valid_after_utc - in_20_days) < timedelta(minutes=1)
    make_certs(tmp_path, ["a"], days=300)
    second = x509.load_pem_x509_certificate((tmp_path / "server" / "server.crt").read_bytes())
    assert second.not_valid_after_utc > in_20_days
    assert second.public_key() == first.public_key()


def test_an_ended_certificate_is_refused_with_what_to_do(tmp_path, monkeypatch):
    make_certs(tmp_path, ["a"], days=1)
    later = datetime.now(UTC) + timedelta(days=2)
    monkeypatch.setattr(keys, "now", lambda: later)
    with pytest.raises(ConfigError, match=r"server\.crt ended on .*Run fedtune certs again"):
        server_folder(tmp_path / "server")


@pytest.mark.parametrize(
    ("sites", "hosts", "days", "words"),
    [
        ([], [], 1, "at least one name"),
        (["a/b"], [], 1, "received 'a/b'"),
        ([".."], [], 1, "received '..'"),
        (["-a"], [], 1, "received '-a'"),
        (["x" * 33], [], 1, "1 to 32 letters"),
        (["caf\N{LATIN SMALL LETTER E WITH ACUTE}"], [], 1, "letters, digits"),
        (["server"], [], 1, "a folder of its own"),
        (["a"], ["host:8000"], 1, "without a port"),
        (["a"], ["999.1.1.1"], 1, "host name or IP address"),
        (["a"], [], 0, "--days: expected 1 to 3650, received 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, sites, hosts, days, words):
    with pytest.raises(ConfigError) as caught:
        make_certs(tmp_path / "new", sites, hosts=hosts, days=days)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("opens", "folder", "words"),
    [
        (server_folder, ".", "holds the folders of all roles. Give .*/server"),
        (server_folder, "a", "is a site's folder. Give the server's"),
        (server_folder, "submit", "has only ca.crt. Give the server's"),
        (server_folder, "nosuch", "is no directory. Make it with fedtune certs"),
        (site_folder, ".", "holds the folders of all roles. Give .*/<site>"),
        (site_folder, "server", "is the server's folder. Give the site's"),
        (ca_certificate, ".", "holds the folders of all roles. Give .*/submit"),
        (ca_certificate, "server/sites", "has none of them"),
    ],
)
def test_the_wrong_folder_is_named_for_what_it_is(certs, opens, folder, words):
    with pytest.raises(ConfigError, match=words):
        opens(certs / folder)


def test_half_a_folder_is_refused(certs, tmp_path):
    make_certs(tmp_path / "other", ["a"])
    for name, words in (
        ("server.key", "is not the key of"),
        ("ca.crt", "was not signed by"),
    ):
        copy = shutil.copytree(certs / "server", tmp_path / name)
        shutil.copy(tmp_path / "other" / "server" / name, copy / name)
        with pytest.raises(ConfigError, match=words):
            server_folder(copy)
    (tmp_path / "server.key" / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"lacks server\.key"):
        server_folder(tmp_path / "server.key")
    (tmp_path / "ca.crt" / "server.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match="expected a certificate in PEM"):
        server_folder(tmp_path / "ca.crt")


def test_a_set_without_its_ca_is_not_mixed_with_a_new_one(tmp_path):
    make_certs(tmp_path, ["a"])
    (tmp_path / "ca" / "ca.key").unlink()
    with pytest.raises(ConfigError, match="is missing, and the server's certificate must be"):
        make_certs(tmp_path, ["a"], hosts=["new.org"])
    shutil.rmtree(tmp_path / "ca")
    with pytest.raises(ConfigError, match="is missing from an earlier set"):
        make_certs(tmp_path, ["b"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write"):
        make_certs(tmp_path / "new", ["a"])


def test_the_command_says_who_gets_which_folder(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    words = [str(tmp_path), "--sites", "a, b", "--host", "one.org", "10.0.0.5"]
    assert module.run(parser.parse_args(words)) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/a: for fedtune join --tls at a (new)" in out
    assert "valid for localhost, one.org, 127.0.0.1, ::1, 10.0.0.5" in out
