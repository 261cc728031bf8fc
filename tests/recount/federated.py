"""The federated arm, round by round, as it was recorded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.recount import oracle
from tests.recount.recorder import Row, Step, Tensors, Train
from tests.recount.rows import Encoded, Encoder, targets
from tests.recount.runs import Run


@dataclass(frozen=True)
class Part:
    """One client's share of a round."""

    client: str
    steps: list[Step]

    @property
    def rows(self) -> list[Row]:
        return [row for step in self.steps for row in step.rows]

    @property
    def label_tokens(self) -> int:
        return sum(step.label_tokens for step in self.steps)

    @property
    def start(self) -> Tensors:
        return self.steps[0].before

    @property
    def end(self) -> Tensors:
        return self.steps[-1].after

    def weight(self, by: str) -> float:
        return {"tokens": self.label_tokens, "examples": len(self.rows), "uniform": 1}[by]


@cache
def encoder_of(run: Run) -> Encoder:
    return Encoder(run.setting.kind, run.setting.max_length, run.setting.classes)


def federated_rounds(run: Run, seed: int) -> list[list[Part]]:
    """Who trained in each round, in the order in which they did."""
    setting = run.setting
    if setting.engine == "flower":
        return _of_processes(run)
    trains = in_place(run.recording.trains, run.root(seed) / "clients")
    return in_rounds(trains, asked(run))


def asked(run: Run) -> int:
    return max(1, int(run.setting.fraction * len(run.setting.sizes) + 0.5))


def in_rounds(trains: list[Train], clients: int) -> list[list[Part]]:
    parts = [Part(Path(train.place).name, train.steps) for train in trains]
    assert len(parts) % clients == 0
    return [parts[i : i + clients] for i in range(0, len(parts), clients)]


def in_place(trains: list[Train], directory: Path) -> list[Train]:
    """Calls of `train` whose Trainer writes below a directory."""
    return [train for train in trains if Path(train.place).is_relative_to(directory)]


def _of_processes(run: Run) -> list[list[Part]]:
    """Every process trained in one call; a round begins where the tensors are not its own."""
    whole = [t for t in run.recording.trains if not _is_arm(run, t)]
    assert len(whole) == len(run.setting.sizes)
    named = sorted((client_of(run, train), train) for train in whole)
    split = {name: _split(train.steps) for name, train in named}
    count = {len(parts) for parts in split.values()}
    assert count == {run.setting.rounds}
    return [
        [Part(name, parts[r]) for name, parts in split.items()] for r in range(run.setting.rounds)
    ]


def _is_arm(run: Run, train: Train) -> bool:
    return Path(train.place).is_relative_to(run.out / "arms")


def _split(steps: list[Step]) -> list[list[Step]]:
    parts: list[list[Step]] = [[]]
    for step in steps:
        if parts[-1] and not oracle.same(step.before, parts[-1][-1].after):
            parts.append([])
        parts[-1].append(step)
    return parts


def client_of(run: Run, train: Train) -> str:
    """The client whose silo the rows of a Trainer are from."""
    encoder = encoder_of(run)
    owner = {encoder.one(row).ids: row["silo"] for row in run.corpus.train}
    (silo,) = {owner[row] for step in train.steps for row in step.rows}
    (name,) = {c["client"] for c in run.summary["data"]["clients"] if c["owned"] == [silo]}
    return name


@cache
def known_rows(run: Run) -> dict[Row, Encoded]:
    """Every training row that has something to learn from, by its content."""
    encoder = encoder_of(run)
    return {row.ids: row for row in encoder.all(run.corpus.train)}


def step_loss(run: Run, model: object, step: Step) -> float:
    """Loss of the rows of an optimizer step, at the tensors it began with, as a Trainer has it.

    A Trainer divides by the labels behind a row's first token. Virtual tokens make a label of that
    one too where it belongs to the answer: then its loss is a little above that of a label token.
    """
    known = known_rows(run)
    rows = [known[row] for row in step.rows]
    score = oracle.score(model, rows, tensors=step.before, smoothing=run.setting.smoothing)
    if run.setting.kind == "labels":
        return score.loss
    return score.loss * score.tokens / sum(targets(row) for row in rows)


@cache
def kept_rows(run: Run, silo: str) -> int:
    rows = [row for row in run.corpus.train if row["silo"] == silo]
    coded = [encoder_of(run).one(row) for row in rows]
    return sum(run.setting.kind == "labels" or targets(row) > 0 for row in coded)
