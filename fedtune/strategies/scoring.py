"""The global parameters' score, from the scores of those who evaluated them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from flwr.app import Message, MetricRecord

from fedtune.errors import RoundError
from fedtune.strategies.lora.manifests import rank_total
from fedtune.strategies.updates import one_line, plausible
from fedtune.transport.messages import Member
from fedtune.transport.records import config_of, metrics_of

__all__ = ["mean_scores", "scorers"]

log = logging.getLogger(__name__)

DECISIVE = ("eval_loss", "num-examples", "num-tokens")
COUNTS = ("num-examples", "num-tokens")  # of one of several held-out sets: `num-tokens:eval_name`
PER_TOKEN = ("_loss", "_mean_token_accuracy")


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
    """Mean of each metric, weighted by what it is a mean over, and every client's own.

    Losses and trl's token accuracy count by label tokens (else rows), others by rows; those of one
    of several held-out sets by what is in that set.

    Clients that fail are left out; raises RoundError when a score is needed and all do.
    """
    scores: list[dict[str, float | str]] = []
    problems: list[str] = []
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    for message in replies:
        name = clients.get(message.metadata.src_node_id, "a lost client")
        if message.has_error():
            problems.append(f"{name}: {one_line(message.error.reason)}")
            continue
        if config_of(message.content).get("round") != server_round:
            problems.append(f"{name}: answered for another round")
            continue
        metrics = dict(metrics_of(message.content))
        bad = [key for key in DECISIVE if key in metrics and plausible(metrics[key]) is None]
        if bad:
            problems.append(
                f"{name}: {bad[0]}: expected a finite number, received another. Lower the learning "
                "rate, or check the held-out rows"
            )
            continue
        # Others may be undefined here and there: as a mean they then are, too.
        own = {key: float(v) for key, v in metrics.items() if isinstance(v, int | float)}
        counts = {key: own.pop(key) for key in list(own) if key.startswith(COUNTS)}
        scores.append({"client": name, **own})
        for key, value in own.items():
            weight = _weight(key, counts)
            totals[key] = totals.get(key, 0.0) + weight * value
            weights[key] = weights.get(key, 0.0) + weight
    if problems:
        log.warning("evaluation of round %d: %s", server_round, "; ".join(problems))
    if not any(weights.values()) and needed:
        raise RoundError(
            f"evaluation of round {server_round} failed: "
            f"{'; '.join(problems) or 'no client answered'}"
        )
    mean = MetricRecord()
    for key, value in totals.items():
        if weights[key] > 0:
            mean[key] = value / weights[key]
    return mean, scores


def _weight(metric: str, counts: Mapping[str, float]) -> float:
    """Rows or label tokens that a client's metric is a mean over."""
    prefixes = {key.partition(":")[2] for key in counts}
    mine = [prefix for prefix in prefixes if prefix and metric.startswith(f"{prefix}_")]
    where = f":{max(mine, key=len)}" if mine else ""
    rows = counts.get(f"num-examples{where}", 0.0)
    by_tokens = metric.endswith(PER_TOKEN)
    return (counts.get(f"num-tokens{where}", 0.0) or rows) if by_tokens else rows
