"""What a model really sees: rows, label tokens, optimizer steps and tensors, from hooks below them.

Nothing of fedtune is asked. A forward hook reads the batches as they enter the model, a hook of
torch's optimizers reads the learning rate and what a step has made of the trained tensors. Which
arm and which client a Trainer is of, its output directory says.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer

IGNORED = -100
FOLDER = "FEDTUNE_TEST_RECORDS"  # where processes that this one starts leave what they recorded

Tensors = dict[str, Tensor]
Row = tuple[int, ...]


@dataclass
class Micro:
    """One batch: token ids of each row without padding, and the labels that the loss sees."""

    rows: list[Row]
    label_tokens: int


@dataclass
class Step:
    """One optimizer step."""

    before: Tensors
    micros: list[Micro] = field(default_factory=list)
    after: Tensors = field(default_factory=dict)
    lr: float = 0.0

    @property
    def rows(self) -> list[Row]:
        return [row for micro in self.micros for row in micro.rows]

    @property
    def label_tokens(self) -> int:
        return sum(micro.label_tokens for micro in self.micros)


@dataclass
class Train:
    """One call of `Trainer.train`: the steps it made."""

    place: str  # output directory of the Trainer
    steps: list[Step] = field(default_factory=list)
    evaluations: int = 0


@dataclass
class Recording:
    """Every call of `train` in the order in which they began, and the models they trained."""

    trains: list[Train] = field(default_factory=list)
    models: dict[str, nn.Module] = field(default_factory=dict)  # by place; not those of children


@contextmanager
def recorded(stop_in: int = 0) -> Iterator[Recording]:
    """Record every Trainer of this process while entered.

    `stop_in`: the number of a call of `train()`, from 1, that is interrupted after a step.
    """
    recorder = _Recorder(stop_in)
    undo = recorder.install()
    try:
        yield recorder.recording
    finally:
        undo()


def record_in_child() -> None:
    """Record this process if one that records has started it; saved when it ends."""
    if FOLDER not in os.environ:
        return
    recorder = _Recorder()
    recorder.install()

    def save() -> None:
        path = Path(os.environ[FOLDER]) / f"{os.getpid()}.pt"
        torch.save(recorder.recording.trains, path)

    atexit.register(save)


def load_children(folder: Path) -> list[Train]:
    """What the processes have left."""
    files = sorted(folder.glob("*.pt"))
    return [train for file in files for train in torch.load(file, weights_only=False)]


class _Recorder:
    def __init__(self, stop_in: int = 0) -> None:
        self.recording, self._stop_in = Recording(), stop_in
        self._trains: list[tuple[Trainer, Train]] = []
        self._micro: Micro | None = None
        self._hooked: set[int] = set()

    def install(self) -> Any:
        train, training_step = Trainer.train, Trainer.training_step
        recorder = self

        def recorded_train(trainer: Trainer, *args: Any, **kw: Any) -> Any:
            now = Train(str(trainer.args.output_dir))
            recorder.recording.trains.append(now)
            recorder.recording.models[now.place] = trainer.model
            recorder._trains.append((trainer, now))
            try:
                return train(trainer, *args, **kw)
            finally:
                recorder._trains.pop()

        def recorded_step(trainer: Trainer, model: Any, inputs: Any, *args: Any, **kw: Any) -> Any:
            return recorder._in_micro(trainer, training_step, model, inputs, *args, **kw)

        Trainer.train, Trainer.training_step = recorded_train, recorded_step
        handle = register_optimizer_step_post_hook(self._after_step)

        def undo() -> None:
            Trainer.train, Trainer.training_step = train, training_step
            handle.remove()

        return undo

    def _in_micro(self, trainer: Trainer, training_step: Any, *args: Any, **kw: Any) -> Any:
        self._hook(trainer.model)
        now = self._trains[-1][1]
        if now.steps and len(self.recording.trains) == self._stop_in:
            self._stop_in = 0
            raise KeyboardInterrupt
        if not now.steps or now.steps[-1].after:
            now.steps.append(Step(_trained(trainer.model)))
        self._micro = Micro([], 0)
        try:
            return training_step(trainer, *args, **kw)
        finally:
            now.steps[-1].micros.append(self._micro)
            self._micro = None

    def _hook(self, model: nn.Module) -> None:
        if id(model) in self._hooked:
            return
        self._hooked.add(id(model))
        model.register_forward_pre_hook(self._on_rows, with_kwargs=True)
        innermost(model).register_forward_pre_hook(self._on_labels, with_kwargs=True)

    def _on_rows(self, module: nn.Module, args: Any, kw: dict[str, Any]) -> None:
        if self._micro is not None and not self._micro.rows:
            self._micro.rows = split_rows(kw)

    def _on_labels(self, module: nn.Module, args: Any, kw: dict[str, Any]) -> None:
        if self._micro is not None and kw.get("labels") is not None:
            self._micro.label_tokens = int((seen_labels(kw["labels"]) != IGNORED).sum())

    def _after_step(self, optimizer: Optimizer, args: Any, kw: Any) -> None:
        if not self._trains:
            return
        trainer, now = self._trains[-1]
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in owned for p in trainer.model.parameters()):
            now.steps[-1].after = _trained(trainer.model)
            now.steps[-1].lr = float(optimizer.param_groups[0]["lr"])


def innermost(model: nn.Module) -> nn.Module:
    """The model that computes logits from embeddings, below any adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def seen_labels(labels: Tensor) -> Tensor:
    """Labels that a loss compares with a prediction: a causal one predicts from position 1 on."""
    return labels[..., 1:] if labels.dim() > 1 else labels


def split_rows(inputs: dict[str, Any]) -> list[Row]:
    """Token ids of each row, without padding, also where rows lie in one line."""
    ids, mask, positions = (inputs.get(k) for k in ("input_ids", "attention_mask", "position_ids"))
    if mask is not None:
        return [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]
    assert positions is not None
    assert len(ids) == 1
    starts = [*torch.nonzero(positions[0] == 0).flatten().tolist(), ids.shape[1]]
    rows = [tuple(ids[0, a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]
    labels = inputs["labels"][0]
    padding = [
        b - a == 1 and labels[a] == IGNORED and ids[0, a] == 0
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    return [row for row, pad in zip(rows, padding, strict=True) if not pad]


def _trained(model: nn.Module) -> Tensors:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
