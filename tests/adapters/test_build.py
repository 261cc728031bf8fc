from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import huggingface_hub
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedtune.adapters import attach_adapter, build_peft_config, collect, keep_trainable, load_base
from fedtune.config import AdapterArguments, ModelArguments
from fedtune.errors import ConfigError
from tests.adapters.variants import batch, train
from tests.tiny import tiny_llama, tiny_tokenizer, tokens

METHODS = get_args(get_type_hints(AdapterArguments)["peft_method"])


def adapter(method: str = "lora", **kw: Any) -> AdapterArguments:
    return AdapterArguments(peft_method=method, **kw)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
def test_every_method_trains(method: str, task: Any) -> None:
    base = tiny_llama(num_labels=3 if task == "seq_cls" else None)
    model = attach_adapter(base, adapter(method), task, seed=0)
    assert isinstance(model, PeftModel) == (method != "none")
    before = collect(model)
    train(model)
    after = collect(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if task == "seq_cls" and method != "none":
        assert any(name.endswith("score.modules_to_save.weight") for name in after)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_the_adapter_and_nothing_else_does(method: str) -> None:
    if method in ("none", "ia3"):
        pytest.skip("nothing is drawn")

    def initial(seed: int, rng: int) -> dict[str, torch.Tensor]:
        base = tiny_llama()
        torch.manual_seed(rng)
        state = torch.get_rng_state()
        params = collect(attach_adapter(base, adapter(method), "causal_lm", seed))
        assert torch.equal(torch.get_rng_state(), state)
        return params

    one, same, other = initial(1, rng=5), initial(1, rng=6), initial(2, rng=5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_settings_reach_peft() -> None:
    config = build_peft_config(
        adapter(
            "dora",
            lora_r=3,
            lora_alpha=5,
            lora_dropout=0.25,
            lora_target_modules="q_proj, k_proj",
            use_rslora=True,
            modules_to_save="lm_head",
        ),
        "causal_lm",
    )
    assert config is not None
    got = config.to_dict()
    assert (got["r"], got["lora_alpha"], got["lora_dropout"]) == (3, 5, 0.25)
    assert set(got["target_modules"]) == {"q_proj", "k_proj"}
    assert got["use_dora"]
    assert got["use_rslora"]
    assert got["modules_to_save"] == ["lm_head"]
    assert got["task_type"] == "CAUSAL_LM"
    everywhere = build_peft_config(adapter(lora_target_modules="all-linear"), "causal_lm")
    assert everywhere is not None
    assert everywhere.to_dict()["target_modules"] == "all-linear"


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="AdaLoRA is not supported: it prunes ranks"):
        build_peft_config(adapter("adalora"), "causal_lm")
    with pytest.raises(ConfigError, match="--peft_method: expected one of lora, .*'bitfit'"):
        build_peft_config(adapter("bitfit"), "causal_lm")


def test_adapter_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--lora_target_modules") as caught:
        attach_adapter(tiny_llama(), adapter(lora_target_modules="nowhere"), "causal_lm", 0)
    assert "\n" not in str(caught.value)


def model_dir(path: Path, **special: str) -> ModelArguments:
    tiny_llama(pad_token_id=None).save_pretrained(path)
    tiny_tokenizer(**special).save_pretrained(path)
    return ModelArguments(model_name_or_path=str(path))


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "<unk>", "eos_token": "</s>"}, 0),  # id 0 is a pad token
        ({"eos_token": "</s>", "unk_token": "<unk>"}, 2),
        ({"unk_token": "<unk>"}, 0),
    ],
    ids=["own", "eos", "unk"],
)
def test_pad_token(tmp_path: Path, special: dict[str, str], pad: int) -> None:
    model, tokenizer = load_base(model_dir(tmp_path, **special), task="causal_lm")
    assert tokenizer.pad_token_id == pad
    assert model.config.pad_token_id == pad
    assert model.generation_config.pad_token_id == pad


def test_no_possible_pad_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a pad, eos or unk token"):
        load_base(model_dir(tmp_path), task="causal_lm")


def test_default_is_the_embedded_model() -> None:
    model, tokenizer = load_base(ModelArguments(), task="causal_lm")
    ids = tokenizer("The bank reported a profit.", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_classifier(tmp_path: Path) -> None:
    settings = model_dir(tmp_path, eos_token="</s>")
    names = {0: "down", 1: "flat", 2: "up"}
    torch.manual_seed(1)
    one, _ = load_base(settings, task="seq_cls", id2label=names)
    torch.manual_seed(2)
    two, _ = load_base(settings, task="seq_cls", num_labels=3)
    assert one.config.id2label == names
    assert one.config.label2id == {"down": 0, "flat": 1, "up": 2}
    assert two.score.out_features == 3
    assert torch.equal(one.score.weight, two.score.weight)  # every site has the same new head


def fails(settings: ModelArguments, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        load_base(settings, task="causal_lm")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--model_name_or_path")


def test_models_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fails(ModelArguments(str(tmp_path / "nothing")), "received a path that does not exist")
    fails(ModelArguments("./nothing"), "received a path that does not exist")
    fails(ModelArguments("nobody/nothing-at-all"), "a hub id that can be reached")
    fails(ModelArguments("nothing-at-all"), "a hub id that can be reached")
    fails(ModelArguments(str(tmp_path)), "received a directory without it")
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(ModelArguments(str(tmp_path)), "received an adapter without it")
    tiny_llama().save_pretrained(tmp_path / "bare")
    fails(ModelArguments(str(tmp_path / "bare")), "expected a tokenizer beside the model")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
def test_quantized_base(tmp_path: Path, kind: str, task: Any) -> None:
    settings = model_dir(tmp_path, eos_token="</s>")
    settings.load_in_8bit = kind == "int8"
    settings.load_in_4bit = kind != "int8"
    settings.bnb_4bit_quant_type = "fp4" if kind == "fp4" else "nf4"
    model, _ = load_base(settings, task=task, num_labels=3 if task == "seq_cls" else None)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, Linear8bitLt if kind == "int8" else Linear4bit)
    assert type(model.score if task == "seq_cls" else model.lm_head) is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="--peft_method none: expected a base model in full"):
        attach_adapter(model, adapter("none"), task, 0)
    peft = attach_adapter(model, adapter(), task, 0)
    peft.eval()
    with torch.no_grad():
        first = peft(tokens()).logits
    peft.train()
    peft(**batch(peft)).loss.backward()  # evaluating must not end training
    grads = [p.grad for name, p in peft.named_parameters() if ".lora_B." in name]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    peft.eval()
    with torch.no_grad():
        assert torch.equal(peft(tokens()).logits, first)


def test_two_quantizations_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at most one, received both"):
        load_base(ModelArguments(load_in_4bit=True, load_in_8bit=True), task="causal_lm")


def test_keep_trainable_on_a_model_of_the_user(tmp_path: Path) -> None:
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    keep_trainable(base)
    model = attach_adapter(base, adapter(lora_target_modules="q_proj"), "causal_lm", 0)
    model.eval()
    with torch.no_grad():
        model(tokens())
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
