from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedtune.adapters import (
    Manifest,
    Params,
    collect,
    collect_static,
    describe,
    export_adapter,
    load_exported,
    load_init_adapter,
    merge,
    params_from_peft_dir,
)
from fedtune.adapters import export as export_module
from fedtune.errors import ConfigError, ManifestError
from tests.adapters.variants import PROMPT, lora, train
from tests.tiny import tiny_llama, tiny_tokenizer, tokens

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT, on tied embeddings


def state_of(model: nn.Module) -> tuple[Params, Params, Manifest]:
    return collect(model), collect_static(model), describe(model)


def trained_lora(**kw: object) -> nn.Module:
    model = get_peft_model(tiny_llama(), lora(**kw))
    train(model)
    return model


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_export_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    export_adapter(target, *state_of(get_peft_model(tiny_llama(), PromptEncoderConfig(**PROMPT))))
    export_adapter(target, *state_of(trained_lora()))
    assert sorted(contents(target)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedtune_manifest.json",
        "fedtune_params.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_failed_write_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    export_adapter(target, *state_of(trained_lora()))
    before = contents(target)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_adapter(target, *state_of(trained_lora(r=2)))
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


CRASH = """
import os, sys
from pathlib import Path
from fedtune.adapters import export_adapter, load_exported
Path.rename = lambda *args: os._exit(9)  # everything is written, nothing is renamed
params, static, manifest = load_exported(sys.argv[1])
export_adapter(sys.argv[1], {name: tensor + 1 for name, tensor in params.items()}, static, manifest)
"""


def test_crash_between_write_and_rename_leaves_the_old_adapter(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    state = state_of(trained_lora())
    export_adapter(target, *state)
    before = contents(target)
    run = subprocess.run([sys.executable, "-c", CRASH, str(target)], timeout=120, check=False)
    assert run.returncode == 9
    assert contents(target) == before
    export_adapter(target, *state)  # and the next export cleans up
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_export_does_not_replace_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="expected a new or empty directory"):
        export_adapter(tmp_path, *state_of(trained_lora()))
    assert (tmp_path / "thesis.txt").exists()


def test_export_checks_first(tmp_path: Path) -> None:
    params, static, manifest = state_of(trained_lora())
    params[max(params)][:] = float("nan")
    with pytest.raises(ManifestError, match="not finite"):
        export_adapter(tmp_path / "adapter", params, static, manifest)
    assert list(tmp_path.iterdir()) == []


def test_large_full_model_is_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = export_module.save_torch_state_dict
    monkeypatch.setattr(
        export_module,
        "save_torch_state_dict",
        lambda *args, **kw: save(*args, **kw, max_shard_size="20KB"),
    )
    model = tiny_llama(tie_word_embeddings=True)
    params, static, manifest = state_of(model)
    export_adapter(tmp_path / "model", params, static, manifest)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(params)
    assert "lm_head.weight" not in params  # tied: stored once
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)
    loaded, _, _ = load_exported(tmp_path / "model")
    assert all(torch.equal(loaded[name], params[name]) for name in params)


def test_export_draws_no_random_number(tmp_path: Path) -> None:
    for config in (PromptEncoderConfig(**PROMPT), lora()):
        state = state_of(get_peft_model(tiny_llama(), config))
        rng = torch.get_rng_state()
        export_adapter(tmp_path / str(config.peft_type), *state)
        assert torch.equal(torch.get_rng_state(), rng)


def test_load_exported_refuses_other_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedtune_manifest.json"):
        load_exported(tmp_path)
    with pytest.raises(ConfigError, match="fedtune_manifest.json"):
        load_exported(tmp_path / "nothing")


