"""Declared properties are what methods do, in both directions."""

from __future__ import annotations

import pytest
import torch

from fedtune.errors import ConfigError, ManifestError
from fedtune.strategies.agreement import check_agreement, check_variants
from tests.methods import named
from tests.strategies.cases import (
    SHAPES,
    asked_for,
    error,
    every_method,
    every_rule,
    made,
    products,
    same,
    same_terms,
    trained,
    update,
)
from tests.strategies.one_round import one_fold, stats_of


@every_method
def test_a_sum_suffices_where_it_says_so(name: str) -> None:
    """Then moving something from one client to another changes nothing. In whole numbers, so that
    the two sums are equal to the bit."""
    method, clients = made(name)
    old = {key: value.round() for key, value in update(0).items()}
    updates = [
        {key: (3 * value).round() for key, value in update(k).items()}
        for k in range(1, clients + 1)
    ]
    for one in updates:
        one |= {key: old[key] for key in one if not method.rule.trains(key, 1)}
    moved = {key: torch.full_like(old[key], 4 * method.rule.trains(key, 1)) for key in old}
    other = [
        {key: updates[0][key] + moved[key] for key in old},
        {key: updates[1][key] - moved[key] for key in old},
        *updates[2:],
    ]
    found, base = one_fold(method, old, updates)
    after, base_after = one_fold(method, old, other)
    unchanged = same(found, after) and same_terms(base, base_after)
    assert unchanged == method.properties.sum_suffices


@every_rule
def test_robust_rules_bound_one_arbitrary_client(name: str) -> None:
    method, clients = made(name)
    old = update(0)
    updates = [trained(method, old, k) for k in range(1, clients + 1)]
    moves = [key for key in updates[2] if method.rule.trains(key, 1)]
    updates[2] |= {key: updates[2][key] * 1e6 for key in moves}
    found, base = one_fold(method, old, updates)
    factors = [factor for term in base.values() for factor in term]
    # Honest values are normal: none of about 300 is above 10.
    bounded = max(float(value.abs().max()) for value in (*found.values(), *factors)) < 10
    assert bounded == method.properties.robust


@every_rule
def test_products_are_as_exact_as_declared(name: str) -> None:
    """fp32: rounding is 1e-6 at most. `to rank` is the best of its rank, which the singular values
    tell, here more than a tenth off; what is neither is clearly worse."""
    method, clients = made(name)
    old = update(0)
    updates = [trained(method, old, k) for k in range(1, clients + 1)]
    weights = [1 + k for k in range(clients)]
    found, base = one_fold(method, old, updates, [stats_of(weight=weight) for weight in weights])
    assert bool(base) == method.properties.changes_base
    assert method.properties.qlora_safe == (not method.properties.changes_base)
    if not all(method.rule.travels(key) for key in old):
        assert method.properties.products == "approximate"
        return
    wanted = asked_for(updates, weights)
    miss = error(products(found, base), wanted, "q")
    best = float(torch.linalg.svdvals(wanted["q"])[2:].norm() / wanted["q"].norm())
    if method.properties.products == "exact":
        assert miss < 1e-6
    elif method.properties.products == "to rank":
        assert miss == pytest.approx(best, rel=1e-5)
    else:
        assert miss > 1.01 * best > 0.1


@every_rule
def test_new_coordinates_are_declared(name: str) -> None:
    """A client alone gets its own factors back, unless they are in other coordinates."""
    method = named(name)
    old = update(0)
    new = trained(method, old, 1)
    found, _ = one_fold(method, old, [new] * method.rule.least_updates())
    stayed = all(torch.equal(found[key].to(new[key].dtype), new[key]) for key in found)
    assert stayed == (not method.properties.refactors)


@every_method
def test_client_state_is_declared(name: str) -> None:
    """A control variate, or a tensor that does not travel, is kept at the client."""
    method = named(name)
    personal = not all(method.rule.travels(key) for key in SHAPES)
    assert method.properties.personal == personal
    assert bool(method.extras) == (name == "scaffold")


@every_method
def test_mixed_ranks_are_taken_or_refused_by_name(name: str) -> None:
    method, clients = made(name)
    updates = [update(k, rank=1 + k % 3) for k in range(1, clients + 1)]
    if method.properties.mixed_ranks:
        check_agreement(name, method.properties, updates)
        found, base = one_fold(method, update(0, rank=3), updates)
        for key, product in products(found, base).items():
            assert product.shape == products(updates[0], {})[key].shape
    else:
        with pytest.raises(ManifestError, match=f"embedding_A`: {name} expected equal ranks"):
            check_agreement(name, method.properties, updates)
        with pytest.raises((RuntimeError, ValueError)):  # not a wrong result, were it let through
            one_fold(method, update(0, rank=3), updates)


@every_method
def test_kinds_of_tensors_are_taken_or_refused_by_name(name: str) -> None:
    properties = named(name).properties
    kinds = {
        "lora": "q.lora_A.weight",
        "dora": "q.lora_magnitude_vector",
        "lora_bias": "q.lora_B.bias",
        "other": "prompt.weight",
    }
    assert properties.variants is None or properties.variants <= kinds.keys()
    for kind, tensor in kinds.items():
        if properties.variants is None or kind in properties.variants:
            check_variants(name, properties, [tensor])
        else:
            with pytest.raises(ConfigError, match=f"{name}: expected .* received {kind}"):
                check_variants(name, properties, [tensor])
