"""Checks of the built-in model and corpus, and of the script that makes them."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fedtune.assets import CORPUS_FILE, MODEL_DIR

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SILOS = ("clinic", "bank", "lawfirm", "helpdesk")


@pytest.fixture
def torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("make_tiny_llm")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in CORPUS_FILE.read_text(encoding="utf-8").splitlines()]


def of_silo(rows: list[dict[str, str]], silo: str) -> list[dict[str, str]]:
    return [row for row in rows if row["silo"] == silo]


def test_assets_stay_below_two_megabytes() -> None:
    files = [CORPUS_FILE, *(path for path in MODEL_DIR.iterdir() if path.is_file())]
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def test_model_is_a_float32_llama(model: Any, tokenizer: Any) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings >= 256
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_special_tokens_differ(tokenizer: Any) -> None:
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
    assert None not in ids


@pytest.mark.parametrize(
    "text", ["Reply to the patient.", "  two  spaces\n\n", "Größe 42 – 日本", "a</s><|user|>b"]
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_is_the_layout_of_pretraining(
    script: ModuleType, tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    row = rows[0]
    messages = [
        {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()},
        {"role": "assistant", "content": row["output"]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == script.chat_text(row)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert script.chat_text(row).startswith(prompt)
    masked = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = [
        token
        for token, mine in zip(masked["input_ids"], masked["assistant_masks"], strict=True)
        if mine
    ]
    assert tokenizer.decode(answer) == row["output"] + tokenizer.eos_token


@pytest.mark.parametrize("silo", SILOS)
def test_untuned_loss_is_far_below_uniform(
    script: ModuleType, model: Any, tokenizer: Any, rows: list[dict[str, str]], silo: str
) -> None:
    texts = [script.instruct_text(row) for row in of_silo(rows, silo)[:64]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss.item()
    assert loss < math.log(len(tokenizer)) - 1.5


def test_generates_words_and_stops(script: ModuleType, model: Any, tokenizer: Any) -> None:
    prompt = script.instruct_text(
        {"instruction": "Reply to the visitor.", "input": "Where is the lamp?", "output": ""}
    ).removesuffix(tokenizer.eos_token)
    batch = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=60, do_sample=False)[0]
    answer = tokenizer.decode(ids[batch["input_ids"].shape[1] :])
    assert answer.endswith(tokenizer.eos_token)
    assert len(answer.split()) >= 4


def test_corpus_is_reproduced(script: ModuleType) -> None:
    assert script.corpus_lines().encode() == CORPUS_FILE.read_bytes()


def test_rows_are_complete_and_unique(rows: list[dict[str, str]]) -> None:
    assert {tuple(row) for row in rows} == {("instruction", "input", "output", "silo", "label")}
    assert all(row["instruction"] and row["output"] for row in rows)
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_silos_differ_in_size_and_label_mix(rows: list[dict[str, str]]) -> None:
    assert tuple(dict.fromkeys(row["silo"] for row in rows)) == SILOS
    parts = [of_silo(rows, silo) for silo in SILOS]
    assert len({len(part) for part in parts}) == len(SILOS)
    counts = [Counter(row["label"] for row in part) for part in parts]
    shares = [
        {label: count[label] / len(part) for label in ("negative", "neutral", "positive")}
        for count, part in zip(counts, parts, strict=True)
    ]
    for label in ("negative", "neutral", "positive"):
        values = [share[label] for share in shares]
        assert min(values) > 0
        assert max(values) - min(values) > 0.2


@pytest.mark.usefixtures("torch_settings")
def test_script_writes_the_same_files_twice(script: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        script.make(tmp_path / name, steps=2, seed=3)
    one, two = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert Path("tiny_llm/model.safetensors") in one
