"""Rows and tokens of one batch, whatever a collator makes of them.

A token counts when the loss sees it: labels that are not -100; causal models shift labels, so
position 0 of a line never counts there, unless a prompt of virtual tokens lies before it.
Preference pairs have no labels but a mask of completions. Other batches without labels count the
tokens of their id tensors, and without ids their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORED", "BatchSize", "count_batch"]

IGNORED = -100
NO_TOKENS = ("position_ids", "token_type_ids", "seq_ids", "segment_ids")
MASKS = (("input_ids", "attention_mask"), ("ids", "attention_mask"), ("ids", "mask"))


class BatchSize(NamedTuple):
    """What a batch holds.

    Attributes:
        tokens: a number, or one on the device of the batch, not yet waited for.
        by_rows: whether there was nothing to count tokens by, so that its rows stand for them.
    """

    rows: int
    tokens: int | Tensor
    by_rows: bool = False


def count_batch(inputs: Any, *, shifts: bool, padding: int | None = None) -> BatchSize:
    """Count any batch; what has no shape that is known here is one row.

    Args:
        shifts: whether the loss shifts labels.
        padding: id of the padding token, which tells padding from a row of one token.
    """
    if not isinstance(inputs, Mapping):
        rows = _leading(inputs)
        return BatchSize(rows, rows, by_rows=True)
    tensors = {str(name): value for name, value in inputs.items() if _is_batch(value)}
    shifted, labels = tensors.get("shift_labels"), tensors.get("labels")
    if shifted is not None:
        return BatchSize(_rows(tensors, shifted, padding), _learned(shifted))
    if labels is not None:
        seen = labels[..., 1:] if shifts and labels.dim() > 1 else labels
        return BatchSize(_rows(tensors, labels, padding), _learned(seen))
    pairs = tensors.get("completion_mask")
    if pairs is not None and "input_ids" in tensors:  # chosen above, rejected below
        return BatchSize(len(pairs) // 2, pairs[:, 1:].sum())
    ids = _ids(tensors)
    if not ids:
        rows = max([len(value) for value in tensors.values()] or [_leading(inputs)])
        return BatchSize(rows, rows, by_rows=True)
    first = tensors[next(iter(ids))]
    return BatchSize(_rows(tensors, first, padding), sum(ids.values()))


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _learned(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def _leading(inputs: Any) -> int:
    """Rows of a list of rows, or of what holds columns of rows."""
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if _is_batch(values):
        return len(values)
    if not isinstance(values, Sequence) or isinstance(values, str):
        return 1
    columns = isinstance(inputs, Mapping) or (values and all(map(_is_batch, values)))
    if not columns:
        return len(values)
    return max([_leading(value) for value in values] or [1])


def _ids(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | int]:
    """Tokens that are there, by the name of each tensor of ids."""
    found: dict[str, Tensor | int] = {}
    for name, value in tensors.items():
        whole = not value.is_floating_point() and value.dtype != torch.bool
        if "ids" in name.split("_") and name not in NO_TOKENS and whole and value.dim() > 1:
            masks = (tensors.get(name.replace(*pair)) for pair in MASKS if pair[0] in name)
            fits = (m for m in masks if m is not None and m.shape == value.shape)
            mask = next(fits, None)
            found[name] = value.numel() if mask is None else (mask != 0).sum()
    return found


def _rows(tensors: Mapping[str, Tensor], like: Tensor, padding: int | None) -> int:
    """Rows in lines like those of `like`: packed, several lie in one, each from position 0 on."""
    positions = tensors.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[0] != len(like):
        return _by_lengths(tensors, len(like))
    mask = tensors.get("attention_mask")
    if mask is not None and mask.shape == positions.shape:
        starts = (positions == 0) & (mask != 0)
    elif len(positions) == 1:
        starts = (positions == 0) & ~_padded(tensors, positions, padding)
    else:
        return len(like)
    return int(starts.sum(1).clamp(min=1).sum())


def _by_lengths(tensors: Mapping[str, Tensor], lines: int) -> int:
    """Rows of one line by where they begin; lines are rows otherwise."""
    begins = tensors.get("cu_seq_lens_q", tensors.get("cu_seqlens"))
    return len(begins) - 1 if lines == 1 and begins is not None and len(begins) > 1 else lines


def _padded(tensors: Mapping[str, Tensor], positions: Tensor, padding: int | None) -> Tensor:
    """What follows the last row of a line: all at position 0, the padding token, never learned.

    A row of one token that ends a line looks the same where it is that token. Without a known
    token it takes two alike to be padding.
    """
    empty = positions == 0
    labels, ids = tensors.get("labels"), tensors.get("input_ids")
    if labels is not None and labels.shape == positions.shape:
        empty = empty & (labels == IGNORED)
    if ids is None or ids.shape != positions.shape:
        return torch.zeros_like(empty)
    empty = empty & (ids == (ids[:, -1:] if padding is None else padding))
    trailing = empty.flip(1).int().cumprod(1).flip(1).bool()
    return trailing & (trailing.sum() > (padding is None))
