"""Fingerprints of frozen weights: others are found by name, equal ones agree in any dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from fedtune.adapters import describe, load_base
from fedtune.adapters.base_weights import read_base
from fedtune.adapters.fingerprint import (
    BaseTensor,
    Fingerprint,
    block_rows,
    disagreement,
    unseen,
)
from fedtune.config import ModelArguments
from fedtune.errors import ManifestError
from tests.adapters.variants import lora
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
KINDS = ["float32", "bfloat16", "float16", "nf4", "fp4", "int8"]

Change = Callable[[Any], None]


def one_value(base: Any) -> None:
    base.model.layers[1].mlp.up_proj.weight[7, 3] += 1e-6


def one_tensor(base: Any) -> None:
    redraw(base.model.layers[1].self_attn.o_proj.weight)


def one_row(base: Any) -> None:
    redraw(base.model.layers[0].self_attn.q_proj.weight[5])


def embedding_row(base: Any) -> None:
    redraw(base.model.embed_tokens.weight[-1])


def head(base: Any) -> None:
    redraw(base.lm_head.weight)


def redraw(values: Tensor) -> None:
    """From the same distribution, so that sizes tell nothing."""
    values.copy_(torch.randn(values.shape) * values.std())


CHANGED = {
    one_tensor: "model.layers.1.self_attn.o_proj.weight",
    one_row: "model.layers.0.self_attn.q_proj.weight",
    embedding_row: "model.embed_tokens.weight",
    head: "lm_head.weight",
}


def unchanged(base: Any) -> None:
    """The base that all have."""


@cache
def fingerprint(kind: str, change: Change = unchanged, source: Path | None = None) -> Fingerprint:
    """Of a base that is loaded in `kind`, from a directory or drawn; as the server receives it."""
    plain = kind in ("float32", "bfloat16", "float16")
    with TemporaryDirectory() as directory:
        path = str(source or directory)
        if source is None:
            base = tiny_llama()
            with torch.no_grad():
                torch.manual_seed(99)
                change(base)
            base.save_pretrained(path)
            tiny_tokenizer(eos_token="</s>", unk_token="<unk>").save_pretrained(path)
        given: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {}
        if kind in ("nf4", "fp4"):
            given = {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
        model: Any = load_base(ModelArguments(model_name_or_path=path, **given), task="causal_lm")
        loaded = model[0].to(getattr(torch, kind)) if plain else model[0]
    return sent(get_peft_model(loaded, lora()))


def sent(model: nn.Module) -> Fingerprint:
    return Fingerprint.from_json(read_base(model).to_json())


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_bases_agree_in_every_kind(kind: str, other: str) -> None:
    one, two = fingerprint(kind), fingerprint(other)
    assert disagreement(one, two) == ""
    assert (unseen(one, two) == "") == (kind == other)


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_what_is_drawn_anew_is_found_by_name_in_every_kind(change: Change, other: str) -> None:
    for kind in ("float32", "nf4"):
        where = disagreement(fingerprint(kind), fingerprint(other, change))
        assert where.startswith(f"`{CHANGED[change]}` has other values"), (kind, other)
        assert "more of" not in where
        if kind != other and change is one_row:
            assert "in row 5 (" in where or "in rows" in where


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_one_value_in_a_million_at_equal_dtype(kind: str) -> None:
    """Of 2 x 10^6, by the smallest step there is, whatever the values came from."""
    base = tiny_llama(hidden_size=256, intermediate_size=1024, vocab_size=64)
    base = base.to(torch.bfloat16).to(getattr(torch, kind))
    assert sum(p.numel() for p in base.parameters()) > 10**6
    model = get_peft_model(base, lora())
    before = sent(model)
    weight = base.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[700, 3] = torch.nextafter(weight[700, 3], torch.tensor(9.0, dtype=weight.dtype))
    where = disagreement(before, sent(model))
    assert where.startswith("`model.layers.1.mlp.up_proj.weight` has other values")


def test_one_value_of_a_quantized_base() -> None:
    """Codes and scales of one kind are compared bit by bit."""
    model = quantized_model()
    before = sent(model)
    codes = model.get_base_model().model.layers[0].mlp.up_proj.weight.data  # type: ignore
    codes[100] ^= 1
    assert "`model.layers.0.mlp.up_proj.weight` has other values" in disagreement(
        before, sent(model)
    )


def quantized_model() -> nn.Module:
    with TemporaryDirectory() as directory:
        tiny_llama().save_pretrained(directory)
        tiny_tokenizer(eos_token="</s>", unk_token="<unk>").save_pretrained(directory)
        base, _ = load_base(
            ModelArguments(model_name_or_path=directory, load_in_4bit=True), task="causal_lm"
        )
    return get_peft_model(base, lora())


def test_a_checkpoint_in_bf16_is_compared_bit_by_bit_in_all_dtypes_that_hold_it() -> None:
    """So one value is found between fp32 and bf16 too."""
    half = tiny_llama().to(torch.bfloat16)
    one = sent(get_peft_model(half, lora()))
    whole = tiny_llama().to(torch.bfloat16).float()
    two = sent(get_peft_model(whole, lora()))
    assert disagreement(one, two) == unseen(one, two) == ""
    assert two.tensors["lm_head.weight"].kind == "float32 of bfloat16"


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "int8"])
def test_the_tolerance_is_what_is_said(kind: str) -> None:
    """Noise of a tenth of the stated share of a tensor passes; three times as much is found."""
    one, name = fingerprint(kind), "model.layers.0.mlp.down_proj.weight"
    other = fingerprint("float32")
    share = float(unseen(one, other).split("by less than ")[1].split(" ")[0]) / 100
    assert {"bfloat16": 0.003, "nf4": 0.15, "int8": 0.005}[kind] < share
    assert share < {"bfloat16": 0.006, "nf4": 0.25, "int8": 0.02}[kind]
    for factor, seen in ((0.1, False), (3.0, True)):
        base = tiny_llama()
        with torch.no_grad():
            torch.manual_seed(7)
            weight = base.model.layers[0].mlp.down_proj.weight
            weight += torch.randn(weight.shape) * weight.std() * share * factor
        where = disagreement(one, sent(get_peft_model(base, lora())))
        assert (f"`{name}`" in where) == seen, where


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no pre-trained model at {STORIES}")
def test_weights_of_a_trained_model_agree() -> None:
    """Their sizes differ between rows and within them, unlike those of drawn ones."""
    for kind in KINDS[1:]:
        assert (
            disagreement(
                fingerprint("float32", unchanged, STORIES), fingerprint(kind, unchanged, STORIES)
            )
            == ""
        )


def test_names_are_those_of_the_base_however_the_adapter_is_attached() -> None:
    names = set(sent(get_peft_model(tiny_llama(), lora())).tensors)
    assert names == {name for name, _ in tiny_llama().named_parameters()}
    named = get_peft_model(tiny_llama(), lora(), adapter_name="ward")
    assert set(read_base(named, "ward").tensors) == names
    model = tiny_llama()
    model.add_adapter(lora())
    assert set(read_base(model).tensors) == names
    dora = get_peft_model(tiny_llama(), lora(use_dora=True, target_modules="all-linear"))
    assert set(sent(dora).tensors) == names


def test_tied_weights_count_once_under_one_name() -> None:
    tied = sent(get_peft_model(tiny_llama(tie_word_embeddings=True), lora()))
    assert "lm_head.weight" in tied.tensors
    assert "model.embed_tokens.weight" not in tied.tensors
    kept = lora(modules_to_save=["embed_tokens"])  # the head stays, and it is the original's weight
    assert (
        "lm_head.weight" in sent(get_peft_model(tiny_llama(tie_word_embeddings=True), kept)).tensors
    )


def test_what_travels_is_left_out() -> None:
    """Two sites may draw what is trained as they like: the first global replaces it."""
    for options in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 63]}):
        found = []
        for seed in (1, 2):
            base = tiny_llama()
            torch.manual_seed(seed)
            with torch.no_grad():
                base.model.embed_tokens.weight[63].normal_()
                if "modules_to_save" in options:
                    base.lm_head.weight.normal_()
            found.append(sent(get_peft_model(base, lora(**options))))
        where = disagreement(*found)
        assert ("embed_tokens" in where) == ("modules_to_save" in options)
        assert "lm_head" not in where


def test_a_model_trained_in_full_sends_all_it_has() -> None:
    assert sent(tiny_llama()) == Fingerprint(1, {})


def test_other_shapes_and_other_tensors_are_named() -> None:
    one = sent(get_peft_model(tiny_llama(), lora()))
    wider = sent(get_peft_model(tiny_llama(vocab_size=65), lora()))
    where = disagreement(one, wider)
    assert where.startswith("`lm_head.weight` has the shape [65, 32], not [64, 32] and")
    some = {name: t for name, t in one.tensors.items() if name != "model.norm.weight"}
    fewer = Fingerprint(one.block, some)
    assert disagreement(fewer, one) == "`model.norm.weight` is not in the run's base"
    assert disagreement(one, fewer) == "`model.norm.weight` is missing"
    gpt2 = get_peft_model(tiny_gpt2(), lora(target_modules=["c_attn"], fan_in_fan_out=True))
    assert disagreement(sent(gpt2), sent(gpt2)) == ""


def resized(seed: int, dtype: torch.dtype, *, mean: bool) -> Fingerprint:
    """A base with a row more, as a script adds it for a pad token."""
    base = tiny_llama()
    torch.manual_seed(seed)
    base.resize_token_embeddings(65, mean_resizing=mean)
    return sent(get_peft_model(base.to(dtype), lora()))


def test_an_added_embedding_row() -> None:
    """Drawn at each site; by transformers' own way so close to the mean that bf16 hides it."""
    one = resized(1, torch.float32, mean=False)
    assert disagreement(one, resized(1, torch.float32, mean=False)) == ""
    for dtype in (torch.float32, torch.bfloat16):
        where = disagreement(one, resized(2, dtype, mean=False))
        assert where.startswith("`lm_head.weight` has other values")
        assert "and 1 more of 21 tensors" in where
    near = resized(1, torch.float32, mean=True)
    assert "lm_head.weight" in disagreement(near, resized(2, torch.float32, mean=True))
    half = resized(2, torch.bfloat16, mean=True)
    assert disagreement(near, half) == ""
    assert "of a row by less than" in unseen(near, half)


