"""Held-out losses per token: the same as row by row in fp64, whatever the eval batch size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fedtune.client.batches import IGNORED
from fedtune.client.local import evaluate_base, quality_metrics
from fedtune.client.per_token import PerToken
from fedtune.client.score import Score
from tests.client.test_trl import dpo
from tests.client.trainers import lora, small_model
from tests.federation.small import training_arguments
from tests.tiny import tiny_llama, tiny_tokenizer, tokens

ROWS, BATCHES = 11, (1, 3, 32)
LENGTHS = [2, 30, 3, 25, 9, 4, 28, 2, 17, 6, 21]
CLOSE = 2e-6  # fp32 forward passes of other shapes; the Trainer's own mean is off by 1e-2 here


def ragged(masked: bool = True) -> list[dict[str, list[int]]]:
    """Short and long rows; every second one has a part that is not learnt, one row has none."""
    rows = []
    for index, length in enumerate(LENGTHS):
        ids = tokens(1, length, seed=index)[0].tolist()
        labels = list(ids)
        if masked and index % 2:
            labels[: length // 2] = [IGNORED] * (length // 2)
        if masked and index == 4:
            labels = [IGNORED] * length
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate with padding right."""
    width = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

    ids = column("input_ids", 0)
    mask = torch.tensor(
        [[1] * len(r["input_ids"]) + [0] * (width - len(r["labels"])) for r in rows]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": column("labels", IGNORED)}


def by_hand(
    model: nn.Module, rows: list[dict[str, list[int]]], first: int = 1
) -> tuple[float, int]:
    """Loss per token and tokens, one row at a time; `first`: first label that is predicted."""
    total, count = 0.0, 0
    model.eval()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        likely = logits.double().log_softmax(-1)
        prompt = len(likely) - len(row["labels"])
        for position, label in enumerate(row["labels"]):
            if position >= first and label != IGNORED:
                total -= float(likely[prompt + position - 1, label])
                count += 1
    return total / count, count


def sharp(model: nn.Module) -> nn.Module:
    """A random model finds all tokens about equally likely; this one has rows of unlike losses."""
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lm_head" in name).mul_(20)
    return model


def plain(directory: Path, batch: int, model: nn.Module, rows: Any, **given: Any) -> Trainer:
    args = training_arguments(
        directory, per_device_eval_batch_size=batch, remove_unused_columns=False, **given
    )
    collate: Callable[[Any], Any] = padded
    return Trainer(model=model, args=args, data_collator=collate, eval_dataset=rows)


def scored(trainer: Trainer) -> Score:
    with PerToken(trainer) as per_token:
        return per_token.score(trainer.evaluate())


@pytest.mark.parametrize("batch", BATCHES)
def test_a_plain_trainer(tmp_path: Path, batch: int) -> None:
    model, rows = sharp(small_model(0.1)), ragged()
    trainer = plain(tmp_path, batch, model, rows)
    found = scored(trainer)
    loss, count = by_hand(model, rows)
    assert found.metrics["eval_loss"] == pytest.approx(loss, rel=CLOSE)
    assert found.size == (ROWS, count)
    assert "evaluation_loop" not in vars(trainer)
    assert "prediction_step" not in vars(trainer)
    if batch < 32:
        assert trainer.evaluate()["eval_loss"] != pytest.approx(loss, rel=1e-3)


def test_what_hears_of_it(tmp_path: Path) -> None:
    """Callbacks, the log and the choice of the best see the same number."""
    heard: list[float] = []

    class Heard(TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: Any = None, **__: Any) -> None:
            heard.append(metrics["eval_loss"])

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            heard.append(logs["eval_loss"])

    trainer = plain(tmp_path, 3, sharp(small_model(0.0)), ragged())
    trainer.add_callback(Heard())
    loss = scored(trainer).metrics["eval_loss"]
    assert heard == [loss, loss]
    assert trainer.state.log_history[-1]["eval_loss"] == loss


@pytest.mark.parametrize(
    "given",
    [
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"dataloader_drop_last": True},
        {"label_smoothing_factor": 0.2},
        {"average_tokens_across_devices": False},
    ],
    ids=lambda given: next(iter(given)),
)
def test_settings_of_the_evaluation(tmp_path: Path, given: dict[str, Any]) -> None:
    """They move neither the loss nor the counts; smoothing has a loss of its own."""
    model, rows = sharp(small_model(0.0)), ragged()
    found = scored(plain(tmp_path, 3, model, rows, **given))
    one_by_one = scored(plain(tmp_path, 1, model, rows, **given))
    loss, count = by_hand(model, rows)
    assert found.size == one_by_one.size == (len(rows), count)
    assert found.metrics["eval_loss"] == pytest.approx(one_by_one.metrics["eval_loss"], rel=CLOSE)
    if "label_smoothing_factor" not in given:
        assert found.metrics["eval_loss"] == pytest.approx(loss, rel=CLOSE)


