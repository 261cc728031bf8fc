"""Rounds of a patched Trainer: the same training as without, and the server's parameters in it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import fedtune
from fedtune.adapters import collect, describe
from fedtune.errors import ManifestError, RoundError
from fedtune.relay.folder import RunFolder
from fedtune.transport.messages import arrays_of
from tests.client.driver import PLAN, Server, planned, send, trained
from tests.client.trainers import Trained, scores, small_model, small_trainer, train
from tests.federation.small import same_tensors


def patched(directory: Path, server: Server, **given: Any) -> Trained:
    trainer = fedtune.patch(small_trainer(directory, **given))
    try:
        with server:
            return train(trainer)
    finally:
        fedtune.unpatch(trainer)


def assert_same(left: Trained, right: Trained) -> None:
    assert left.losses == right.losses
    assert len(left.losses) == 12
    assert same_tensors(left.params, right.params)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_one_client_trains_like_the_plain_trainer(
    run: RunFolder, tmp_path: Path, accumulation: int, dropout: float
) -> None:
    given = {"gradient_accumulation_steps": accumulation, "dropout": dropout}
    plain = train(small_trainer(tmp_path / "plain", **given))
    server = Server(run)
    federated = patched(tmp_path / "federated", server, **given)
    assert_same(federated, plain)
    assert [score["num-examples"] for score in server.scores] == [6] * 4
    assert [score["num-tokens"] for score in server.scores] == [66] * 4  # 12 tokens less one
    assert [trained(frame)["num-steps"] for frame in server.updates] == [4, 4, 4]


def test_the_servers_evaluations_are_in_the_log_and_leave_no_other_trace(
    run: RunFolder, tmp_path: Path
) -> None:
    plain = train(small_trainer(tmp_path / "plain", logging_steps=3))
    server = Server(run)
    federated = patched(tmp_path / "federated", server, logging_steps=3)
    assert federated.losses == plain.losses
    assert [step for step, _ in scores(federated.history)] == [0, 4, 8, 12]
    assert [loss for _, loss in scores(federated.history)] == [
        score["eval_loss"] for score in server.scores
    ]


@pytest.mark.parametrize("on_start", [False, True])
@pytest.mark.parametrize("every", [2, 4, 5])
def test_an_evaluation_of_the_trainers_own_serves_the_server_too(
    run: RunFolder, tmp_path: Path, every: int, on_start: bool
) -> None:
    given = {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": on_start}
    plain = train(small_trainer(tmp_path / "plain", **given))
    server = Server(run)
    federated = patched(tmp_path / "federated", server, **given)
    assert_same(federated, plain)
    steps = [step for step, _ in scores(federated.history)]
    assert steps == sorted({step for step, _ in scores(plain.history)} | {0, 4, 8, 12})
    by_step = dict(scores(federated.history))
    for step, loss in scores(plain.history):  # rows of one length; the mean is taken in fp32 there
        assert by_step[step] == pytest.approx(loss, rel=2e-7)
    assert [score["eval_loss"] for score in server.scores] == [by_step[s] for s in (0, 4, 8, 12)]


def test_an_evaluation_at_an_epochs_end_serves_the_server_too(
    run: RunFolder, tmp_path: Path
) -> None:
    given = {"eval_strategy": "epoch", "rows": 8}  # 4 steps an epoch
    plain = train(small_trainer(tmp_path / "plain", **given))
    server = Server(run)
    federated = patched(tmp_path / "federated", server, **given)
    assert_same(federated, plain)
    assert [step for step, _ in scores(federated.history)] == [0, 4, 8, 12]


def test_several_held_out_sets_are_scored_together(run: RunFolder, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.train_dataset}
    fedtune.patch(trainer)
    with Server(run) as server:
        trainer.train()
    fedtune.unpatch(trainer)
    score = server.scores[2]
    assert [score[f"num-tokens{of}"] for of in ("", ":eval_a", ":eval_b")] == [209, 66, 143]
    assert score["num-examples"] == 19
    mean = (66 * score["eval_a_loss"] + 143 * score["eval_b_loss"]) / 209
    assert score["eval_loss"] == pytest.approx(mean, rel=1e-12)


def test_counts_and_loss_are_those_of_the_round(run: RunFolder, tmp_path: Path) -> None:
    server = Server(run)
    federated = patched(tmp_path, server)
    losses = [row[1] for row in federated.losses]
    for number, frame in enumerate(server.updates):
        metrics = trained(frame)
        mine = losses[4 * number : 4 * number + 4]
        assert metrics["train-loss"] == pytest.approx(sum(mine) / 4, abs=1e-4)  # the log rounds
        assert metrics["num-tokens"] == 11 * metrics["num-examples"]
    # 7 batches an epoch, the last of one row: the second round holds the end of the first epoch.
    assert [trained(frame)["num-examples"] for frame in server.updates] == [8, 7, 8]


def test_what_the_server_sends_is_what_is_trained_and_kept(run: RunFolder, tmp_path: Path) -> None:
    sent: list[Any] = []

    def script(server: Server) -> None:
        first = server.begin()
        for number in (1, 2, 3):
            sent.append({name: value + number / 100 for name, value in first.items()})
            server.train(number, sent[-1])
        server.finish(first, 3)
        sent.append(first)

    trainer = fedtune.patch(small_trainer(tmp_path, learning_rate=0.0))
    with Server(run, script) as server:
        result = train(trainer)
    fedtune.unpatch(trainer)
    for frame, params in zip(server.updates, sent, strict=False):
        assert same_tensors(arrays_of(frame.content), params)  # LR 0 leaves them as they came
    assert same_tensors(result.params, sent[-1])


def test_parameters_and_optimizer_stay_the_same_objects(run: RunFolder, tmp_path: Path) -> None:
    trainer = fedtune.patch(small_trainer(tmp_path))
    assert trainer.model is not None
    before = [id(parameter) for parameter in trainer.model.parameters()]
    with Server(run):
        trainer.train()
    assert [id(parameter) for parameter in trainer.model.parameters()] == before
    state = trainer.optimizer.state  # type: ignore[union-attr]
    assert {int(entry["step"]) for entry in state.values()} == {12}
    fedtune.unpatch(trainer)


def test_reset_optimizer_forgets_its_moments_every_round(run: RunFolder, tmp_path: Path) -> None:
    trainer = fedtune.patch(small_trainer(tmp_path), reset_optimizer=True)
    with Server(run):
        trainer.train()
    state = trainer.optimizer.state  # type: ignore[union-attr]
    assert {int(entry["step"]) for entry in state.values()} == {4}
    fedtune.unpatch(trainer)


def test_restart_lr_repeats_the_schedule_of_one_round(run: RunFolder, tmp_path: Path) -> None:
    short = train(small_trainer(tmp_path / "plain", max_steps=4))
    trainer = fedtune.patch(small_trainer(tmp_path / "federated"), restart_lr=True)
    with Server(run):
        federated = train(trainer)
    fedtune.unpatch(trainer)
    rates = [row[2] for row in short.losses]
    assert [row[2] for row in federated.losses] == rates * 3


def test_without_carry_every_round_starts_afresh(run: RunFolder, tmp_path: Path) -> None:
    planned(run, carry=False)
    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, plan=replace(PLAN, carry=False)):
        trainer.train()
    state = trainer.optimizer.state  # type: ignore[union-attr]
    assert {int(entry["step"]) for entry in state.values()} == {4}
    fedtune.unpatch(trainer)


def test_a_late_joiner_continues_at_the_runs_place(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(small_trainer(tmp_path / "plain"))

    def script(server: Server) -> None:
        params = server.begin()
        server.finish(server.train(3, server.train(2, params)), 3)

    trainer = fedtune.patch(small_trainer(tmp_path / "federated"))
    with caplog.at_level(logging.INFO), Server(run, script):
        federated = train(trainer)
    fedtune.unpatch(trainer)
    rates = [row[2] for row in plain.losses]
    assert [(row[0], row[2]) for row in federated.losses] == list(
        zip(range(5, 13), rates[4:], strict=True)
    )
    assert "goes from step 0 to 4" in caplog.text
    # A loss is the mean over the steps since the last one, not since step 0.
    assert all(0.5 < row[1] / plain.losses[0][1] < 2 for row in federated.losses)


def test_a_server_that_was_rolled_back_gets_its_rounds_again(
    run: RunFolder, tmp_path: Path
) -> None:
    def script(server: Server) -> None:
        first = server.begin()
        second = server.train(1, first)
        third = server.train(2, second)
        server.train(3, third)
        other = {name: value * 0.5 for name, value in first.items()}
        params = other
        for number in (1, 2, 3):
            params = server.train(number, params)
        server.finish(params, 3)

    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, script):
        federated = train(trainer)
    fedtune.unpatch(trainer)
    assert [row[0] for row in federated.losses] == [*range(1, 13)] * 2
    rates = [row[2] for row in federated.losses]
    assert rates[:12] == rates[12:]


def test_the_run_may_be_stopped_between_rounds(run: RunFolder, tmp_path: Path) -> None:
    def script(server: Server) -> None:
        server.finish(server.train(1, server.begin()), 1, "stopped")

    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, script):
        assert train(trainer).steps == 4
    fedtune.unpatch(trainer)


def test_a_run_that_is_over_before_the_first_round_changes_nothing(
    run: RunFolder, tmp_path: Path
) -> None:
    def script(server: Server) -> None:
        server.finish(server.begin(), 0, "stopped")

    trainer = fedtune.patch(small_trainer(tmp_path))
    assert trainer.model is not None
    before = collect(trainer.model)
    with Server(run, script):
        after = train(trainer)
    fedtune.unpatch(trainer)
    assert same_tensors(before, after.params)


def test_a_run_that_failed_ends_with_an_error_and_the_last_good_global(
    run: RunFolder, tmp_path: Path
) -> None:
    kept: list[Any] = []

    def script(server: Server) -> None:
        first = server.begin()
        server.train(1, first)
        kept.append(first)
        server.finish(first, 0, "failed: too few clients")

    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, script), pytest.raises(RoundError, match="too few clients"):
        trainer.train()
    assert trainer.model is not None
    assert same_tensors(collect(trainer.model), kept[0])
    fedtune.unpatch(trainer)


def test_bad_parameters_are_refused_and_the_site_waits_on(run: RunFolder, tmp_path: Path) -> None:
    refusals: list[str] = []

    def script(server: Server) -> None:
        params = server.begin()
        for bad in (
            {name: value * float("nan") for name, value in params.items()},
            dict(list(params.items())[1:]),
        ):
            refusals.append(str(send(run, server.train_frame(1, bad)).error))
        refusals.append(str(send(run, server.train_frame(9, params)).error))
        refusals.append(str(server.ask("unheard of").error))
        for number in (1, 2, 3):
            params = server.train(number, params)
        server.finish(params, 3)

    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, script):
        assert train(trainer).steps == 12
    fedtune.unpatch(trainer)
    assert "not finite" in refusals[0]
    assert "is missing" in refusals[1]
    assert "expected a round from 1 to 3" in refusals[2]
    assert "unheard of" in refusals[3]


def test_scaffold_with_a_loss_scaler_is_refused_by_name(run: RunFolder, tmp_path: Path) -> None:
    errors: list[str] = []

    def script(server: Server) -> None:
        params = server.begin()
        frame = server.train_frame(1, params, correction="scaffold")
        errors.append(str(send(run, frame).error))
        server.finish(params, 0, "stopped")

    trainer = fedtune.patch(small_trainer(tmp_path))
    trainer.args.fp16 = True  # a CPU has no scaler: the flag alone is read
    with Server(run, script):
        trainer.train()
    fedtune.unpatch(trainer)
    assert "--strategy scaffold" in errors[0]
    assert "--fp16" in errors[0]


def test_another_adapter_ends_the_script(run: RunFolder, tmp_path: Path) -> None:
    other = describe(small_model(r=2))
    errors: list[str] = []

    def script(server: Server) -> None:
        errors.append(str(server.ask("query.setup", {}, manifest=other.to_json()).error))

    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, script), pytest.raises(ManifestError, match="adapter differs"):
        trainer.train()
    assert "adapter differs" in errors[0]
    assert run.refusal in errors[0]
    assert run.refusal


def test_silence_ends_the_wait_with_its_length(run: RunFolder, tmp_path: Path) -> None:
    planned(run, idle_timeout_s=0.3)
    trainer = fedtune.patch(small_trainer(tmp_path))
    with pytest.raises(RoundError, match=r"within 0\.3 s"):
        trainer.train()


def test_torch_is_left_alone_before_the_first_round(run: RunFolder, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    state = torch.random.get_rng_state()
    fedtune.patch(trainer, epochs_per_round=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.args.max_steps == 21
    fedtune.unpatch(trainer)


def test_a_single_bad_gradient_does_not_spoil_the_rounds_after_it(
    run: RunFolder, tmp_path: Path
) -> None:
    """NaN stays in Adam's moments: good parameters alone would be spoiled again at once."""

    class OnceNaN(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("nan"))
            return loss

    def refuse_what_is_not_finite(server: Server) -> None:
        params = server.begin()
        for number in range(1, 4):
            found = server.train(number, params)
            if all(bool(tensor.isfinite().all()) for tensor in found.values()):
                params = found
                finite.append(number)
        server.finish(params, 3)

    finite: list[int] = []
    patched(tmp_path, Server(run, refuse_what_is_not_finite), cls=OnceNaN)
    assert finite == [2, 3]
