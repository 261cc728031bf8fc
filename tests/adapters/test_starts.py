"""Starts of LoRA: after loading equal parameters all sites compute the same, or none may begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from fedtune.adapters import collect, collect_static, describe, export_adapter, load
from fedtune.adapters.starts import refused_start, rewrites_base
from fedtune.errors import ManifestError
from tests.adapters.variants import logits, lora, train
from tests.tiny import tiny_llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

SAME: list[dict[str, Any]] = [
    {"init_lora_weights": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "OLoRA"},
    {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
]
OTHER: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    {"init_lora_weights": "eva"},
]


def site(seed: int, options: dict[str, Any]) -> nn.Module:
    """A site with an RNG and rows of its own."""
    base, config = tiny_llama().eval(), lora(**options)
    rows = tokens(rows=8, seed=seed)
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(base, config, lambda: base(rows, labels=rows).loss.backward())
    if config.init_lora_weights == "corda":
        preprocess_corda(base, config, run_model=lambda: base(rows.reshape(1, -1)[:, :60]))
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    if config.init_lora_weights == "eva":
        batches = [{"input_ids": tokens(rows=8, seed=seed + i)} for i in range(3)]
        initialize_lora_eva_weights(
            model,
            batches,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=flat,
            show_progress_bar=False,
        )
    return model


def flat(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    inputs: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return inputs.reshape(-1, inputs.shape[-1])


def shown(options: dict[str, Any]) -> str:
    return " ".join(str(getattr(value, "rho", value))[:20] for value in options.values())


@pytest.mark.parametrize("options", SAME, ids=shown)
def test_what_is_the_same_everywhere(options: dict[str, Any], tmp_path: Path) -> None:
    """Two sites with the parameters of one are one model, and so is the adapter loaded again."""
    one, other = site(1, options), site(2, options)
    train(one)
    manifest, params, static = describe(one), collect(one), collect_static(one)
    assert describe(other).hash == manifest.hash
    load(other, params, manifest, static=static)
    assert torch.equal(logits(one), logits(other))
    export_adapter(tmp_path / "adapter", params, static, manifest)
    torch.manual_seed(5)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", OTHER, ids=shown)
def test_what_is_not_is_refused_by_the_setting_and_with_a_way_out(options: dict[str, Any]) -> None:
    with pytest.raises(ManifestError) as caught:
        describe(site(1, options))
    text = str(caught.value)
    assert options["init_lora_weights"] in text
    assert "init_lora_weights" in text
    assert ("rho=1.0" if "eva" in text.split(":")[0] else "Use pissa or olora") in text
    assert "\n" not in text


def test_loftq_is_refused_where_it_runs() -> None:
    """PEFT computes it on a GPU alone, so what is checked here is the config."""
    assert "loftq, whose quantized rest" in refused_start({"init_lora_weights": "loftq"})


def test_every_start_of_peft_that_rewrites_the_base_is_known() -> None:
    """Whatever a config says of a start, the base is as it was, or `rewrites_base` names it."""
    for options in [*SAME, *OTHER[:3]]:
        before = tiny_llama().state_dict()
        after = site(1, options).get_base_model().state_dict()  # type: ignore[operator]
        same = all(
            torch.equal(after[name.replace("_proj.weight", "_proj.base_layer.weight")], tensor)
            if name.endswith(("q_proj.weight", "v_proj.weight"))
            else torch.equal(after[name], tensor)
            for name, tensor in before.items()
        )
        assert same == (not rewrites_base(lora(**options).to_dict()))


def test_a_config_of_another_method_has_no_start() -> None:
    assert not refused_start({})
    assert not rewrites_base(LoraConfig().to_dict())
