"""One process's share of a simulation: the base model once, one Trainer per client around it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
    warn_of_half_precision,
)
from fedtune.adapters.beside import Beside, beside
from fedtune.adapters.names import has_adapter
from fedtune.client.client_round import completed, remembers
from fedtune.client.declared import declared, within
from fedtune.client.local import MEMORY, evaluate, evaluate_base, steps_of, train_round
from fedtune.client.memory import ClientMemory
from fedtune.client.replies import LocalResult, Sent, agree
from fedtune.client.score import Score
from fedtune.client.undisturbed import get_rng, set_rng
from fedtune.config import Arguments
from fedtune.data.embeddings import check_trainer_tokens
from fedtune.data.usage import Given, Usage, usage_of
from fedtune.errors import ConfigError
from fedtune.strategies.lora.manifests import at_ranks
from fedtune.strategies.lora.padding import cut, widen
from fedtune.transport.messages import UNKNOWN, Declared, EvaluateTask, PlanTask, RoundTask

__all__ = ["BuildModel", "BuildTrainer", "Worker"]

STATIC = "static.safetensors"

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
    _beside: Beside = field(default_factory=Beside, repr=False)
    _static: dict[str, Tensor] | None = field(default=None, init=False, repr=False)
    _trainers: dict[str, Trainer] = field(default_factory=dict, init=False, repr=False)
    _rng: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _declared: dict[str, Declared] = field(default_factory=dict, init=False, repr=False)

    def fork(self, *, work_dir: Path, train: dict[str, Dataset] | None = None) -> Worker:
        """A worker over the same live model, with Trainers and arguments of its own.

        `train`: of some of the clients; they keep their ranks.
        """
        args, rows = copy.copy(self.args), train or self.train
        args.training = copy.deepcopy(self.args.training)
        if args.adapter.ranks is not None:
            ranks = ",".join(str(self.ranks[name]) for name in rows)
            args.adapter = replace(args.adapter, client_ranks=ranks)
        return Worker(
            self.build_model,
            self.build_trainer,
            args,
            rows,
            self.evaluation,
            work_dir,
            self._build(),
            self._beside,
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
            self._beside = _beside(*self._live)
            keep_trainable(self._live[0])
            warn_of_half_precision(self._live[0])
        return self._live

    @property
    def model(self) -> nn.Module:
        """The live model; all clients of this process share it."""
        return self._build()[0]

    @property
    def beside(self) -> Beside:
        """What a full model needs beside its weights, as it was before a Trainer changed it."""
        self._build()
        return self._beside

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to it."""
        return self._build()[1]

    @cached_property
    def manifest(self) -> Manifest:
        """What this model trains, as the server and the other clients must see it."""
        return describe(self.model)

    def manifest_of(self, client: str) -> Manifest:
        """What a client trains: the live adapter, at the client's rank."""
        if self.args.adapter.ranks is None:
            return self.manifest
        return at_ranks(self.manifest, self.ranks[client])

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each client: `--client_ranks` in the order of the clients, else one for all."""
        given = self.args.adapter.ranks or [self.args.adapter.lora_r] * len(self.train)
        return dict(zip(self.train, given, strict=True))

    @property
    def names(self) -> list[str]:
        """Clients in the order of the simulation's nodes."""
        return list(self.train)

    @property
    def evaluator(self) -> str:
        """The client whose Trainer holds the held-out set: one that has the highest rank."""
        return min(self.train, key=lambda name: (-self.ranks[name], name))

    def initial(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and static tensors as built, before any training."""
        return collect(self.model), collect_static(self.model)

    def set_up(self, client: str, manifest: Manifest, static: dict[str, Tensor]) -> None:
        """Agree with the server on the adapter; keeps the static tensors for later processes."""
        agree(manifest, self.manifest_of(client))
        if static:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            save_file(static, self.work_dir / STATIC)
            self._static = static
            load_static(self.model, static, self._agreed(self.manifest))

    def declare(self, client: str, plan: PlanTask) -> Declared:
        """What this client can train in a round, as far as that is known without building it."""
        trainer = self._trainers.get(client)
        found = Declared(rows=len(self.train[client]))
        if trainer is not None:
            found = declared(trainer, steps_of(trainer, plan.steps, plan.epochs))
        self._declared[client] = found
        return found

    def train_round(self, client: str, task: RoundTask, sent: Sent) -> LocalResult:
        """Train one client's part of a round."""
        trainer = self.trainer(client)
        if not task.resume_round:
            set_rng(self._rng[client])
        live, own = self._agreed(self.manifest), self._agreed(self.manifest_of(client))
        result = train_round(
            trainer,
            task,
            Sent(self._widened(sent.params), sent.base, sent.control),
            live,
            client=client,
            state_dir=self.work_dir / client,
        )
        shapes = {name: entry.shape for name, entry in own.entries.items()}
        result = replace(result, params=cut(result.params, shapes))
        return within(result, self._declared.get(client, UNKNOWN))

    def base_loss(self) -> float | None:
        """Held-out loss of the base model alone; to be asked before anything is trained."""
        return evaluate_base(self.trainer(self.evaluator))

    def evaluate(self, client: str, task: EvaluateTask, sent: Sent) -> Score:
        """Score of what was sent, with what the client keeps for itself."""
        trainer = self.trainer(self.evaluator)
        memory = ClientMemory(self.work_dir / client / MEMORY)
        kept = memory.read(task.resume_round if remembers(task) else 0)
        params = completed(self._widened(sent.params), kept, task.personal)
        return evaluate(trainer, Sent(params, sent.base), self._agreed(self.manifest))

    def at_rank_of(self, client: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the live adapter with the ranks that a client does not have at zero."""
        entries = self.manifest_of(client).entries
        return self._widened(cut(params, {name: entry.shape for name, entry in entries.items()}))

    def own(self, client: str) -> dict[str, Tensor]:
        """The live parameters, at the rank of a client."""
        shapes = {name: entry.shape for name, entry in self.manifest_of(client).entries.items()}
        return cut(collect(self.model), shapes)

    def personal(self, client: str, server_round: int) -> dict[str, Tensor]:
        """The parameters that stay with a client, as after one of its rounds."""
        return dict(ClientMemory(self.work_dir / client / MEMORY).read(server_round).personal)

    def _agreed(self, manifest: Manifest) -> Manifest:
        """With that frozen which the run has sent once."""
        if self._static is None:
            file = self.work_dir / STATIC
            self._static = load_file(file) if file.is_file() else {}
        return manifest.frozen(self._static)

    def _widened(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the live adapter holds it, which has the highest rank of all clients."""
        if self.args.adapter.ranks is None:
            return dict(params)
        return widen(params, {name: entry.shape for name, entry in self.manifest.entries.items()})

    def trainer(self, client: str) -> Trainer:
        """This client's Trainer, built on first use; static tensors are loaded then."""
        if client not in self._trainers:
            evaluation = self.evaluation if client == self.evaluator else None
            self._trainers[client] = self._checked(client, evaluation)
            self._rng[client] = get_rng()
            # Every train() collects garbage; what lives as long as the worker need not be visited.
            gc.freeze()
            agreed = self._agreed(self.manifest)
            if self._static:
                load_static(self.model, self._static, agreed)
        return self._trainers[client]

    def usage(self, client: str) -> Usage:
        """What this client's Trainer learns from."""
        trainer, rows = self.trainer(client), self.train[client]
        return _usage(trainer, trainer.train_dataset, len(rows), "train")

    def held_out_usage(self) -> Usage:
        """What the held-out rows are scored on."""
        trainer = self.trainer(self.evaluator)
        return _usage(trainer, trainer.eval_dataset, len(self.evaluation), "eval")

    def _checked(self, client: str, evaluation: Dataset | None) -> Trainer:
        trainer = self.new_trainer(self.train[client], evaluation, client)
        rows = len(self.train[client])
        _usage(trainer, trainer.train_dataset, rows, "train").check(f"training rows of {client}")
        if evaluation is not None:
            _usage(trainer, trainer.eval_dataset, len(evaluation), "eval").check("held-out rows")
        return trainer

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
        check_trainer_tokens(trainer)
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        return trainer


def _beside(model: nn.Module, tokenizer: Any) -> Beside:
    """Nothing for an adapter, which has all of it at its base."""
    full = not has_adapter(model) and hasattr(model, "config")
    return beside(model, tokenizer) if full else Beside()


def _usage(trainer: Trainer, rows: Any, count: int, name: str) -> Usage:
    """Usage of one of the Trainer's sets; what a recipe did to its rows stands on the settings."""
    given = getattr(trainer.args, "rows_given", {}).get(name, Given())
    packed = bool(getattr(trainer.args, "packing", False))
    return usage_of(rows, count, given, packed=packed)
