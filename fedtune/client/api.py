"""Rounds for code that is no Trainer: `init`, then `receive` and `send` in a loop of its own.

fedtune.init()
while (update := fedtune.receive()) is not None:
    if update.is_final:
        break
    params, rows = train(update.params)
    fedtune.send(params, num_examples=rows)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from fedtune.adapters import FULL, Entry, Manifest, check
from fedtune.adapters.manifest import digest
from fedtune.client import replies
from fedtune.client.codec_link import CodecLink
from fedtune.client.failing import told
from fedtune.client.refusal import note_refusal
from fedtune.client.session import Request, Session
from fedtune.errors import ConfigError, FedtuneError, ManifestError, RoundError
from fedtune.relay.folder import ENVIRONMENT, RunFolder, SitePlan
from fedtune.transport import messages
from fedtune.transport.messages import RoundTask
from fedtune.transport.records import config_of

__all__ = ["GlobalUpdate", "init", "is_running", "receive", "send"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GlobalUpdate:
    """The global parameters at the start of a round, or at the end of the run.

    Attributes:
        params: tensors on the CPU by canonical name.
        round: 1 to `num_rounds`; of the final ones the last round of the run.
        config: the server's task: steps, epochs, seed and so on.
        is_final: whether these are the run's result; they need no `send`.
    """

    params: dict[str, Tensor]
    round: int
    num_rounds: int
    config: dict[str, Any]
    is_final: bool = False


def init(params: Mapping[str, Tensor] | None = None) -> None:
    """Take part in the run that `fedtune join` started this script for.

    Args:
        params: the run's first parameters, when it should start from this site; without them it
            starts from another site or from `fedtune submit --init_adapter`.

    Raises:
        ConfigError: this script was not started by `fedtune join`, or something else in it takes
            part in the same run.
    """
    global _client
    folder = RunFolder.of_environment()
    if folder is None:
        raise ConfigError(
            f"init: expected a script that fedtune join started, received no {ENVIRONMENT}. Start "
            "it with fedtune join, or ask fedtune.is_running() first."
        )
    if _client is not None:
        _client.session.close()
        _client = None
    plan = folder.plan
    if plan is None:
        raise ConfigError(
            f"{ENVIRONMENT}: expected the folder of a run, received {folder.path}, which has no "
            "plan. Start the script with fedtune join."
        )
    link = CodecLink(folder.path / "transport", lambda: _copies(params or {}))
    _client = _Client(Session(folder, link), plan, params)


def is_running() -> bool:
    """Whether there is, or will be, something to receive: a round, or the run's result.

    After `init` this waits for the server when it is its turn. Before it, and without
    `fedtune join`, it says at once whether there is a run.
    """
    if _client is not None:
        return _client.look()
    if RunFolder.of_environment() is not None:
        return True
    log.warning("fedtune: not started by fedtune join, so there is no run to take part in.")
    return False


def receive() -> GlobalUpdate | None:
    """Wait for the next round; after the last one the final parameters, once, then None.

    Raises:
        ConfigError: before `init`.
        RoundError: the round before was not answered with `send`, the run has failed, or the
            server was silent for too long.
        ManifestError: the run's parameters are not those given to `init`.
    """
    return _initialized("receive").receive()


def send(
    params: Mapping[str, Tensor],
    *,
    num_examples: int,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Answer the round that was received; what answers the final parameters is dropped.

    Args:
        params: the updated tensors: names, shapes and dtypes as received.
        num_examples: rows trained on.
        metrics: `num_tokens` (else the examples count as tokens), `num_steps` (else those
            planned, at least 1), `train_loss` (else NaN); others are not sent.

    Raises:
        ConfigError: before `init`.
        RoundError: no round was received.
        ManifestError: the parameters are not those of the run; send them again.
    """
    _initialized("send").send(dict(params), num_examples, dict(metrics or {}))


def _copies(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What may be on a GPU, or share memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in params.items()}


