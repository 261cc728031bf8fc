"""Clients with f_k(y) = h_k / 2 (y - b_k)^2 in real Trainers: the model is one fp64 number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedtune.client.worker import Worker
from tests.federation.small import arguments, build_trainer, training_arguments

H, B = (1.0, 10.0), (0.0, 1.0)
RATE = 0.05


class Number(PreTrainedModel):
    """One parameter, trained in full."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.y = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, h: Tensor, b: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (h.double() / 2 * (self.y - b.double()) ** 2).mean()}


def rows(client: int, count: int) -> Dataset:
    """Equal rows; a batch of any of them has the gradient h_k (y - b_k)."""
    columns: dict[str, list[Any]] = {"h": [H[client]], "b": [B[client]], "labels": [[1]]}
    return Dataset.from_dict({name: values * count for name, values in columns.items()})


def quadratic_worker(directory: Path, sizes: tuple[int, ...] = (10, 10)) -> Worker:
    """Client k has `sizes[k]` rows, so that many SGD steps an epoch."""

    def build_model(args: Any) -> tuple[nn.Module, None]:
        return Number(PreTrainedConfig()), None

    training = training_arguments(
        directory,
        per_device_train_batch_size=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        max_grad_norm=0.0,
        prediction_loss_only=True,
    )
    train = {f"client-{k}": rows(k, size) for k, size in enumerate(sizes)}
    return Worker(build_model, build_trainer, arguments(training), train, rows(0, 1), directory)


def local_steps(x: float, client: int, steps: int, shift: float = 0.0, mu: float = 0.0) -> Any:
    """(y, mean gradient) after SGD on h/2 (y - b)^2 with the gradient shifted and pulled to x."""
    y, total = x, 0.0
    for _ in range(steps):
        gradient = H[client] * (y - B[client])
        total += gradient
        y -= RATE * (gradient + shift + mu * (y - x))
    return y, total / steps


def recursion(
    steps: tuple[int, int], rounds: int, *, control: bool = False, mu: float = 0.0
) -> list[float]:
    """The global value after each round, in plain numbers: equal weights, both clients in each."""
    x, c, own, found = 0.0, 0.0, [0.0, 0.0], []
    for _ in range(rounds):
        shifts = [c - one if control else 0.0 for one in own]
        ends = [local_steps(x, k, steps[k], shifts[k], mu) for k in range(2)]
        x = sum(y for y, _ in ends) / 2
        c += sum(mean - one for (_, mean), one in zip(ends, own, strict=True)) / 2
        own = [mean for _, mean in ends]
        found.append(x)
    return found
