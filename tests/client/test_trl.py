"""Trainers of other kinds: the same rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fedtune
from fedtune.adapters import collect
from fedtune.errors import ConfigError
from fedtune.relay.folder import RunFolder
from tests.client.driver import Server, send, trained
from tests.client.trainers import Trained, lora, small_model, small_trainer, train
from tests.federation.small import same_tensors, training_arguments
from tests.tiny import tiny_llama, tiny_tokenizer, tokens


def words(rows: int, seed: int) -> list[str]:
    return [" ".join(f"w{int(token)}" for token in row) for row in tokens(rows, 10, seed)]


def texts(rows: int, seed: int = 0) -> Dataset:
    lines = words(rows, seed)
    prompts = [line.rsplit(" ", 4)[0] for line in lines]
    completions = [" " + " ".join(line.split()[-4:]) for line in lines]
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def pairs(rows: int, seed: int = 0) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": words(rows, seed),
            "chosen": [" w5 w6 w7" for _ in range(rows)],
            "rejected": [" w9 w10" for _ in range(rows)],
        }
    )


def sft(directory: Path, **given: Any) -> SFTTrainer:
    args = training_arguments(
        directory, SFTConfig, max_steps=12, max_length=16, gradient_checkpointing=False, **given
    )
    return SFTTrainer(
        model=tiny_llama(1),
        args=args,
        train_dataset=texts(13),
        eval_dataset=texts(5, seed=9),
        processing_class=tiny_tokenizer(pad_token="<unk>", eos_token="</s>"),
        peft_config=LoraConfig(**lora(0.1)),
    )


def dpo(directory: Path, *, model: Any = None, peft: bool = False, **given: Any) -> DPOTrainer:
    args = training_arguments(
        directory, DPOConfig, max_steps=12, max_length=32, gradient_checkpointing=False, **given
    )
    return DPOTrainer(
        model=model or (tiny_llama(1) if peft else small_model(0.0)),
        args=args,
        train_dataset=pairs(9),
        eval_dataset=pairs(4, seed=3),
        processing_class=tiny_tokenizer(pad_token="<unk>", eos_token="</s>"),
        peft_config=LoraConfig(**lora(0.0)) if peft else None,
    )


def steps_of(result: Trained) -> list[dict[str, Any]]:
    """All that was logged of each step; trl adds entropy, rewards and more to the loss."""
    return [row for row in result.history if "loss" in row]


def both(run: RunFolder, tmp_path: Path, build: Any, **given: Any) -> tuple[Trained, Server]:
    """Train plainly and in a run; they have to be the same."""
    plain = train(build(tmp_path / "plain", **given))
    trainer = fedtune.patch(build(tmp_path / "federated", **given))
    with Server(run) as server:
        federated = train(trainer)
    fedtune.unpatch(trainer)
    assert steps_of(federated) == steps_of(plain)
    assert len(federated.losses) == 12
    assert same_tensors(federated.params, plain.params)
    return federated, server


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft(run: RunFolder, tmp_path: Path, accumulation: int, packing: bool) -> None:
    given = {"gradient_accumulation_steps": accumulation, "packing": packing}
    federated, server = both(run, tmp_path, sft, **given)
    tokens_seen = [row["num_tokens"] for row in federated.history if "num_tokens" in row]
    assert tokens_seen == sorted(tokens_seen)
    if not packing:
        # Four words and the end of the text are learnt, the prompt is not.
        metrics = trained(server.updates[0])
        assert metrics["num-tokens"] == 5 * metrics["num-examples"]
        assert server.scores[0]["num-tokens"] == 25


def test_seq2seq(run: RunFolder, tmp_path: Path) -> None:
    def build(directory: Path) -> Seq2SeqTrainer:
        args = training_arguments(directory, Seq2SeqTrainingArguments, max_steps=12)
        trainer = small_trainer(directory, cls=Seq2SeqTrainer, args=args)
        assert isinstance(trainer, Seq2SeqTrainer)
        return trainer

    both(run, tmp_path, build)


@pytest.mark.parametrize("peft", [False, True])
def test_dpo(run: RunFolder, tmp_path: Path, peft: bool) -> None:
    _, server = both(run, tmp_path, dpo, peft=peft)
    metrics = trained(server.updates[0])
    assert metrics["num-examples"] == 8
    assert metrics["num-tokens"] == 8 * (4 + 3)  # three words and two, each with an end
    # A score is a mean over pairs, whatever their length.
    assert (server.scores[0]["num-examples"], server.scores[0]["num-tokens"]) == (4, 0)


def trained_adapter() -> Any:
    model = small_model(0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def test_dpos_reference_is_the_runs_first_global(run: RunFolder, tmp_path: Path) -> None:
    """It was copied from this site's own adapter when the trainer was built."""
    sent: list[Any] = []

    def script(server: Server) -> None:
        first = server.begin()
        sent.append({name: value + 0.01 for name, value in first.items()})
        server.evaluate(0, sent[0])
        params = server.train(1, sent[0])
        server.finish(server.train(2, params), 2)

    trainer = fedtune.patch(dpo(tmp_path, model=trained_adapter()))
    with Server(run, script) as server:
        trainer.train()
    assert trainer.model is not None
    live = dict(trainer.model.named_parameters())
    for name, value in sent[0].items():
        assert torch.equal(live[name.replace(".weight", ".ref.weight")], value)
    assert not same_tensors(collect(trainer.model), sent[0])
    assert server.scores[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)  # policy == reference
    fedtune.unpatch(trainer)


def test_dpo_without_the_first_global_is_refused(run: RunFolder, tmp_path: Path) -> None:
    errors: list[str] = []

    def script(server: Server) -> None:
        params = server.begin()
        frame = server.train_frame(2, params)
        errors.append(str(send(run, frame).error))
        server.finish(params, 2)

    trainer = fedtune.patch(dpo(tmp_path, model=trained_adapter()))
    with Server(run, script):
        trainer.train()
    fedtune.unpatch(trainer)
    assert "first parameters" in errors[0]


def test_dpo_with_precomputed_references_is_refused(run: RunFolder, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, model=trained_adapter(), precompute_ref_log_probs=True)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        fedtune.patch(trainer)
