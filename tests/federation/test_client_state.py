"""What a client keeps between its rounds: optimizer, RNG, its place in data and schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor
from transformers import Trainer, TrainerCallback, get_scheduler

from fedtune.client.local import derive_seed
from fedtune.client.worker import Worker
from fedtune.engines.inline import InlineGrid
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import fixed_global
from tests.federation.small import (
    ROUNDS,
    STEPS,
    eval_losses,
    run_on,
    run_small,
    same_tensors,
    small_rows,
    small_worker,
)

Row = tuple[int, ...]


@dataclass
class Session:
    """One round of one client, step by step."""

    batches: list[list[Row]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    adam_steps: list[int] = field(default_factory=list)
    rng_before: Tensor | None = None
    rng_after: Tensor | None = None


class Watched(Trainer):
    """A Trainer that writes down what every step saw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sessions: list[Session] = []
        self.add_callback(_Watch(self.sessions))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.sessions[-1].batches.append([tuple(row) for row in inputs["input_ids"].tolist()])
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Watch(TrainerCallback):
    def __init__(self, sessions: list[Session]) -> None:
        self.sessions = sessions

    def on_train_begin(self, *args: Any, **_: Any) -> None:
        self.sessions.append(Session())

    def on_step_begin(self, *args: Any, **_: Any) -> None:
        if self.sessions[-1].rng_before is None:
            self.sessions[-1].rng_before = torch.get_rng_state()

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **_: Any) -> None:
        self.sessions[-1].lrs.append(optimizer.param_groups[0]["lr"])

    def on_optimizer_step(self, *args: Any, optimizer: Any, **_: Any) -> None:
        states = list(optimizer.state.values())
        (count,) = {int(state["step"]) for state in states}
        self.sessions[-1].adam_steps.append(count)

    def on_step_end(self, *args: Any, **_: Any) -> None:
        self.sessions[-1].rng_after = torch.get_rng_state()


