"""What SFTTrainer learns from its inputs: its labels, decoded, against the rows' own answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fedtune.config import DataArguments
from fedtune.data import as_classification_rows, as_language_rows, sft_inputs, text_inputs
from fedtune.data.usage import usage_of
from fedtune.errors import ConfigError, DataError
from tests.data.conftest import make_tokenizer

WRITTEN = (
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}"
)
MARKED = (
    "{{ (tools or '') | tojson if tools else '' }}"
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}" + WRITTEN + "{% endgeneration %}{% else %}" + WRITTEN + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
USER, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"}
LATER = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "no"}]


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=96,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def learned(model, tmp_path):
    """Trains nothing: texts that the labels of a Trainer hold, its usage, and the Trainer."""

    def build(raw, tokenizer, evaluation=None, data=None, **settings):
        defaults = {"max_length": None, "assistant_only_loss": None, **settings}
        training = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, **defaults)
        args = SimpleNamespace(training=training, data=DataArguments(**(data or {})))
        inputs = sft_inputs(
            lambda rows: as_language_rows(rows, args.data, tokenizer),
            args,
            model,
            tokenizer,
            Dataset.from_list(raw),
            None if evaluation is None else Dataset.from_list(evaluation),
        )
        assert args.training.max_length == settings.get("max_length")  # an argument never changes
        trainer = SFTTrainer(model=model, processing_class=tokenizer, **inputs)
        rows = trainer.train_dataset
        texts = [tokenizer.decode([t for t in row if t != -100]) for row in rows["labels"]]
        given, packed = trainer.args.rows_given["train"], trainer.args.packing
        return texts, usage_of(rows, len(raw), given, packed=packed), trainer

    return build


@pytest.mark.parametrize(
    ("raw", "answers"),
    [
        ({"messages": [USER, ANSWER]}, ["yes</s>"]),
        ({"messages": [USER, ANSWER, *LATER]}, ["yes</s>no</s>"]),
        ({"prompt": [USER], "completion": [ANSWER]}, ["yes</s>"]),
        ({"prompt": [USER, ANSWER], "completion": LATER}, ["no</s>"]),
        ({"prompt": "one?", "completion": "yes"}, ["yes</s>"]),
        (
            {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "a"}]},
            ["a</s>"],
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}, *LATER]},
            ['[{"name": "f"}]</s>no</s>'],
        ),
    ],
)
def test_answers_alone_are_learned(raw, answers, learned):
    texts, usage, trainer = learned([raw], make_tokenizer(MARKED))
    assert texts == answers
    assert usage.label_tokens == len(answers[0].replace("</s>", "$"))  # a byte is a token
    assert usage.tokens == len(trainer.train_dataset["input_ids"][0])
    assert (usage.rows_used, usage.given.every_turn) == (1, False)


def test_tools_reach_the_text(learned):
    tools = [{"name": "find_ward"}]
    tokenizer = make_tokenizer(MARKED)
    _, usage, trainer = learned([{"messages": [USER, ANSWER], "tools": tools}], tokenizer)
    assert "find_ward" in tokenizer.decode(trainer.train_dataset["input_ids"][0])
    assert usage.given.unwritten == ()
    _, usage, _ = learned([{"messages": [USER, ANSWER], "tools": tools}], make_tokenizer(PLAIN))
    assert usage.given.unwritten == ("tools",)


def test_without_marks_all_turns_are_learned_and_that_is_known(learned):
    texts, usage, _ = learned([{"messages": [USER, ANSWER]}], make_tokenizer(PLAIN))
    assert texts == ["<user>one?</s><assistant>yes</s>"]
    assert usage.given.every_turn
    assert usage.label_tokens == usage.tokens - 1  # nothing is before the first


def test_the_user_decides(learned):
    raw = [{"messages": [USER, ANSWER]}]
    texts, usage, _ = learned(raw, make_tokenizer(MARKED), assistant_only_loss=False)
    assert "one?" in texts[0]
    assert not usage.given.every_turn
    with pytest.raises(ConfigError, match="expected a chat template that marks"):
        learned(raw, make_tokenizer(PLAIN), assistant_only_loss=True)
    with pytest.raises(ConfigError, match="received rows without turns"):
        learned([{"text": "a"}], make_tokenizer(MARKED), assistant_only_loss=True)


def test_conversations_without_an_answer_are_left_out(learned):
    raw = [{"messages": [USER]}, {"messages": [USER, ANSWER]}]
    texts, usage, _ = learned(raw, make_tokenizer(MARKED))
    assert texts == ["yes</s>"]
    assert usage.sentences("rows") == [
        "1 of 2 rows have no assistant turn to learn from and are left out"
    ]
    with pytest.raises(DataError, match="training rows: expected assistant turns .* received 1 "):
        learned(raw[:1], make_tokenizer(MARKED))


LONG = [{"prompt": "q" * n, "completion": "abc"} for n in (2, 40, 32, 29)]


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"truncation_mode": "keep_end"}])
def test_rows_that_are_cut_and_rows_that_have_nothing_left(settings, learned):
    """Prompt, three letters and EOS: 6, 44, 36 and 33 tokens against 32."""
    _, usage, trainer = learned(LONG, make_tokenizer(), max_length=32, **settings)
    left = [row for row in trainer.train_dataset["labels"] if any(t != -100 for t in row)]
    labels = sum(token != -100 for row in left for token in row)
    assert (usage.rows_cut, usage.given.longest) == (3, 44)
    assert usage.label_tokens == labels
    keeps_end = settings.get("truncation_mode") == "keep_end"
    assert usage.rows_used == (4 if keeps_end else 2)
    assert any("no token left to learn from at --max_length 32" in s for s in usage.sentences("r"))\
        != keeps_end  # fmt: skip


def test_rows_above_the_context_are_cut_unless_strict(learned):
    raw = [{"text": "a" * 200}, {"text": "b"}]
    _, usage, trainer = learned(raw, make_tokenizer())
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [96, 2]
    assert usage.sentences("training rows of client-1") == [
        "1 of 2 training rows of client-1 are cut at --max_length 96 (the model's context): the "
        "longest has 201 tokens"
    ]
    with pytest.raises(DataError, match=r"expected at most 96 .* received 201 in row 1 "):
        learned(raw, make_tokenizer(), data={"strict_length": True})
    _, usage, trainer = learned(raw[1:], make_tokenizer())
    assert (usage.rows_cut, trainer.args.max_length) == (0, None)


def test_split_rows_are_not_cut(learned):
    raw = [{"text": "a" * 50}, {"text": "b"}]
    settings = {"max_length": 32, "packing": True, "packing_strategy": "wrapped"}
    _, usage, trainer = learned(raw, make_tokenizer(), **settings)
    assert sum(map(len, trainer.train_dataset["input_ids"])) == 53
    assert (usage.rows_cut, usage.rows_used) == (0, None)


def test_nothing_left_is_refused_by_name(learned):
    _, usage, _ = learned(LONG[1:3], make_tokenizer(), max_length=32)
    with pytest.raises(DataError) as caught:
        usage.check("training rows of client-1")
    assert "training rows of client-1: " in str(caught.value)
    assert "all 2 have no token left to learn from at --max_length 32. Fix: " in str(caught.value)


def test_texts_to_classify_are_cut_and_keep_their_label(model, tmp_path):
    tokenizer = make_tokenizer()
    args = SimpleNamespace(training=SimpleNamespace(), data=DataArguments())
    raw = Dataset.from_dict({"text": ["a" * 200, "b"], "label": ["x", "y"]})
    inputs = text_inputs(
        lambda rows: as_classification_rows(rows, args.data)[0], args, model, tokenizer, raw, None
    )
    usage = usage_of(inputs["train_dataset"], 2, inputs["args"].rows_given["train"])
    assert (usage.rows_used, usage.rows_cut, usage.tokens) == (2, 1, 96 + 1)
    assert usage.label_tokens is None
    args.data = DataArguments(strict_length=True)
    with pytest.raises(DataError, match="expected at most 96"):
        text_inputs(
            lambda rows: as_classification_rows(rows, args.data)[0],
            args,
            model,
            tokenizer,
            raw,
            raw,
        )