def test_a_start_that_rewrites_the_base_is_compared_up_to_the_last_bits() -> None:
    """A decomposition has other last bits on another machine; other weights are found."""
    one = get_peft_model(tiny_llama(), lora(init_lora_weights="pissa"))
    two = get_peft_model(tiny_llama(), lora(init_lora_weights="pissa"))
    weight = two.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    with torch.no_grad():
        weight *= 1 + 1e-6
    assert disagreement(sent(one), sent(two)) == ""
    assert "2^" not in unseen(sent(one), sent(two))
    assert "without its first adapter" in unseen(sent(one), sent(two))
    with torch.no_grad():
        weight *= 1.1
    assert "q_proj.weight` has other values" in disagreement(sent(one), sent(two))


def test_offloaded_weights_are_read_and_meta_ones_are_said() -> None:
    from accelerate import cpu_offload

    model = get_peft_model(tiny_llama(), lora())
    before = sent(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.get_base_model().lm_head.parameters()).is_meta
    assert disagreement(before, sent(model)) == unseen(before, sent(model)) == ""
    bare = get_peft_model(tiny_llama(), lora())
    bare.get_base_model().lm_head.to("meta")
    assert disagreement(before, sent(bare)) == ""
    assert unseen(before, sent(bare)) == "1 tensors could not be read"


