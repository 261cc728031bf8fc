"""One process's share of a simulation: the base model once, one Trainer per client around it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, set_seed

from fedtune.adapters import (
    Manifest,
    collect,
    collect_static,
    describe,
    keep_trainable,
    load_static,
)
from fedtune.client.counter import HeldOut, held_out
from fedtune.client.local import evaluate, train_round
from fedtune.client.replies import LocalResult, agree
from fedtune.client.undisturbed import get_rng, set_rng
from fedtune.config import Arguments
from fedtune.errors import ConfigError
from fedtune.transport.messages import RoundTask

__all__ = ["BuildModel", "BuildTrainer", "Worker"]

BuildModel = Callable[[Arguments], tuple[nn.Module, Any]]
BuildTrainer = Callable[[Arguments, nn.Module, Any, Dataset, Dataset | None], Trainer]


@dataclass
class Worker:
    """Builds what the recipe's two functions describe, once, and trains clients one at a time.

    Attributes:
        build_model: recipe function: model and tokenizer; called once per process.
        build_trainer: recipe function: a Trainer; called once per client.
        train: rows of each client, by name.
        evaluation: the pooled held-out rows.
        work_dir: where clients keep their state.
    """

    build_model: BuildModel
    build_trainer: BuildTrainer
    args: Arguments
    train: dict[str, Dataset]
    evaluation: Dataset
    work_dir: Path
    _live: tuple[nn.Module, Any] | None = field(default=None, repr=False)
    _trainers: dict[str, Trainer] = field(default_factory=dict, init=False, repr=False)
    _rng: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def fork(self, *, work_dir: Path, train: dict[str, Dataset] | None = None) -> Worker:
        """A worker over the same live model, with Trainers and arguments of its own."""
        args = copy.copy(self.args)
        args.training = copy.deepcopy(self.args.training)
        return Worker(
            self.build_model,
            self.build_trainer,
            args,
            train or self.train,
            self.evaluation,
            work_dir,
            self._build(),
        )

    def blank(self) -> Worker:
        """A worker that has built nothing yet, for another process."""
        return Worker(
            self.build_model,
            self.build_trainer,
            self.args,
            self.train,
            self.evaluation,
            self.work_dir,
        )

    def release(self) -> None:
        """Let go of the model and the Trainers; they are built again when asked for."""
        self._live = None
        self._trainers.clear()
        self._rng.clear()

    def _build(self) -> tuple[nn.Module, Any]:
        if self._live is None:
            set_seed(self.args.training.seed)
            self._live = self.build_model(self.args)
            keep_trainable(self._live[0])
        return self._live

    @property
    def model(self) -> nn.Module:
        """The live model; all clients of this process share it."""
        return self._build()[0]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to it."""
        return self._build()[1]

    @cached_property
    def manifest(self) -> Manifest:
        """What this model trains, as the server and the other clients must see it."""
        return describe(self.model)

    @property
    def names(self) -> list[str]:
        """Clients in the order of the simulation's nodes."""
        return list(self.train)

    @property
    def evaluator(self) -> str:
        """The client whose Trainer holds the held-out set."""
        return min(self.train)

    def initial(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and static tensors as built, before any training."""
        return collect(self.model), collect_static(self.model)

    def set_up(self, manifest: Manifest, static: dict[str, Tensor]) -> None:
        """Agree with the server on the adapter; keeps the static tensors for later processes."""
        agree(manifest, self.manifest)
        if static:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            save_file(static, self.work_dir / "static.safetensors")
            load_static(self.model, static, self.manifest)

    def train_round(self, client: str, task: RoundTask, params: dict[str, Tensor]) -> LocalResult:
        """Train one client's part of a round."""
        trainer = self.trainer(client)
        if not task.resume_round:
            set_rng(self._rng[client])
        return train_round(
            trainer, task, params, self.manifest, client=client, state_dir=self.work_dir / client
        )

    def evaluate(self, params: dict[str, Tensor]) -> tuple[dict[str, float], HeldOut]:
        """Metrics of the global parameters on the held-out rows, and how many of them there are."""
        trainer = self.trainer(self.evaluator)
        metrics = evaluate(trainer, params, self.manifest)
        return metrics, HeldOut(len(self.evaluation), held_out(trainer).tokens)

    def trainer(self, client: str) -> Trainer:
        """This client's Trainer, built on first use; static tensors are loaded then."""
        if client not in self._trainers:
            evaluation = self.evaluation if client == self.evaluator else None
            self._trainers[client] = self.new_trainer(self.train[client], evaluation, client)
            self._rng[client] = get_rng()
            # Every train() collects garbage; what lives as long as the worker need not be visited.
            gc.freeze()
            static = self.work_dir / "static.safetensors"
            if static.is_file():
                load_static(self.model, load_file(static), self.manifest)
        return self._trainers[client]

    def new_trainer(self, train: Dataset, evaluation: Dataset | None, name: str) -> Trainer:
        """A Trainer over the shared model, quiet, writing below `work_dir/name`."""
        args = copy.copy(self.args)
        args.training = copy.deepcopy(self.args.training)
        args.training.output_dir = str(self.work_dir / name)
        trainer = self.build_trainer(args, self.model, self.tokenizer, train, evaluation)
        if trainer.optimizer is not None or trainer.lr_scheduler is not None:
            raise ConfigError(
                "build_trainer: expected a Trainer that makes its own optimizer in every round, "
                "received one with optimizers=(...). Use --optim and --lr_scheduler_type, or "
                "override create_optimizer."
            )
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        return trainer
