"""One run over sites whose adapters are attached in ways of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from fedtune.adapters import collect
from fedtune.strategies.registry import build_method
from tests.client.federations import federate_sites
from tests.client.trainers import lora, small_trainer
from tests.federation.small import same_tensors, server_run
from tests.tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")


def attached(name: str) -> Any:
    model, config = tiny_llama(1), LoraConfig(**lora(0.0))
    torch.manual_seed(42)
    if name == "client-0":
        return get_peft_model(model, config, adapter_name="ward")
    if name == "client-1":
        model.add_adapter(config)
        return model
    plain: Any = get_peft_model(model, config)
    plain.add_adapter("other", LoraConfig(**{**lora(0.0), "r": 2}))
    return plain


def default(name: str) -> Any:
    base = tiny_llama(1)
    torch.manual_seed(42)
    return get_peft_model(base, LoraConfig(**lora(0.0)))


@pytest.mark.parametrize("method", ["scaffold", "fedex_lora"])
def test_they_train_as_if_all_were_called_default(method: str, tmp_path: Path) -> None:
    """The same global to the bit, and each site ends with it; with what methods add at a site."""
    ends = []
    for ways in (attached, default):

        def script(name: str, directory: Path, ways: Any = ways) -> Trainer:
            return small_trainer(directory, model=ways(name))

        run = server_run(3, method=build_method(method, weight_by="tokens"), num_rounds=2)
        state, sites = federate_sites(run, tmp_path / ways.__name__, script)
        ends.append(state.params)
        for site in sites:
            assert site.trainer is not None
            held = collect(site.trainer.model)
            assert all(torch.equal(held[name], value) for name, value in state.params.items())
    assert same_tensors(*ends)
