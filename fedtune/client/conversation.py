"""What the server asks and what it hears, the same on every process of a training."""

from __future__ import annotations

import logging

from flwr.app import RecordDict

from fedtune.client.ranks import Ranks
from fedtune.client.session import Request, Session
from fedtune.errors import FedtuneError, RoundError
from fedtune.relay.folder import SitePlan
from fedtune.relay.frames import Frame, decode, encode

__all__ = ["Conversation"]

log = logging.getLogger(__name__)


class Conversation:
    """One request after the other.

    Args:
        session: of rank 0; None on the others, which hear what it hears and say nothing.
        plan: says how long to wait without a word from the server.
    """

    def __init__(self, session: Session | None, ranks: Ranks, plan: SitePlan) -> None:
        self._session, self._ranks, self._plan = session, ranks, plan
        self.request: Request | None = None  # the last one heard, on rank 0

    def hear(self) -> Frame:
        """The next request. Raises RoundError after a long silence."""
        self.request, data, problem = None, b"", None
        if self._session is not None:
            try:
                self.request = self._session.next(self._plan.idle_timeout_s, self._ranks.beat)
                if self._ranks.count == 1:
                    return Frame(self.request.kind, self.request.content)
                data = encode(self.request.kind, self.request.content)
            except FedtuneError as error:
                problem = error
                data = encode("error", error=error.outside)
        while not (heard := self._ranks.share(data)):
            pass  # rank 0 is still there
        frame = decode(heard)
        if frame.error is not None:
            raise problem or RoundError(frame.error)
        return frame

    def reply(self, content: RecordDict) -> None:
        """Answer what was heard last."""
        if self.request is not None:
            self.request.reply(content)

    def fail(self, reason: str) -> None:
        """Refuse it."""
        if self.request is not None:
            self.request.fail(reason)

    def tell(self, state: str, **more: str | int | float) -> None:
        """What the trainer is doing, for people and pings."""
        if self._session is not None:
            self._session.say(state, **more)

    def note(self, what: str, *, warn: bool = False) -> None:
        """A line in the site's log."""
        if self._ranks.first:
            log.log(logging.WARNING if warn else logging.INFO, "%s: %s", self._plan.client, what)

    def end(self, reason: str) -> None:
        """The run is over at this site."""
        self.tell("over", reason=reason)
        if self._session is not None:
            self._session.finish(reason)

    def close(self, reason: str) -> None:
        """Free the session; what the server waits for is refused with `reason`."""
        if self._session is not None:
            self._session.close(reason)
