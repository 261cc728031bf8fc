"""Weighted mean of client parameters, folded as replies arrive.

    mean = sum_k w_k y_k / sum_k w_k

over values (not old value + mean difference), so that one client is reproduced exactly. Products
w_k y_k of fp32 values and integer weights below 2^29 are exact in fp64, and the sum is kept as an
unevaluated pair hi + lo (TwoSum: Knuth, TAOCP 2, 4.2.2), which makes the rounded result independent
of the order of arrival. Memory: two fp64 values per parameter, whatever the number of clients.
The mean of half precision is not rounded here: the server's step comes before (`server_step.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RunningMean", "toward", "unrounded"]

# The temporaries of a block stay in the processor's cache.
BLOCK = 1 << 15
# Fewer blocks than this are folded before a second thread has started.
BLOCKS_PER_THREAD = 32

Array = NDArray[Any]


class Part(NamedTuple):
    """A block of one tensor, and where its sums are."""

    name: str
    block: slice
    sums: slice


class RunningMean:
    """A fold of `{name: tensor}`; all updates must have the same names, shapes and dtypes.

    Uses as many threads as torch does.
    """

    def __init__(self) -> None:
        self._like: dict[str, Tensor] = {}
        self._parts: list[Part] = []
        self._sums: Array = np.empty((2, 0))
        self._weight = Fraction(0)  # exact, so free of the order too

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's parameters with a positive weight."""
        if not weight > 0:
            raise ValueError(f"weight must be positive, received {weight}")
        first = not self._weight
        if first:
            self._lay_out(params)
        shapes = {name: tensor.shape for name, tensor in params.items()}
        if shapes != {name: like.shape for name, like in self._like.items()}:
            raise ValueError("names or shapes differ from those of the first update")
        flat = {name: tensor.detach().reshape(-1) for name, tensor in params.items()}

        def fold(parts: Sequence[Part]) -> None:
            work = np.empty((3, BLOCK))
            for name, block, sums in parts:
                term, total, virtual = work[:, : block.stop - block.start]
                torch.from_numpy(term).copy_(flat[name][block])
                high, low = self._sums[:, sums]
                if first:
                    np.multiply(term, weight, out=high)
                    low.fill(0.0)
                else:
                    np.multiply(term, weight, out=term)
                    _two_sum_(high, low, term, total, virtual)

        _in_threads(fold, self._parts)
        self._weight += Fraction(weight)

    def result(self) -> dict[str, Tensor]:
        """The mean, in each tensor's `unrounded` dtype; ValueError when nothing was added."""
        if not self._weight:
            raise ValueError("no update was folded")
        weight = float(self._weight)
        mean = {
            name: torch.empty(like.shape, dtype=unrounded(like.dtype))
            for name, like in self._like.items()
        }
        flat = {name: tensor.view(-1) for name, tensor in mean.items()}

        def divide(parts: Sequence[Part]) -> None:
            work = np.empty(BLOCK)
            for name, block, sums in parts:
                value = work[: block.stop - block.start]
                high, low = self._sums[:, sums]
                np.divide(np.add(high, low, out=value), weight, out=value)
                flat[name][block].copy_(torch.from_numpy(value))

        _in_threads(divide, self._parts)
        return mean

    def _lay_out(self, params: Mapping[str, Tensor]) -> None:
        at = 0
        for name, tensor in params.items():
            self._like[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for start in range(0, tensor.numel(), BLOCK):
                stop = min(start + BLOCK, tensor.numel())
                self._parts.append(Part(name, slice(start, stop), slice(at + start, at + stop)))
            at += tensor.numel()
        # One large array of numpy: it comes in huge pages, six times as fast to touch first.
        self._sums = np.empty((2, at))


def unrounded(dtype: torch.dtype) -> torch.dtype:
    """Fp64 for half precision, whose aggregate is rounded once, after the server's step."""
    return torch.float64 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


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


def _two_sum_(high: Array, low: Array, term: Array, total: Array, virtual: Array) -> None:
    """In place, without loss: high + low += term; the last three are overwritten."""
    np.add(high, term, out=total)
    np.subtract(total, high, out=virtual)
    np.subtract(term, virtual, out=term)
    np.subtract(total, virtual, out=virtual)
    np.subtract(high, virtual, out=virtual)
    np.add(term, virtual, out=term)
    np.add(low, term, out=low)
    np.copyto(high, total)


def _in_threads(work: Callable[[Sequence[Part]], None], parts: Sequence[Part]) -> None:
    """Numpy lets other threads run while it computes; the parts do not overlap."""
    threads = min(torch.get_num_threads(), len(parts) // BLOCKS_PER_THREAD)
    if threads < 2:
        work(parts)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [parts[k::threads] for k in range(threads)]))
