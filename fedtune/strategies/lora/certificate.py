"""The residual: how far the aggregate is from what the clients' updates ask for.

    residual = sqrt(sum_layers |M - T|^2 / sum_layers |T|^2),   T = sum p_k s B_k A_k

with M the merged update of the rule, base term included. Frobenius norms in fp64 from one QR of the
stacked factors on each side, layer by layer; exact to about 1e-15, and no (out, in) matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedtune.strategies.lora.factors import Factors, distances

__all__ = ["relative_errors"]


def relative_errors(layers: Iterable[tuple[Factors, tuple[Factors, ...]]]) -> tuple[float, ...]:
    """One relative error per candidate; each layer gives its target and its candidates, in order.

    0 where target and candidate are both 0, infinite where only the target is.
    """
    lengths: list[float] = []
    errors: list[list[float]] = []
    for target, candidates in layers:
        length, *distance = distances(target, candidates)
        lengths.append(length)
        errors.append(distance)
    return tuple(
        _ratio(math.hypot(*row), math.hypot(*lengths)) for row in zip(*errors, strict=True)
    )


def _ratio(error: float, length: float) -> float:
    return error / length if length else math.inf if error else 0.0
