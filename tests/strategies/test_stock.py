"""Strategies of Flower behind the same shell: `--strategy flwr:NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.serverapp import strategy as flower
from torch import Tensor

import fedtune
from fedtune.errors import ConfigError, RoundError
from fedtune.strategies import FedAvg, Method, build_method
from fedtune.strategies.base import Round
from fedtune.strategies.fedopt import FedAdagrad
from fedtune.strategies.median import Median
from fedtune.strategies.stock import REFUSED, stock_rule
from tests.federation.scripted import in_a_task
from tests.federation.small import run_small, same_tensors, small_worker
from tests.strategies.one_round import one_round

WORKING = sorted(
    name
    for name in flower.__all__
    if issubclass(getattr(flower, name), flower.FedAvg) and name not in REFUSED
)
EPS = 2**-23


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


def build(name: str, **settings: float) -> Method:
    return build_method(f"flwr:{name}", weight_by="uniform", settings=settings)


def update(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Not in the order of their names, as FedAvgM pairs arrays by their place."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 4), "b": (2, 5), "scale": ()}
    return {n: torch.rand(s, generator=generator).to(dtype) for n, s in shapes.items()}


UPDATES = [update(seed) for seed in range(1, 8)]


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol)


def test_the_names_are_flowers() -> None:
    """A name that Flower adds is looked at here before anybody uses it."""
    assert WORKING == [
        "Bulyan", "FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedMedian", "FedTrimmedAvg",
        "FedYogi", "Krum", "MultiKrum",
    ]  # fmt: skip


@pytest.mark.parametrize("name", WORKING)
def test_every_strategy_works_in_any_order_of_arrival(name: str) -> None:
    found, _ = one_round(build(name), update(0), UPDATES)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in update(0).items()
    }
    other, _ = one_round(build(name), update(0), UPDATES[::-1])
    assert same_tensors(found, other)
    assert same_tensors(update(1), UPDATES[0])


def test_fedavg_is_ours() -> None:
    """It sums 7 products below 1/7 in fp32, with a rounded weight each: 7 roundings of 1."""
    expected, _ = one_round(FedAvg(), update(0), UPDATES)
    found, _ = one_round(build("FedAvg"), update(0), UPDATES)
    close(found, expected, atol=7 * EPS)


def test_weights_are_those_of_weight_by() -> None:
    fold = build("FedAvg").rule.fold(Round(1, update(0)))
    fold.add({"w": torch.tensor([0.0])}, 1.0)
    fold.add({"w": torch.tensor([1.0])}, 3.0)
    assert fold.result()["w"].item() == 0.75


@pytest.mark.parametrize("count", [6, 7])
def test_median_is_ours(count: int) -> None:
    """The mean of the two middle values is one rounding."""
    expected, _ = one_round(Median(), update(0), UPDATES[:count])
    found, _ = one_round(build("FedMedian"), update(0), UPDATES[:count])
    close(found, expected, atol=0.0 if count % 2 else EPS)


def test_a_server_optimizer_gets_the_parameters_and_keeps_its_memory() -> None:
    """Two rounds of Adagrad. Flower starts v at 0 where the paper and we have tau^2 = 1e-6; with
    deltas of 1 that is a relative difference of 5e-7, and fp32 roundings of values below 2."""
    stock, ours = build("FedAdagrad", eta=0.1), FedAdagrad(lr=0.1)
    one = expected = {"w": torch.full((3,), 0.5)}
    state: dict[str, dict[str, Tensor]] = {}
    for number in (1, 2):
        sent = [{"w": one["w"] + 1.0}] * 3
        one, _ = one_round(stock, one, sent, number=number)
        expected, state = one_round(ours, expected, sent, state=state, number=number)
        close(one, expected, atol=8 * EPS)
    assert not torch.equal(one["w"], torch.full((3,), 1.5))


@pytest.mark.parametrize("turned", [0, 1])
def test_momentum_pairs_arrays_by_name(turned: int) -> None:
    """Its first round is FedAvg, up to some roundings of values below 1; FedAvgM goes by places, so
    a client that sends its tensors in another order must not matter."""
    updates = [dict(sorted(one.items(), reverse=k == turned)) for k, one in enumerate(UPDATES[:2])]
    found, _ = one_round(build("FedAvgM", server_momentum=0.5), update(0), updates)
    expected, _ = one_round(FedAvg(), update(0), UPDATES[:2])
    close(found, expected, atol=4 * EPS)


def test_a_whole_run(tmp_path: Path) -> None:
    """To the bit: halves of two clients are exact in fp32, and their sum is rounded once."""
    plain = run_small(small_worker(tmp_path / "a", clients=2), method=FedAvg(weight_by="uniform"))
    other = run_small(small_worker(tmp_path / "b", clients=2), method=build("FedAvg"))
    assert same_tensors(other.params, plain.params)


def test_a_resumed_run_is_refused_where_memory_is_lost() -> None:
    for name in ("FedMedian", "FedAvgM"):  # the latter without momentum
        assert one_round(build(name), update(0), UPDATES, number=3)
    for stock in (build("FedAdam"), build("FedAvgM", server_momentum=0.9)):
        with pytest.raises(ConfigError, match="received round 3: .* without --resume"):
            one_round(stock, update(0), UPDATES, number=3)


def test_what_numpy_lacks_is_refused_by_name() -> None:
    old = {**update(0), "b": update(0)["b"].bfloat16()}
    with pytest.raises(ConfigError, match=r"flwr:FedAvg: `b`: .* received bfloat16 \[2, 5\]"):
        build("FedAvg").rule.fold(Round(1, old))
    with pytest.raises(ConfigError, match="`b`: .* bfloat16"):
        build("FedAvg").rule.fold().add(old, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_come_back_as_they_are(dtype: torch.dtype) -> None:
    found, _ = one_round(build("FedAdam"), update(0, dtype), [update(1, dtype)] * 2)
    assert {value.dtype for value in found.values()} == {dtype}


def test_what_it_returns_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_rule("FedAvg", "uniform", {})
    whole = stock.strategy.aggregate_train

    def cut(number, replies):
        arrays, metrics = whole(number, replies)
        del arrays["b"]
        return arrays, metrics

    monkeypatch.setattr(stock.strategy, "aggregate_train", cut)
    with pytest.raises(RoundError, match=r"`b`: expected \(2, 5\), received none"):
        one_round(stock, update(0), UPDATES)
    monkeypatch.setattr(stock.strategy, "aggregate_train", lambda number, replies: (None, None))
    with pytest.raises(RoundError, match="`b`: expected"):
        one_round(stock, update(0), UPDATES)


def test_its_own_errors_are_one_line() -> None:
    with pytest.raises(RoundError, match="flwr:FedAdam: Keys of the aggregated arrays") as caught:
        one_round(build("FedAdam"), {}, UPDATES)
    assert "\n" not in str(caught.value)


def test_bulyan_says_how_many_clients_it_needs() -> None:
    assert build("Bulyan", num_malicious_nodes=2.0).rule.least_updates() == 11
    assert build("FedAvg").rule.least_updates() == 1


@pytest.mark.parametrize(
    ("strategy", "settings", "part"),
    [
        ("flwr:FedMedain", {}, "Did you mean FedMedian?"),
        ("flwr:", {}, "unknown strategy of Flower ''"),
        ("flwr:Strategy", {}, "unknown strategy of Flower"),
        ("flwr:DifferentialPrivacyServerSideFixedClipping", {}, "it wraps another strategy"),
        ("flwr:DifferentialPrivacyClientSideAdaptiveClipping", {}, "it wraps another strategy"),
        ("flwr:FedProx", {}, "Use fedprox"),
        ("flwr:QFedAvg", {}, "losses"),
        ("flwr:FedXgbCyclic", {}, "trees"),
        ("fedprox+flwr:FedMedian", {}, "flwr:FedMedian combines with no other method"),
        ("flwr:FedAvg+fedadam", {}, "flwr:FedAvg combines with no other method"),
        ("flwr:FedAdam", {"beta_3": 1}, "Did you mean beta_"),
        ("flwr:FedMedian", {"beta": 1}, "It has none: leave it out"),
        ("flwr:FedAvg", {"fraction_train": 0.5}, "'fraction_train' is no setting of flwr:FedAvg"),
        ("flwr:FedTrimmedAvg", {"beta": 0.7}, "`beta` must be in the range"),
        ("flwr:Krum", {"num_malicious_nodes": 1.5}, "expected a whole number, received 1.5"),
    ],
)
def test_refused(strategy: str, settings: dict[str, float], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_method(strategy, weight_by="tokens", settings=settings)
    assert part in str(caught.value)
    assert str(caught.value).startswith("--strategy")
    assert "\n" not in str(caught.value)


def test_aggregate_refuses_it() -> None:
    with pytest.raises(ConfigError, match="aggregate: flwr:FedAvg reads Flower's messages"):
        fedtune.aggregate("flwr:FedAvg", UPDATES)
