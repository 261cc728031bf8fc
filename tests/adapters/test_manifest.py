from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from fedtune.adapters import Manifest, check, collect, describe, load
from fedtune.errors import ManifestError
from tests.adapters.variants import logits, lora, train
from tests.tiny import tiny_gpt2, tiny_llama

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


def attached(config: LoraConfig | None = None, **base: object) -> nn.Module:
    return get_peft_model(tiny_llama(**base), config or lora())


@pytest.mark.parametrize(
    "other",
    [
        attached(lora(r=8, lora_alpha=16)),
        attached(lora(lora_alpha=16)),
        attached(lora(use_rslora=True)),
        attached(lora(target_modules=["q_proj"])),
        attached(lora(use_dora=True)),
        attached(rms_norm_eps=1e-3),
        attached(intermediate_size=64),
        tiny_llama(),
    ],
    ids=["r", "alpha", "rslora", "modules", "dora", "base-eps", "base-width", "full"],
)
def test_hash_tells_adapters_and_bases_apart(other: nn.Module) -> None:
    assert describe(other).hash != describe(attached()).hash


def pad(model: nn.Module) -> None:
    model.config.pad_token_id = 7  # Trainer aligns special tokens


def cache(model: nn.Module) -> None:
    model.config.use_cache = False  # Trainer, with gradient checkpointing


def moved(model: nn.Module) -> None:
    model.config._name_or_path = "/another/place"
    model.peft_config["default"].base_model_name_or_path = "/another/place"


def released(model: nn.Module) -> None:
    model.config.transformers_version = "9.9"
    model.peft_config["default"].peft_version = "9.9"


@pytest.mark.parametrize("change", [pad, cache, moved, released, train])
def test_hash_ignores_what_sites_may_differ_in(change: Callable[[nn.Module], None]) -> None:
    model, other = attached(), attached()
    change(other)
    assert describe(other).hash == describe(model).hash


def test_hash_of_a_half_precision_base_is_the_same() -> None:
    base = tiny_llama().to(torch.bfloat16)
    assert describe(get_peft_model(base, lora())).hash == describe(attached()).hash


def test_scaling_is_read_from_the_layers() -> None:
    config = lora(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 32})
    scaling = describe(attached(config)).scaling
    path = "base_model.model.model.layers.{}.self_attn.{}_proj"
    assert scaling == {
        path.format(0, "q"): 8 / 4,
        path.format(1, "q"): 8 / 2,
        path.format(0, "v"): 32 / 4,
        path.format(1, "v"): 32 / 4,
    }
    rslora = describe(attached(lora(use_rslora=True))).scaling
    assert set(rslora.values()) == {8 / 4**0.5}


def test_describe_takes_copies() -> None:
    model = attached()
    manifest = describe(model)
    before = copy.deepcopy(manifest)
    model.peft_config["default"].rank_pattern["x"] = 1
    model.config.hidden_size = 1
    assert manifest == before
    with pytest.raises(FrozenInstanceError):
        manifest.peft_type = "IA3"  # type: ignore[misc]


def test_adalora_is_refused_with_the_reason() -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    with pytest.raises(ManifestError, match="local|own importance scores.*update_and_allocate"):
        describe(get_peft_model(tiny_llama(), config))


def test_the_adapter_is_bound_by_name() -> None:
    """A second adapter (DPO's `ref`) neither travels nor changes the names."""
    model, alone = attached(), attached()
    model.add_adapter("ref", lora())
    assert collect(model).keys() == collect(alone).keys()
    assert describe(model).hash == describe(alone).hash
    with pytest.raises(ManifestError, match=r"expected one of \['default', 'ref'\]"):
        describe(model, "other")
    with pytest.raises(ManifestError, match="Nothing to train"):
        describe(model, "ref")
    model.set_adapter("ref")
    assert describe(model, "ref").entries == describe(alone).entries
    assert collect(model, "ref").keys() == collect(alone).keys()
    train(model)
    load(alone, collect(model, "ref"), describe(alone))
    assert torch.equal(logits(alone), logits(model))


def test_what_peft_would_not_save_is_refused() -> None:
    model = attached()
    model.get_base_model().model.norm.weight.requires_grad = True
    with pytest.raises(ManifestError, match=r"model\.norm\.weight.*modules_to_save"):
        describe(model)


def test_a_mixed_model_is_refused() -> None:
    model = get_peft_model(tiny_llama(), lora(), mixed=True)
    with pytest.raises(ManifestError, match="get_peft_model"):
        describe(model)


def test_load_refuses_a_model_of_another_kind() -> None:
    source, target = attached(), tiny_gpt2()
    before = collect(target)
    with pytest.raises(ManifestError, match=r"lora_A\.weight`: this model has no such tensor"):
        load(target, collect(source), describe(source))
    after = collect(target)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_load_casts_to_the_receiver() -> None:
    source = attached()
    train(source)
    target = attached().to(torch.bfloat16)
    load(target, collect(source), describe(source))
    for name, tensor in collect(target).items():
        assert torch.equal(tensor, collect(source)[name].to(torch.bfloat16))


def test_check_names_the_first_key_in_order() -> None:
    model = attached()
    params = dict.fromkeys(reversed(collect(model)), torch.tensor(float("nan")))
    with pytest.raises(ManifestError, match=f"^`{min(params)}`"):
        check(params, describe(model))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 2}', "null"])
def test_from_json_refuses_other_files(text: str) -> None:
    with pytest.raises(ManifestError, match="expected"):
        Manifest.from_json(text)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no pre-trained model at {STORIES}")
def test_two_processes_agree_on_a_directory() -> None:
    script = (
        "from fedtune.adapters import attach_adapter, describe, load_base\n"
        "from fedtune.config import AdapterArguments, ModelArguments\n"
        f"base, _ = load_base(ModelArguments({str(STORIES)!r}), task='causal_lm')\n"
        "print(describe(attach_adapter(base, AdapterArguments(), 'causal_lm', {})).hash)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script.replace("{}", seed)], stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    hashes = [run.communicate(timeout=120)[0].strip() for run in runs]
    assert len(hashes[0]) == 64
    assert hashes[0] == hashes[1]


def test_dropout_is_a_setting_of_the_training() -> None:
    """Sites may differ in it, as in the learning rate; what differs besides is shown as it is."""
    one, other = describe(attached(lora(lora_dropout=0.1))), describe(attached())
    assert one.hash == other.hash
    assert other.objection_to(one) == ""
    dora = describe(attached(lora(use_dora=True)))
    assert "expected use_dora False, built True" in other.objection_to(dora)
