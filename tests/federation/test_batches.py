"""Rows and tokens of one batch: packed, padded, paired, without labels, and odd ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchEncoding
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fedtune.client.batches import count_batch

PAD = 0


def packed(lengths: list[list[int]], multiple: int | None, first: int = 5) -> dict[str, Any]:
    """What trl's collator makes of lines of packed rows."""
    collate = DataCollatorForLanguageModeling(PAD, padding_free=True, pad_to_multiple_of=multiple)
    return collate([{"input_ids": [first] * sum(line), "seq_lengths": line} for line in lengths])


@pytest.mark.parametrize("multiple", [None, 8, 64])
@pytest.mark.parametrize("lengths", [[[4, 3]], [[1, 2, 1], [5]], [[3, 1]], [[1, 1, 1]], [[8]]])
def test_padding_is_no_row(lengths: list[list[int]], multiple: int | None) -> None:
    rows = [length for line in lengths for length in line]
    batch = packed(lengths, multiple)
    rows_, tokens, _ = count_batch(batch, shifts=True, padding=PAD)
    assert rows_ == len(rows)
    assert int(tokens) == sum(length - 1 for length in rows)  # the first of a row is masked


def test_padding_that_no_tokenizer_names() -> None:
    assert count_batch(packed([[4, 3]], 16), shifts=True).rows == 2
    assert count_batch(packed([[4, 1]], None), shifts=True).rows == 2


def test_a_mask_tells_padding_from_rows_in_every_line() -> None:
    batch = {
        "labels": torch.full((2, 6), 7),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    }
    assert count_batch(batch, shifts=True).rows == 3 + 1


def test_left_padding_with_positions_is_one_row_a_line() -> None:
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    batch = {"labels": torch.ones(2, 4, dtype=torch.long), "position_ids": positions}
    assert count_batch(batch, shifts=True).rows == 2
    batch["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert count_batch(batch, shifts=True).rows == 2


def test_lengths_tell_where_there_are_no_positions() -> None:
    batch = {
        "labels": torch.ones(1, 9, dtype=torch.long),
        "cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
    }
    assert count_batch(batch, shifts=True).rows == 2


def test_shifted_labels_count_as_they_are() -> None:
    labels = torch.tensor([[1, 2, 3, -100]])
    batch = {"labels": torch.tensor([[0, 1, 2, 3]]), "shift_labels": labels}
    assert int(count_batch(batch, shifts=True).tokens) == 3


def test_without_labels_the_tokens_of_all_ids_count() -> None:
    good = torch.ones(4, 8, dtype=torch.long)
    rows, tokens, by_rows = count_batch({"ids_good": good, "ids_bad": good}, shifts=True)
    assert (rows, int(tokens), by_rows) == (4, 64, False)
    masked = {
        "sentence_0_input_ids": good,
        "sentence_0_attention_mask": good.clone().fill_diagonal_(0),
        "prompt_ids": good,
        "prompt_mask": torch.zeros_like(good),
        "position_ids": good,
        "token_type_ids": good,
    }
    assert int(count_batch(masked, shifts=True).tokens) == 32 - 4


def test_preference_pairs_count_completions() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])
    batch = {"input_ids": torch.ones(4, 4, dtype=torch.long), "completion_mask": mask}
    rows, tokens, _ = count_batch(batch, shifts=True)
    assert (rows, int(tokens)) == (2, 8)


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ([{"prompt": "a"}, {"prompt": "b"}], 2),
        ([], 0),
        ((torch.ones(3, 2), torch.ones(3)), 3),
        ({"pixel_values": torch.ones(5, 3, 2, 2)}, 5),
        ({"texts": ["a", "b", "c"]}, 3),
        ({"labels": None, "pixel_values": torch.ones(2, 1)}, 2),
        ({"labels": [1, 2], "n": torch.tensor(3)}, 2),
        ({}, 1),
        (torch.ones(6, 2), 6),
        (None, 1),
        ("row", 1),
        ({"labels": torch.tensor(3)}, 1),
        (BatchEncoding({"scores": torch.ones(2)}), 2),
    ],
    ids=str,
)
def test_odd_batches_count_their_rows(batch: Any, rows: int) -> None:
    assert count_batch(batch, shifts=True) == (rows, rows, True)


def test_positions_of_another_shape_are_left_alone() -> None:
    batch = {
        "labels": torch.ones(1, 4, dtype=torch.long),
        "position_ids": torch.zeros(3, 1, 4, dtype=torch.long),
    }
    assert count_batch(batch, shifts=True).rows == 1
