"""The oracles notice: each classic mistake, put into a rule, makes the dense check fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fedtune
from fedtune.adapters import collect
from fedtune.strategies import METHODS
from fedtune.strategies.lora import FedExLoRA, FLoRA
from fedtune.strategies.lora import fedex_lora as fedex_file
from fedtune.strategies.lora.factors import Factors, stack
from fedtune.strategies.lora.product_rule import NewLayer, Terms
from fedtune.strategies.lora.shared_factor import SharedFactorMean
from fedtune.strategies.mean import RunningMean
from tests.strategies.lora import oracles
from tests.strategies.lora.test_peft_layers import error_after

Patch = Callable[[pytest.MonkeyPatch], None]


def dropped_scale(patch: pytest.MonkeyPatch) -> None:
    """The base term as if s were 1."""

    class Mutant(FedExLoRA):
        def combine(self, terms: Terms) -> NewLayer:
            layer = super().combine(terms)
            return layer._replace(base=Factors(layer.base.B / terms.scaling, layer.base.A))

    patch.setitem(METHODS.built_in, "fedex_lora", Mutant)


def scale_counted_twice(patch: pytest.MonkeyPatch) -> None:
    class Mutant(FLoRA):
        def combine(self, terms: Terms) -> NewLayer:
            layer = super().combine(terms)
            return layer._replace(base=Factors(layer.base.B * terms.scaling, layer.base.A))

    patch.setitem(METHODS.built_in, "flora", Mutant)


def no_residual(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fedex_file, "covariance", lambda terms, mean: None)


def lost_term(patch: pytest.MonkeyPatch) -> None:
    """K - 1 of the K deviations, but taken from the mean instead of from the last client."""

    def covariance(terms: Terms, mean: Factors) -> Factors:
        pairs = zip(terms.shares[:-1], terms.factors[:-1], strict=True)
        return stack((p * terms.scaling, Factors(f.B - mean.B, f.A - mean.A)) for p, f in pairs)

    patch.setattr(fedex_file, "covariance", covariance)


def unweighted(patch: pytest.MonkeyPatch) -> None:
    """Every client alike, in shares and in means."""
    add = RunningMean.add
    patch.setattr(RunningMean, "add", lambda self, params, weight: add(self, params, 1.0))
    patch.setattr(Terms, "shares", property(lambda self: (1 / len(self.weights),) * 3))


def means_of_both(patch: pytest.MonkeyPatch) -> None:
    """FFA-LoRA without its check, and clients that train both factors."""
    patch.setattr(METHODS["ffa_lora"], "trains", lambda self, name, server_round: True)
    patch.setattr(SharedFactorMean, "add", lambda self, params, w: self._mean.add(params, w))


MUTANTS: list[tuple[str, Patch]] = [
    ("fedex_lora", dropped_scale),
    ("flora", scale_counted_twice),
    ("fedex_lora", no_residual),
    ("fedex_lora", lost_term),
    ("fedex_lora", unweighted),
    ("flora", unweighted),
    ("ffa_lora", unweighted),
    ("ffa_lora", means_of_both),
]


@pytest.mark.parametrize(
    ("name", "mutate"), MUTANTS, ids=lambda case: getattr(case, "__name__", case)
)
def test_the_dense_oracle_notices(
    name: str, mutate: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_after(name, 1, torch.float64) <= 1e-12
    mutate(monkeypatch)
    assert error_after(name, 1, torch.float64) > 1e-2


@pytest.mark.parametrize(
    ("name", "mutate"), MUTANTS[:4], ids=lambda case: getattr(case, "__name__", case)
)
def test_the_certificate_notices(name: str, mutate: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at what came out, not at how."""
    model = oracles.peft_net()
    mutate(monkeypatch)
    out = fedtune.aggregate(name, oracles.clients(model), [1, 5, 2], scaling=5 / 3)
    assert out.residual > 1e-2


def test_a_transposed_residual_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedEx-LoRA's released mistake: layers that are not square refuse it, square ones hide it."""

    class Mutant(FedExLoRA):
        def combine(self, terms: Terms) -> NewLayer:
            layer = super().combine(terms)
            return layer._replace(base=Factors(layer.base.A.T, layer.base.B.T))

    monkeypatch.setitem(METHODS.built_in, "fedex_lora", Mutant)
    with pytest.raises(RuntimeError, match="size"):
        error_after("fedex_lora", 1, torch.float64)

    class Square(oracles.Net):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin = nn.Embedding(6, 6), nn.Linear(6, 6)
            self.conv = oracles.Conv1D(6, 6)

    monkeypatch.setattr(oracles, "Net", Square)
    assert error_after("fedex_lora", 1, torch.float64) > 1e-2
    updates = oracles.clients(oracles.peft_net())
    assert fedtune.aggregate("fedex_lora", updates).residual > 1e-2


def test_certificate_against_dense_matrices() -> None:
    model = oracles.peft_net()
    updates, weights, s = oracles.clients(model), [1.0, 5.0, 2.0], oracles.scaling(model)
    ends = [oracles.deltas(model, update) for update in updates]
    want = oracles.weighted(ends, weights)
    out = fedtune.aggregate("fedit", updates, weights, scaling=s)
    got = oracles.deltas(model, out.params)
    assert out.residual == pytest.approx(oracles.relative(got, want), rel=1e-12)
    assert math.isclose(out.residual, out.residual_fedavg)
    assert collect(model).keys() == out.params.keys()
