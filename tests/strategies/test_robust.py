"""Rules that outvote a few clients: examples by hand, slow definitions, and a trap of fp32."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor

from fedtune.errors import RoundError
from fedtune.strategies import Method
from fedtune.strategies.krum import Krum, MultiKrum, product_distance, ranking, scores
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.median import Median
from fedtune.strategies.trimmed_mean import TrimmedMean
from tests.strategies.one_round import Params, one_round


def points(*values: float) -> list[dict[str, Tensor]]:
    """One update per number."""
    return [{"x": torch.tensor([float(value)])} for value in values]


def result(method: Method, updates: Sequence[Params]) -> float:
    return one_round(method, {"x": torch.zeros(1)}, updates)[0]["x"].item()


def random_updates(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """LoRA factors of a layer that is not square, and one more tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_A.weight": (2, 7), "q.lora_B.weight": (5, 2), "head.weight": (3, 4)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def test_median_by_hand() -> None:
    assert result(Median(), points(3, 100, -1)) == 3
    assert result(Median(), points(3, 100, -1, 4)) == 3.5
    assert result(Median(), points(7)) == 7


def test_trimmed_mean_by_hand() -> None:
    assert result(TrimmedMean(beta=0.2), points(1, 2, 3, 4, 1000)) == 3
    assert result(TrimmedMean(beta=0.2), points(1, 2, 3, 1000)) == 251.5  # floor(0.8): none dropped
    assert result(TrimmedMean(beta=0.0), points(1, 2, 6)) == 3
    assert result(TrimmedMean(beta=0.49), points(1, 2, 1000)) == 2


def test_a_share_is_what_was_written() -> None:
    """0.29 * 100 is 28.999999999999996 in fp64; 29 of 100 are to be dropped at each end."""
    updates = points(*[-1e6] * 29, *[1.0] * 42, *[1e6] * 29)
    assert result(TrimmedMean(beta=0.29), updates) == 1


@pytest.mark.parametrize("method", [Median(), TrimmedMean()], ids=lambda m: type(m).__name__)
def test_coordinates_against_torch(method: Median | TrimmedMean) -> None:
    """Larger than a block of 65,536; every block, shape and dtype is reduced."""
    generator = torch.Generator().manual_seed(1)
    updates = [
        {
            "x": torch.randn(3, 30_001, generator=generator),
            "h": torch.randn(4, generator=generator).bfloat16(),
            "empty": torch.empty(0, 2),
            "scalar": torch.tensor(float(k)),
        }
        for k in range(5)
    ]
    params, _ = one_round(method, updates[0], updates)
    for name, value in params.items():
        stacked = torch.stack([update[name].double() for update in updates]).sort(0).values
        expected = stacked[2] if isinstance(method, Median) else stacked[1:4].mean(0)
        assert torch.equal(value, expected.to(updates[0][name].dtype)), name


def test_krum_scores_by_hand() -> None:
    """n = 5, f = 1: the two nearest squared distances."""
    values = [0.0, 1.0, 3.0, 4.0, 100.0]
    nearest = [1 + 9, 1 + 4, 1 + 4, 1 + 9, 96**2 + 97**2]
    assert scores(points(*values), 1) == nearest
    assert ranking(points(*values), 1)[-1] == 4
    assert result(Krum(f=1), points(*values)) in (1.0, 3.0)  # a tie
    assert result(MultiKrum(f=1), points(*values)) == 2.0  # the mean of both
    assert result(MultiKrum(f=0, m=4), points(0, 1, 2, 3, 4, 100)) in (1.5, 2.5)  # 1, 2, 3; 0 or 4


def test_krum_against_its_definition() -> None:
    updates, f = random_updates(8), 2
    flat = torch.stack(
        [torch.cat([update[name].flatten() for name in sorted(update)]) for update in updates]
    ).double()
    squared = (flat[:, None] - flat[None]).square().sum(-1)
    expected = squared.sort(1).values[:, 1 : 1 + 8 - f - 2].sum(1)
    torch.testing.assert_close(torch.tensor(scores(updates, f)).double(), expected)
    best = updates[int(expected.argmin())]
    chosen, _ = one_round(Krum(f=f), updates[0], updates)
    assert all(torch.equal(chosen[name], best[name]) for name in best)


