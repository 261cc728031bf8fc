"""LoRA rules in whole federations: the model that is served is the one that the rule promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from fedtune.adapters import merge, params
from fedtune.adapters.base_terms import base_terms
from fedtune.client.worker import Worker
from fedtune.server.checkpoint import ServerState
from fedtune.server.store import RunStore
from fedtune.strategies import Method, Rule
from fedtune.strategies.lora import LORA_RULES, fedex_lora, product_rule
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.product_rule import BaseRule, Terms
from tests.federation.dense import (
    KINDS,
    Oracle,
    dequantized,
    exported,
    four_bit,
    llama,
    logits,
    lora_worker,
    off,
)
from tests.federation.small import run_small, same_tensors, small_worker
from tests.tiny import tiny_tokenizer

EXACT = ["ffa_lora", "rolora", "flora", "fedex_lora"]
BASE = ["flora", "fedex_lora"]
ROUNDS = 10


class Checked:
    """A round hook: relative errors of logits against the dense oracle, by round."""

    def __init__(self, worker: Worker, name: str, kind: str, directory: Path) -> None:
        self.patch = pytest.MonkeyPatch()
        self.worker, self.base, self.directory = worker, KINDS[kind][0], directory
        self.oracle = Oracle(worker, self.patch, fresh=name == "flora")
        self.store = RunStore(directory, num_rounds=ROUNDS, save_every_rounds=1)
        self.live: dict[int, float] = {}
        self.exported: dict[int, float] = {}
        self.fedavg: list[float] = []
        self.wanted = self.first = logits(self.base())

    def __call__(self, state: ServerState, record: dict[str, Any]) -> None:
        self.oracle(state, record)
        self.store.on_round(state, record)
        if not state.round:
            return
        self.fedavg.append(self.oracle.lost_by_averaging)
        if state.round in (1, ROUNDS):
            # The live model is as the server's evaluation has left it.
            self.wanted = self.oracle.logits(self.base())
            self.live[state.round] = off(logits(self.worker.model), self.wanted)
            found = exported(self.base(), self.directory / "adapter")
            self.exported[state.round] = off(found, self.wanted)


def checked(
    directory: Path, name: str, kind: str, method: Method | None = None, **given: Any
) -> tuple[Checked, ServerState]:
    worker = lora_worker(directory / "clients", kind)
    check = Checked(worker, name, kind, directory / "run")
    try:
        state = run_small(
            worker,
            method=method or LORA_RULES[name](),
            on_round=check,
            **{"num_rounds": ROUNDS, "steps": 2, **given},
        )
    finally:
        check.patch.undo()
    return check, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_rule_is_exact(name: str, kind: str, tmp_path: Path) -> None:
    """Live, exported and merged; 1e-6 in fp64 is the recompression's 1e-7 over ten rounds."""
    check, state = checked(tmp_path, name, kind)
    within = KINDS[kind][2]
    assert max(check.live.values()) <= within
    assert max(check.exported.values()) <= within
    assert off(check.first, check.wanted) > 1e-2  # or nothing was tested
    for record, fedavg in zip(state.history[1:], check.fedavg, strict=True):
        assert record["residual"] <= 1e-6, record["round"]
        # abs: where nothing is lost there is the rounding of fp32 means
        assert record["residual_fedavg"] == pytest.approx(fedavg, rel=1e-3, abs=2e-7)
        assert ("base_rank" in record) == ("base_error" in record) == bool(record.get("base_rank"))
    assert ("base_rank" in state.history[-1]) == (name in BASE)
    assert (max(check.fedavg) > 1e-3) == (name in BASE)
    check.base().save_pretrained(tmp_path / "base")
    tiny_tokenizer(pad_token="<unk>").save_pretrained(tmp_path / "base")
    merge(tmp_path / "run" / "adapter", tmp_path / "merged", str(tmp_path / "base"))
    merged = type(check.base()).from_pretrained(tmp_path / "merged", dtype="auto")
    assert off(logits(merged), check.wanted) <= within


@pytest.mark.parametrize("name", BASE)
def test_a_four_bit_base_is_not_written_to(name: str, tmp_path: Path) -> None:
    """Within 1e-3 of a base that is dequantized and can be; its own bits stay as they were."""
    llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer(pad_token="<unk>").save_pretrained(tmp_path / "base")
    base = four_bit(tmp_path / "base")
    plain = dequantized(base)
    before = four_bits(base)
    worker = lora_worker(tmp_path / "clients", SQUARE, base=lambda: base)
    store = RunStore(tmp_path / "run", num_rounds=4, save_every_rounds=4)
    with pytest.MonkeyPatch.context() as patch:
        oracle = Oracle(worker, patch, fresh=name == "flora")

        def on_round(state: ServerState, record: dict[str, Any]) -> None:
            oracle(state, record)
            store.on_round(state, record)

        state = run_small(
            worker, method=LORA_RULES[name](), on_round=on_round, num_rounds=4, steps=2
        )
    first = logits(plain)
    wanted = oracle.logits(plain)
    assert off(first, wanted) > 1e-2
    assert off(logits(worker.model), wanted) <= 1e-3
    fresh = four_bit(tmp_path / "base")
    assert off(exported(fresh, tmp_path / "run" / "adapter"), wanted) <= 1e-3
    assert max(record["residual"] for record in state.history[1:]) <= 1e-6
    assert same_tensors(four_bits(base), before)


