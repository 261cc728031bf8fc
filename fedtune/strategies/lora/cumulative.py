"""The base's additions of all rounds as one frozen low-rank adapter, for bases that cannot change.

FLoRA and FedEx-LoRA add (B, A) terms to W in every round. A quantized W (QLoRA) cannot take them:
rounding to 4 bits loses most of an update. Here W stays as it is and the terms add up beside it:

    C <- best approximation of C + B A,  of the smallest rank with error <= tolerance |B A|,
         but of no more than max_rank

Kept in fp64: a late round adds little to a large C, and fp32 would round that away. Clients get a
copy that is rounded once. With `error` the sum of what each round left out, the triangle inequality
gives, for every module and after any number of rounds,

    | C - sum of all terms |  <=  error        (Frobenius norm)

Without `max_rank` the rank grows by that of every round's term, up to the layer's own size; every
client receives it. `max_rank` wins over `tolerance`: the rank is bounded, and `error` says what
that cost. All on the factors; memory O((out + in) rank) a module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.adapters.manifest import TERM_A, TERM_B
from fedtune.strategies.lora.factors import Factors, norm, rank_within, stack, svd, tail
from fedtune.strategies.lora.names import lora_modules

__all__ = ["Cumulative", "accumulate", "one_adapter"]

SVD_ULPS = 64  # two QRs and an SVD of small matrices; of 6,000 random terms up to 17


@dataclass(frozen=True)
class Cumulative:
    """Module -> B @ A to add to the base's output, scaling included, and module -> error bound.

    The factors are in fp64.
    """

    terms: Mapping[str, Factors] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a term; 0 without one."""
        return max((term.rank for term in self.terms.values()), default=0)

    @property
    def megabytes(self) -> float:
        """What the terms take in a message, in fp32."""
        values = sum(term.B.numel() + term.A.numel() for term in self.terms.values())
        return 4 * values / 1e6

    @property
    def relative_error(self) -> float:
        """Bound of the clients' error over all modules, relative to the total; 0 without a term."""
        total = math.hypot(*(norm(term) for term in self.terms.values()))
        errors = (self.error[m] + _rounding(t, torch.float32) for m, t in self.terms.items())
        return math.hypot(*errors) / total if total else 0.0

    def sent(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms as clients hold them (`adapters/base_terms.py`): at the adapter's precision.

        That is fp32 at least: terms of half precision would cost what the rule gains.
        """
        modules = lora_modules(params)
        rounded = {
            name: term.to(torch.promote_types(params[modules[name].b].dtype, torch.float32))
            for name, term in self.terms.items()
        }
        return Cumulative(rounded).tensors()

    def tensors(self) -> dict[str, Tensor]:
        """The terms by name."""
        return {
            module + suffix: factor
            for module, term in sorted(self.terms.items())
            for suffix, factor in ((TERM_B, term.B), (TERM_A, term.A))
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], error: Mapping[str, float]) -> Cumulative:
        """Inverse of `tensors`."""
        modules = [name.removesuffix(TERM_B) for name in tensors if name.endswith(TERM_B)]
        terms = {m: Factors(tensors[m + TERM_B], tensors[m + TERM_A]) for m in modules}
        return cls(terms, error)

    def change_since(self, before: Cumulative) -> dict[str, Factors]:
        """What has been added, by module."""
        change = {}
        for module, term in self.terms.items():
            old = before.terms.get(module)
            if old is not term:
                parts = [(1.0, term)] if old is None else [(1.0, term), (-1.0, old)]
                change[module] = stack(parts)
        return change


def accumulate(
    total: Cumulative,
    base: Mapping[str, Factors],
    *,
    tolerance: float = 1e-7,
    max_rank: int = 0,
) -> Cumulative:
    """The total with one round's terms added; modules without a term stay as they are.

    `max_rank` 0: no bound but the layer's size.
    """
    terms, error = dict(total.terms), dict(total.error)
    for name, term in base.items():
        parts = [(1.0, terms[name])] if name in terms else []
        spectrum = svd(stack([*parts, (1.0, term)]))
        within = rank_within(spectrum.S, tolerance * norm(term))
        rank = max(1, min(within, max_rank or within))
        terms[name] = spectrum.balanced(rank)
        error[name] = error.get(name, 0.0) + tail(spectrum.S, rank)
        error[name] += SVD_ULPS * _rounding(terms[name], torch.float64)
    return Cumulative(terms, error)


def one_adapter(
    params: Mapping[str, Tensor], scaling: Mapping[str, float], total: Cumulative
) -> dict[str, Tensor]:
    """The adapter and the total as one LoRA adapter with scaling 1 and rank r + r', in fp32."""
    joined = dict(params)
    for module in lora_modules(params).values():
        b, a = params[module.b], params[module.a]
        precise = torch.promote_types(b.dtype, torch.float32)
        parts = [(scaling[module.name], Factors(b, a))]
        if module.name in total.terms:
            parts.append((1.0, total.terms[module.name]))
        whole = stack(parts)
        joined |= {module.b: whole.B.to(precise), module.a: whole.A.to(precise)}
    return joined


def _rounding(factors: Factors, dtype: torch.dtype) -> float:
    """Bound of what rounding both factors to `dtype` costs: half an ulp each, and the product."""
    lengths = torch.linalg.matrix_norm(factors.B) * torch.linalg.matrix_norm(factors.A)
    return float(torch.finfo(dtype).eps * lengths) * (1 + 1e-6)
