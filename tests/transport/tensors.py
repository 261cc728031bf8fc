"""Tensors of all shapes and dtypes, and their forms under a codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.transport.codecs import CODECS
from fedtune.transport.differences import Form, form_of
from fedtune.transport.settings import CodecSettings

NAMES = ("none", "bf16", "fp16", "int8", "nf4", "fp4")
LOSSY = NAMES[1:]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
SHAPES = {
    "scalar": (), "empty": (0,), "flat empty": (3, 0), "one": (1, 1), "row": (7,), "small": (5, 13),
    "blocks": (64, 8), "ragged": (129, 3), "large": (40, 31), "larger": (1, 1000),
}  # fmt: skip

Tensors = dict[str, Tensor]


def made(dtype: torch.dtype, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 30).to(dtype)
        for name, shape in SHAPES.items()
    }


def settings_of(codec: str, **given: Any) -> CodecSettings:
    return CodecSettings(codec, **{"min_size": 1, **given})


def forms_of(tensors: Tensors, old: Tensors, codec: str, **given: Any) -> dict[str, Form]:
    settings = settings_of(codec, **given)
    return {
        name: form_of(name, tensor, old.get(name), codec, settings)
        for name, tensor in tensors.items()
    }


def assert_bits(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert tensor.shape == right[name].shape
        raw = [side.contiguous().reshape(-1).view(torch.uint8) for side in (tensor, right[name])]
        assert torch.equal(*raw), name


def block_bound(codec: str, delta: Tensor) -> Tensor:
    """The largest error that a codec may make of each value, by its own documentation, fp64."""
    flat = delta.double().reshape(-1).abs()
    if codec == "bf16":
        return flat * 2**-8
    if codec == "fp16":
        return flat * 2**-11 + 2**-25  # below 2^-14 its numbers have one distance
    block = CODECS[codec].block
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = padded.amax(1).repeat_interleave(block)[: len(flat)]
    if codec == "int8":
        return largest / 254 * (1 + 2**-7)
    gap = float(np.diff(np.unique(np.array(CODECS[codec].book))).max())  # type: ignore[attr-defined]
    return largest * (gap / 2 + 2**-15) * (1 + 2**-5)
