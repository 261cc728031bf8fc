"""A script that is started again: which checkpoint it goes on from, and what it still knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig, get_peft_model
from transformers import TrainerCallback

import fedtune
from fedtune.adapters import collect_static
from fedtune.client.checkpoints import MARK, Mark, find_checkpoint, mark_checkpoint
from fedtune.relay.folder import RunFolder
from tests.client.driver import Server, send, trained
from tests.client.trainers import Trained, small_model, small_trainer, train
from tests.federation.small import same_tensors
from tests.tiny import tiny_llama

OURS = Mark(run="run", client="site", num_rounds=3, steps_per_round=4)


class Failing(TrainerCallback):
    """Ends the first training in its second round."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            raise InterruptedError


def twice(run: RunFolder, directory: Path, **given: Any) -> tuple[Trained, Server]:
    """A run whose trainer fails in round 2 and is made anew."""

    def script(server: Server) -> None:
        params = server.train(1, server.begin())
        frame = server.train_frame(2, params)
        assert "InterruptedError" in str(send(run, frame).error)
        params = server.train(3, server.train(2, params))
        server.finish(params, 3)

    with Server(run, script) as server:
        trainer = fedtune.patch(small_trainer(directory, callbacks=[Failing()], **given))
        with pytest.raises(InterruptedError):
            trainer.train()
        assert run.refusal == ""
        trainer = fedtune.patch(small_trainer(directory, **given))
        result = train(trainer)
        fedtune.unpatch(trainer)
    return result, server


@pytest.mark.parametrize("every", [2, 4])
def test_it_goes_on_exactly_from_the_end_of_the_last_round(
    run: RunFolder, tmp_path: Path, every: int
) -> None:
    given = {"save_strategy": "steps", "save_steps": every}
    plain = train(small_trainer(tmp_path / "plain"))
    result, server = twice(run, tmp_path / "federated", **given)
    assert result.losses == plain.losses[4:]
    assert same_tensors(result.params, plain.params)
    assert [trained(frame)["num-steps"] for frame in server.updates] == [4, 4, 4]


@pytest.mark.parametrize("given", [{}, {"save_strategy": "steps", "save_steps": 3}])
def test_without_such_a_checkpoint_the_rate_is_right(
    run: RunFolder, tmp_path: Path, given: dict[str, Any]
) -> None:
    plain = train(small_trainer(tmp_path / "plain"))
    result, _ = twice(run, tmp_path / "federated", **given)
    assert [(row[0], row[2]) for row in result.losses] == [
        (row[0], row[2]) for row in plain.losses[4:]
    ]


def test_static_tensors_are_there_again(run: RunFolder, tmp_path: Path) -> None:
    """FFA-LoRA: lora_A is frozen, differs from site to site, and is sent once, in `setup`."""

    def model(seed: int) -> Any:
        made = small_model(0.0)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
                    parameter.normal_()
        return made

    static: list[Any] = []

    def script(server: Server) -> None:
        params = server.begin()
        assert server.manifest is not None
        static.append({name: value + 1 for name, value in collect_static(model(1)).items()})
        server.good(server.ask("query.setup", static[0], manifest=server.manifest.to_json()))
        params = server.train(1, params)
        send(run, server.train_frame(2, params))
        server.finish(server.train(2, params), 2)

    with Server(run, script):
        first = small_trainer(tmp_path, model=model(1), callbacks=[Failing()])
        with pytest.raises(InterruptedError):
            fedtune.patch(first).train()
        again = fedtune.patch(small_trainer(tmp_path, model=model(2)))
        again.train()
        fedtune.unpatch(again)
    assert again.model is not None
    assert same_tensors(collect_static(again.model), static[0])


def test_prompt_tuning_goes_on_though_its_checkpoint_is_lossy(
    run: RunFolder, tmp_path: Path
) -> None:
    def model() -> Any:
        base = tiny_llama(1)
        torch.manual_seed(42)
        return get_peft_model(
            base,
            PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
        )

    plain = train(small_trainer(tmp_path / "plain", model=model()))
    given = {"save_strategy": "steps", "save_steps": 4}

    def script(server: Server) -> None:
        params = server.train(1, server.begin())
        send(run, server.train_frame(2, params))
        server.finish(server.train(3, server.train(2, params)), 3)

    with Server(run, script):
        first = small_trainer(tmp_path / "a", model=model(), callbacks=[Failing()], **given)
        with pytest.raises(InterruptedError):
            fedtune.patch(first).train()
        again = fedtune.patch(small_trainer(tmp_path / "a", model=model(), **given))
        result = train(again)
        fedtune.unpatch(again)
    assert result.losses == plain.losses[4:]
    assert same_tensors(result.params, plain.params)


def test_checkpoints_of_other_trainings_do_not_count(run: RunFolder, tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 4}
    train(small_trainer(tmp_path, **given))
    assert not list(tmp_path.glob(f"*/{MARK}"))
    trainer = fedtune.patch(small_trainer(tmp_path, **given))
    with Server(run):
        assert [row[0] for row in train(trainer).losses] == [*range(1, 13)]
    fedtune.unpatch(trainer)
    assert len(list(tmp_path.glob(f"*/{MARK}"))) == 3


@pytest.mark.parametrize("asked", ["checkpoint-4", True])
def test_a_checkpoint_of_another_training_is_not_resumed(
    asked: str | bool, run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A script that takes up its last checkpoint, in a run that did not make it."""
    given = {"save_strategy": "steps", "save_steps": 4}
    train(small_trainer(tmp_path, **given))
    trainer = fedtune.patch(small_trainer(tmp_path))
    with Server(run):
        trainer.train(
            resume_from_checkpoint=str(tmp_path / asked) if isinstance(asked, str) else asked
        )
    fedtune.unpatch(trainer)
    steps = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert steps == [*range(1, 13)]
    assert "begins with fresh moments" in caplog.text
    assert "--init_adapter" in caplog.text


def test_which_checkpoint_is_chosen(tmp_path: Path) -> None:
    def checkpoint(step: int, mark: Mark | None) -> None:
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        if mark is not None:
            mark_checkpoint(directory, replace(mark, step=step))

    assert find_checkpoint(tmp_path, OURS) is None
    checkpoint(6, OURS)
    assert find_checkpoint(tmp_path, OURS) == tmp_path / "checkpoint-6"
    checkpoint(4, OURS)
    assert find_checkpoint(tmp_path, OURS) == tmp_path / "checkpoint-4"  # the end of a round
    checkpoint(8, OURS)
    checkpoint(12, None)  # cut off while it was written
    checkpoint(16, replace(OURS, run="another"))
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / MARK).write_text('{"run": ')
    assert find_checkpoint(tmp_path, OURS) == tmp_path / "checkpoint-8"
