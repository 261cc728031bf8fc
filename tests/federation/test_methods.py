"""Methods inside a whole federation; their maths is tested in `tests/strategies`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import RoundError
from fedtune.strategies import FedAvg, build_method
from fedtune.strategies.fedavgm import FedAvgM
from fedtune.strategies.krum import Krum
from tests.federation.small import run_small, same_tensors, small_worker


def test_a_server_step_of_the_whole_delta_is_fedavg(tmp_path: Path) -> None:
    plain = run_small(small_worker(tmp_path / "a", clients=2), method=FedAvg())
    stepped = run_small(small_worker(tmp_path / "b", clients=2), method=FedAvgM(lr=1.0, beta=0.0))
    assert same_tensors(plain.params, stepped.params)
    assert {key for state in stepped.method_state.values() for key in state} == {"momentum"}


def test_a_rule_and_a_server_optimizer_work_together(tmp_path: Path) -> None:
    method = build_method("fednova+fedadam", weight_by="tokens", settings={"lr": 0.001})
    state = run_small(small_worker(tmp_path, clients=2), method=method)
    assert {key for memory in state.method_state.values() for key in memory} == {"m", "v"}
    # The update of a coordinate is below lr / sqrt(1 - beta2) = 10 lr a round, there are three.
    first = small_worker(tmp_path / "again", clients=2).initial()[0]
    moved = max(float((state.params[name] - first[name]).abs().max()) for name in first)
    assert 0 < moved < 3 * 10 * 0.001


def test_a_round_needs_what_its_method_needs(tmp_path: Path) -> None:
    """`min_replies` is a wish; below 2 f + 3 Krum is not defined."""
    worker = small_worker(tmp_path, clients=2)
    with pytest.raises(RoundError, match="2 of 3 needed updates"):
        run_small(worker, method=Krum(f=0), min_replies="1", max_failed_rounds=0)
