"""The Flower `Strategy` around every method: sampling, messages, checked fold, outcome of a round.

The shell keeps no reply: each is decoded, checked, folded and dropped as the grid yields it.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.config import sampled_clients
from fedtune.errors import ConfigError, RoundError
from fedtune.strategies.base import ClientStats, Method, Round
from fedtune.strategies.mean import toward
from fedtune.strategies.updates import Refusal, Update, UpdateRefusedError, one_line, read_update
from fedtune.transport.messages import EVALUATE, TRAIN, Member, RoundTask, pack
from fedtune.transport.records import config_of, metrics_of, params_of, to_arrays

__all__ = ["FedStrategy", "Outcome", "needed_replies", "sample_clients"]

log = logging.getLogger(__name__)

MethodState = dict[str, dict[str, Tensor]]


@dataclass
class Outcome:
    """What came back in one attempt of a round."""

    asked: list[str]
    replies: list[dict[str, float | int | str | None]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    aggregate_s: float = 0.0
    train_s: float = 0.0
    update_norm: float | None = None
    client_drift: float | None = None

    @property
    def accepted(self) -> list[str]:
        """Names of the clients whose updates were folded."""
        return [str(reply["client"]) for reply in self.replies]

    def total(self, key: str) -> int:
        """Sum of a count over the accepted replies."""
        return sum(int(reply[key] or 0) for reply in self.replies)

    @property
    def train_loss(self) -> float | None:
        """Mean training loss over the round, weighted by tokens."""
        known = [
            (float(reply["train_loss"]), int(reply["tokens"] or 0))
            for reply in self.replies
            if reply["train_loss"] is not None
        ]
        tokens = sum(weight for _, weight in known)
        return sum(loss * weight for loss, weight in known) / tokens if tokens else None


class FedStrategy(Strategy):
    """Drives one `Method` over named clients.

    Args:
        method: what to compute.
        manifest: what every update must obey.
        fraction_train: share of the clients asked in a round.
        min_replies: good updates needed: a number, a fraction of those asked, or None for all.
        seed: of the sampling.
        run_id: id of the run, which clients know it by.
        ttl_s: how long a message may wait for its client; infinite when there is no limit.

    Set `members` to who takes part before each use.
    """

    def __init__(
        self,
        method: Method,
        manifest: Manifest,
        *,
        fraction_train: float = 1.0,
        min_replies: str | None = None,
        seed: int = 42,
        run_id: str = "",
        ttl_s: float = math.inf,
    ) -> None:
        if method.correction() is not None:  # no message carries it: it would be plain FedAvg
            raise ConfigError(
                "--strategy: expected no correction at the clients, received "
                f"{method.correction()}."
            )
        self.method = method
        self.manifest = manifest
        self.fraction_train = fraction_train
        self.min_replies = min_replies
        self.seed = seed
        self.run_id = run_id
        self.ttl_s = ttl_s
        self.members: list[Member] = []
        self.scores: list[dict[str, float | str]] = []
        self.method_state: MethodState = {}
        self.tasks: dict[str, RoundTask] = {}
        self.outcome = Outcome(asked=[])
        self._global: dict[str, Tensor] = {}

    @property
    def clients(self) -> dict[int, str]:
        """Node id -> client name."""
        return {member.node: member.name for member in self.members}

    def summary(self) -> None:
        """Log the method and its settings."""
        log.info("method %s over %d clients", self.method, len(self.clients))

    @property
    def needed(self) -> int:
        """Good updates that the round needs, by `min_replies` and by the method."""
        asked = needed_replies(self.min_replies, len(self.outcome.asked))
        return max(asked, self.method.least_updates())

    def sample(self, server_round: int, attempt: int) -> list[str]:
        """Names of the clients asked in this attempt of a round, sorted."""
        count = sampled_clients(self.fraction_train, len(self.clients))
        return sample_clients(self.clients.values(), count, f"{self.seed}/{server_round}/{attempt}")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client in `tasks`; the parameter record is shared by all of them."""
        self._global = params_of(arrays)
        nodes = {name: node for node, name in self.clients.items()}
        self.outcome = Outcome(asked=sorted(self.tasks))
        return [
            Message(
                pack(arrays=arrays, config=self.tasks[name].record()),
                nodes[name],
                TRAIN,
                ttl=self.ttl_s if math.isfinite(self.ttl_s) else None,
                group_id=str(server_round),
            )
            for name in self.outcome.asked
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold good replies, refuse the others; (None, None) when too few are good.

        `outcome` then says what happened. Nothing of the strategy's own state changes unless the
        round is good.
        """
        outcome, spread, stats = self.outcome, _Spread(), list[ClientStats]()
        fold = self.method.fold(Round(server_round, self._global, self.manifest.scaling))
        silent = {name: node for node, name in self.clients.items() if name in outcome.asked}
        lost: list[str] = []
        for message in replies:
            node = message.metadata.src_node_id
            name = self.clients.get(node, str(node))
            if message.has_error() and node not in self.clients:  # the server's, for a lost node
                lost.append(one_line(message.error.reason))
                continue
            if silent.pop(name, None) is None:
                outcome.refused.append(Refusal(node, name, "not asked, or answered twice"))
                continue
            started = time.perf_counter()
            try:
                update = read_update(message, self.manifest, server_round)
                weight = self._weight(update)
            except UpdateRefusedError as error:
                outcome.refused.append(Refusal(node, name, str(error)))
                log.warning("round %d: refused %s: %s", server_round, name, error)
                continue
            finally:
                del message
            fold.add(update.params, weight)
            spread.add(_squared_distance(update.params, self._global), weight)
            stats.append(update.stats)
            outcome.replies.append(_reply_row(name, update))
            outcome.train_s += update.train_s
            outcome.aggregate_s += time.perf_counter() - started
            del update
        for name, node in sorted(silent.items()):
            why = lost.pop() if lost else "no reply within the round's time limit"
            outcome.refused.append(Refusal(node, name, why))
        if len(outcome.replies) < self.needed:
            return None, None
        started = time.perf_counter()
        arrays = to_arrays(self._step(fold.result(), self.method.server_rate(stats), spread))
        outcome.aggregate_s += time.perf_counter() - started
        return arrays, MetricRecord({"num-examples": outcome.total("examples")})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global parameters for every client that has held-out rows."""
        content = pack(
            arrays=arrays,
            config={"run": self.run_id, "round": server_round, "manifest": self.manifest.hash},
        )
        group = str(server_round)
        nodes = [member.node for member in self.members if member.evaluates]
        return [Message(content, node, EVALUATE, group_id=group) for node in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Mean of each metric, weighted by the tokens (else the examples) it was measured on.

        `scores` then holds each client's own. Clients that fail are left out; raises RoundError
        when all do.
        """
        self.scores, problems = [], []
        totals: dict[str, float] = {}
        weights = 0
        for message in replies:
            name = self.clients.get(message.metadata.src_node_id, "a lost client")
            if message.has_error():
                problems.append(f"{name}: {one_line(message.error.reason)}")
                continue
            metrics = dict(metrics_of(message.content))
            if config_of(message.content).get("round") != server_round:
                problems.append(f"{name}: answered for another round")
                continue
            examples = int(metrics.pop("num-examples", 0))  # type: ignore[arg-type]
            weight = int(metrics.pop("num-tokens", 0)) or examples  # type: ignore[arg-type]
            scores = {key: float(value) for key, value in metrics.items()}  # type: ignore[arg-type]
            self.scores.append({"client": name, **scores})
            weights += weight
            for key, value in scores.items():
                totals[key] = totals.get(key, 0.0) + weight * value
        if problems:
            log.warning("evaluation of round %d: %s", server_round, "; ".join(problems))
        if not weights and any(member.evaluates for member in self.members):
            raise RoundError(
                f"evaluation of round {server_round} failed: "
                f"{'; '.join(problems) or 'no client answered'}"
            )
        return MetricRecord({key: value / weights for key, value in totals.items()})

    def _weight(self, update: Update) -> float:
        return self.method.weigh(update.stats)

    def _step(self, new: dict[str, Tensor], rate: float, spread: _Spread) -> dict[str, Tensor]:
        self.outcome.client_drift = spread.around(_squared_distance(new, self._global))
        stepped: dict[str, Tensor] = {}
        state: MethodState = {}
        for name, value in toward(self._global, new, rate).items():
            old = self._global[name]
            stepped[name], state[name] = self.method.step(
                old, value, self.method_state.get(name, {})
            )
        self.method_state = state
        self.outcome.update_norm = math.sqrt(_squared_distance(stepped, self._global))
        return stepped


def sample_clients(names: Iterable[str], count: int, key: str) -> list[str]:
    """The same names, count and key give the same sample, whatever order the names arrive in."""
    return sorted(random.Random(key).sample(sorted(names), count))


def needed_replies(min_replies: str | None, asked: int) -> int:
    """`None` -> all asked; `"3"` -> 3; `"0.5"` -> half of those asked, rounded up."""
    if min_replies is None:
        return asked
    if "." in min_replies:
        return max(1, math.ceil(Fraction(min_replies) * asked))
    return int(min_replies)


class _Spread:
    """Weighted spread of client updates from running sums: sum p|d_k|^2 - |sum p d_k|^2."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def add(self, squared_norm: float, weight: float) -> None:
        self._sum += weight * squared_norm
        self._weight += weight

    def around(self, squared_norm_of_mean: float) -> float:
        return math.sqrt(max(0.0, self._sum / self._weight - squared_norm_of_mean))


def _squared_distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    return sum(float(torch.sum((left[name].double() - right[name].double()) ** 2)) for name in left)


def _reply_row(name: str, update: Update) -> dict[str, float | int | str | None]:
    return {
        "client": name,
        "examples": update.stats.num_examples,
        "tokens": update.stats.num_tokens,
        "steps": update.stats.num_steps,
        "train_loss": update.train_loss,
        "train_s": round(update.train_s, 4),
    }
