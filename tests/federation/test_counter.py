"""What counts as trained on: rows and label tokens of the micro-batches a Trainer takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fedtune.client.counter import BatchCounter


def trainer(shifted: bool) -> Any:
    """The three things a counter touches; like a label smoother, the step takes the labels out."""
    return SimpleNamespace(
        model=None,
        _loss_shifts_labels=shifted,
        training_step=lambda model, inputs: inputs.pop("labels"),
    )


def batch() -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor([[5, 6, 7, -100], [-100, -100, 8, 9]])}


def test_labels_count_before_the_loss_takes_them_out() -> None:
    given = trainer(shifted=True)
    with BatchCounter(given) as counter:
        given.training_step(None, batch())
        given.training_step(None, batch())
    assert (counter.examples, counter.tokens) == (4, 8)  # position 0 is never predicted


def test_without_shift_every_label_counts() -> None:
    given = trainer(shifted=False)
    with BatchCounter(given) as counter:
        given.training_step(None, batch())
        given.training_step(None, {"labels": torch.tensor([1, 0, 2])})  # a classifier's
    assert (counter.examples, counter.tokens) == (5, 8)


def test_packed_rows_count_one_by_one() -> None:
    given = trainer(shifted=True)
    packed = {
        "labels": torch.tensor([[1, 2, 3, 4, 5, 6]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]]),
    }
    with BatchCounter(given) as counter:
        given.training_step(None, packed)
    assert counter.examples == 3


def test_a_step_of_ones_own_stays() -> None:
    given = trainer(shifted=True)
    own = given.training_step
    with BatchCounter(given):
        assert given.training_step is not own
    assert given.training_step is own


def test_the_trainer_is_left_as_it_was() -> None:
    class Plain:
        model = None
        _loss_shifts_labels = True

        def training_step(self, model: object, inputs: dict[str, Any]) -> None:
            """Nothing to do."""

    given: Any = Plain()
    with BatchCounter(given) as counter:
        given.training_step(None, batch())
    given.training_step(None, batch())
    assert counter.examples == 2
    assert "training_step" not in vars(given)
