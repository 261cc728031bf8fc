"""FedBuff: rounds that end when a buffer is full, in a simulation with a clock of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune._flower.task_message import task_identity
from fedtune.client.app import client_app
from fedtune.engines.delayed import DelayedGrid
from fedtune.errors import ConfigError
from fedtune.server.app import server_app
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import Method, build_method
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedbuff import FedBuff
from tests.federation.small import result_of, run_small, same_tensors, server_run, small_worker


def run(
    directory: Path, method: Method, delays: list[float], rounds: int = 6, **given: Any
) -> tuple[ServerState, float]:
    """The last state, and what the clock showed."""
    worker = small_worker(directory, clients=len(delays))
    server = server_run(len(delays), method=method, num_rounds=rounds, **given)
    with task_identity(1, 1):
        grid = DelayedGrid(client_app(lambda: worker), delays)
        server_app(server)(grid, grid._contexts[2])
    return result_of(server), grid.now


def took_part(state: ServerState) -> list[list[tuple[str, int]]]:
    """Client and the round its update is of, for every round."""
    rounds = [record["replies"] for record in state.history[1:]]
    return [[(reply["client"], reply["round"]) for reply in replies] for replies in rounds]


def test_with_a_buffer_of_all_and_nobody_late_it_is_fedavg(tmp_path: Path) -> None:
    plain = run_small(small_worker(tmp_path / "a", clients=3), method=FedAvg(), num_rounds=2)
    buffered, _ = run(tmp_path / "b", FedBuff(size=3), [1, 1, 5], rounds=2)
    assert same_tensors(plain.params, buffered.params)


def test_a_slow_client_does_not_hold_the_rounds(tmp_path: Path) -> None:
    waiting, clock = run(tmp_path / "a", FedAvg(), [1, 1, 5])
    buffered, fast_clock = run(tmp_path / "b", FedBuff(), [1, 1, 5])
    assert (clock, fast_clock) == (30.0, 6.0)  # 6 x the slowest; 6 x the others
    assert len(waiting.history) == len(buffered.history) == 7
    slow = [part for part in took_part(buffered) if ("client-2", 1) in part]
    assert slow == [[("client-2", 1), ("client-0", 5)]]  # four rounds late, and taken once
    assert not any(record["refused"] for record in buffered.history[1:])
    # What has been taken, not when: the client goes on from the state of its own round.
    assert buffered.client_rounds == {"client-0": 6, "client-1": 5, "client-2": 1}


def test_a_late_update_counts_by_its_age(tmp_path: Path) -> None:
    """Of two clients, with a buffer of one, the slow one's update is alone in round 3."""
    seen: list[dict[str, Tensor]] = []
    late: list[dict[str, Tensor]] = []

    class Watched(FedBuff):
        def rebase(self, new: Any, start: Any, now: Any, age: int) -> Any:
            if age:
                late.append({name: new[name].double() - start[name].double() for name in new})
                assert age == 2
            return super().rebase(new, start, now, age)

    def keep(state: ServerState, record: dict[str, Any]) -> None:
        seen.append({name: tensor.clone() for name, tensor in state.params.items()})

    state, _ = run(tmp_path, Watched(size=1), [1.0, 2.5], rounds=3, on_round=keep)
    assert took_part(state) == [[("client-0", 1)], [("client-0", 2)], [("client-1", 1)]]
    for name, value in seen[3].items():
        expected = seen[2][name].double() + late[0][name] / 3**0.5
        # Rounded to fp32 once: half a bit of values below 1.
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=6e-8)


def test_it_goes_with_a_server_optimizer_and_with_sampling(tmp_path: Path) -> None:
    method = build_method("fedbuff+fedadam", weight_by="uniform", settings={"lr": 0.001})
    state, _ = run(tmp_path, method, [1, 2, 3, 4], rounds=4, fraction_train=0.5)
    assert {len(part) for part in took_part(state)} == {1}  # half of the two at work
    assert {key for memory in state.method_state.values() for key in memory} == {"m", "v"}


class Batches(DelayedGrid):
    """Hands out all replies that are due in one pull, once, as a SuperLink does."""

    def pull_messages(self, message_ids: Any) -> Any:
        wanted, found = set(message_ids), []
        while reply := list(super().pull_messages(wanted)):
            found += reply
            wanted -= {message.metadata.reply_to_message_id for message in reply}
        return found


class Leaving(Batches):
    """Two of four nodes leave after the first round."""

    def get_node_ids(self) -> Any:
        nodes = list(super().get_node_ids())
        return nodes if self.now < 1.5 else nodes[:2]


def on_grid(directory: Path, grid_type: type[DelayedGrid], clients: int, **given: Any) -> Any:
    worker = small_worker(directory, clients=clients)
    server = server_run(2, num_rounds=4, **given)
    with task_identity(1, 1):
        grid = grid_type(client_app(lambda: worker), [1.0] * clients)
        server_app(server)(grid, grid._contexts[2])
    return result_of(server)


def test_replies_that_come_together_are_all_used(tmp_path: Path) -> None:
    state = on_grid(tmp_path, Batches, 4, method=FedBuff(size=2))
    names = sorted(name for part in took_part(state) for name, _ in part)
    assert names == sorted([f"client-{k}" for k in range(4)] * 2)


def test_clients_under_way_may_leave(tmp_path: Path) -> None:
    state = on_grid(tmp_path, Leaving, 4, method=FedBuff(size=1))
    assert [len(part) for part in took_part(state)] == [1] * 4


def test_the_residual_is_that_of_the_moved_update(tmp_path: Path) -> None:
    """One update a round is its own mean, late or not; fp32 factors, so 1e-6."""
    state, _ = run(tmp_path, FedBuff(size=1), [1.0, 2.5], rounds=4)
    assert any(number < r + 1 for r, ((_, number),) in enumerate(took_part(state)))
    for record in state.history[1:]:
        assert record["residual"] < 1e-6
        assert record["client_drift"] < 1e-6


def test_what_cannot_be_late_is_refused() -> None:
    with pytest.raises(ConfigError, match="late updates"):
        build_method("scaffold+fedbuff", weight_by="tokens")
