"""What `patch` accepts, refuses and plans, and that it leaves no trace where there is no run."""

from __future__ import annotations

import logging
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import fedtune
from fedtune.errors import ConfigError
from fedtune.relay.folder import ENVIRONMENT, RunFolder
from tests.client.driver import PLAN, Server, connect, planned, send, trained
from tests.client.trainers import small_model, small_trainer, train
from tests.federation.small import same_tensors, small_rows, training_arguments


def test_alone_it_trains_as_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = train(small_trainer(tmp_path / "a"))
    trainer = small_trainer(tmp_path / "b")
    assert fedtune.patch(trainer, steps_per_round=5) is trainer
    alone = train(trainer)
    assert alone.losses == plain.losses
    assert same_tensors(alone.params, plain.params)
    assert caplog.text.count("trains alone") == 1
    assert not list((tmp_path / "b").glob("**/fedtune*"))


def test_unpatch_leaves_nothing(run: RunFolder, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    before = {**vars(trainer)}
    callbacks = list(trainer.callback_handler.callbacks)
    fedtune.patch(trainer, steps_per_round=2)
    assert trainer.args.max_steps == 6
    assert fedtune.unpatch(trainer) is trainer
    assert vars(trainer).keys() == before.keys()
    assert trainer.callback_handler.callbacks == callbacks
    assert trainer.args.max_steps == 12
    fedtune.unpatch(fedtune.patch(trainer))  # the folder is free again
    assert fedtune.unpatch(trainer) is trainer


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps_per_round": 3, "epochs_per_round": 1.0}, "received both"),
        ({"steps_per_round": 0}, "at least 1"),
        ({"steps_per_round": 1.5}, "whole number"),
        ({"epochs_per_round": -1}, "above 0"),
    ],
)
def test_bad_budgets(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fedtune.patch(small_trainer(tmp_path), **given)


@pytest.mark.parametrize(
    ("plan", "given", "steps"),
    [
        ({"steps": 4}, {}, 12),
        ({"steps": 0, "epochs": 1.0}, {}, 21),
        ({"steps": 4}, {"steps_per_round": 6}, 18),
        ({"steps": 4}, {"epochs_per_round": 2}, 42),
        ({"steps": 0, "epochs": 0.5}, {"steps_per_round": 1}, 3),
    ],
)
def test_the_scripts_budget_wins_over_the_servers(
    run: RunFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    plan: dict[str, Any],
    given: dict[str, Any],
    steps: int,
) -> None:
    planned(run, **plan)
    trainer = fedtune.patch(small_trainer(tmp_path, max_steps=-1, num_train_epochs=1), **given)
    assert trainer.args.max_steps == steps
    assert ("as this script says" in caplog.text) == bool(given)
    fedtune.unpatch(trainer)


def test_an_own_budget_trains_that_many_steps(run: RunFolder, tmp_path: Path) -> None:
    trainer = fedtune.patch(small_trainer(tmp_path), steps_per_round=2)
    with Server(run) as server:
        assert train(trainer).steps == 6
    fedtune.unpatch(trainer)
    assert [trained(frame)["num-steps"] for frame in server.updates] == [2, 2, 2]


def test_a_sites_limit_holds_for_what_only_the_trainer_knows(
    run: RunFolder, tmp_path: Path
) -> None:
    planned(run, steps=0, epochs=1.0, max_steps=20)
    with pytest.raises(ConfigError, match=r"at most 20 steps .* 3 rounds x 7 steps") as refused:
        fedtune.patch(small_trainer(tmp_path))
    assert run.refusal == str(refused.value)


def test_no_budget_at_all(run: RunFolder, tmp_path: Path) -> None:
    planned(run, steps=0)
    with pytest.raises(ConfigError, match="received neither"):
        fedtune.patch(small_trainer(tmp_path))


def test_epochs_of_a_stream_are_refused(run: RunFolder, tmp_path: Path) -> None:
    stream = small_rows().to_iterable_dataset()
    with pytest.raises(ConfigError, match="received a stream"):
        fedtune.patch(small_trainer(tmp_path, train=stream), epochs_per_round=1)


def test_one_patch_per_trainer_and_one_trainer_per_run(run: RunFolder, tmp_path: Path) -> None:
    trainer = fedtune.patch(small_trainer(tmp_path))
    with pytest.raises(ConfigError, match=r"fedtune\.patch once"):
        fedtune.patch(trainer)
    with pytest.raises(ConfigError, match="one Trainer per run"):
        fedtune.patch(small_trainer(tmp_path))
    assert run.refusal == ""  # it may be what a killed one has left
    with Server(run):
        assert train(trainer).steps == 12
    with pytest.raises(ConfigError, match=r"one train\(\) per run"):
        trainer.train()
    fedtune.unpatch(trainer)


def test_no_plan(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(folder.path))
    with pytest.raises(ConfigError, match="has no plan"):
        fedtune.patch(small_trainer(tmp_path))


def test_what_cannot_be_trained_in_rounds(run: RunFolder, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    for name, value, said in [
        ("is_deepspeed_enabled", True, "DeepSpeed"),
        ("is_fsdp_enabled", True, "FSDP1"),
    ]:
        before = getattr(trainer, name)
        setattr(trainer, name, value)
        with pytest.raises(ConfigError, match=said):
            fedtune.patch(trainer)
        setattr(trainer, name, before)
    trainer.args.auto_find_batch_size = True
    with pytest.raises(ConfigError, match="auto_find_batch_size"):
        fedtune.patch(trainer)
    assert "train" not in vars(trainer)


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"optim": "schedule_free_adamw"}, {}, "--optim schedule_free_adamw: it keeps weights"),
        ({"optim": "lomo"}, {}, "--optim lomo: it steps inside"),
        (
            {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 2},
            {"restart_lr": True},
            "restart_lr restarts schedules of",
        ),
    ],
)
def test_what_rounds_cannot_train_is_refused(
    run: RunFolder, tmp_path: Path, settings: dict[str, Any], options: dict[str, bool], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"patch: {said}"):
        fedtune.patch(small_trainer(tmp_path, **settings), **options)


