from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fedtune.deploy import clocks, keys, roles
from fedtune.deploy.address import Address
from fedtune.deploy.certs import make_certs
from fedtune.deploy.clock import AHEAD_S, BEHIND_S, CLOCK, SITE, TIME, Offset, offset_of, span
from fedtune.deploy.clocks import Clocks
from fedtune.deploy.lookout import Lookout
from fedtune.deploy.probe import NotYet, probe
from fedtune.errors import ConfigError, DeployError
from tests.deploy.test_connection import web_server


def test_the_bounds_are_flowers():
    assert AHEAD_S == SYSTEM_TIME_TOLERANCE
    assert BEHIND_S == TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


@pytest.mark.parametrize(
    ("ahead", "refused", "notable"),
    [
        (-7200, True, True),
        (-305.1, True, True),
        (-304.9, False, True),
        (-2.1, False, True),
        (-1.9, False, False),
        (0, False, False),
        (1.9, False, False),
        (2.1, False, True),
        (4.9, False, True),
        (5.1, True, True),
        (7200, True, True),
    ],
)
def test_from_where_on_a_clock_matters(ahead, refused, notable):
    offset = offset_of(1000 + ahead, 1000 + ahead, {TIME: "1000"})
    assert offset is not None
    assert (offset.is_refused, offset.is_notable) == (refused, notable)


def test_a_slow_answer_leaves_room():
    """The server may have told its time at any moment from the question to the answer."""
    offset = offset_of(1000, 1010, {TIME: "1000"})
    assert offset == Offset(0, 10)
    assert not offset.is_notable
    assert offset_of(1006, 1016, {TIME: "1000"}) == Offset(6, 16)


def test_a_server_that_tells_its_date_alone():
    date = formatdate(1000, usegmt=True)
    assert offset_of(1000, 1000, {"date": date}) == Offset(-2, 0)
    assert offset_of(8200, 8200, {"date": date}) == Offset(7198, 7200)


@pytest.mark.parametrize("headers", [{}, {"date": "yesterday"}, {TIME: "soon"}])
def test_a_server_that_tells_no_time(headers):
    assert offset_of(1000, 1000, headers) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.04, "2 s"),
        (8, "8 s"),
        (59.6, "60 s"),
        (118, "2 min"),
        (330, "5.5 min"),
        (7200, "2 h"),
        (86400 * 3.2, "3.2 days"),
        (86400 * 400, "400 days"),
    ],
)
def test_how_long_reads(seconds, text):
    assert span(seconds) == text


class Site:
    """What a site says while the server's clock is another one."""

    def __init__(self, address, ca=None):
        self.said = []
        self.lookout = Lookout(address, ca, None, name="clinic", say=self.said.append)


def set_clock(monkeypatch, ahead):
    """The site's alone; the server is in this process, too."""
    wrong = SimpleNamespace(time=lambda: time.time() + ahead)
    monkeypatch.setattr("fedtune.deploy.probe.time", wrong)


@pytest.mark.parametrize(
    ("skew", "words"),
    [
        (7200, "2 h ahead of"),
        (-7200, "2 h behind"),
        (9, r"[789](\.\d)? s ahead of"),  # this server tells whole seconds
    ],
)
def test_a_site_waits_with_a_reason_that_speaks_of_the_clock(monkeypatch, skew, words):
    with web_server() as address:
        site = Site(address)
        set_clock(monkeypatch, skew)
        assert not site.lookout.is_clear()
        assert not site.lookout.is_clear()
        monkeypatch.undo()
        assert site.lookout.is_clear()
    assert len(site.said) == 1
    assert re.match(f"not let in: this host's clock is {words} the server's", site.said[0])
    assert "Set it, best by NTP; trying again" in site.said[0]


def test_a_small_difference_is_a_warning(monkeypatch):
    with web_server() as address:
        site = Site(address)
        set_clock(monkeypatch, -60)
        assert site.lookout.is_clear()
        assert site.lookout.is_clear()
    assert len(site.said) == 1
    assert site.said[0].startswith("warning: this host's clock is 6")


def note(made, site, ahead):
    headers = [(SITE.encode(), site.encode()), (CLOCK.encode(), f"{time.time() + ahead}".encode())]
    made.note({"headers": headers, "client": ("192.0.2.7", 1)})


def test_the_server_notes_whose_clock_differs(capsys):
    made = Clocks()
    for site, ahead in (("clinic", 7200), ("clinic", 7200), ("bank", -60), ("lab", 0)):
        note(made, site, ahead)
    for odd in ("a b", "x" * 33, "\x1b[2J", ""):
        note(made, odd, 7200)
    made.note({"headers": []})
    made.note({"headers": [(SITE.encode(), b"x"), (CLOCK.encode(), b"noon")]})
    assert capsys.readouterr().err.splitlines() == [
        "site clinic at 192.0.2.7: its clock is 2 h ahead of the server's; not let in until it is "
        "set",
        "site bank at 192.0.2.7: its clock is 60 s behind the server's; let in",
    ]
    assert [line.split()[1] for line in made.lately()] == ["clinic", "bank"]
    note(made, "clinic", 0)  # it was set
    assert [line.split()[1] for line in made.lately()] == ["bank"]


def test_many_names_take_no_room(capsys):
    made = Clocks()
    for number in range(clocks.MOST_SITES * 3):
        note(made, f"s{number}", 7200)
    assert len(made.lately()) <= clocks.MOST_SITES
    capsys.readouterr()


def test_an_answer_tells_the_time_and_is_not_kept():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Clocks.telling(send)({"type": "http.response.start", "headers": []}))
    headers = dict(sent[0]["headers"])
    assert abs(float(headers[TIME.encode()]) - time.time()) < 5
    assert headers[b"cache-control"] == b"no-store"


def certs_of(directory, monkeypatch, days):
    """A set that was made `days` from now."""
    monkeypatch.setattr(keys, "now", lambda: datetime.now(UTC) + timedelta(days=days))
    make_certs(directory, ["a"], days=30)
    monkeypatch.undo()
    return directory


def test_a_certificate_that_is_not_valid_yet_is_the_clocks_fault(tmp_path, monkeypatch):
    made = certs_of(tmp_path, monkeypatch, 9)
    with web_server(made / "server") as address:
        with pytest.raises(NotYet, match="not valid yet by this host's clock, 20") as caught:
            probe(address, made / "submit" / "ca.crt")
        site = Site(address, made / "a" / "ca.crt")
        assert not site.lookout.is_clear()
    assert "Set the clock (NTP)" in str(caught.value)
    assert "its certificate is not valid yet" in site.said[0]
    with pytest.raises(ConfigError, match="begins on .* the clock of this host"):
        roles.server_folder(made / "server")


def test_a_certificate_that_has_expired(tmp_path, monkeypatch):
    made = certs_of(tmp_path, monkeypatch, -40)
    with (
        web_server(made / "server") as address,
        pytest.raises(DeployError, match="has expired by this host's clock, 20") as caught,
    ):
        probe(address, made / "submit" / "ca.crt")
    assert "fedtune certs DIR again" in str(caught.value)
    assert not isinstance(caught.value, NotYet)


def test_nobody_there_is_waited_for():
    site = Site(Address("127.0.0.1", 1))
    assert not site.lookout.is_clear()
    assert site.said == ["waiting for a SuperLink at 127.0.0.1:1 (Connection refused)"]
