"""The contract of every kind: collect and load give the same client, export the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.adapters import (
    Manifest,
    check,
    collect,
    collect_static,
    describe,
    export_adapter,
    load,
    load_exported,
    load_init_adapter,
    load_static,
)
from fedtune.errors import ManifestError
from tests.adapters.conftest import Trained
from tests.adapters.variants import logits, train, train_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT, on tied embeddings


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reload(trained: Trained, directory: Path) -> nn.Module:
    """What a user does with the export: a clean base and `from_pretrained`."""
    if trained.variant.config is not None:
        return PeftModel.from_pretrained(trained.variant.base(trained.saved), directory)
    if "score.weight" in trained.params:
        return AutoModelForSequenceClassification.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def test_collect_gives_detached_sorted_copies(trained: Trained) -> None:
    assert list(trained.params) == sorted(trained.params)
    live = {p.data_ptr() for p in trained.model.parameters()}
    for name, tensor in {**trained.params, **trained.static}.items():
        assert ".default" not in name
        assert not tensor.requires_grad
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        assert tensor.data_ptr() not in live


def test_load_gives_the_same_client(trained: Trained) -> None:
    other = trained.other()
    load(other, trained.params, trained.manifest, static=trained.static)
    assert torch.equal(logits(other), logits(trained.model))
    assert torch.equal(train_loss(other), train_loss(trained.model))
    assert equal(collect(other), trained.params)
    assert equal(collect_static(other), trained.static)


def test_training_moves_every_tensor_that_travels(trained: Trained) -> None:
    # Otherwise the tests of this file would compare initial values.
    before = collect(trained.other(seed=1))
    same = [name for name in before if torch.equal(before[name], trained.params[name])]
    assert not same


def test_two_sites_agree(trained: Trained) -> None:
    other = describe(trained.other())
    assert other.hash == trained.manifest.hash
    assert other.entries == trained.manifest.entries
    assert other.static == trained.manifest.static
    assert other.export == trained.manifest.export


def test_describe_changes_nothing(trained: Trained) -> None:
    trained.model.train()
    state = torch.get_rng_state()
    describe(trained.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert trained.model.training
    assert equal(collect(trained.model), trained.params)


def test_manifest_round_trip(trained: Trained) -> None:
    again = Manifest.from_json(trained.manifest.to_json())
    assert again == trained.manifest
    assert again.hash == trained.manifest.hash


def test_load_keeps_the_optimizer_valid(trained: Trained) -> None:
    other = trained.other()
    before = [id(p) for p in other.parameters()]
    optimizer = train(other, steps=1)
    load(other, trained.params, trained.manifest, static=trained.static)
    assert [id(p) for p in other.parameters()] == before
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in other.parameters() if p.requires_grad}


def corrupt(params: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], str]:
    """Parameters with one fault in their last key, and the key."""
    params, name = dict(params), max(params)
    tensor = params[name]
    if kind == "missing":
        del params[name]
    elif kind == "extra":
        name = "zzz.weight"
        params[name] = tensor
    elif kind == "shape":
        params[name] = tensor[None]
    elif kind == "dtype":
        params[name] = tensor.double()
    else:
        params[name] = tensor.clone()
        params[name].view(-1)[0] = {"nan": float("nan"), "inf": float("inf")}[kind]
    return params, name


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "dtype", "nan", "inf"])
def test_bad_parameters_are_refused_by_name(trained: Trained, kind: str) -> None:
    params, name = corrupt(trained.params, kind)
    before = {n: t.clone() for n, t in trained.model.state_dict().items() if torch.is_tensor(t)}
    with pytest.raises(ManifestError, match=f"^`{name}`") as caught:
        load(trained.model, params, trained.manifest, static=trained.static)
    assert "\n" not in str(caught.value)
    after = trained.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_bad_static_is_refused_before_anything_is_loaded(trained: Trained) -> None:
    other = trained.other()
    before, static = collect(other), {**trained.static, "zzz.weight": torch.zeros(1)}
    with pytest.raises(ManifestError, match="^`zzz.weight`"):
        load(other, trained.params, trained.manifest, static=static)
    assert equal(collect(other), before)


def test_load_static_alone(trained: Trained) -> None:
    other = trained.other()
    before = collect(other)
    load_static(other, trained.static, trained.manifest)
    assert equal(collect_static(other), trained.static)
    assert equal(collect(other), before)


def test_export_is_an_ordinary_checkpoint(trained: Trained, tmp_path: Path) -> None:
    export_adapter(tmp_path / "adapter", trained.params, trained.static, trained.manifest)
    got, want = logits(reload(trained, tmp_path / "adapter")), logits(trained.model)
    if trained.variant.atol:
        torch.testing.assert_close(got, want, rtol=0, atol=trained.variant.atol)
    else:
        assert torch.equal(got, want)


def test_export_can_be_continued(trained: Trained, tmp_path: Path) -> None:
    export_adapter(tmp_path / "adapter", trained.params, trained.static, trained.manifest)
    params, static, manifest = load_exported(tmp_path / "adapter")
    assert equal(params, trained.params)
    assert equal(static, trained.static)
    assert manifest == trained.manifest
    other = trained.other()
    load(other, *load_init_adapter(tmp_path / "adapter", describe(other))[:1], manifest)
    assert equal(collect(other), trained.params)


def test_plain_peft_checkpoint_can_be_continued(trained: Trained, tmp_path: Path) -> None:
    if trained.variant.config is None:
        pytest.skip("a full model has no PEFT checkpoint")
    trained.model.save_pretrained(tmp_path)
    if not trained.variant.continues:
        with pytest.raises(ManifestError, match="^`prompt_embeddings`: expected the encoder"):
            load_init_adapter(tmp_path, trained.manifest)
        return
    params, static = load_init_adapter(tmp_path, trained.manifest)
    check(params, trained.manifest)
    assert equal(params, trained.params)
    assert equal(static, trained.static)


def test_export_equals_peft_save(trained: Trained, tmp_path: Path) -> None:
    """The same tensors under the same keys as PEFT writes, but for copies of the base."""
    if trained.variant.config is None:
        pytest.skip("a full model has no PEFT checkpoint")
    from safetensors.torch import load_file

    trained.model.eval()
    trained.model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    export_adapter(tmp_path / "ours", trained.params, trained.static, trained.manifest)
    peft = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == peft.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], peft[key], rtol=0, atol=trained.variant.atol)
