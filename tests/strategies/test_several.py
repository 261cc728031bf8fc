"""Which of several strategies takes which setting."""

from __future__ import annotations

import pytest

from fedtune.errors import ConfigError
from fedtune.strategies.several import args_of_each


@pytest.mark.parametrize(
    ("strategies", "given", "taken"),
    [
        (["fedavg"], "mu=1", ["mu=1"]),  # one strategy: for its own check to refuse
        (["fedavg", "fedadam"], None, [None, None]),
        (["fedavg", "fedadam", "fedyogi"], "lr=0.1", [None, "lr=0.1", "lr=0.1"]),
        (["fedadam", "fedyogi"], "fedadam.lr=0.1,lr=1", ["fedadam.lr=0.1,lr=1", "lr=1"]),
        (["fedprox+fedadam", "fedprox"], "mu=0.1,lr=1", ["mu=0.1,lr=1", "mu=0.1"]),
        (["flwr:FedAdam", "fedadam"], "flwr:FedAdam.eta=0.1,lr=1", ["eta=0.1", "lr=1"]),
        (["nothing", "fedadam"], "lr=1", [None, "lr=1"]),
    ],
)
def test_settings_go_where_they_belong(strategies, given, taken):
    assert args_of_each(strategies, given) == taken


@pytest.mark.parametrize(("given", "words"), [("mu=1", "no setting of any"), ("lr=x", "lr=x")])
def test_a_setting_that_nobody_has(given, words):
    with pytest.raises(ConfigError, match=words):
        args_of_each(["fedavg", "fedadam"], given)
