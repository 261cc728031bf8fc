"""Sites with real Trainers on bases of their own: a whole federation, from `plan` to the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from fedtune.adapters import load_base
from fedtune.config import ModelArguments
from fedtune.errors import RunStopped
from tests.client.federations import federate_sites, play_sites
from tests.client.trainers import lora, small_trainer
from tests.federation.small import server_run
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(1).save_pretrained(directory)
    tiny_tokenizer(eos_token="</s>", unk_token="<unk>").save_pretrained(directory)
    return directory


def site(base: Any) -> Callable[[str, Path], Trainer]:
    """A site's script: `base(name)` is what it puts its adapter on."""

    def script(name: str, directory: Path) -> Trainer:
        model = base(name)
        torch.manual_seed(42)
        return small_trainer(directory, model=get_peft_model(model, LoraConfig(**lora(0.0))))

    return script


def test_equal_bases_in_fp32_bf16_and_nf4_train_together(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def base(name: str) -> Any:
        if name == "client-2":
            settings = ModelArguments(model_name_or_path=str(checkpoint), load_in_4bit=True)
            return load_base(settings, task="causal_lm")[0]
        return tiny_llama(1).to(torch.bfloat16 if name == "client-1" else torch.float32)

    state, sites = federate_sites(server_run(3, num_rounds=1), tmp_path, site(base))
    assert state.round == 1
    assert sorted(state.client_rounds) == [one.name for one in sites]
    said = [text for text in caplog.messages if "base weights look equal" in text]
    assert {text.split(":")[0] for text in said} == {"client-1", "client-2"}


@pytest.mark.parametrize("what", NAMES)
def test_a_site_with_another_base_is_refused_by_name_and_told_why(
    tmp_path: Path, what: str
) -> None:
    """A row of the embeddings, or the head, is drawn at one site; the other one is in bf16."""

    def base(name: str) -> Any:
        model = tiny_llama(1)
        torch.manual_seed(5)
        with torch.no_grad():
            weight = model.lm_head.weight if what == "lm_head" else model.model.embed_tokens.weight
            if name == "client-1":
                drawn = weight if what == "lm_head" else weight[-1:]
                drawn.copy_(torch.randn(drawn.shape) * weight.std())
        return model.to(torch.bfloat16) if name == "client-0" else model

    run = server_run(2, num_rounds=1)
    shown: list[dict[str, Any]] = []

    def on_clients(rows: list[dict[str, Any]]) -> None:
        shown[:] = [row for row in rows if row["problem"]]
        if shown:
            raise RunStopped("a site was refused")

    run.on_clients = on_clients
    sites = play_sites(run, tmp_path, site(base))
    expected = f"base weights: expected those of client-0, received others: `{NAMES[what]}`"
    (row,) = shown
    assert row["client"] == "client-1"
    assert row["problem"].startswith(f"{expected} has other values")
    assert str(sites[1].problem).startswith(expected)
    assert "modules_to_save" in str(sites[1].problem)
