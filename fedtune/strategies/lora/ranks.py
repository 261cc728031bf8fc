"""Ranks: a fresh adapter of a rank, and one adapter seen at another rank.

Cutting keeps the first rows of A and columns of B: the best approximation after FlexLoRA, whose
factors are sorted by singular value, no loss after FLoRA, whose product is 0, and the definition in
HetLoRA and raFLoRA, whose clients train the first slices. Padding adds the start of a fresh adapter
(one factor random, the other 0): the product stays, the new ranks train. Zeros in both would never
train.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.names import LoraModule, lora_modules

__all__ = ["extend", "initial", "pad", "resize"]


def initial(module: LoraModule, out_dim: int, in_dim: int, rank: int, key: str) -> Factors:
    """Factors as PEFT starts them, product 0; the same `key` and module give the same bits.

    Linear: A uniform within 1 / sqrt(in), B = 0. Embedding: B normal, A = 0.
    """
    digest = hashlib.sha256(f"{key}/{module.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if module.embedding:
        return Factors(torch.randn(out_dim, rank, generator=generator), torch.zeros(rank, in_dim))
    bound = 1 / math.sqrt(in_dim)
    a = torch.rand(rank, in_dim, generator=generator).mul_(2 * bound).sub_(bound)
    return Factors(torch.zeros(out_dim, rank), a)


def extend(factors: Factors, previous: Factors | None, rank: int) -> Factors:
    """The factors, and behind them those slices of `previous` that they lack, up to a rank."""
    if previous is None:
        return factors
    (b, a), lacking = factors, slice(factors.rank, rank)
    more_b, more_a = previous.B[:, lacking].to(b.dtype), previous.A[lacking].to(a.dtype)
    return Factors(torch.cat([b, more_b], 1), torch.cat([a, more_a]))


def pad(module: LoraModule, factors: Factors, rank: int, key: str) -> Factors:
    """The same product at a higher rank; the new ranks are those of a fresh adapter."""
    b, a = factors
    missing = max(0, rank - factors.rank)
    more = initial(module, b.shape[0], a.shape[1], missing, key)
    return Factors(torch.cat([b, more.B.to(b.dtype)], 1), torch.cat([a, more.A.to(a.dtype)]))


def resize(
    params: Mapping[str, Tensor], ranks: int | Mapping[str, int], *, key: str = "0"
) -> dict[str, Tensor]:
    """The adapter at other ranks (one for all, or by module); `key` of the padding's start."""
    resized = dict(params)
    for module in lora_modules(params).values():
        rank = ranks if isinstance(ranks, int) else ranks[module.name]
        b, a = pad(module, Factors(params[module.b], params[module.a]), rank, key)
        resized |= {module.b: b[:, :rank].clone(), module.a: a[:rank].clone()}
    return resized
