"""Every exact rule through real PEFT layers, against dense weights: after 1 and after 10 rounds.

Oracle: the clients' mean weight. If all start a round at weight W with adapter D (dense) and end it
with D_k, the next weight is W + sum_k p_k (D_k - D). It knows nothing of factors or of base terms.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import fedtune
from fedtune.adapters import collect
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.lora.ranks import resize
from tests.strategies.lora.oracles import (
    add_to_base,
    base_weights,
    deltas,
    lora_layers,
    peft_net,
    put,
    relative,
    scaling,
    trained,
    weighted,
)

EXACT = sorted(n for n, rule in LORA_RULES.items() if rule.properties.products == "exact")
WEIGHTS = [1.0, 5.0, 2.0]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin": 2, "emb": 4}, "alpha_pattern": {"conv": 9}},
}
# fp64 leaves 1e-14; fp32 rounds about ten numbers of size 1 a round.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def error_after(name: str, rounds: int, dtype: torch.dtype, **options: Any) -> float:
    """Relative error of the weights, from one model whose base and adapter follow the rule."""
    model = peft_net(dtype=dtype, **options)
    method, params = LORA_RULES[name](), collect(model)
    want = {n: base + deltas(model, params)[n] for n, base in base_weights(model).items()}
    for server_round in range(1, rounds + 1):
        moves = partial(method.trains, server_round=server_round)
        updates = [trained(params, 100 * server_round + k, moves) for k in range(len(WEIGHTS))]
        start, ends = deltas(model, params), [deltas(model, update) for update in updates]
        moved = weighted([{n: end[n] - start[n] for n in end} for end in ends], WEIGHTS)
        want = {n: want[n] + moved[n] for n in want}
        out = fedtune.aggregate(name, updates, WEIGHTS, scaling=scaling(model))
        assert out.params.keys() == params.keys()
        assert out.scaling == scaling(model)
        params = out.params
        add_to_base(model, out.base)
    got = {n: base + deltas(model, params)[n] for n, base in base_weights(model).items()}
    return relative(got, want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", EXACT)
def test_one_round_is_exact(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert error_after(name, 1, dtype, **options) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_ten_rounds_are_exact(name: str, dtype: torch.dtype) -> None:
    assert error_after(name, 10, dtype) <= TOLERANCE[dtype]


def test_the_average_of_factors_is_not() -> None:
    assert error_after("fedit", 1, torch.float64) > 0.05


def test_outputs_follow_the_weights() -> None:
    """The forward pass of the adapted model is that of a plain model with the mean weights."""
    model, plain = peft_net(), peft_net()
    updates = [trained(collect(model), k) for k in range(3)]
    ends = [deltas(model, update) for update in updates]
    out = fedtune.aggregate("fedex_lora", updates, WEIGHTS, scaling=scaling(model))
    put(model, out.params)
    add_to_base(model, out.base)
    for name, moved in weighted(ends, WEIGHTS).items():
        lora_layers(plain)[name].get_base_layer().weight.data += moved
    tokens = torch.arange(11)
    with plain.disable_adapter():
        want = plain(tokens)
    torch.testing.assert_close(model(tokens), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_mixed_ranks(name: str) -> None:
    """Clients of ranks 1, 2 and 4 at one scaling; 1 + 2 + 4 columns are all that FlexLoRA needs."""
    models = [peft_net(rank, alpha=1.5 * rank) for rank in (1, 2, 4)]
    updates = [trained(collect(model), k) for k, model in enumerate(models)]
    ends = [deltas(model, update) for model, update in zip(models, updates, strict=True)]
    settings = {"rank": 7} if name == "flexlora" else {}
    out = fedtune.aggregate(name, updates, WEIGHTS, scaling=1.5, **settings)
    rank = settings.get("rank", 4)
    receiver = peft_net(rank, alpha=1.5 * rank)
    before = base_weights(receiver)
    add_to_base(receiver, out.base)
    got = deltas(receiver, out.params)
    got = {n: got[n] + base_weights(receiver)[n] - before[n] for n in got}
    assert relative(got, weighted(ends, WEIGHTS)) <= 1e-12
    assert out.residual <= 1e-12


def test_flexlora_gives_each_client_the_best_of_its_rank() -> None:
    models = {rank: peft_net(rank, alpha=1.5 * rank) for rank in (1, 2, 4)}
    updates = [trained(collect(model), rank) for rank, model in models.items()]
    whole = weighted([deltas(m, u) for m, u in zip(models.values(), updates, strict=True)], WEIGHTS)
    out = fedtune.aggregate("flexlora", updates, WEIGHTS, scaling=1.5)
    for rank, model in models.items():
        for name, got in deltas(model, resize(out.params, rank)).items():
            error = float(torch.linalg.matrix_norm(got - whole[name]))
            best = float(torch.linalg.vector_norm(torch.linalg.svdvals(whole[name])[rank:]))
            assert error == pytest.approx(best, rel=1e-10)


def test_other_scalings_per_client() -> None:
    """Equal alpha at mixed ranks: s_k = alpha / r_k differs, and so may it by module."""
    models = [peft_net(rank, alpha=4) for rank in (1, 2, 4)]
    updates = [trained(collect(model), k) for k, model in enumerate(models)]
    ends = [deltas(model, update) for model, update in zip(models, updates, strict=True)]
    own = [scaling(model) for model in models]
    for given in (own, [4.0, 2.0, 1.0]):
        out = fedtune.aggregate("flora", updates, WEIGHTS, scaling=given)
        receiver = peft_net(4)
        before = base_weights(receiver)
        add_to_base(receiver, out.base)
        got = {n: w - before[n] for n, w in base_weights(receiver).items()}
        assert relative(got, weighted(ends, WEIGHTS)) <= 1e-12