def test_quantization_is_not_part_of_the_bases_name() -> None:
    assert describe(quantized_model()).hash == describe(get_peft_model(tiny_llama(), lora())).hash


def test_a_7b_model_is_sent_in_less_than_100_kb() -> None:
    """291 tensors with the shapes of Llama-2-7B."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, 4096),
        "lm_head.weight": (32000, 4096),
        "model.norm.weight": (4096,),
    }
    for layer in range(32):
        path = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{path}self_attn.{name}_proj.weight"] = (4096, 4096)
        for name in ("gate", "up"):
            shapes[f"{path}mlp.{name}_proj.weight"] = (11008, 4096)
        shapes[f"{path}mlp.down_proj.weight"] = (4096, 11008)
        for name in ("input", "post_attention"):
            shapes[f"{path}{name}_layernorm.weight"] = (4096,)
    block = block_rows(shapes)
    drawn = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        blocks = -(-int(np.prod(shape[:-1])) // block)
        sketch = drawn.normal(size=(blocks, 9)).astype(np.float32)
        kind = "nf4/64 twice of bfloat16 on cuda"
        tensors[name] = BaseTensor(shape, kind, "0" * 32, 0.0937, sketch)
    text = Fingerprint(block, tensors).to_json()
    assert len(text) < 100_000
    assert Fingerprint.from_json(text).tensors.keys() == shapes.keys()


def broken() -> dict[str, dict[str, Any]]:
    """What a site may send instead, by what is wrong."""
    good = json.loads(fingerprint("float32").to_json())
    name = "lm_head.weight"
    shape, kind, sha, noise, scale = good["tensors"][name]

    def with_row(*row: Any) -> dict[str, Any]:
        return {**good, "tensors": {**good["tensors"], name: list(row)}}

    return {
        "another version": {**good, "version": 2},
        "a block of no rows": {**good, "block": 0},
        "half the sketches": {**good, "sketches": good["sketches"][:400]},
        "more sketches": {**good, "sketches": good["sketches"] + good["sketches"]},
        "not base64": {**good, "sketches": "?" + good["sketches"][1:]},
        "NaN": {**good, "sketches": "/////w==" * (len(good["sketches"]) // 8)},
        "a huge shape": with_row([2**41, 3], kind, sha, noise, scale),
        "a shape of text": with_row(["3"], kind, sha, noise, scale),
        "many dimensions": with_row([1] * 99, kind, sha, noise, scale),
        "a long name": with_row(shape, "x" * 2000, sha, noise, scale),
        "infinite noise": with_row(shape, kind, sha, float("inf"), scale),
        "a negative scale": with_row(shape, kind, sha, noise, -1.0),
        "no tensors": {**good, "tensors": None},
    }


@pytest.mark.parametrize("what", broken())
def test_what_is_no_fingerprint_is_refused(what: str) -> None:
    with pytest.raises(ManifestError, match="fingerprint of the base: expected"):
        Fingerprint.from_json(json.dumps(broken()[what]))
    for text in ("", "[]", "null", "[" * 10**5):
        with pytest.raises(ManifestError, match="fingerprint of the base: expected"):
            Fingerprint.from_json(text)