def build_watched(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Trainer:
    return Watched(model=model, args=args.training, train_dataset=train, eval_dataset=evaluation)


def watched(directory: Path, **given: Any) -> Worker:
    return small_worker(directory, build_trainer=build_watched, **given)


def sessions(worker: Worker, client: str) -> list[Session]:
    trainer = worker.trainer(client)
    assert isinstance(trainer, Watched)
    return trainer.sessions


def schedule(rounds: int, steps: int = STEPS) -> list[float]:
    """The LR at every step of the whole run: cosine with 3 warmup steps, built on its own."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    curve = get_scheduler("cosine", optimizer, 3, rounds * steps)
    values = []
    for _ in range(rounds * steps):
        values.append(curve.get_last_lr()[0])
        optimizer.step()
        curve.step()
    return values


def rounds_of(state: ServerState, client: str) -> list[int]:
    return [
        record["round"]
        for record in state.history[1:]
        if client in [reply["client"] for reply in record["replies"]]
    ]


def epochs(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def generator_at(state: Tensor | None, *, new_epoch: bool = False) -> torch.Generator:
    """The global generator in `state`; a new pass over the rows draws one seed from it."""
    assert state is not None
    generator = torch.Generator()
    generator.set_state(state)
    if new_epoch:
        torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator


@pytest.mark.parametrize("accumulation", [1, 2])
def test_carry_continues_a_client_that_was_not_sampled(tmp_path: Path, accumulation: int) -> None:
    """Half of four clients a round: some start late, some pause for rounds."""
    worker = watched(tmp_path, clients=4, gradient_accumulation_steps=accumulation)
    state = run_small(worker, num_rounds=6, fraction_train=0.5)
    curve = schedule(6)
    paused = late = False
    for client in worker.names:
        seen, numbers = sessions(worker, client), rounds_of(state, client)
        assert len(seen) == len(numbers)
        late |= bool(numbers) and numbers[0] > 1
        paused |= any(after - before > 1 for before, after in pairwise(numbers))
        # its own optimizer counts its own steps
        steps = [count for session in seen for count in session.adam_steps]
        assert steps == list(range(1, len(numbers) * STEPS + 1))
        # the learning rate is that of the run
        for number, session in zip(numbers, seen, strict=True):
            assert session.lrs == curve[(number - 1) * STEPS : number * STEPS]
        # no row comes twice before all rows of the client were seen
        rows = [row for session in seen for batch in session.batches for row in batch]
        own = {tuple(row) for row in worker.train[client]["input_ids"]}
        for epoch in epochs(rows, len(own)):
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= own
        # the generator goes on where the client left it, whatever others drew in between
        per_epoch = -(-13 // (2 * accumulation))
        for done, (before, after) in enumerate(pairwise(seen), start=1):
            expected = generator_at(before.rng_after, new_epoch=done * STEPS % per_epoch == 0)
            assert torch.equal(expected.get_state(), generator_at(after.rng_before).get_state())
    assert late
    assert paused


def test_clients_do_not_see_each_other(tmp_path: Path) -> None:
    """With a fixed global, client 1 sees the same batches and takes the same steps with any number
    of other clients around it."""
    replies = []
    for clients in (2, 4):
        worker = watched(tmp_path / str(clients), clients=clients)
        state = run_small(worker, method=fixed_global())
        session = [(s.batches, s.adam_steps, s.lrs) for s in sessions(worker, "client-1")]
        losses = [record["replies"][1]["train_loss"] for record in state.history[1:]]
        replies.append((session, losses))
    assert replies[0] == replies[1]


def test_epoch_budget_with_clients_of_different_sizes(tmp_path: Path) -> None:
    """An epoch is 7 steps for 13 rows and 3 for 5 rows; each sees all its rows every round."""
    worker = watched(tmp_path, clients=2)
    worker.train["client-1"] = small_rows(5, seed=7)
    state = run_small(worker, steps=0, epochs=1.0)
    for client, steps in (("client-0", 7), ("client-1", 3)):
        seen = sessions(worker, client)
        assert [len(session.adam_steps) for session in seen] == [steps] * ROUNDS
        own = sorted(tuple(row) for row in worker.train[client]["input_ids"])
        for number, session in enumerate(seen):
            assert sorted(row for batch in session.batches for row in batch) == own
            assert session.lrs == schedule(ROUNDS, steps)[number * steps : (number + 1) * steps]
        orders = [[row for batch in session.batches for row in batch] for session in seen]
        assert len({tuple(order) for order in orders}) == ROUNDS
    assert state.history[-1]["samples"] == ROUNDS * (13 + 5)
    assert state.history[-1]["tokens"] == ROUNDS * (13 + 5) * 11  # 12 tokens, the first has no loss


def test_reset_starts_afresh_on_other_batches(tmp_path: Path) -> None:
    """The trap: a new train() per round sees the same first batches and the warmup again."""
    worker = watched(tmp_path, clients=3)
    state = run_small(worker, carry=False, num_rounds=5, fraction_train=2 / 3)
    curve = schedule(5)
    firsts = []
    for client in worker.names:
        for number, session in zip(rounds_of(state, client), sessions(worker, client), strict=True):
            assert session.adam_steps == [1, 2, 3, 4]
            assert session.lrs == curve[(number - 1) * STEPS : number * STEPS]
            firsts.append(tuple(row for batch in session.batches for row in batch))
            assert len(set(firsts[-1])) == len(firsts[-1])
    assert len(set(firsts)) == len(firsts) == 10
    again = watched(tmp_path / "again", clients=3)
    same = run_small(again, carry=False, num_rounds=5, fraction_train=2 / 3)
    assert same_tensors(same.params, state.params)
    assert eval_losses(same) == eval_losses(state)
    assert not list(tmp_path.rglob("optimizer.pt"))


def test_reset_depends_on_the_seed(tmp_path: Path) -> None:
    """Order and masks are drawn from (seed, client, round)."""
    orders = []
    for seed in (1, 1, 2):
        worker = watched(tmp_path / str(len(orders)))
        run_small(worker, carry=False, seed=seed, num_rounds=2)
        orders.append([session.batches for session in sessions(worker, "client-0")])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_derived_seeds_differ() -> None:
    seeds = {
        derive_seed(seed, f"client-{client}", number)
        for seed in (1, 2)
        for client in range(12)
        for number in range(1, 6)
    }
    assert len(seeds) == 2 * 12 * 5
    assert derive_seed(42, "client-0", 1) == derive_seed(42, "client-0", 1)
    assert all(0 <= seed < 2**31 for seed in seeds)


def refusing(client: int, number: int, attempts: range) -> type[InlineGrid]:
    """A grid that marks a trained update as stale on its way, so that the server refuses it."""

    class Refusing(InlineGrid):
        attempt = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for reply in super().pull_messages(message_ids):
                config = reply.content.config_records.get("config", {})
                here = reply.metadata.src_node_id == client + 2 and config.get("round") == number
                if reply.metadata.message_type == "train" and here:
                    self.attempt += 1
                    if self.attempt in attempts:
                        config["round"] = 0
                yield reply

    return Refusing


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failed_round_rolls_the_clients_back(tmp_path: Path, number: int) -> None:
    """Both clients train the failed attempts; the run ends as if these had never been."""
    calm = run_small(small_worker(tmp_path / "calm", clients=2))
    state = run_on(small_worker(tmp_path / "failing", clients=2), refusing(1, number, range(1, 3)))
    assert [record["attempt"] for record in state.history[1:]] == [
        3 if record["round"] == number else 1 for record in calm.history[1:]
    ]
    assert same_tensors(state.params, calm.params)
    assert eval_losses(state) == eval_losses(calm)
    assert [r["train_loss"] for r in state.history] == [r["train_loss"] for r in calm.history]


def test_a_refused_client_repeats_what_was_refused(tmp_path: Path) -> None:
    """Round 2 goes on without client 1; in round 3 it goes on from round 1: same batches, same
    optimizer step, the run's learning rate."""
    worker = watched(tmp_path, clients=2)
    state = run_on(worker, refusing(1, 2, range(1, 2)), min_replies="1")
    assert rounds_of(state, "client-1") == [1, 3]
    first, refused, third = sessions(worker, "client-1")
    assert refused.batches == third.batches
    assert refused.adam_steps == third.adam_steps == [5, 6, 7, 8]
    assert third.lrs == schedule(3)[2 * STEPS :]
    assert first.batches != refused.batches


def test_memory_and_disk_hold_one_optimizer(tmp_path: Path) -> None:
    """Between rounds no Trainer keeps an optimizer; on disk a client keeps what may be needed."""
    worker = small_worker(tmp_path, clients=3)
    run_small(worker, num_rounds=6)
    assert [worker.trainer(name).optimizer for name in worker.names] == [None] * 3
    for name in worker.names:
        kept = sorted(path.name for path in (tmp_path / name).glob("*-*"))
        assert kept[-1] == "round-00006"
        assert len(kept) <= 4
        assert not list((tmp_path / name).rglob("*.safetensors"))  # no weights


def test_a_checkpoint_that_a_killed_run_left_is_ignored(tmp_path: Path) -> None:
    """Killed between the Trainer's checkpoint of a later step and its renaming."""
    calm = run_small(small_worker(tmp_path / "calm"))
    torn = tmp_path / "killed" / "client-0" / "checkpoint-99"
    torn.mkdir(parents=True)
    (torn / "optimizer.pt").write_bytes(b"half")
    state = run_small(small_worker(tmp_path / "killed"))
    assert same_tensors(state.params, calm.params)
    assert not torn.exists()
