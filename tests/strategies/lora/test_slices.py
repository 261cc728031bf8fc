"""HetLoRA and raFLoRA: means of rank slices, against loops over slices and clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

import fedtune
from fedtune.adapters import collect
from fedtune.strategies.lora.names import LoraModule, lora_modules
from fedtune.strategies.lora.ranks import resize
from tests.strategies.lora.oracles import (
    Params,
    clients,
    deltas,
    peft_net,
    relative,
    scaling,
    trained,
    weighted,
)

SLICED = ["hetlora", "raflora"]
RANKS = (1, 2, 4)
WEIGHTS = [1.0, 5.0, 2.0]
X = LoraModule("x", "x.lora_B.weight", "x.lora_A.weight")


def mixed(alpha: float = 1.5) -> list[Params]:
    """Trained clients of three ranks with one scaling."""
    models = [peft_net(rank, alpha=alpha * rank) for rank in RANKS]
    return [trained(collect(model), k) for k, model in enumerate(models)]


def padded(update: Mapping[str, Tensor], rank: int) -> Params:
    """With zeros."""
    wide = {}
    for module in lora_modules(update).values():
        b, a = update[module.b], update[module.a]
        wide[module.b] = torch.zeros(b.shape[0], rank, dtype=b.dtype)
        wide[module.a] = torch.zeros(rank, a.shape[1], dtype=a.dtype)
        wide[module.b][:, : b.shape[1]] = b
        wide[module.a][: a.shape[0]] = a
    return wide


def by_hand(name: str, updates: Sequence[Params], weights: Sequence[float], s: Tensor) -> Params:
    """The definitions, on dense products, one slice and one client at a time; s of each client."""
    wide = [padded(update, max(RANKS)) for update in updates]
    out = {key: torch.zeros_like(value) for key, value in wide[0].items()}
    for module in lora_modules(updates[0]).values():
        ranks = [update[module.a].shape[0] for update in updates]
        dense = [c * u[module.b] @ u[module.a] for c, u in zip(s, updates, strict=True)]
        lengths = [matrix.square().sum().sqrt() for matrix in dense]
        shared = sum(p * c for p, c in zip(weights, s, strict=True)) / sum(weights)
        for i in range(max(RANKS)):
            for k, update in enumerate(wide):
                if name == "hetlora":
                    share = lengths[k] / sum(lengths)
                else:
                    owners = [p for p, rank in zip(weights, ranks, strict=True) if rank > i]
                    share = weights[k] / sum(owners) if ranks[k] > i else 0.0
                out[module.a][i] += share * update[module.a][i]
                out[module.b][:, i] += share * s[k] / shared * update[module.b][:, i]
    return out


@pytest.mark.parametrize("own", [[1.5, 1.5, 1.5], [4.0, 2.0, 1.0]], ids=["one s", "s by client"])
@pytest.mark.parametrize("name", SLICED)
def test_the_definition(name: str, own: list[float]) -> None:
    updates = mixed()
    want = by_hand(name, updates, WEIGHTS, torch.tensor(own, dtype=torch.float64))
    out = fedtune.aggregate(name, updates, WEIGHTS, scaling=own)
    assert relative(out.params, want) <= 1e-14  # fp64, a few sums
    assert out.base == {}


def numbers() -> list[Params]:
    """Ranks 1, 2 and 3 on a layer 2 -> 1; the products are (3, 4), (3, 4) and (6, 8)."""
    values = [
        ([[1.0]], [[3.0, 4.0]]),
        ([[1.0, 1.0]], [[3.0, 0.0], [0.0, 4.0]]),
        ([[2.0, 1.0, 1.0]], [[3.0, 0.0], [0.0, 4.0], [0.0, 4.0]]),
    ]
    return [
        {X.b: torch.tensor(b, dtype=torch.float64), X.a: torch.tensor(a, dtype=torch.float64)}
        for b, a in values
    ]


# name: weights, new B, new A; |merged - target|, |plain - target| and |target|, by hand.
# hetlora weighs 5 : 5 : 10 whatever the weights are. Targets: (5.25, 7) and (4.5, 6).
CASES = {
    "hetlora": (
        [1, 1, 6],
        [[1.5, 0.75, 0.5]],
        [[3.0, 1.0], [0.0, 3.0], [0.0, 2.0]],
        (0.75 * 10**0.5, 0.8125, 8.75),  # (4.5, 4.75) and (5.25, 6.1875)
    ),
    "raflora": (
        [1, 1, 2],
        [[1.5, 1.0, 1.0]],
        [[3.0, 1.0], [0.0, 4.0], [0.0, 4.0]],
        (3.5, 1.25, 7.5),  # (4.5, 9.5) and (4.5, 4.75)
    ),
}


@pytest.mark.parametrize("name", SLICED)
def test_three_ranks_by_hand(name: str) -> None:
    weights, b, a, (error, plain, length) = CASES[name]
    out = fedtune.aggregate(name, numbers(), weights)
    # Norms by QR are off by an ulp or two.
    torch.testing.assert_close(out.params[X.b].tolist(), b, rtol=1e-14, atol=0)
    torch.testing.assert_close(out.params[X.a].tolist(), a, rtol=1e-14, atol=0)
    assert out.residual == pytest.approx(error / length, rel=1e-13)
    assert out.residual_fedavg == pytest.approx(plain / length, rel=1e-13)


@pytest.mark.parametrize("name", SLICED)
def test_residuals_are_those_of_dense_matrices(name: str) -> None:
    updates, receiver = mixed(), peft_net(4, alpha=6)
    ends = [
        deltas(peft_net(rank, alpha=1.5 * rank), update)
        for rank, update in zip(RANKS, updates, strict=True)
    ]
    want = weighted(ends, WEIGHTS)
    out = fedtune.aggregate(name, updates, WEIGHTS, scaling=1.5)
    plain = weighted([padded(update, 4) for update in updates], WEIGHTS)
    for residual, params in ((out.residual, out.params), (out.residual_fedavg, plain)):
        assert residual == pytest.approx(relative(deltas(receiver, params), want), rel=1e-12)
        assert residual > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SLICED)
def test_one_client_is_reproduced_exactly(name: str, dtype: torch.dtype) -> None:
    update = {key: value.to(dtype) for key, value in mixed()[1].items()}
    out = fedtune.aggregate(name, [update], [3.0], scaling=0.7)
    assert all(torch.equal(out.params[key], value) for key, value in update.items())


def test_raflora_of_equal_ranks_is_fedit() -> None:
    """The same sums, which fp64 pairs make free of their order, so every bit."""
    updates = [{n: t.float() for n, t in update.items()} for update in clients(peft_net())]
    one, other = (fedtune.aggregate(name, updates, WEIGHTS) for name in ("raflora", "fedit"))
    assert all(torch.equal(one.params[n], other.params[n]) for n in other.params)


def test_hetlora_of_equal_norms_is_fedit() -> None:
    """Rows in another order and other signs have the same norm; p_k does not enter."""
    update = trained(collect(peft_net()), 7)
    turned = {n: t.flip(0) if "lora_B" in n or n.endswith("_B") else t for n, t in update.items()}
    group = [update, turned, {n: -t for n, t in turned.items()}]
    one = fedtune.aggregate("hetlora", group, WEIGHTS)
    assert relative(one.params, fedtune.aggregate("fedit", group).params) <= 1e-14  # norms by QR


def test_a_sliced_global_adapter_is_a_fixed_point_of_raflora_alone() -> None:
    """Clients that hold its first slices and do not move; with zeros the high slices shrink."""
    start = {n: t.float() for n, t in mixed()[2].items()}
    group = [resize(start, rank) for rank in RANKS]
    same = fedtune.aggregate("raflora", group, WEIGHTS).params
    assert all(torch.equal(same[n], start[n]) for n in start)
    less = fedtune.aggregate("hetlora", group, WEIGHTS).params
    for module in lora_modules(start).values():
        assert less[module.a][3].norm() < 0.7 * start[module.a][3].norm()


def still(update: Params) -> Params:
    """As before the first step: the factor that PEFT starts at 0 is 0."""
    zeros = {m.a if m.embedding else m.b for m in lora_modules(update).values()}
    return {n: torch.zeros_like(t) if n in zeros else t for n, t in update.items()}


def test_hetlora_weighs_by_p_where_no_client_moved() -> None:
    group = [still({n: t.float() for n, t in u.items()}) for u in clients(peft_net())]
    one, other = (fedtune.aggregate(name, group, WEIGHTS) for name in ("hetlora", "fedit"))
    assert all(torch.equal(one.params[n], other.params[n]) for n in other.params)


def test_hetlora_gives_no_weight_to_a_product_of_0() -> None:
    """Its slices count as nobody's: product 0, and able to train."""
    first, second, last = mixed()
    out = fedtune.aggregate("hetlora", [first, second, still(last)], WEIGHTS).params
    alone = fedtune.aggregate("hetlora", [first, second], WEIGHTS[:2]).params
    assert relative(resize(out, 2), alone) == 0
    for module in lora_modules(out).values():
        b, a = out[module.b][:, 2:], out[module.a][2:]
        assert b.shape[1] == 2
        assert not (b @ a).any()
        assert bool((b.norm(dim=0) + a.norm(dim=1) > 0).all())


def test_scaling_by_module_of_the_same_clients() -> None:
    """s cancels where all clients have the same, in each layer for itself."""
    updates, model = mixed(), peft_net(4, alpha=6)
    by_module = {name: 1.0 + k for k, name in enumerate(sorted(scaling(model)))}
    for name in SLICED:
        one = fedtune.aggregate(name, updates, WEIGHTS, scaling=by_module)
        other = fedtune.aggregate(name, updates, WEIGHTS)
        assert relative(one.params, other.params) == 0
