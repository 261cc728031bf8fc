"""The server's last word to each site."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from flwr.app import RecordDict

from fedtune.server.checkpoint import ServerState
from fedtune.server.rounds.client_views import ClientViews
from fedtune.transport.messages import Member, pack

__all__ = ["goodbyes"]


def goodbyes(
    nodes: Iterable[int],
    met: Mapping[int, Member],
    words: Mapping[str, str | int],
    state: ServerState | None,
    personal: Collection[str],
) -> dict[int, RecordDict]:
    """What each node is told at the end of a run.

    Args:
        met: nodes whose trainer has said what it trains; others get the words alone.
        words: id of the run, its last round, and why it is over.
        state: what they end with; without one they keep what they have.
        personal: parameters that a client keeps as they are once it has trained.
    """
    told = {node: pack(config=words) for node in nodes}
    if state is None:
        return told
    views = ClientViews(state.params, "end", state.base)
    for node in told.keys() & met.keys():
        member = met[node]
        trained = state.client_rounds.get(member.name, 0)
        arrays = views.record(member.manifest, personal if trained else ())
        told[node] = pack(arrays=arrays, base=views.base, config={**words, "resume_round": trained})
    return told