def test_damaged_export_is_refused(tmp_path: Path) -> None:
    export_adapter(tmp_path / "adapter", *state_of(trained_lora()))
    file = tmp_path / "adapter" / "fedtune_params.safetensors"
    tensors = load_file(file)
    name = max(tensors)
    save_file({key: tensors[key] for key in tensors if key != name}, file)
    with pytest.raises(ManifestError, match=f"^`{name}` is missing"):
        load_exported(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"lora_alpha": 32}, "`lora_alpha` differs: expected 8 .*received 32"),
        ({"use_rslora": True}, "`use_rslora` differs"),
        ({"r": 2, "lora_alpha": 4}, "`r` differs: expected 4 .*received 2"),
        ({"target_modules": ["q_proj"]}, r"v_proj\.lora_A\.weight` is missing"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, r"k_proj\.lora_A\.weight` is unknown"),
    ],
    ids=["alpha", "rslora", "r", "fewer-modules", "more-modules"],
)
@pytest.mark.parametrize("plain", [True, False], ids=["peft", "fedtune"])
def test_init_adapter_refuses_another_adapter(
    tmp_path: Path, other: dict[str, object], match: str, plain: bool
) -> None:
    model = trained_lora(**other)
    if plain:
        model.save_pretrained(tmp_path)
    else:
        export_adapter(tmp_path, *state_of(model))
    with pytest.raises(ManifestError, match=match):
        load_init_adapter(tmp_path, describe(trained_lora()))


def test_plain_peft_directory_with_embedding_copy_and_half_precision(tmp_path: Path) -> None:
    model = trained_lora(target_modules=["embed_tokens", "q_proj"])
    model.to(torch.bfloat16).save_pretrained(tmp_path, save_embedding_layers=True)
    manifest = describe(trained_lora(target_modules=["embed_tokens", "q_proj"]))
    params, static = params_from_peft_dir(tmp_path, manifest)
    assert static == {}
    assert all(tensor.dtype == torch.float32 for tensor in params.values())
    want = collect(model)
    assert all(torch.equal(params[name], want[name].float()) for name in want)


def test_params_from_peft_dir_refuses_a_path_without_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter_config.json"):
        params_from_peft_dir(tmp_path, describe(trained_lora()))


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({}, {}),
        ({"use_dora": True}, {}),
        ({"use_rslora": True, "target_modules": "all-linear"}, {}),
        ({"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {"tie_word_embeddings": True}),
        ({"target_modules": ["q_proj"]}, {"tie_word_embeddings": True}),
        ({"task_type": "SEQ_CLS"}, {"num_labels": 3, "id2label": {0: "bad", 1: "ok", 2: "good"}}),
    ],
    ids=["lora", "dora", "rslora", "lm_head-tied", "embed-tied", "tied", "seq_cls"],
)
def test_merge_gives_the_same_model(tmp_path: Path, config: dict, base: dict) -> None:
    classifier = "num_labels" in base
    if classifier:
        base = {"num_labels": None, **base, "id2label": base["id2label"]}
        model = tiny_llama(num_labels=3)
        model.config.id2label = base["id2label"]
    else:
        model = tiny_llama(**base)
    tiny_llama(**({} if classifier else base)).save_pretrained(tmp_path / "base")
    tiny_tokenizer(pad_token="<unk>").save_pretrained(tmp_path / "base")
    if classifier:
        # A causal checkpoint: the classifier's backbone is the same, its head travels.
        model.model.load_state_dict(tiny_llama().model.state_dict())
    model = get_peft_model(model, lora(**config))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    train(model)
    export_adapter(tmp_path / "adapter", *state_of(model))
    merge(tmp_path / "adapter", tmp_path / "merged")
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    merged = auto.from_pretrained(tmp_path / "merged")
    assert not isinstance(merged, PeftModel)
    # W + s B A is rounded once more than W x + s B (A x): about 1e-6 at logits of order 1.
    torch.testing.assert_close(
        merged(tokens()).logits, model.eval()(tokens()).logits, rtol=0, atol=1e-5
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id == 0
    if classifier:
        assert merged.config.id2label == base["id2label"]


def test_merge_refuses(tmp_path: Path) -> None:
    prompt = get_peft_model(tiny_llama(), PromptEncoderConfig(**PROMPT))
    export_adapter(tmp_path / "prompt", *state_of(prompt))
    export_adapter(tmp_path / "lora", *state_of(trained_lora()))
    export_adapter(tmp_path / "full", *state_of(tiny_llama()))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="P_TUNING: a prompt is input to the model"):
        merge(tmp_path / "prompt", tmp_path / "out")
    with pytest.raises(ConfigError, match="full model. It needs no merge"):
        merge(tmp_path / "full", tmp_path / "out")
    with pytest.raises(ConfigError, match="Pass model_name_or_path"):
        merge(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a new or empty directory"):
        merge(tmp_path / "lora", tmp_path / "used", model_name_or_path="x")
    assert not os.path.exists(tmp_path / "out")
