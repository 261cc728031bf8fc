"""When a node is started, and what stops it from being started."""

from __future__ import annotations

import pytest

from fedtune.deploy import site_node
from fedtune.deploy.address import Address
from fedtune.deploy.site_node import SiteNode
from fedtune.errors import DeployError


class Lookout:
    """Answers as it is told, the last answer for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def is_clear(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Parts:
    """A node that ends at once, after it has joined."""

    def __init__(self, directory):
        self.log, self.log_start, self.status, self.started = directory / "node.log", 0, 0, 0

    def start(self, name, command, *, env):
        self.started += 1
        self.log.write_text("INFO : SuperNode ID: 5\n")
        return self

    def stop(self, part):
        pass

    def ended(self):
        return DeployError("node: ended")


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setattr(site_node, "LOOK_S", 0.0)

    def make(*answers):
        parts, said = Parts(tmp_path), []
        lookout = Lookout(*answers)
        made = SiteNode(
            parts, [], {}, superlink=Address("h", 1), lookout=lookout, key=None, say=said.append
        )
        return made, parts, said

    return make


def test_it_is_not_started_before_the_lookout_is_clear(node):
    made, parts, _ = node(False, False, True)
    for expected in (0, 0, 1):
        made.step()
        assert parts.started == expected


def test_what_is_wrong_at_first_ends_the_site(node):
    made, parts, _ = node(DeployError("another CA"))
    with pytest.raises(DeployError, match="another CA"):
        made.step()
    assert parts.started == 0


def test_what_is_wrong_later_may_be_mended(node, monkeypatch):
    """A server that comes back with a certificate that has expired does not end its sites."""
    made, parts, said = node(True, DeployError("it has expired."), True)
    made.step()
    for _ in range(2):  # it has ended, and is gone
        made.step()
        made._start_at = 0.0
    assert said[-1] == "it has expired. Trying again."
    made.step()
    assert parts.started == 2


def run(made):
    for _ in range(99):
        made._start_at = 0.0
        made.step()


def test_what_stays_wrong_ends_the_site(node):
    made, _, said = node(True, DeployError("it has expired."))
    with pytest.raises(DeployError, match="it has expired"):
        run(made)
    assert said.count("it has expired. Trying again.") <= site_node.NODE_RESTARTS
