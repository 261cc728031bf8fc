"""Names and settings of methods, alone and joined by `+`."""

from __future__ import annotations

import pytest
import torch

from fedtune.errors import ConfigError
from fedtune.strategies import METHODS, FedAvg, Method, build_method
from fedtune.strategies.fedopt import FedAdam
from fedtune.strategies.fedprox import FedProx
from fedtune.strategies.krum import Krum
from fedtune.strategies.median import Median
from tests.strategies.one_round import one_round, stats_of

X = {"x": torch.zeros(3)}
UPDATES = [{"x": torch.tensor([1.0, -2.0, 3.0]) * k} for k in (1, 2, 9)]


def build(strategy: str, **settings: float) -> Method:
    return build_method(strategy, weight_by="uniform", settings=settings)


def message(strategy: str, settings: dict[str, float] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        build_method(strategy, weight_by="tokens", settings=settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_name_is_that_method() -> None:
    assert build("fedadam", lr=0.5) == Method(FedAvg("uniform"), optimizer=FedAdam(lr=0.5))
    assert build("krum", f=2.0) == Method(Krum(weight_by="uniform", f=2))
    assert isinstance(build("krum", f=2.0).rule.least_updates(), int)


def test_every_axis_does_its_part() -> None:
    method = build("fedprox+median+fedadam", mu=0.3, lr=0.5)
    assert method.correction == FedProx(mu=0.3)
    middle, _ = one_round(Median(), X, UPDATES)
    expected, memory = one_round(FedAdam(lr=0.5), X, [middle])
    found, state = one_round(method, X, UPDATES)
    assert torch.equal(found["x"], expected["x"])
    assert state["x"].keys() == memory["x"].keys()


def test_all_three_axes_at_once() -> None:
    method = build("fedprox+ffa_lora+fedadam", mu=0.1, lr=0.01)
    assert method.correction == FedProx(mu=0.1)
    assert not method.rule.trains("q.lora_A.weight", 1)
    assert method.properties.products == "exact"
    assert method.optimizer == FedAdam(lr=0.01)


def test_the_order_of_names_does_not_matter() -> None:
    assert build("fedadam+fedprox", mu=0.3) == build("fedprox+fedadam", mu=0.3)


def test_an_axis_that_is_not_named_is_fedavgs() -> None:
    expected, _ = one_round(FedAvg(weight_by="uniform"), X, UPDATES)
    found, state = one_round(build("fedprox+fedavgm", lr=1.0, beta=0.0), X, UPDATES)
    assert torch.equal(found["x"], expected["x"])
    assert build("median+fedadam").correction is None
    assert set(state["x"]) == {"momentum"}


def test_the_rule_sees_what_every_client_did() -> None:
    """FedNova's weights and its rate, under a server step of the whole delta."""
    stats = [stats_of(steps) for steps in (1, 5, 20)]
    expected, _ = one_round(METHODS["fednova"](), X, UPDATES, stats)
    found, _ = one_round(build("fednova+fedavgm", lr=1.0, beta=0.0), X, UPDATES, stats)
    assert torch.equal(found["x"], expected["x"])
    assert not torch.equal(found["x"], one_round(FedAvg(), X, UPDATES, stats)[0]["x"])


def test_properties_are_those_of_the_members() -> None:
    assert build("scaffold+fedadam").extras
    assert build("scaffold+fedadam").properties.sum_suffices
    assert not build("fedprox+median").properties.sum_suffices
    assert build("krum+fedadam").rule.least_updates() == 5


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("fedadm", ("unknown method 'fedadm'", "Did you mean fedadam?")),
        ("ffalora", ("Did you mean ffa_lora?",)),
        ("xyz", ("Known: ", "fedavg", "rolora")),
        ("fedprox+", ("unknown method ''",)),
        ("fedprox+scaffold", ("is a second correction", "one method of each axis")),
        ("fedprox+fedprox", ("is a second correction",)),
        ("fedadam+diloco", ("is a second server_optimizer",)),
        ("krum+ffa_lora", ("is a second rule",)),
        ("fedavg+fedadam", ("fedavg combines with no other method",)),
    ],
)
def test_names_that_do_not_go(strategy: str, parts: tuple[str, ...]) -> None:
    text = message(strategy)
    assert all(part in text for part in ("--strategy", *parts))


@pytest.mark.parametrize(
    ("strategy", "setting", "value", "parts"),
    [
        ("fedadam", "beta", 0.5, ("'beta' is no setting of fedadam", "Did you mean beta")),
        ("fedavg", "mu", 1, ("'mu' is no setting of fedavg", "leave it out")),
        ("fedprox+fedadam", "mux", 1, ("no setting of fedprox+fedadam", "Did you mean mu?")),
        ("fedadam", "fedprox.mu", 1, ("'fedprox.mu' is no setting of fedadam",)),
        ("fedadam", "weight_by", 1, ("no setting of fedadam",)),
        ("fedadam", "beta1", 1, ("beta1: expected a number >= 0 and < 1, received 1",)),
        ("fedadam", "lr", 0, ("lr: expected a number > 0, received 0",)),
        ("flora", "seed", -1, ("seed: expected a whole number >= 0, received -1",)),
        ("ffa_lora", "rank", 1, ("'rank' is no setting of ffa_lora", "leave it out")),
        ("krum", "f", 1.5, ("f: expected a whole number >= 0, received 1.5",)),
        ("trimmed_mean", "beta", 0.5, ("beta: expected a number >= 0 and < 0.5, received 0.5",)),
        ("krum", "products", 2, ("products: expected 0 or 1, received 2",)),
        ("fedprox", "mu", float("nan"), ("mu: expected a number >= 0, received nan",)),
    ],
)
def test_settings_that_do_not_go(
    strategy: str, setting: str, value: float, parts: tuple[str, ...]
) -> None:
    text = message(strategy, {setting: value})
    assert all(part in text for part in ("--strategy_args", *parts))


def test_a_setting_of_two_members_needs_its_method() -> None:
    text = message("trimmed_mean+fedavgm", {"beta": 0.1})
    assert "'beta' is a setting of trimmed_mean and of fedavgm" in text
    assert "Write trimmed_mean.beta or fedavgm.beta." in text
    method = build("trimmed_mean+fedavgm", **{"trimmed_mean.beta": 0.1, "fedavgm.beta": 0.7})
    assert (method.rule, method.optimizer) == (
        METHODS["trimmed_mean"](weight_by="uniform", beta=0.1),  # type: ignore[call-arg]
        METHODS["fedavgm"](beta=0.7),  # type: ignore[call-arg]
    )
    assert "given twice" in message("fedavgm", {"beta": 0.1, "fedavgm.beta": 0.2})


@pytest.mark.parametrize("strategy", ["fedprox+fedadam", "fedprox+median", "median+fedadam"])
def test_weights_are_those_asked_for_whatever_is_joined(strategy: str) -> None:
    stats = stats_of(3)
    for by, expected in (("uniform", 1.0), ("tokens", float(stats.num_tokens))):
        method = build_method(strategy, weight_by=by, settings={})
        assert method.rule.share(stats) == expected
