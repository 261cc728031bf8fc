from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedtune.data.text import say_once

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is written to the user's cache; one worker's tests share theirs."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    cache = tmp_path_factory.getbasetemp() / f"datasets-cache-{worker}"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(autouse=True)
def everything_is_said_again():
    """What is said once a process is said once a test."""
    say_once.cache_clear()


@pytest.fixture
def real_data():
    """Returns the path of one of the real data sets beside the repository, or skips."""

    def find(name: str) -> str:
        path = REAL_DATA / name
        if not path.exists():
            pytest.skip(f"real data set {path} is not on this machine")
        return str(path)

    return find


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and BOS at the front as Llama tokenizers do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [],
        trainers.BpeTrainer(
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return make_tokenizer(CHAT_TEMPLATE)