def four_bits(base: nn.Module) -> dict[str, torch.Tensor]:
    """By number: PEFT renames the layers that it wraps."""
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    return {str(number): layer.weight.data.clone() for number, layer in enumerate(layers)}


# --- the checks above notice what is off ---

SQUARE = "patterns, rsLoRA, fp32"


def transposed_residual(patch: pytest.MonkeyPatch) -> None:
    """Of the square layers; of the others it could not be added at all."""
    covariance = fedex_lora.covariance

    def turned(terms: Terms, mean: Factors) -> Factors | None:
        found = covariance(terms, mean)
        square = found is not None and found.B.shape[0] == found.A.shape[1]
        return Factors(found.A.T, found.B.T) if square and found else found

    patch.setattr(fedex_lora, "covariance", turned)


def dropped_scale(patch: pytest.MonkeyPatch) -> None:
    update, covariance = Terms.update, fedex_lora.covariance
    patch.setattr(Terms, "update", lambda terms: update(replace(terms, scaling=1.0)))
    patch.setattr(
        fedex_lora,
        "covariance",
        lambda terms, mean: covariance(replace(terms, scaling=1.0), mean),
    )


def unweighted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rule, "weigh", lambda self, stats: 1.0)


def forgotten_terms(patch: pytest.MonkeyPatch) -> None:
    """Only the last round's terms."""
    accumulate = product_rule.accumulate

    def last(total: Any, terms: Any, **given: Any) -> Any:
        return accumulate(type(total)(), terms, **given)

    patch.setattr(product_rule, "accumulate", last)


def absent_terms(patch: pytest.MonkeyPatch) -> None:
    """The server knows them, the live model does not."""
    patch.setattr(params, "set_base_terms", lambda *_: None)


def without_terms(patch: pytest.MonkeyPatch) -> None:
    """An export that leaves them out."""
    patch.setattr(ServerState, "whole", lambda state: (state.params, state.manifest))


def no_residual(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BaseRule, "cumulate", lambda self, total, terms: total)


Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: list[tuple[str, Mutation, str]] = [
    ("fedex_lora", transposed_residual, "live exported residual"),
    ("fedex_lora", dropped_scale, "live exported residual"),
    ("flora", dropped_scale, "live exported"),
    ("ffa_lora", unweighted, "live exported"),
    ("fedex_lora", unweighted, "live exported"),
    ("flora", forgotten_terms, "live exported residual"),
    ("flora", absent_terms, "live"),
    ("fedex_lora", absent_terms, "live"),
    ("flora", without_terms, "exported"),
    ("fedex_lora", without_terms, "exported"),
    ("flora", no_residual, "live exported residual"),
    ("fedex_lora", no_residual, "live exported residual"),
]


@pytest.mark.parametrize(
    ("name", "mutation", "noticed"),
    MUTATIONS,
    ids=lambda value: value.__name__ if callable(value) else str(value).replace(" ", "-"),
)
def test_a_mistake_is_noticed(
    name: str,
    mutation: Mutation,
    noticed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By at least ten times what exactness allows."""
    monkeypatch.setattr("tests.federation.test_lora_rules.ROUNDS", 2)
    mutation(monkeypatch)
    check, state = checked(tmp_path, name, SQUARE, num_rounds=2)
    found = {
        "live": check.live[2] > 1e-4,
        "exported": check.exported[2] > 1e-4,
        "residual": max(record["residual"] for record in state.history[1:]) > 1e-5,
    }
    for what in noticed.split():
        assert found[what], (what, check.live, check.exported)


# --- what recompression costs is known ---


@pytest.mark.parametrize("name", BASE)
def test_a_bounded_rank_keeps_within_its_bound(name: str, tmp_path: Path) -> None:
    """The base terms beside the oracle's, after every round."""
    worker = lora_worker(tmp_path / "clients", SQUARE)
    ranks, errors = [], []

    def on_round(state: ServerState, record: dict[str, Any]) -> None:
        oracle(state, record)
        if not state.base.terms:
            return
        kept = {n: t.B.double() @ t.A.double() for n, t in state.base.terms.items()}
        for module, term in kept.items():
            missed = float((term - oracle.base[module]).norm())
            # the oracle's means are not rounded to fp32 as the adapter is
            assert missed <= state.base.error[module] + 1e-6
        total = sum(float(term.square().sum()) for term in kept.values()) ** 0.5
        error = sum(float((kept[n] - oracle.base[n]).square().sum()) for n in kept) ** 0.5 / total
        errors.append((error, record["base_error"]))
        ranks.append(record["base_rank"])

    with pytest.MonkeyPatch.context() as patch:
        oracle = Oracle(worker, patch, fresh=name == "flora")
        run_small(
            worker, method=LORA_RULES[name](max_rank=5), on_round=on_round, num_rounds=4, steps=2
        )
    assert max(ranks) == 5
    assert all(error <= bound + 1e-6 for error, bound in errors)
    assert errors[-1][0] > 1e-4  # something was left out


def test_terms_are_the_models_only_while_they_are_sent(tmp_path: Path) -> None:
    """Another federation on the same live model starts from the plain base."""
    worker = small_worker(tmp_path, clients=2)
    state = run_small(worker, method=LORA_RULES["flora"](), num_rounds=1, steps=2)
    assert base_terms(worker.model).keys() == state.base.tensors().keys() != set()
    run_small(worker.fork(work_dir=tmp_path / "other"), num_rounds=1, steps=1)
    assert not base_terms(worker.model)
    assert not any(module._forward_hooks for module in worker.model.modules())
