"""A token without an embedding is found before a model meets it, and only where it is used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from torch import nn

from fedtune.config import DataArguments
from fedtune.data import as_language_rows, check_row_lengths
from fedtune.data.embeddings import check_trainer_tokens
from fedtune.data.origin import mark, select
from fedtune.errors import DataError
from tests.data.conftest import CHAT_TEMPLATE, make_tokenizer


@pytest.fixture(scope="module")
def grown():
    """A tokenizer with two tokens more than the 259 embeddings of `model_of`."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.add_tokens(["account", "invoice"])
    assert len(tokenizer) == 261
    return tokenizer


def model_of(count=259):
    return SimpleNamespace(
        config=SimpleNamespace(n_positions=512), get_input_embeddings=lambda: nn.Embedding(count, 2)
    )


def chat(text):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]


KINDS = {
    "text": lambda texts: {"text": texts},
    "pair": lambda texts: {"prompt": ["p"] * len(texts), "completion": texts},
    "messages": lambda texts: {"messages": [chat(text) for text in texts]},
}


def rows_of(kind, texts):
    return mark(Dataset.from_dict(KINDS[kind](texts)), "here")


TEXTS = ["one", "two", "my invoice", "four", "the account"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_uses_such_a_token_is_named(kind, grown):
    rows = as_language_rows(select(rows_of(kind, TEXTS), [4, 1]), DataArguments(), grown)
    with pytest.raises(DataError) as caught:
        check_row_lengths(rows, model_of(), grown, None, "rows")
    assert str(caught.value) == (
        "the tokenizer has 261 tokens, the model 259 embeddings; row 3 of here and 1 more row use "
        "token 260 `invoice`. Fix: resize the model (model.resize_token_embeddings) and save it, "
        "or use its own tokenizer."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_such_a_token_are_good(kind, grown):
    good = as_language_rows(select(rows_of(kind, TEXTS), [0, 1, 3]), DataArguments(), grown)
    check_row_lengths(good, model_of(), grown, None, "rows")
    bad = as_language_rows(rows_of(kind, TEXTS), DataArguments(), grown)
    check_row_lengths(bad, model_of(300), grown, None, "rows")


def test_classification_rows_are_looked_at(grown):
    rows = mark(Dataset.from_dict({"text": TEXTS, "labels": [0, 1, 0, 1, 0]}), "here")
    with pytest.raises(DataError, match="row 3 of here and 1 more row use token 260 `invoice`"):
        check_row_lengths(rows, model_of(), grown, None, "rows")


def test_padding_needs_an_embedding_too():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = rows_of("text", ["one"])
    with pytest.raises(DataError, match=r"the padding is token 259 `\[PAD\]`"):
        check_row_lengths(rows, model_of(), tokenizer, None, "rows")


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "an eval set by name"])
def test_rows_of_a_trainer_of_ones_own(where, grown):
    good, bad = (Dataset.from_dict({"input_ids": [[1, 2], ids]}) for ids in ([3], [4, 260]))
    sets = {"train_dataset": good, "eval_dataset": good}
    if where in sets:
        sets[where] = bad
    else:
        sets["eval_dataset"] = {"first": good, "second": bad}
    trainer = SimpleNamespace(model=model_of(), processing_class=grown, **sets)
    what = "a training row" if where == "train_dataset" else "a held-out row"
    with pytest.raises(DataError, match=f"{what} uses token 260 `invoice`"):
        check_trainer_tokens(trainer)
    trainer.model = model_of(261)
    check_trainer_tokens(trainer)


def test_trainers_without_rows_tokenizer_or_embeddings_are_left_alone(grown):
    empty = {"train_dataset": None, "eval_dataset": None}
    check_trainer_tokens(SimpleNamespace(model=model_of(), processing_class=None, **empty))
    check_trainer_tokens(SimpleNamespace(model=nn.Linear(1, 1), processing_class=grown, **empty))
    check_trainer_tokens(SimpleNamespace(model=model_of(), processing_class=grown, **empty))
