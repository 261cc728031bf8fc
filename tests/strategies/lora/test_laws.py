"""Laws that hold for every rule, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtune
from fedtune.adapters import collect
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.lora.factors import Factors, norm, svd
from fedtune.strategies.lora.fedex_lora import covariance
from fedtune.strategies.lora.names import LoraModule, is_lora_b, lora_modules
from fedtune.strategies.lora.product_rule import Terms
from tests.strategies.lora.oracles import clients, pair, peft_net, trained

WEIGHTS = [3.0, 1.0, 4.0]
PRODUCT_RULES = ["fedex_lora", "flexlora", "flora"]
LAYER = LoraModule("x", "x.lora_B.weight", "x.lora_A.weight")


def effect(out: fedtune.Aggregate) -> dict[str, torch.Tensor]:
    """Dense addition to every layer."""
    found = {}
    for name, module in lora_modules(out.params).items():
        b, a = out.params[module.b].double(), out.params[module.a].double()
        found[name] = out.scaling[name] * b @ a
        if name in out.base:
            found[name] += out.base[name].B.double() @ out.base[name].A.double()
    return found


def updates_for(name: str) -> list[dict[str, torch.Tensor]]:
    method = LORA_RULES[name]()
    return clients(peft_net(), moves=lambda tensor: method.trains(tensor, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(set(LORA_RULES) - {"fedsa_lora"}))
def test_equal_clients_change_nothing(name: str, dtype: torch.dtype) -> None:
    update = {n: t.to(dtype) for n, t in trained(collect(peft_net()), 7).items()}
    out = fedtune.aggregate(name, [update] * 3, WEIGHTS, scaling=1.7)
    assert all(value.dtype == dtype for value in out.params.values())
    alone = fedtune.aggregate("fedavg", [update], scaling=1.7)
    for module, want in effect(alone).items():
        torch.testing.assert_close(effect(out)[module], want, rtol=1e-5, atol=1e-6)
    if name not in ("flora", "flexlora") and dtype == torch.float32:
        # Those keep the product, not the factors; the mean of fp64 values rounds once itself.
        assert out.base == {}
        assert all(torch.equal(out.params[n], update[n]) for n in update)


@pytest.mark.parametrize("name", sorted(LORA_RULES))
def test_order_of_arrival_does_not_matter(name: str) -> None:
    updates = [{n: t.float() for n, t in update.items()} for update in updates_for(name)]
    one = fedtune.aggregate(name, updates, WEIGHTS)
    other = fedtune.aggregate(name, updates[::-1], WEIGHTS[::-1])
    assert all(torch.equal(one.params[n], other.params[n]) for n in one.params)
    for module, term in one.base.items():
        assert all(map(torch.equal, term, other.base[module]))


@pytest.mark.parametrize("name", sorted(LORA_RULES))
def test_inputs_stay_as_they_are(name: str) -> None:
    updates = updates_for(name)
    before = [{n: t.clone() for n, t in update.items()} for update in updates]
    fedtune.aggregate(name, updates, WEIGHTS, scaling=[1.0, 1.0, 1.0])
    for update, copy in zip(updates, before, strict=True):
        assert all(torch.equal(update[n], copy[n]) for n in copy)


@pytest.mark.parametrize("name", PRODUCT_RULES)
def test_the_gauge_of_a_client_does_not_matter(name: str) -> None:
    """(B G, G^-1 A) is the same update as (B, A)."""
    updates = clients(peft_net())
    turned = []
    for seed, update in enumerate(updates):
        generator = torch.Generator().manual_seed(seed)
        other = dict(update)
        for module in lora_modules(update).values():
            rank = update[module.a].shape[0]
            gauge = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
            gauge += 3 * torch.eye(rank, dtype=torch.float64)
            other[module.b] = update[module.b] @ gauge
            other[module.a] = torch.linalg.solve(gauge, update[module.a])
        turned.append(other)
    one, other = (fedtune.aggregate(name, group, WEIGHTS) for group in (updates, turned))
    for module, want in effect(one).items():
        torch.testing.assert_close(effect(other)[module], want, rtol=1e-10, atol=1e-10)
    assert other.residual == pytest.approx(one.residual, abs=1e-12)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_covariance_identity(count: int, rank: int, seed: int) -> None:
    """sum p B A - mean B mean A has K - 1 terms of rank r: as written, and as its rank."""
    generator = torch.Generator().manual_seed(seed)
    factors = tuple(pair(generator, 9, 7, rank) for _ in range(count))
    weights = tuple(1.0 + k for k in range(count))
    terms = Terms(LAYER, factors, weights, scaling=0.7)
    mean = terms.mean()
    want = sum(w / sum(weights) * f.B @ f.A for w, f in zip(weights, factors, strict=True)) - (
        mean.B @ mean.A
    )
    found = covariance(terms, mean)
    if count == 1:
        assert found is None
        return
    assert found.rank == (count - 1) * rank
    torch.testing.assert_close(found.B @ found.A, 0.7 * want, rtol=1e-11, atol=1e-11)
    residual = fedtune.aggregate(
        "fedavg",
        [{LAYER.b: f.B, LAYER.a: f.A} for f in factors],
        weights,
        scaling=0.7,
    ).residual
    assert residual == pytest.approx(norm(found) / norm(terms.update()), rel=1e-9)


def test_fedavg_has_the_residual_that_fedex_corrects() -> None:
    updates = clients(peft_net())
    exact = fedtune.aggregate("fedex_lora", updates, WEIGHTS, scaling=2.0)
    plain = fedtune.aggregate("fedavg", updates, WEIGHTS, scaling=2.0)
    assert exact.residual <= 1e-14
    assert plain.residual == plain.residual_fedavg > 0.1
    assert exact.residual_fedavg == pytest.approx(plain.residual, rel=1e-12)
    assert all(torch.equal(plain.params[n], exact.params[n]) for n in plain.params)


def test_flora_leaves_nothing_in_the_adapter_that_is_started_anew() -> None:
    out = fedtune.aggregate("flora", clients(peft_net()), WEIGHTS, seed=1)
    again = fedtune.aggregate("flora", clients(peft_net()), WEIGHTS, seed=1)
    other = fedtune.aggregate("flora", clients(peft_net()), WEIGHTS, seed=2)
    for name, module in lora_modules(out.params).items():
        zero, random = (module.a, module.b) if module.embedding else (module.b, module.a)
        assert not out.params[zero].any()
        assert out.params[random].std() > 0.05
        assert torch.equal(out.params[random], again.params[random])
        assert not torch.equal(out.params[random], other.params[random])
        assert out.base[name].rank == 9


def test_flexlora_is_balanced_and_florist_keeps_its_share() -> None:
    updates, s = clients(peft_net()), 2.0
    out = fedtune.aggregate("flexlora", updates, WEIGHTS, scaling=s)
    florist = fedtune.aggregate("flexlora", updates, WEIGHTS, scaling=s, energy=0.9)
    for module in lora_modules(out.params).values():
        b, a = out.params[module.b], out.params[module.a]
        torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-10, atol=1e-10)
        factors = tuple(Factors(update[module.b], update[module.a]) for update in updates)
        energies = svd(Terms(module, factors, tuple(WEIGHTS), s).update()).S.square()
        rank = florist.params[module.a].shape[0]
        assert energies[:rank].sum() >= 0.9 * energies.sum() > energies[: rank - 1].sum()
    assert florist.residual <= 0.1**0.5


def test_flexlora_leaves_no_rank_that_cannot_train() -> None:
    """Equal clients give rank 3 of 5; the other two start as a fresh adapter does."""
    update = trained(collect(peft_net()), 7)
    out = fedtune.aggregate("flexlora", [update] * 2, rank=5)
    for module in lora_modules(out.params).values():
        b, a = out.params[module.b], out.params[module.a]
        assert b.shape[1] == a.shape[0] == 5
        assert bool((b.norm(dim=0) + a.norm(dim=1) > 1e-3).all())
    assert out.residual <= 1e-14


def test_fedsa_averages_a_and_leaves_b_where_it_is() -> None:
    updates = clients(peft_net())
    out = fedtune.aggregate("fedsa_lora", updates, WEIGHTS)
    plain = fedtune.aggregate("fedavg", updates, WEIGHTS)
    assert sorted(out.params) == sorted(n for n in updates[0] if not is_lora_b(n))
    assert all(torch.equal(out.params[n], plain.params[n]) for n in out.params)
    assert out.residual == pytest.approx(plain.residual)  # of the mean of sum p_k s B_k A
    again = fedtune.aggregate("fedsa_lora", updates, WEIGHTS, reference=updates[0])
    assert again.residual == out.residual


def test_truncated_fedex_is_the_best_of_its_rank() -> None:
    updates = clients(peft_net())
    exact = fedtune.aggregate("fedex_lora", updates, WEIGHTS)
    cut = fedtune.aggregate("fedex_lora", updates, WEIGHTS, rank=2)
    for name, term in cut.base.items():
        assert term.rank == 2
        whole = exact.base[name].B @ exact.base[name].A
        error = torch.linalg.matrix_norm(term.B @ term.A - whole)
        best = torch.linalg.vector_norm(torch.linalg.svdvals(whole)[2:])
        torch.testing.assert_close(error, best, rtol=1e-9, atol=1e-12)
