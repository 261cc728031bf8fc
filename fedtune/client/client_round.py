"""One round of one client as its method wants it, whatever Trainer it is trained with.

load     what was sent, and what the client kept
begin    let some of it stand still, remember the rest
apply    once per optimizer step: add the correction to the gradients
finish   what goes back, and what is kept until the client's next round
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedtune.adapters import Manifest, collect, load
from fedtune.adapters.names import trainable_tensors
from fedtune.adapters.sharded import is_sharded, is_spread
from fedtune.client.corrections import ControlVariates, GradientCorrection, make_correction
from fedtune.client.memory import Kept
from fedtune.client.replies import Sent
from fedtune.errors import ConfigError, ManifestError
from fedtune.transport.messages import EvaluateTask, RoundTask

__all__ = ["ClientRound", "Outgoing", "completed", "refuse_fp16", "refuse_own_weights", "remembers"]


class Outgoing(NamedTuple):
    """What a client sends back, and what it keeps; `kept` is None where nothing has to be."""

    params: dict[str, Tensor]
    control_change: Mapping[str, Tensor]
    kept: Kept | None


class ClientRound:
    """What has to happen in the model during a round.

    Args:
        kept: what this client kept from its last round that counted.
    """

    def __init__(self, task: RoundTask, sent: Sent, kept: Kept, manifest: Manifest) -> None:
        self._task, self._sent, self._manifest = task, sent, manifest
        self._params = completed(sent.params, kept, task.personal)
        self._correction = _correction(task, sent, kept)
        self._still: dict[str, Tensor] = {}
        self._guards: list[RemovableHandle] = []

    def load(self, model: nn.Module) -> None:
        """Put the round's parameters into the model. Raises ManifestError when they are others."""
        load(model, self._params, self._manifest, base=self._sent.base)

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        """Before the first step, with the parameters in place.

        Raises:
            ConfigError: the training is sharded, and the method needs whole tensors; or the
                optimizer has weights of its own.
        """
        refuse_own_weights(optimizer)
        live = trainable_tensors(model)
        still = {*self._task.frozen, *self._manifest.static}
        self._still = {name: tensor for name, tensor in live.items() if name in still}
        if (self._still or self._correction) and is_sharded(model):
            raise ConfigError(
                "--strategy: expected whole parameters at the client, found them sharded (FSDP, "
                "DeepSpeed). Train whole, or use a method without correction and frozen factors."
            )
        for parameter in self._still.values():
            parameter.grad = None
            if is_spread():  # DDP waits for the gradients of all that it found when it was made
                guard: Any = parameter.register_hook
                self._guards.append(guard(torch.zeros_like))
            else:  # PEFT lets a whole adapter train again once it was off for a reference (DPO)
                guard = parameter.register_post_accumulate_grad_hook
                self._guards.append(guard(_drop_gradient))
                parameter.requires_grad_(False)
        if self._task.new_factors:
            optimizer.state.clear()
        if self._correction is not None:
            self._correction.begin(model, {*self._still, *self._task.personal})

    def apply(self) -> None:
        """After clipping, before the optimizer's step."""
        for parameter in self._still.values():
            parameter.grad = None
        if self._correction is not None:
            self._correction.apply()

    def finish(self, model: nn.Module, *, collects: bool = True) -> Outgoing:
        """After the last step; `collects`: whether this process has to know the parameters."""
        collected = collect(model) if collects else {}
        trained = {name: value for name, value in collected.items() if name not in self._still}
        self.end()
        personal = {name: trained.pop(name) for name in self._task.personal if name in trained}
        own: Mapping[str, Tensor] = {}
        change: Mapping[str, Tensor] = {}
        if isinstance(self._correction, ControlVariates):
            own, change = self._correction.finish()
        return Outgoing(trained, change, Kept(own, personal) if remembers(self._task) else None)

    def end(self) -> None:
        """Let everything train again."""
        for guard in self._guards:
            guard.remove()
        for parameter in self._still.values():
            parameter.requires_grad_(True)
        self._guards, self._still = [], {}


def remembers(task: RoundTask | EvaluateTask) -> bool:
    """Whether the client keeps something of its own from round to round."""
    return bool(task.personal) or getattr(task, "correction", "") == "scaffold"


def completed(params: Mapping[str, Tensor], kept: Kept, personal: list[str]) -> dict[str, Tensor]:
    """The parameters that were sent, with the client's own where it has them.

    Raises:
        ManifestError: a personal one was neither sent nor kept.
    """
    whole = {**params, **{name: kept.personal[name] for name in personal if name in kept.personal}}
    missing = [name for name in personal if name not in whole]
    if missing:
        raise ManifestError(
            f"`{missing[0]}`: expected this client's own from an earlier round, found none. "
            "Start again with --overwrite, or submit a new run."
        )
    return {name: whole[name] for name in sorted(whole)}


def refuse_fp16(task: RoundTask, args: Any) -> None:
    """Raises ConfigError where the loss scaler may leave out steps that the method counts on."""
    if args.fp16 and task.correction == "scaffold":
        raise ConfigError(
            "--strategy scaffold: expected every step to be taken, received --fp16, whose loss "
            "scaler leaves some out. Use --bf16."
        )


def refuse_own_weights(optimizer: Any) -> None:
    """Raises ConfigError for a schedule-free optimizer, whatever made it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
        raise ConfigError(
            f"optimizer: expected one that trains the model's weights, received "
            f"{type(inner).__name__}, which keeps weights of its own that no round would send. Use "
            "adamw_torch."
        )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _correction(task: RoundTask, sent: Sent, kept: Kept) -> GradientCorrection | None:
    if not task.correction:
        return None
    settings = json.loads(task.correction_settings)
    return make_correction(task.correction, settings, sent.control, kept.control)