@pytest.mark.parametrize("f", [0, 1])
def test_ties_do_not_depend_on_the_order_of_arrival(f: int) -> None:
    """The two closest of three clients always have equal scores."""
    updates = random_updates(2 * f + 3)
    for method in (Krum(f=f), Krum(f=f, products=1), MultiKrum(f=f, m=1)):
        first, _ = one_round(method, updates[0], updates)
        for order in list(permutations(range(len(updates))))[:24]:
            again, _ = one_round(method, updates[0], [updates[k] for k in order])
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_small_deltas_on_large_weights_are_told_apart() -> None:
    """The expanded square in fp32 loses them: 1e6 weights of size 1, deltas of 1e-4."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1_000_000, generator=generator)
    sizes = [1e-4, 1e-4, 5e-4, 1e-4, 1e-4]
    deltas = [size * torch.randn(len(base), generator=generator) for size in sizes]
    updates = [{"x": base + delta} for delta in deltas]
    assert ranking(updates, 1)[-1] == 2
    # Rounding of the weights themselves, 6e-8 of 1 against 1e-4, is all that is lost.
    exact = scores([{"x": delta} for delta in deltas], 1)
    assert scores(updates, 1) == pytest.approx(exact, rel=1e-3)

    flat = torch.stack([update["x"] for update in updates])
    norms = flat.square().sum(1)
    expanded = norms[:, None] + norms[None] - 2 * flat @ flat.T
    true = (flat[0].double() - flat[1].double()).square().sum()
    assert abs(expanded[0, 1].double() - true) > 0.5 * true  # what the trap looks like


def test_too_few_updates_for_krum_are_an_error() -> None:
    for method, least in ((Krum(f=1), 5), (MultiKrum(f=2), 7), (MultiKrum(f=0, m=4), 6)):
        assert method.least_updates() == least
        with pytest.raises(RoundError, match=f"expected at least {least} updates, received 3"):
            one_round(method, points(0)[0], points(1, 2, 3))


@pytest.mark.parametrize("ranks", [(2, 2), (3, 5), (4, 1)], ids=str)
def test_product_distance_is_that_of_the_dense_products(ranks: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = (
        Factors(torch.randn(6, r, generator=generator), torch.randn(r, 9, generator=generator))
        for r in ranks
    )
    dense = left.B.double() @ left.A.double() - right.B.double() @ right.A.double()
    expected = float(dense.square().sum())
    assert product_distance(left, right) == pytest.approx(expected, rel=1e-12)
    assert product_distance(left, right) == product_distance(right, left)
    assert product_distance(left, left) == 0


def test_small_product_distances_keep_their_digits() -> None:
    """Differences of 1e-9: |M|^2 + |N|^2 - 2 <M, N> would have none left in fp64."""
    generator = torch.Generator().manual_seed(3)
    b = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    a = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    change = 1e-9 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    expected = float(((b + change - b) @ a).square().sum())
    found = product_distance(Factors(b + change, a), Factors(b, a))
    assert found == pytest.approx(expected, rel=1e-6)


def test_krum_of_products_sees_through_another_split() -> None:
    """(B G, G^-1 A) is the same layer as (B, A): far off in parameters, equal as a product."""
    honest = random_updates(1)[0]
    generator = torch.Generator().manual_seed(4)
    updates = [
        {name: t + 1e-3 * torch.randn(t.shape, generator=generator) for name, t in honest.items()}
        for _ in range(5)
    ]
    updates[3]["q.lora_B.weight"] *= 4.0
    updates[3]["q.lora_A.weight"] /= 4.0
    updates[4]["q.lora_B.weight"] += 0.1  # the liar
    assert ranking(updates, 1)[-1] == 3
    assert ranking(updates, 1, scaling={})[-1] == 4


def test_scaling_weighs_the_products() -> None:
    updates = random_updates(3)
    factors = [Factors(one["q.lora_B.weight"], one["q.lora_A.weight"]) for one in updates]
    plain = [one["head.weight"].double() for one in updates]

    def distance(i: int, j: int) -> float:
        apart = float((plain[i] - plain[j]).square().sum())
        return apart + 9 * product_distance(factors[i], factors[j])

    expected = [min(distance(i, j) for j in range(3) if j != i) for i in range(3)]
    assert scores(updates, 0, scaling={"q": 3.0}) == pytest.approx(expected, rel=1e-12)
