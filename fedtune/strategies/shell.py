"""The Flower `Strategy` around every method: sampling, messages, checked fold, outcome of a round.

The shell keeps no reply: each is decoded, checked, folded and dropped as the grid yields it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.config import sampled_clients
from fedtune.errors import ManifestError
from fedtune.strategies.base import Method, Round
from fedtune.strategies.gathering import Gathering, squared_distance
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.manifests import at_ranks, rank_total, ranks_in, ranks_of
from fedtune.strategies.lora.names import is_lora_a, is_lora_b
from fedtune.strategies.mean import toward
from fedtune.strategies.outcome import Outcome, needed_replies, sample_clients
from fedtune.strategies.scaffold import next_control
from fedtune.strategies.scoring import mean_scores
from fedtune.strategies.updates import (
    Expected,
    Refusal,
    UpdateRefusedError,
    one_line,
    read_update,
)
from fedtune.strategies.views import Views
from fedtune.transport.messages import EVALUATE, TRAIN, EvaluateTask, Member, RoundTask, pack
from fedtune.transport.records import params_of, to_arrays

__all__ = ["FedStrategy"]

log = logging.getLogger(__name__)

MethodState = dict[str, dict[str, Tensor]]

CONTROL = "control"  # SCAFFOLD's c among what is kept for a parameter
# A method that is not for LoRA keeps the factors for the residuals up to this many (32 MB in fp32):
# they are a figure beside the mean, which itself needs no more memory for more clients.
CERTIFIED_VALUES = 8_000_000


class FedStrategy(Strategy):
    """Drives one `Method` over named clients.

    Args:
        method: what to compute.
        manifest: of the global parameters; its ranks may change with a round.
        static: frozen tensors that every client has.
        fraction_train: share of the clients asked in a round.
        min_replies: good updates needed: a number, a fraction of those asked, or None for all.
        seed: of the sampling.
        run_id: id of the run, which clients know it by.
        ttl_s: how long a message may wait for its client; infinite when there is no limit.
        pooled: whether one client's held-out rows are those of all.

    Set `members` to who takes part before each use, and `client_rounds` to the last round in which
    each one's update was taken.
    """

    def __init__(
        self,
        method: Method,
        manifest: Manifest,
        *,
        static: Mapping[str, Tensor] | None = None,
        fraction_train: float = 1.0,
        min_replies: str | None = None,
        seed: int = 42,
        run_id: str = "",
        ttl_s: float = math.inf,
        pooled: bool = True,
    ) -> None:
        self.method = method
        self.manifest = manifest
        self.static = static or {}
        self.fraction_train = fraction_train
        self.min_replies = min_replies
        self.seed = seed
        self.run_id = run_id
        self.ttl_s = ttl_s
        self.pooled = pooled
        self.members: list[Member] = []
        self.scores: list[dict[str, float | str]] = []
        self.method_state: MethodState = {}
        self.base = Cumulative()
        self.client_rounds: Mapping[str, int] = {}
        self.tasks: dict[str, RoundTask] = {}
        self.outcome = Outcome(asked=[])
        self._global: dict[str, Tensor] = {}
        self._views = Views({}, ArrayRecord(), "")

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
        """One message per client in `tasks`; equal parameter records are shared."""
        self._take(arrays, server_round)
        members = {member.name: member for member in self.members}
        base = to_arrays(self.base.tensors()) if self.base.terms else None
        control = to_arrays(self._control()) if self._has_control else None
        self.outcome = Outcome(asked=sorted(self.tasks))
        return [
            Message(
                pack(
                    arrays=self._view(members[name], task.resume_round),
                    control=control,
                    base=base,
                    config=task.record(),
                ),
                members[name].node,
                TRAIN,
                ttl=self.ttl_s if math.isfinite(self.ttl_s) else None,
                group_id=str(server_round),
            )
            for name, task in sorted(self.tasks.items())
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold good replies, refuse the others; (None, None) when too few are good.

        `outcome` then says what happened. Nothing of the strategy's own state changes unless the
        round is good.
        """
        outcome, gathering = self.outcome, self._gathering(server_round)
        members = {member.node: member for member in self.members}
        silent = {name: node for node, name in self.clients.items() if name in self.tasks}
        lost: list[str] = []
        for message in replies:
            node = message.metadata.src_node_id
            member = members.get(node)
            name = member.name if member else str(node)
            if message.has_error() and not member:  # the server's, for a lost node
                lost.append(one_line(message.error.reason))
                continue
            if member is None or silent.pop(name, None) is None:
                outcome.refused.append(Refusal(node, name, "not asked, or answered twice"))
                continue
            started = time.perf_counter()
            try:
                update = read_update(message, self._expected(member))
                gathering.add(update, self._views.params(member.manifest))
            except (UpdateRefusedError, ManifestError) as error:
                outcome.refused.append(Refusal(node, name, one_line(str(error))))
                log.warning("round %d: refused %s: %s", server_round, name, error)
                continue
            finally:
                del message
            outcome.take(name, update)
            outcome.aggregate_s += time.perf_counter() - started
            del update
        for name, node in sorted(silent.items()):
            why = lost.pop() if lost else "no reply within the round's time limit"
            outcome.refused.append(Refusal(node, name, why))
        if len(outcome.replies) < self.needed:
            return None, None
        started = time.perf_counter()
        arrays = to_arrays(self._advance(gathering))
        outcome.aggregate_s += time.perf_counter() - started
        return arrays, MetricRecord({"num-examples": outcome.total("examples")})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global parameters for the clients that score them.

        Those are all that have held-out rows; only one where these rows are the same and clients
        keep nothing of their own.
        """
        self._take(arrays, server_round + 1)
        base = to_arrays(self.base.tensors()) if self.base.terms else None
        scorers = [member for member in self.members if member.evaluates]
        personal = self.personal
        if self.pooled and not personal:
            scorers = sorted(scorers, key=lambda m: (-_size(m.manifest), m.name))[:1]
        messages = []
        for member in scorers:
            task = EvaluateTask(
                run=self.run_id,
                round=server_round,
                manifest=(member.manifest or self.manifest).hash,
                resume_round=self.client_rounds.get(member.name, 0),
                personal=personal,
            )
            content = pack(
                arrays=self._view(member, task.resume_round), base=base, config=task.record()
            )
            messages.append(Message(content, member.node, EVALUATE, group_id=str(server_round)))
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Mean of each metric, weighted by the tokens (else the examples) it was measured on.

        `scores` then holds each client's own. Clients that fail are left out; raises RoundError
        when all do.
        """
        scored = any(member.evaluates for member in self.members)
        mean, self.scores = mean_scores(server_round, replies, self.clients, needed=scored)
        return mean

    # What the method asks for.

    def frozen(self, server_round: int) -> list[str]:
        """Trained tensors that stand still in a round."""
        names = sorted(self.manifest.entries)
        return [name for name in names if not self.method.trains(name, server_round)]

    @property
    def personal(self) -> list[str]:
        """Trained tensors that stay with their client."""
        return [name for name in sorted(self.manifest.entries) if not self.method.travels(name)]

    @property
    def _has_control(self) -> bool:
        correction = self.method.correction()
        return correction is not None and correction.control

    def _control(self) -> dict[str, Tensor]:
        """The control variate c; a name without one is at zero."""
        return {
            name: state[CONTROL] for name, state in self.method_state.items() if CONTROL in state
        }

    def _take(self, arrays: ArrayRecord, server_round: int) -> None:
        self._global = params_of(arrays)
        self._views = Views(self._global, arrays, f"{self.seed}/{server_round}")

    def _view(self, member: Member, resume_round: int) -> ArrayRecord:
        """What a member gets: personal tensors only until it has its own."""
        return self._views.record(member.manifest, self.personal if resume_round else ())

    def _expected(self, member: Member) -> Expected:
        task, manifest = self.tasks[member.name], member.manifest or self.manifest
        stays = {*task.frozen, *task.personal}
        sent = {name: entry for name, entry in manifest.entries.items() if name not in stays}
        return Expected(
            task.round, replace(manifest, entries=sent), task.manifest, control=self._has_control
        )

    def _gathering(self, server_round: int) -> Gathering:
        manifests = [member.manifest or self.manifest for member in self.members]
        held = [ranks_of(manifest) for manifest in (*manifests, self.manifest)]
        most = {name: max(ranks[name] for ranks in held) for name in held[-1]}
        now = Round(server_round, self._global, self.manifest.scaling, rank=most)
        same = not self.method.properties.refactors and all(ranks == held[-1] for ranks in held)
        return Gathering(
            self.method, now, self.static, certified=self._certified(), same_coordinates=same
        )

    def _certified(self) -> bool:
        """Whether the factors of all updates are kept for the residuals."""
        entries = self.manifest.entries
        lora = [name for name in entries if is_lora_a(name) or is_lora_b(name)]
        if not lora or self.personal:  # the server never sees what is personal
            return False
        values = len(self.tasks) * sum(math.prod(entries[name].shape) for name in lora)
        return self.method.properties.variants is not None or values <= CERTIFIED_VALUES

    def _advance(self, gathering: Gathering) -> dict[str, Tensor]:
        """The new global parameters; all that the strategy keeps moves with them."""
        result = gathering.fold.result()
        terms: Mapping[str, Factors] = getattr(gathering.fold, "base", {})
        before, self.base = self.base, self.method.cumulate(self.base, terms)
        rate = self.method.server_rate(gathering.stats)
        control = self._next_control(gathering)
        stepped: dict[str, Tensor] = dict(self._global)
        state: MethodState = {name: dict(kept) for name, kept in self.method_state.items()}
        for name, value in toward(self._global, result, rate).items():
            memory = {key: kept for key, kept in state.get(name, {}).items() if key != CONTROL}
            stepped[name], state[name] = self.method.step(self._global[name], value, memory)
        for name, value in control.items():
            state.setdefault(name, {})[CONTROL] = value
        self.method_state = state
        self.manifest = at_ranks(self.manifest, ranks_in(stepped))
        if gathering.spread is not None:
            drift = gathering.spread.around(squared_distance(result, self._global))
            self.outcome.client_drift = drift
            self.outcome.update_norm = math.sqrt(squared_distance(stepped, self._global))
        if gathering.certificate is not None:
            merged = {**self.static, **self._global, **result}
            self.outcome.residual, self.outcome.residual_fedavg = gathering.certificate.residuals(
                merged, self.base.change_since(before)
            )
        return stepped

    def _next_control(self, gathering: Gathering) -> dict[str, Tensor]:
        control = self._control()
        if self._has_control:
            share = len(gathering.stats) / len(self.members)
            control |= next_control(control, gathering.control.result(), share)
        return control


def _size(manifest: Manifest | None) -> int:
    return rank_total(manifest) if manifest else 0