class _Client:
    def __init__(
        self, session: Session, plan: SitePlan, params: Mapping[str, Tensor] | None
    ) -> None:
        self.session, self._plan = session, plan
        self._params = None if params is None else {k: v.cpu() for k, v in params.items()}
        self._manifest = None if self._params is None else _manifest_of(self._params)
        self._next: Request | None = None  # a round that is known, but was not received yet
        self._round: Request | None = None  # received, but not answered yet
        self._started = 0.0
        self._task = RoundTask(
            plan.run, 0, plan.num_rounds, 1, "", plan.steps, plan.epochs, plan.carry, plan.seed
        )
        self._final: GlobalUpdate | None = None  # the run's result, not received yet
        self._has_final = False  # it was received
        self._reason = ""

    def look(self) -> bool:
        """Whether a round or the result is at hand; waits for the server's word if need be."""
        while not (self._round or self._next or self._reason):
            request = self.session.next(self._plan.idle_timeout_s)
            try:
                self._take(request)
            except FedtuneError as error:
                request.fail(told(error))
                if request.kind == messages.SETUP:
                    note_refusal(self.session.folder, error)
                    self.session.close()
                    raise
                log.error("%s: %s", request.kind, error)
        return not self._reason or self._final is not None

    def receive(self) -> GlobalUpdate | None:
        if self._round is not None:
            raise RoundError(
                "receive: expected fedtune.send for the round received before, received none. "
                "Call it first."
            )
        if not self.look():
            if self._reason.startswith("failed"):
                raise RoundError(f"run {self._plan.run}: {self._reason}.")
            return None
        if self._final is not None:
            final, self._final, self._has_final = self._final, None, True
            return final
        self._round, self._next = self._next, None
        assert self._round is not None
        content = self._round.content
        task = self._task = RoundTask.of(content)
        self._started = time.perf_counter()
        self.session.say("training", round=task.round)
        config = dict(config_of(content))
        return GlobalUpdate(messages.arrays_of(content), task.round, task.num_rounds, config)

    def send(self, params: dict[str, Tensor], num_examples: int, metrics: dict[str, float]) -> None:
        if self._has_final:
            log.warning("fedtune: the run is over (%s), so nothing is sent.", self._reason)
            return
        if self._round is None:
            raise RoundError("send: expected a received round, received none. Call receive first.")
        task = RoundTask.of(self._round.content)
        params = {name: params[name].detach().cpu() for name in sorted(params)}
        check(params, _manifest_of(messages.arrays_of(self._round.content)))
        result = replies.LocalResult(
            params=params,
            num_examples=num_examples,
            num_tokens=int(metrics.get("num_tokens", num_examples)),
            num_steps=int(metrics.get("num_steps", max(task.steps, 1))),
            train_loss=float(metrics.get("train_loss", float("nan"))),
            train_s=time.perf_counter() - self._started,
        )
        self._round.reply(replies.trained(self._plan.client, task, result))
        self._round = None
        self.session.say("waiting", round=task.round)

    def _take(self, request: Request) -> None:
        answer = self._answer(request)
        if answer is not None:
            request.reply(answer)
        if self._reason:
            self.session.finish(self._reason)

    def _answer(self, request: Request) -> RecordDict | None:
        client, content = self._plan.client, request.content
        match request.kind:
            case messages.PLAN:
                return replies.planned(client, evaluates=False, manifest=self._manifest)
            case messages.INITIAL:
                if self._params is None or self._manifest is None:
                    raise ManifestError(
                        f"{client}: expected first parameters in fedtune.init(params), received "
                        "none. Give them, or submit the run with --init_adapter."
                    )
                return replies.initial(self._params, {}, self._manifest)
            case messages.SETUP:
                manifest = replies.manifest_of(content)
                if self._manifest is not None:
                    replies.agree(manifest, self._manifest)
                self._manifest = manifest
                return replies.set_up(client)
            case messages.TRAIN:
                task = RoundTask.of(content)
                self._hold_to_plan(task)
                _refuse_more(task)
                params = messages.arrays_of(content)
                check(params, self._manifest or _manifest_of(params))
                self._next = request
                return None
            case messages.FINISH:
                self._reason = str(config_of(content).get("reason", messages.DONE))
                if not self._reason.startswith("failed"):
                    self._final = self._result(content)
                return replies.finished(client)
        raise RoundError(f"{client}: expected a round, received {request.kind!r}.")

    def _result(self, content: RecordDict) -> GlobalUpdate | None:
        """What came with the server's last word; nothing, if no round was finished."""
        params = messages.arrays_of(content)
        if not params:
            return None
        check(params, self._manifest or _manifest_of(params))
        number = int(config_of(content)["round"])  # type: ignore[arg-type]
        config = {**asdict(self._task), "round": number}
        return GlobalUpdate(params, number, self._plan.num_rounds, config, is_final=True)

    def _hold_to_plan(self, task: RoundTask) -> None:
        """The site's limits were held against the plan; no round may ask for more."""
        plan = self._plan
        planned = 1 <= task.round <= plan.num_rounds
        if not planned or (task.steps, task.epochs) != (plan.steps, plan.epochs):
            raise RoundError(
                f"{plan.client}: expected a round of {plan.num_rounds} with {plan.steps} steps, "
                f"{plan.epochs:g} epochs as planned, received round {task.round} with {task.steps} "
                f"steps, {task.epochs:g} epochs. Submit a new run."
            )


def _refuse_more(task: RoundTask) -> None:
    """A script of its own gets parameters and returns parameters."""
    if task.frozen or task.personal or task.correction or task.adds_to_base:
        raise RoundError(
            "receive: expected a method that needs nothing but parameters, received one that "
            "freezes, keeps, corrects or adds to the base at the client. Use fedtune.patch with a "
            "Trainer, or submit the run with --strategy fedavg."
        )


_client: _Client | None = None


def _initialized(what: str) -> _Client:
    if _client is None:
        raise ConfigError(f"{what}: expected fedtune.init() before, received none. Call it first.")
    return _client


def _manifest_of(params: Mapping[str, Tensor]) -> Manifest:
    """Plain tensors: nothing is known of a model."""
    entries = {name: Entry.of(params[name]) for name in sorted(params)}
    return Manifest(
        peft_type=FULL,
        base_hash=digest("fedtune.init"),
        adapter_config={},
        entries=entries,
        export={name: name for name in entries},
    )
