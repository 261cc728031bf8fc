"""A small federation: a random Llama with LoRA, random rows, the two functions of a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedtune._flower.task_message import task_identity
from fedtune.client.app import client_app
from fedtune.client.worker import Worker
from fedtune.config import (
    AdapterArguments,
    Arguments,
    DataArguments,
    FederationArguments,
    ModelArguments,
    RunArguments,
    TransportArguments,
)
from fedtune.engines.inline import InlineGrid, run_inline
from fedtune.server.app import ServerRun, server_app
from fedtune.server.checkpoint import ServerState
from fedtune.server.plan import Plan
from fedtune.server.rounds.central import CentralRounds
from fedtune.server.rounds.exchange import DirectExchange
from fedtune.server.rounds.workflow import Setting
from fedtune.server.run_rounds import RoundHook
from fedtune.strategies import Method
from fedtune.strategies.method import Part
from fedtune.transport.grid import EagerGrid
from tests.methods import method_of
from tests.tiny import tiny_llama, tokens

ROUNDS, STEPS = 3, 4


def small_rows(rows: int = 13, seed: int = 0) -> Dataset:
    """Rows of 12 random tokens; 13 rows in batches of 2 make 7 batches, the last one short."""
    ids = tokens(rows, seed=seed)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def training_arguments(directory: Path | str, cls: type = TrainingArguments, **given: Any) -> Any:
    """Cosine with warmup, a log line per step, nothing saved or evaluated by the Trainer itself."""
    return cls(
        **{
            "output_dir": str(directory),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "data_seed": 42,
            **given,
        }
    )


def arguments(
    training: Any, *, dropout: float = 0.1, run: dict[str, Any] | None = None, **federation: Any
) -> Arguments:
    """Arguments of a run; keywords are those of the federation."""
    given = {"num_rounds": ROUNDS, "steps_per_round": STEPS, **federation}
    return Arguments(
        model=ModelArguments(),
        adapter=AdapterArguments(lora_dropout=dropout),
        data=DataArguments(),
        federation=FederationArguments(**given),
        transport=TransportArguments(),
        run=RunArguments(**(run or {})),
        training=training,
    )


def build_model(args: Arguments) -> tuple[nn.Module, None]:
    """A tiny Llama with LoRA on q and v."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=args.adapter.lora_dropout,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    base = tiny_llama(1)
    torch.manual_seed(args.training.seed)
    return get_peft_model(base, config), None


def build_trainer(
    args: Arguments, model: nn.Module, tokenizer: Any, train: Dataset, evaluation: Dataset | None
) -> Trainer:
    """A plain Trainer."""
    return Trainer(model=model, args=args.training, train_dataset=train, eval_dataset=evaluation)


def small_worker(
    directory: Path,
    *,
    clients: int = 1,
    same_rows: bool = False,
    dropout: float = 0.1,
    rows: int = 13,
    build_trainer: Any = build_trainer,
    training: Any = None,
    **given: Any,
) -> Worker:
    """A worker over `clients` clients; `given` are TrainingArguments."""
    args = arguments(training or training_arguments(directory, **given), dropout=dropout)
    train = {f"client-{k}": small_rows(rows, seed=0 if same_rows else k) for k in range(clients)}
    return Worker(build_model, build_trainer, args, train, small_rows(6, seed=99), directory)


PLAN = Plan(run="42", num_rounds=ROUNDS, steps=STEPS, epochs=0.0, carry=True, seed=42)


def nothing(state: ServerState, record: dict[str, Any]) -> None:
    """A round hook that keeps nothing."""


def server_run(
    clients: int,
    *,
    method: Method | Part | None = None,
    on_round: RoundHook = nothing,
    start: ServerState | None = None,
    fraction_train: float = 1.0,
    min_replies: str | None = None,
    **plan: Any,
) -> ServerRun:
    """A ServerRun of FedAvg; `plan` replaces fields of `PLAN`."""
    return ServerRun(
        method=method_of(method),
        plan=replace(PLAN, **plan),
        min_clients=clients,
        on_round=on_round,
        start=start,
        fraction_train=fraction_train,
        min_replies=min_replies,
    )


def central(grid: EagerGrid, method: Method | Part | None = None, **plan: Any) -> CentralRounds:
    """The workflow of a run over a grid; `plan` replaces fields of `PLAN`."""
    return CentralRounds(Setting(DirectExchange(grid), method_of(method), replace(PLAN, **plan)))


def result_of(run: ServerRun) -> ServerState:
    """The last state, or the error."""
    if run.error is not None:
        raise run.error
    assert run.result is not None
    return run.result


def run_small(worker: Worker, **given: Any) -> ServerState:
    """Federate a worker's clients inline."""
    run = server_run(len(worker.train), **given)
    run_inline(server_app(run), client_app(lambda: worker), len(worker.train))
    return result_of(run)


class StepLog(TrainerCallback):
    """Per step: number, loss, learning rate, gradient norm, as the Trainer logs them."""

    KEYS = ("step", "loss", "learning_rate", "grad_norm")

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.rows.append(
                tuple(
                    float({**logs, "step": state.global_step}.get(key, -1.0)) for key in self.KEYS
                )
            )

    def column(self, key: str) -> list[float]:
        """One value per logged step."""
        return [row[self.KEYS.index(key)] for row in self.rows]


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype
        for name in left
    )


def eval_losses(state: ServerState) -> list[float]:
    """Eval loss of every round, index 0 before training."""
    return [record["eval_loss"] for record in state.history]


def run_on(worker: Worker, grid_type: type[InlineGrid], **given: Any) -> ServerState:
    """`run_small` on another kind of grid."""
    run = server_run(len(worker.train), **given)
    with task_identity(1, 1):
        grid = grid_type(client_app(lambda: worker), len(worker.train))
        server_app(run)(grid, grid._contexts[2])
    return result_of(run)
