"""What a Trainer says it can train in a round, and that it never says more afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.client.declared import declared, within
from fedtune.client.replies import LocalResult
from fedtune.transport.messages import MOST_LENGTH, Declared
from tests.federation.small import run_small, small_rows, small_worker


def trainer(rows: Any = None, tokenizer: Any = None, length: int | None = 64, **args: Any) -> Any:
    given = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_length": None, **args}
    return SimpleNamespace(
        args=SimpleNamespace(**given),
        train_dataset=[0] * 13 if rows is None else rows,
        data_collator=SimpleNamespace(),
        processing_class=tokenizer,
        model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=length)),
    )


def test_rows_steps_and_tokens() -> None:
    """2 lines, 3 at a time, 4 processes; a model for 64 tokens, four times that to be sure."""
    assert declared(trainer(), 5, 4) == Declared(13, 5, 24, 24 * 256)
    assert declared(trainer(max_length=10), 5) == Declared(13, 5, 6, 6 * 20)
    assert declared(trainer(max_length=10, packing=True), 5) == Declared(13, 5, 120, 120)
    assert declared(trainer(rows=iter([])), 5).rows == 0
    long = SimpleNamespace(model_max_length=100)
    assert declared(trainer(tokenizer=long), 1).tokens_per_step == 6 * 400
    endless = SimpleNamespace(model_max_length=10**30)
    assert declared(trainer(tokenizer=endless, length=None), 1).tokens_per_step == 6 * MOST_LENGTH


def test_an_honest_reply_is_never_above_it(caplog: pytest.LogCaptureFixture) -> None:
    most = Declared(13, 4, 6, 60)
    result = LocalResult({}, num_examples=25, num_tokens=241, num_steps=4, train_loss=1, train_s=1)
    with caplog.at_level(logging.WARNING):
        cut = within(result, most)
    assert (cut.num_examples, cut.num_tokens) == (24, 240)
    assert "25 rows and 241 tokens, more than declared; 24 and 240 are sent" in caplog.text
    assert within(cut, most) == cut
    assert within(result, Declared()) == result


def test_a_simulation_declares_what_its_trainers_do(tmp_path: Path) -> None:
    """Its rounds pass, to the last short batch."""
    worker = small_worker(tmp_path, clients=3)
    for name in worker.train:
        worker.trainer(name)
    state = run_small(worker, num_rounds=1)
    said = worker._declared["client-0"]
    assert (said.rows, said.steps, said.rows_per_step) == (len(small_rows()), 4, 2)
    assert not state.history[1]["refused"]
    assert all(row["tokens"] <= 4 * said.tokens_per_step for row in state.history[1]["replies"])