class ScheduleFree(torch.optim.SGD):
    """Made by the script itself, so that no flag names it."""

    def train(self) -> None:
        """To the weights that are trained."""

    def eval(self) -> None:
        """To those that are meant."""


def test_an_optimizer_with_weights_of_its_own_is_refused(run: RunFolder, tmp_path: Path) -> None:
    model = small_model()
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad], lr=0.1)
    given = {"args": training_arguments(tmp_path), "train_dataset": small_rows()}
    with pytest.raises(ConfigError, match="received ScheduleFree, which keeps weights"):
        fedtune.patch(Trainer(model=model, **given, optimizers=(optimizer, None)))


@pytest.mark.parametrize("strategy", ["steps", "no"])
@pytest.mark.parametrize("name", ["save_only_model", "ignore_data_skip"])
def test_what_a_restart_would_lose_is_said(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, strategy: str
) -> None:
    trainer = small_trainer(tmp_path, save_strategy=strategy, **{name: True})
    fedtune.unpatch(fedtune.patch(trainer))
    said = [
        r.message
        for r in caplog.records
        if f"{name} is set: when this script is started" in r.message
    ]
    assert len(said) == (strategy == "steps")


def test_a_script_without_a_batch_is_refused(run: RunFolder, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, rows=1, dataloader_drop_last=True)
    with pytest.raises(
        ConfigError, match="expected at least one batch to train on, received 1 row"
    ):
        fedtune.patch(trainer)


def test_a_schedule_of_ones_own_is_refused_an_optimizer_is_not(
    run: RunFolder, tmp_path: Path
) -> None:
    model = small_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    args = training_arguments(tmp_path)
    given = {"model": model, "args": args, "train_dataset": small_rows()}
    with pytest.raises(ConfigError, match=r"optimizers=\(\.\.\.\)"):
        fedtune.patch(Trainer(**given, optimizers=(optimizer, schedule)))
    trainer = fedtune.patch(Trainer(**given, optimizers=(optimizer, None)))
    with Server(run, lambda server: server.whole_run(evaluate=False)):
        assert train(trainer).steps == 12
    fedtune.unpatch(trainer)


