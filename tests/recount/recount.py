"""One seed of a run, our own losses of it, and a list of what it says that is not so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from tests.recount import oracle
from tests.recount.federated import Part, encoder_of, federated_rounds, step_loss
from tests.recount.recorder import Row, Step, Tensors
from tests.recount.runs import Run

# fp32 forward passes in batches or packed lines against ours of one row: a few 1e-7 a token.
LOSS = 2e-5


class Recount:
    """What the checks share; `found` are the figures that are wrong, a line each."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.setting, self.seed = run, run.setting, seed
        self.root = run.root(seed)
        self.number = run.setting.seeds.index(seed)
        self.found: list[str] = []
        self.losses: dict[str, list[float]] = {}  # our own, by arm and round

    def expect(self, what: str, said: Any, ours: Any, tolerance: float = 0.0) -> None:
        """Note a figure that is not ours."""
        if said is None or ours is None or isinstance(said, str | bool | list | tuple | dict):
            good = said == ours
        else:
            good = math.isclose(said, ours, rel_tol=tolerance, abs_tol=tolerance)
        if not good:
            self.found.append(f"{what}: says {said}, is {ours}")

    def series(self, arm: str) -> dict[str, Any]:
        return self.run.summary["arms"][arm]["runs"][self.number]

    @cached_property
    def rounds(self) -> list[list[Part]]:
        return federated_rounds(self.run, self.seed)

    @cached_property
    def model(self) -> nn.Module:
        places = [p for p in self.run.recording.models if Path(p).is_relative_to(self.root)]
        if places:
            return self.run.recording.models[places[0]]
        return oracle.on_disk(self.root / "adapter")

    @cached_property
    def held_out(self) -> list[Any]:
        return encoder_of(self.run).all(self.run.corpus.evaluation)

    def own_loss(self, tensors: Tensors) -> float:
        return self.own_score(tensors).loss

    def own_score(self, tensors: Tensors) -> oracle.Score:
        return oracle.score(
            self.model, self.held_out, tensors=tensors, smoothing=self.setting.smoothing
        )

    @cached_property
    def start(self) -> Tensors:
        return self.rounds[0][0].start

    def client_row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.run.summary["data"]["clients"] if row["client"] == name)

    def in_turn(self, name: str, rows: Counter[Row], given: int) -> None:
        """Every one of the rows given comes before any comes again."""
        whole, rest = divmod(rows.total(), given)
        self.expect(f"{name} saw a row at most", max(rows.values()), whole + (rest > 0))
        if whole:
            self.expect(f"{name} saw rows", len(rows), given)
            self.expect(f"{name} saw a row at least", min(rows.values()), whole)

    def descends(self, where: str, steps: Sequence[Step], first: int, whole: int) -> None:
        ours = [oracle.linear_lr(0.01, first + i, whole) for i in range(len(steps))]
        worst = max(abs(step.lr - lr) for step, lr in zip(steps, ours, strict=True))
        self.expect(f"{where}: learning rate", worst, 0.0, 1e-9)

    def mean_of(self, parts: Sequence[Part]) -> Tensors:
        weights = [part.weight(self.setting.weight_by) for part in parts]
        return oracle.weighted_mean([part.end for part in parts], weights)

    @property
    def knows_train_loss(self) -> bool:
        """Whether the loss of a step can be told from its rows and the tensors before it."""
        return self.setting.exact and not self.setting.packed

    def train_loss(self, steps: Sequence[Step]) -> float:
        """Mean over optimizer steps of the loss per label token of their rows."""
        return sum(step_loss(self.run, self.model, step) for step in steps) / len(steps)

    def same_losses(
        self, arm: str, said: Sequence[float | None], ours: Sequence[float], limit: float = LOSS
    ) -> None:
        self.expect(f"{arm}: values of eval_loss", len(said), len(ours))
        for number, (one, other) in enumerate(zip(said, ours, strict=False)):
            self.expect(f"{arm}: eval_loss[{number}]", one, other, limit)

    def disk_loss(self, directory: Path) -> float:
        model = oracle.on_disk(directory, len(self.setting.classes))
        return oracle.loss_per_token(model, self.held_out, smoothing=self.setting.smoothing)
