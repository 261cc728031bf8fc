"""Parameters as one long vector: distances and lengths, in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["length", "shortened", "squared_distance"]

Params = Mapping[str, Tensor]


def squared_distance(left: Params, right: Params) -> float:
    """Sum of squares over the tensors of `left`."""
    return sum(float(torch.sum((left[name].double() - right[name].double()) ** 2)) for name in left)


def length(params: Params) -> float:
    """Euclidean norm of all floating-point values."""
    norms = [
        float(torch.linalg.vector_norm(value, dtype=torch.float64))
        for value in params.values()
        if value.is_floating_point()
    ]
    return math.hypot(*norms)


def shortened(params: Params, start: Params | None, factor: float) -> dict[str, Tensor]:
    """Start + factor (params - start), in the dtypes of `params`; None: start is zero."""
    return {
        name: _between(value, None if start is None else start[name], factor)
        if value.is_floating_point()
        else value
        for name, value in params.items()
    }


def _between(value: Tensor, start: Tensor | None, factor: float) -> Tensor:
    origin = torch.zeros((), dtype=torch.float64) if start is None else start.double()
    return (origin + factor * (value.double() - origin)).to(value.dtype)
