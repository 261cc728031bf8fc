"""Tokens that the model has no embedding for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset

from fedtune.data.origin import Faults, bad_rows
from fedtune.errors import DataError, private

__all__ = ["check_tokens", "check_trainer_tokens"]


IdsOf = Callable[[Dataset, Any], Iterable[Sequence[int]]]


class Sizes(NamedTuple):
    """Tokens that a tokenizer can give, and embeddings that a model has for them."""

    tokens: int
    embeddings: int


def check_tokens(rows: Dataset, model: Any, tokenizer: Any, ids_of: IdsOf) -> None:
    """Compare tokens of converted rows, `ids_of(rows, tokenizer)`, with what `model` has.

    Nothing is tokenized where every token of the tokenizer has its embedding.

    Raises:
        DataError: a row, or the padding, uses a token beyond the embeddings.
    """
    sizes = _beyond(model, tokenizer)
    if sizes is None:
        return
    check = partial(_faults, ids_of=ids_of, tokenizer=tokenizer, limit=sizes.embeddings)
    bad = bad_rows(rows, check)
    if bad is not None:
        raise _too_many(sizes, f"{bad.where} use{'s' if bad.total == 1 else ''} {bad.received}")
    _check_padding(sizes, tokenizer)


def check_trainer_tokens(trainer: Any) -> None:
    """The same of the tokenized data sets of a Trainer, whose rows have no origin any more.

    Raises:
        DataError: a row, or the padding, uses a token beyond the embeddings.
    """
    tokenizer = getattr(trainer, "processing_class", None)
    sizes = _beyond(trainer.model, tokenizer)
    if sizes is None:
        return
    held_out = trainer.eval_dataset
    sets = held_out.values() if isinstance(held_out, dict) else [held_out]
    named = [(trainer.train_dataset, "a training row"), *((s, "a held-out row") for s in sets)]
    for rows, what in named:
        if "input_ids" in (getattr(rows, "column_names", None) or ()):
            token = _first_beyond(rows["input_ids"], sizes.embeddings)
            if token is not None:
                raise _too_many(sizes, f"{what} uses {_shown(token, tokenizer)}")
    _check_padding(sizes, tokenizer)


def _beyond(model: Any, tokenizer: Any) -> Sizes | None:
    """Sizes where the tokenizer has tokens that the model lacks."""
    vocabulary = getattr(tokenizer, "get_vocab", None)
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model without tokens, or of its own kind
        return None
    weight = getattr(embeddings, "weight", None)
    if vocabulary is None or weight is None or not weight.shape[0]:  # none here: a shard of it
        return None
    tokens = max(vocabulary().values(), default=-1) + 1
    rows = getattr(embeddings, "num_embeddings", None) or weight.shape[0]
    return Sizes(tokens, rows) if tokens > rows else None


def _faults(rows: Dataset, ids_of: IdsOf, tokenizer: Any, limit: int) -> Faults:
    firsts = ((i, _first_beyond([ids], limit)) for i, ids in enumerate(ids_of(rows, tokenizer)))
    return [(i, _shown(token, tokenizer)) for i, token in firsts if token is not None]


def _first_beyond(rows: Iterable[Sequence[int]], limit: int) -> int | None:
    return next((int(token) for ids in rows for token in ids if token >= limit), None)


def _shown(token: int, tokenizer: Any) -> str:
    return f"token {token:,} `{private(tokenizer.convert_ids_to_tokens(token))}`"


def _check_padding(sizes: Sizes, tokenizer: Any) -> None:
    padding = tokenizer.pad_token_id
    if padding is not None and padding >= sizes.embeddings:
        raise _too_many(sizes, f"the padding is {_shown(padding, tokenizer)}")


def _too_many(sizes: Sizes, use: str) -> DataError:
    return DataError(
        f"the tokenizer has {sizes.tokens:,} tokens, the model {sizes.embeddings:,} embeddings; "
        f"{use}. Fix: resize the model (model.resize_token_embeddings) and save it, or use its own "
        "tokenizer."
    )
