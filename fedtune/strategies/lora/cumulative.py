"""The base's additions of all rounds as one frozen low-rank adapter, for bases that cannot change.

FLoRA and FedEx-LoRA add (B, A) terms to W in every round. A quantized W (QLoRA) cannot take them:
rounding to 4 bits loses most of an update. Here W stays as it is and the terms add up beside it:

    C <- best approximation of C + B A,  of the smallest rank with error <= tolerance |C + B A|,
         but of no more than max_rank

With `error` the sum of what each round left out and of the rounding to fp32, the triangle
inequality gives, for every module and after any number of rounds,

    | C - sum of all terms |  <=  error        (Frobenius norm)

`max_rank` wins over `tolerance`: the rank is bounded, and `error` says what that cost. All on the
factors; memory O((out + in) max_rank) a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.strategies.lora.factors import Factors, rank_within, stack, svd, tail
from fedtune.strategies.lora.names import lora_modules

__all__ = ["Cumulative", "accumulate", "one_adapter"]


@dataclass(frozen=True)
class Cumulative:
    """Module -> B @ A to add to the base's output, scaling included, and module -> error bound."""

    terms: Mapping[str, Factors] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)


def accumulate(
    total: Cumulative,
    base: Mapping[str, Factors],
    *,
    tolerance: float = 1e-4,
    max_rank: int = 64,
) -> Cumulative:
    """The total with one round's terms added; modules without a term stay as they are."""
    terms, error = dict(total.terms), dict(total.error)
    for name, term in base.items():
        parts = [(1.0, terms[name])] if name in terms else []
        spectrum = svd(stack([*parts, (1.0, term)]))
        within = rank_within(spectrum.S, tolerance * tail(spectrum.S, 0))
        rank = max(1, min(within, max_rank))
        kept = spectrum.balanced(rank)
        terms[name] = kept.to(torch.float32)
        error[name] = error.get(name, 0.0) + tail(spectrum.S, rank) + _rounding(kept)
    return Cumulative(terms, error)


def one_adapter(
    params: Mapping[str, Tensor], scaling: Mapping[str, float], total: Cumulative
) -> dict[str, Tensor]:
    """The adapter and the total as one plain LoRA adapter with scaling 1 and rank r + r'."""
    joined = dict(params)
    for module in lora_modules(params).values():
        b, a = params[module.b], params[module.a]
        parts = [(scaling[module.name], Factors(b, a))]
        if module.name in total.terms:
            parts.append((1.0, total.terms[module.name]))
        whole = stack(parts)
        joined |= {module.b: whole.B.to(b.dtype), module.a: whole.A.to(a.dtype)}
    return joined


def _rounding(factors: Factors) -> float:
    """Bound of |B A - fp32(B) fp32(A)|: half an ulp in each factor, and their product."""
    lengths = torch.linalg.matrix_norm(factors.B) * torch.linalg.matrix_norm(factors.A)
    return float(torch.finfo(torch.float32).eps * lengths) * (1 + 1e-6)
