"""By content, what losses depend on beside the method: rows, base model, tokenizer.

Two runs may name the same file or model and mean another, or the other way round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

__all__ = ["identity_of", "model_sha256", "rows_of", "tokenizer_sha256"]

SAMPLE = 4096  # values of a tensor that are hashed, evenly spaced: fine-tuning changes them all


def identity_of(
    train: Iterable[Dataset], evaluation: Dataset, model: nn.Module, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """`{"data": {"held_out", "train"}, "model": {"base_sha256", "tokenizer_sha256"}}`."""
    return {
        "data": {"held_out": rows_of([evaluation]), "train": rows_of(train)},
        "model": {
            "base_sha256": model_sha256(model),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
        },
    }


def rows_of(parts: Iterable[Dataset]) -> dict[str, Any]:
    """How many raw rows there are, and a hash of all of them in any order and partition."""
    digests = sorted(_row(row) for part in parts for row in part)
    return {"rows": len(digests), "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}


def _row(row: Mapping[str, Any]) -> bytes:
    plain = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()


def model_sha256(model: nn.Module) -> str:
    """Of the base model's weights, whatever adapter is on it; its head is left out.

    A head may be drawn anew for a task, by the seed.
    """
    base: Any = model
    if hasattr(model, "get_base_model"):
        base = model.get_base_model()  # type: ignore[operator]
    body = getattr(base, "base_model", base)
    adapted = base is not model
    tensors = (p for p in body.parameters() if not (adapted and p.requires_grad))
    digests = sorted(_sample(tensor) for tensor in tensors)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _sample(tensor: Tensor) -> bytes:
    values = tensor.detach().reshape(-1)
    some = values[:: max(1, values.numel() // SAMPLE)].contiguous().cpu()
    what = json.dumps([list(tensor.shape), str(tensor.dtype)]).encode()
    return hashlib.sha256(what + some.view(torch.uint8).numpy().tobytes()).digest()


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """Of all that decides a row's tokens; None for what is no tokenizer."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for transient in ("truncation", "padding"):  # set by whoever called it last
        rules.pop(transient, None)
    what = [tokenizer.get_vocab(), rules, getattr(tokenizer, "chat_template", None)]
    plain = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()