def test_the_server_reads_why_a_script_cannot_take_part(run: RunFolder, tmp_path: Path) -> None:
    planned(run, steps=0)
    errors: list[str] = []

    def script(server: Server) -> None:
        errors.append(str(server.ask("query.plan").error))

    with Server(run, script), pytest.raises(ConfigError):
        fedtune.patch(small_trainer(tmp_path))
    assert "received neither" in errors[0]


def test_as_a_callback_it_does_the_same(run: RunFolder, tmp_path: Path) -> None:
    plain = train(small_trainer(tmp_path / "a", max_steps=6))
    callback = fedtune.FedTuneCallback(steps_per_round=2)
    trainer = small_trainer(tmp_path / "b", callbacks=[callback])
    with Server(run) as server:
        federated = train(trainer)
    fedtune.unpatch(trainer)
    assert federated.losses == plain.losses
    assert same_tensors(federated.params, plain.params)
    assert len(server.scores) == 4


def test_a_callback_belongs_to_one_trainer_and_comes_in_time(
    run: RunFolder, tmp_path: Path
) -> None:
    callback = fedtune.FedTuneCallback()
    small_trainer(tmp_path, callbacks=[callback])
    with pytest.raises(ConfigError, match="one Trainer per callback"):
        small_trainer(tmp_path, callbacks=[callback])
    late = small_trainer(tmp_path)
    late.add_callback(fedtune.FedTuneCallback())
    with pytest.raises(ConfigError, match="too late"):
        late.train()


def test_a_callback_alone_does_nothing(tmp_path: Path) -> None:
    plain = train(small_trainer(tmp_path / "a"))
    alone = train(small_trainer(tmp_path / "b", callbacks=[fedtune.FedTuneCallback()]))
    assert alone.losses == plain.losses


def test_two_trainers_in_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="ft-") as directory:
        trainers, folders = [], []
        for name in ("a", "b"):
            folder = RunFolder.create(Path(directory) / name)
            planned(folder, client=name)
            monkeypatch.setenv(ENVIRONMENT, str(folder.path))
            trainers.append(fedtune.patch(small_trainer(tmp_path / name)))
            folders.append(folder)
        for name, trainer, folder in zip("ab", trainers, folders, strict=True):
            with Server(folder, plan=replace(PLAN, client=name)):
                assert train(trainer).steps == 12
            fedtune.unpatch(trainer)