@pytest.mark.parametrize("uses_count", [True, False])
def test_a_loss_of_ones_own(tmp_path: Path, uses_count: bool) -> None:
    """It is the mean over the labels of a batch, by the count that it is given or by its own."""

    def loss_of(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        summed = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        seen = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        return 2 * summed / (num_items_in_batch.clamp(min=1) if uses_count else seen)

    model, rows = sharp(small_model(0.0)), ragged()
    trainer = plain(tmp_path, 3, model, rows)
    trainer.compute_loss_func = loss_of
    found = scored(trainer)
    assert found.metrics["eval_loss"] == pytest.approx(2 * by_hand(model, rows)[0], rel=CLOSE)


def test_a_prompt_before_the_row(tmp_path: Path) -> None:
    """The last virtual token predicts the row's first, which no other model does."""
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    model, rows = get_peft_model(sharp(tiny_llama(1)), config), ragged(masked=False)
    loss, count = by_hand(model, rows, first=0)
    assert count == sum(LENGTHS)
    for batch in (1, 3):
        trainer = plain(tmp_path, batch, model, rows)
        found = scored(trainer)
        assert found.metrics["eval_loss"] == pytest.approx(loss, rel=CLOSE)
        assert found.size.tokens == count
        base, _ = by_hand(sharp(tiny_llama(1)), rows)
        assert evaluate_base(trainer) == pytest.approx(base, rel=CLOSE)
        assert scored(trainer).metrics["eval_loss"] == found.metrics["eval_loss"]


def test_classes_count_by_rows(tmp_path: Path) -> None:
    model = tiny_llama(2, num_labels=3)
    rows = [{**row, "labels": index % 3} for index, row in enumerate(ragged())]
    model.eval()

    def collate(batch: Any) -> dict[str, Tensor]:
        plain_rows = [{**row, "labels": row["input_ids"]} for row in batch]
        return {**padded(plain_rows), "labels": torch.tensor([row["labels"] for row in batch])}

    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            total -= float(model(ids).logits.double().log_softmax(-1)[0, row["labels"]])
    for batch in BATCHES:
        args = training_arguments(
            tmp_path, per_device_eval_batch_size=batch, remove_unused_columns=False
        )
        trainer = Trainer(model=model, args=args, data_collator=collate, eval_dataset=rows)
        found = scored(trainer)
        assert found.metrics["eval_loss"] == pytest.approx(total / ROWS, rel=CLOSE)
        assert found.size == (ROWS, ROWS)


def sft(directory: Path, batch: int, **given: Any) -> SFTTrainer:
    args = training_arguments(
        directory,
        SFTConfig,
        per_device_eval_batch_size=batch,
        max_length=32,
        gradient_checkpointing=False,
        bf16=False,
        **given,
    )
    columns = {name: [row[name] for row in ragged(masked=False)] for name in ("input_ids",)}
    return SFTTrainer(
        model=sharp(tiny_llama(1)),
        args=args,
        train_dataset=Dataset.from_dict(columns),
        eval_dataset=Dataset.from_dict(columns),
        processing_class=tiny_tokenizer(pad_token="<unk>", eos_token="</s>"),
        peft_config=LoraConfig(**lora(0.0)),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_trl(tmp_path: Path, packed: bool) -> None:
    """trl's token accuracy is one of the set as well, packed rows are rows."""
    rows = ragged(masked=False)
    loss, count = by_hand(sharp(tiny_llama(1)), rows)
    right, model = 0, sharp(tiny_llama(1)).eval()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            right += int((model(ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
    for batch in BATCHES:
        found = scored(sft(tmp_path, batch, packing=packed))
        assert found.metrics["eval_loss"] == pytest.approx(loss, rel=CLOSE)
        assert found.size == (ROWS, count)
        accuracy = found.metrics["eval_mean_token_accuracy"]
        assert accuracy == pytest.approx(right / count, rel=1e-6)


def test_pairs_count_by_rows(tmp_path: Path) -> None:
    """Four pairs in batches of 1, 3 and 4: the rewards are means over pairs too."""
    found = []
    for batch in (1, 3, 4):
        trainer = dpo(tmp_path, peft=True, per_device_eval_batch_size=batch)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():  # type: ignore[union-attr]
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        found.append(scored(trainer))
    for score in found:
        assert score.size == (4, 0)
        for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
            assert score.metrics[name] == pytest.approx(found[0].metrics[name], rel=1e-5)


def test_several_sets(tmp_path: Path) -> None:
    """Their loss is the mean by tokens over all of them; each set keeps its own."""
    model, rows = sharp(small_model(0.0)), ragged()
    trainer = plain(tmp_path, 3, model, {"short": rows[::2], "long": rows[1::2]})
    found = scored(trainer)
    (short, few), (long, many) = by_hand(model, rows[::2]), by_hand(model, rows[1::2])
    assert found.metrics["eval_short_loss"] == pytest.approx(short, rel=CLOSE)
    assert found.metrics["eval_long_loss"] == pytest.approx(long, rel=CLOSE)
    whole = (short * few + long * many) / (few + many)
    assert found.metrics["eval_loss"] == pytest.approx(whole, rel=CLOSE)
    assert found.size == (ROWS, few + many)
    assert found.sets == {"eval_short": (6, few), "eval_long": (5, many)}
    assert set(quality_metrics(found.metrics)) == {
        "eval_loss",
        "eval_short_loss",
        "eval_long_loss",
    }


def test_an_evaluation_of_its_own_kind(tmp_path: Path) -> None:
    """What does not go through the Trainer's loop is taken as it is, its rows are counted."""

    class Own(Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            return {"eval_loss": 1.5}

    rows = ragged()
    args = training_arguments(tmp_path, remove_unused_columns=False)
    collate: Callable[[Any], Any] = padded
    trainer = Own(model=small_model(), args=args, data_collator=collate, eval_dataset=rows)
    found = scored(trainer)
    assert found.metrics == {"eval_loss": 1.5}
    assert found.size == (ROWS, by_hand(small_model(), rows)[1])


def test_rows_without_any_label_have_no_loss(tmp_path: Path) -> None:
    """Not 0, which trl says, but no number."""
    rows = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in ragged()]
    found = scored(plain(tmp_path, 3, small_model(), rows))
    assert found.metrics["eval_loss"] != found.metrics["eval_loss"]
    assert found.size == (ROWS, 0)


def test_rows_that_the_trainer_collates_itself(tmp_path: Path) -> None:
    """As GRPO does: the loader hands out lists of rows, whose mean counts by rows."""

    class Own(Trainer):
        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            lengths = [float(len(row["input_ids"])) for row in inputs]
            return torch.tensor(lengths).mean(), None, None

    rows = ragged()
    for batch in BATCHES:
        args = training_arguments(
            tmp_path, per_device_eval_batch_size=batch, remove_unused_columns=False
        )
        trainer = Own(model=small_model(), args=args, data_collator=list, eval_dataset=rows)
        found = scored(trainer)
        assert found.metrics["eval_loss"] == pytest.approx(sum(LENGTHS) / ROWS, rel=1e-6)
        assert found.size == (ROWS, 0)
