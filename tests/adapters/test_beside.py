"""A full model on disk is used as its base is: tokenizer, stop tokens, cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedtune.adapters import collect, describe, export_adapter, load_base
from fedtune.adapters.beside import beside
from fedtune.cli import main
from fedtune.config import ModelArguments
from tests.tiny import tiny_llama, tiny_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
STOPS = {"eos_token_id": [2, 5], "repetition_penalty": 1.2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_llama()
    model.generation_config = GenerationConfig(**STOPS)
    model.save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer(eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def as_a_trainer_leaves_it(base: Path) -> tuple:
    model, tokenizer = load_base(ModelArguments(model_name_or_path=str(base)), task="causal_lm")
    found = beside(model, tokenizer)
    model.config.use_cache = False
    model.config.pad_token_id = 7
    return model, found


def check_like_base(directory: Path, base: Path) -> None:
    tokenizer, wanted = (AutoTokenizer.from_pretrained(path) for path in (directory, base))
    assert tokenizer.chat_template == wanted.chat_template == TEMPLATE
    assert tokenizer("w3 w9")["input_ids"] == wanted("w3 w9")["input_ids"]
    got = AutoModelForCausalLM.from_pretrained(directory)
    assert {name: getattr(got.generation_config, name) for name in STOPS} == STOPS
    assert got.config.use_cache is True
    assert got.config.pad_token_id != 7


def test_a_run_on_one_machine_writes_it(base: Path, tmp_path: Path) -> None:
    model, found = as_a_trainer_leaves_it(base)
    export_adapter(tmp_path / "model", collect(model), {}, describe(model), beside=found)
    check_like_base(tmp_path / "model", base)


def test_export_adds_it_to_the_model_of_a_deployment(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = as_a_trainer_leaves_it(base)
    export_adapter(tmp_path / "run" / "model", collect(model), {}, describe(model))
    assert json.loads((tmp_path / "run/model/config.json").read_text())["use_cache"] is False
    words = ["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--model_name_or_path", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "out").exists()
    assert main([*words, "--model_name_or_path", str(base)]) == 0
    check_like_base(tmp_path / "out", base)
    assert "no model" not in capsys.readouterr().out
