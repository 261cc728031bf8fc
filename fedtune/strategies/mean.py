"""Weighted mean of client parameters, folded as replies arrive.

    mean = sum_k w_k y_k / sum_k w_k

over values (not old value + mean difference), so that one client is reproduced exactly. Products
w_k y_k of fp32 values and integer weights below 2^29 are exact in fp64, and the sum is kept as an
unevaluated pair hi + lo (TwoSum: Knuth, TAOCP 2, 4.2.2), which makes the rounded result independent
of the order of arrival. Memory: two fp64 values per parameter, whatever the number of clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["RunningMean", "toward"]

# The temporaries of a block stay in the processor's cache.
BLOCK = 1 << 16


class RunningMean:
    """A fold of `{name: tensor}`; all updates must have the same names, shapes and dtypes."""

    def __init__(self) -> None:
        self._high: dict[str, Tensor] = {}
        self._low: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._weight = Fraction(0)  # exact, so free of the order too

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's parameters with a positive weight."""
        if not weight > 0:
            raise ValueError(f"weight must be positive, received {weight}")
        for name, tensor in params.items():
            flat = tensor.reshape(-1)
            if name not in self._high:
                self._high[name] = torch.zeros(flat.numel(), dtype=torch.float64)
                self._low[name] = torch.zeros(flat.numel(), dtype=torch.float64)
                self._dtypes[name], self._shapes[name] = tensor.dtype, tensor.shape
            for start in range(0, flat.numel(), BLOCK):
                part = slice(start, start + BLOCK)
                _two_sum_(self._high[name][part], self._low[name][part], flat[part], weight)
        self._weight += Fraction(weight)

    def result(self) -> dict[str, Tensor]:
        """The mean, in each tensor's own dtype; raises ValueError when nothing was added."""
        if not self._weight:
            raise ValueError("no update was folded")
        weight = float(self._weight)
        return {
            name: ((high + self._low[name]) / weight)
            .to(self._dtypes[name])
            .reshape(self._shapes[name])
            for name, high in self._high.items()
        }


def toward(old: Mapping[str, Tensor], new: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """The point old + rate (new - old), `new` itself at rate 1; integers and bools are `new`."""
    if rate == 1.0:
        return dict(new)
    return {
        name: (tensor.double() + (rate - 1.0) * (tensor.double() - old[name].double())).to(
            tensor.dtype
        )
        if tensor.is_floating_point()
        else tensor
        for name, tensor in new.items()
    }


def _two_sum_(high: Tensor, low: Tensor, value: Tensor, weight: float) -> None:
    """In place, without loss: high + low += weight * value."""
    term = value.to(torch.float64, copy=True).mul_(weight)
    total = high + term
    virtual = total - high
    error = (high - (total - virtual)) + term.sub_(virtual)
    high.copy_(total)
    low.add_(error)