def test_load_best_is_left_to_the_server(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    final: list[Any] = []

    def script(server: Server) -> None:
        params = server.begin()
        final.append(params)
        for number in (1, 2, 3):
            params = server.train(number, params)
            server.evaluate(number, params)
        server.finish(final[0], 0)

    given = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = fedtune.patch(small_trainer(tmp_path, load_best_model_at_end=True, **given))
    with Server(run, script):
        result = train(trainer)
    assert same_tensors(result.params, final[0])
    assert trainer.state.best_metric is not None
    assert "the server decides which is best" in caplog.text
    fedtune.unpatch(trainer)
    assert trainer.args.load_best_model_at_end


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            control.should_training_stop = True


@pytest.mark.parametrize("step", [6, 8])
def test_who_stops_early_sends_what_was_trained_and_no_surplus_round(
    run: RunFolder, tmp_path: Path, step: int
) -> None:
    refusals: list[str] = []
    final: list[Any] = []

    def script(server: Server) -> None:
        params = server.train(2, server.train(1, server.begin()))
        refusals.append(str(send(run, server.train_frame(3, params)).error))
        server.evaluate(2, params)
        server.finish(params, 2)
        final.append(params)

    trainer = fedtune.patch(small_trainer(tmp_path, callbacks=[StopAt(step)]))
    with Server(run, script) as server:
        result = train(trainer)
    fedtune.unpatch(trainer)
    assert result.steps == step
    assert [trained(frame)["num-steps"] for frame in server.updates] == [4, step - 4]
    assert f"training has ended at step {step} of 12" in refusals[0]
    assert same_tensors(result.params, final[0])


def test_early_stopping_counts_its_own_evaluations_only(run: RunFolder, tmp_path: Path) -> None:
    """The server's evaluations, one a round, would use up the patience."""

    def build(name: str) -> Trainer:
        given = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss"}
        stopping = EarlyStoppingCallback(early_stopping_patience=2)
        # Larger is better, and the loss falls: all evaluations after the first one are worse.
        return small_trainer(tmp_path / name, callbacks=[stopping], greater_is_better=True, **given)

    plain = train(build("plain"))
    trainer = fedtune.patch(build("federated"))
    with Server(run) as server:
        federated = train(trainer)
    fedtune.unpatch(trainer)
    assert plain.steps == federated.steps == 9
    assert [trained(frame)["num-steps"] for frame in server.updates] == [4, 4, 1]


class Once(torch.utils.data.IterableDataset[Any]):
    """Rows that can be read only once."""

    def __init__(self, rows: int) -> None:
        self._rows = iter(small_rows(rows))

    def __iter__(self) -> Any:
        return self._rows


def test_rows_that_run_out_are_sent_too(run: RunFolder, tmp_path: Path) -> None:
    def script(server: Server) -> None:
        params = server.train(2, server.train(1, server.begin()))
        server.finish(params, 2)

    given = {"accelerator_config": {"dispatch_batches": False}}
    trainer = fedtune.patch(small_trainer(tmp_path, train=Once(12), **given))
    with Server(run, script) as server:
        result = train(trainer)
    fedtune.unpatch(trainer)
    assert result.steps == 6
    assert [trained(frame)["num-steps"] for frame in server.updates] == [4, 2]


class Failing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            raise ZeroDivisionError("no rows left")


def test_an_error_in_training_reaches_the_server(run: RunFolder, tmp_path: Path) -> None:
    errors: list[str] = []

    def script(server: Server) -> None:
        params = server.train(1, server.begin())
        errors.append(str(send(run, server.train_frame(2, params)).error))

    trainer = fedtune.patch(small_trainer(tmp_path, callbacks=[Failing()]))
    with Server(run, script), pytest.raises(ZeroDivisionError):
        trainer.train()
    (error,) = errors  # its text may hold rows
    assert re.fullmatch(r"training failed: ZeroDivisionError \(id [0-9a-f]{8}\)", error)
    fedtune.patch(small_trainer(tmp_path / "again"))  # the folder is free for a new start


def test_a_changed_max_steps_is_noticed(run: RunFolder, tmp_path: Path) -> None:
    trainer = fedtune.patch(small_trainer(tmp_path))
    trainer.args.max_steps = 99
    with pytest.raises(ConfigError, match="3 rounds x 4 steps"):
        trainer.train()
    assert "expected 3 rounds x 4 steps" in run.refusal


def test_a_peer_that_leaves_does_not_make_the_round_train_twice(
    run: RunFolder, tmp_path: Path
) -> None:
    def script(server: Server) -> None:
        params = server.begin()
        with connect(run) as connection:
            connection.send_bytes(server.train_frame(1, params))
        update = server.train(1, params)
        assert same_tensors(server.train(1, params), update)
        update = server.train(3, server.train(2, update))
        server.finish(update, 3)

    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, script):
        result = train(trainer)
    fedtune.unpatch(trainer)
    assert [row[0] for row in result.losses] == [*range(1, 13)]


def test_a_run_is_told_to_people(run: RunFolder, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def script(server: Server) -> None:
        params = server.begin()
        update = server.train(1, params)
        seen.append(run.status)
        server.finish(update, 1)

    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run, script):
        trainer.train()
    assert seen[0]["state"] in ("training", "waiting")
    assert run.status["state"] == "over"
    fedtune.unpatch(trainer)


def test_it_says_what_it_plans(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedtune"):
        fedtune.unpatch(fedtune.patch(small_trainer(tmp_path)))
    assert "site: 3 rounds of 4 steps" in caplog.text
