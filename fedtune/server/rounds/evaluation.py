"""The global parameters' score, from the scores of those who evaluated them.

What a client says of them is read with care: a number that is not finite is null, and no reply can
hold more than a record is meant for, or end a run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flwr.app import Message

from fedtune.errors import RoundError, private
from fedtune.server.rounds.check_update import finite_or_none, one_line, plausible, reason_of
from fedtune.strategies.lora.manifests import rank_total
from fedtune.transport.messages import Member
from fedtune.transport.records import config_of, metrics_of

__all__ = ["MOST_METRICS", "Row", "Scores", "mean_scores", "scorers"]

log = logging.getLogger(__name__)

LOSS = "eval_loss"  # decides which round is best
COUNTS = ("num-examples", "num-tokens")  # of one of several held-out sets: `num-tokens:eval_name`
MOST_COUNT = 2**53 - 1
MOST_METRICS = 64  # of one reply
NAME = re.compile(r"[\w./-]{1,64}")
CLIENT = "client"  # whose scores they are
PER_TOKEN = ("_loss", "_mean_token_accuracy")

Row = dict[str, float | str | None]


class Scores(NamedTuple):
    """Scores of the global parameters.

    Attributes:
        mean: of each metric.
        clients: each client's own, with its name.
    """

    mean: dict[str, float]
    clients: list[Row]


class _Reading(NamedTuple):
    """One client's metrics, None where one is not finite, and the sizes of its held-out sets."""

    own: dict[str, float | None]
    counts: dict[str, int]


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
) -> Scores:
    """Mean of each metric, weighted by what it is a mean over, and every client's own.

    Losses and trl's token accuracy count by label tokens (else rows), others by rows; those of one
    of several held-out sets by what is in that set. A metric that is not finite at one of them has
    no mean. Of a reply at most `MOST_METRICS` metrics are read, with names of up to 64 letters,
    digits, `_`, `.`, `/` and `-`.

    Clients that fail are left out; raises RoundError when a score is needed and all do.
    """
    scores: list[Row] = []
    problems: list[str] = []
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    for message in replies:
        name = clients.get(message.metadata.src_node_id, "a lost client")
        try:
            reading = _read(message, server_round, name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        scores.append({CLIENT: name, **reading.own})
        for key, value in reading.own.items():
            weight = _weight(key, reading.counts)
            known = float("nan") if value is None else value
            totals[key] = totals.get(key, 0.0) + weight * known
            weights[key] = weights.get(key, 0.0) + weight
    if problems:
        log.warning("evaluation of round %d: %s", server_round, "; ".join(problems))
    if not any(weights.values()) and needed:
        raise RoundError(
            f"evaluation of round {server_round} failed: "
            f"{private('; '.join(problems) or 'no client answered')}"
        )
    mean = {key: value / weights[key] for key, value in totals.items() if weights[key] > 0}
    return Scores(mean, scores)


def _read(message: Message, server_round: int, client: str) -> _Reading:
    """What a reply says; raises ValueError where it is of no use."""
    if message.has_error():
        raise ValueError(reason_of(message))
    if config_of(message.content).get("round") != server_round:
        raise ValueError("answered for another round")
    given = {key: v for key, v in metrics_of(message.content).items() if not isinstance(v, list)}
    if LOSS in given and plausible(given[LOSS]) is None:
        raise ValueError(
            f"{LOSS}: expected a finite number, received another. Lower the learning rate, or "
            "check the held-out rows"
        )
    counts = dict(_counts(given))
    metrics = {key: finite_or_none(value) for key, value in given.items() if key not in counts}
    named = [key for key in metrics if NAME.fullmatch(key) and key != CLIENT]
    kept = sorted(named, key=lambda key: (key != LOSS, key))[:MOST_METRICS]
    if len(kept) < len(metrics):
        log.warning(
            "evaluation of round %d: %d of %d metrics of %s are left out: expected at most %d, "
            "with names of up to 64 letters, digits, `_`, `.`, `/` and `-`, none of them `%s`",
            server_round,
            len(metrics) - len(kept),
            len(metrics),
            client,
            MOST_METRICS,
            CLIENT,
        )
    return _Reading({key: metrics[key] for key in metrics if key in set(kept)}, counts)


def _counts(given: Mapping[str, float]) -> Iterator[tuple[str, int]]:
    """Rows and label tokens that the metrics are means over; raises ValueError for no count."""
    for key, value in given.items():
        count, _, held_out = key.partition(":")
        if count not in COUNTS:
            continue
        if not isinstance(value, int) or not 0 <= value <= MOST_COUNT:
            shown = one_line(key, 80)
            raise ValueError(f"{shown}: expected 0 to {MOST_COUNT}, received {value!r}")
        yield key, value


def _weight(metric: str, counts: Mapping[str, int]) -> float:
    """Rows or label tokens that a client's metric is a mean over."""
    prefixes = {key.partition(":")[2] for key in counts}
    mine = [prefix for prefix in prefixes if prefix and metric.startswith(f"{prefix}_")]
    where = f":{max(mine, key=len)}" if mine else ""
    rows = counts.get(f"num-examples{where}", 0)
    by_tokens = metric.endswith(PER_TOKEN)
    return float((counts.get(f"num-tokens{where}", 0) or rows) if by_tokens else rows)
