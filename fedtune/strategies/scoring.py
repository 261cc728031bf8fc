"""The global parameters' score, from the scores of those who evaluated them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from flwr.app import Message, MetricRecord

from fedtune.errors import RoundError
from fedtune.strategies.lora.manifests import rank_total
from fedtune.strategies.updates import one_line
from fedtune.transport.messages import Member
from fedtune.transport.records import config_of, metrics_of

__all__ = ["mean_scores", "scorers"]

log = logging.getLogger(__name__)


def scorers(members: Sequence[Member], busy: Collection[str], *, all_of_them: bool) -> list[Member]:
    """Who scores the global parameters: of those with held-out rows the ones that are not busy.

    Where all have the same rows it is one of them, with the highest rank.
    """
    able = [member for member in members if member.evaluates]
    idle = [member for member in able if member.name not in busy] or able
    if all_of_them:
        return idle
    return sorted(idle, key=lambda member: (-_rank(member), member.name))[:1]


def _rank(member: Member) -> int:
    return rank_total(member.manifest) if member.manifest else 0


def mean_scores(
    server_round: int, replies: Iterable[Message], clients: Mapping[int, str], *, needed: bool
) -> tuple[MetricRecord, list[dict[str, float | str]]]:
    """Mean of each metric, weighted by tokens (else examples), and every client's own.

    Clients that fail are left out; raises RoundError when a score is needed and all do.
    """
    scores: list[dict[str, float | str]] = []
    problems: list[str] = []
    totals: dict[str, float] = {}
    weights = 0
    for message in replies:
        name = clients.get(message.metadata.src_node_id, "a lost client")
        if message.has_error():
            problems.append(f"{name}: {one_line(message.error.reason)}")
            continue
        metrics = dict(metrics_of(message.content))
        if config_of(message.content).get("round") != server_round:
            problems.append(f"{name}: answered for another round")
            continue
        examples = int(metrics.pop("num-examples", 0))  # type: ignore[arg-type]
        weight = int(metrics.pop("num-tokens", 0)) or examples  # type: ignore[arg-type]
        own = {key: float(value) for key, value in metrics.items()}  # type: ignore[arg-type]
        scores.append({"client": name, **own})
        weights += weight
        for key, value in own.items():
            totals[key] = totals.get(key, 0.0) + weight * value
    if problems:
        log.warning("evaluation of round %d: %s", server_round, "; ".join(problems))
    if not weights and needed:
        raise RoundError(
            f"evaluation of round {server_round} failed: "
            f"{'; '.join(problems) or 'no client answered'}"
        )
    return MetricRecord({key: value / weights for key, value in totals.items()}), scores
