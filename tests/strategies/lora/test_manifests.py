"""One adapter at other ranks: its manifest is what PEFT builds, its tensors what PEFT loads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fedtune.adapters import Manifest, collect, describe, export_adapter
from fedtune.strategies.lora.cumulative import Cumulative, accumulate
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.manifests import at_ranks, joined, like, ranks_of
from fedtune.strategies.lora.names import lora_modules
from tests.strategies.lora.oracles import add_to_base, put, trained

EXACT = 1e-15  # alpha = s r, and PEFT divides by r again: half an ulp each


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


class Net(nn.Module):
    """One layer of each kind, and two whose names end alike: `lin` and `inner.lin`."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.emb = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 8)
        self.inner = Inner()
        self.conv = Conv1D(7, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(self.inner(self.lin(self.emb(tokens))))


def net() -> Net:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net().double()


def build(config: LoraConfig) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return get_peft_model(net(), config).double()


def config(**options: Any) -> LoraConfig:
    given: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["emb", "lin", "conv"]}
    return LoraConfig(**{**given, **options})


def peft_config(manifest: Manifest) -> LoraConfig:
    """PEFT's own reading of the options in a manifest."""
    made = PeftConfig.from_peft_type(**manifest.adapter_config)
    assert isinstance(made, LoraConfig)
    return made


MODULES = ["emb", "lin", "inner.lin", "conv"]
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"conv": 7, "^lin": 0.3}},
    "ranks": {"rank_pattern": {"emb": 1, r"inner\.lin": 6}},
    "all of it": {
        "use_rslora": True,
        "alpha_pattern": {"conv": 7},
        "rank_pattern": {r"inner\.lin": 6},
    },
}
RANKS: dict[str, int | dict[str, int]] = {
    "lower": 2,
    "higher": 7,
    "by layer": dict(zip(MODULES, (4, 1, 4, 2), strict=True)),
    "ends alike": dict(zip(MODULES, (5, 2, 5, 5), strict=True)),
}


def named(ranks: int | Mapping[str, int]) -> int | dict[str, int]:
    if isinstance(ranks, int):
        return ranks
    return {f"base_model.model.{name}": rank for name, rank in ranks.items()}


def assert_same_adapter(found: Manifest, expected: Manifest) -> None:
    assert found.entries == expected.entries
    assert found.scaling == pytest.approx(expected.scaling, rel=EXACT, abs=0)
    assert found.hash == expected.hash
    assert found.objection_to(expected) == ""


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("options", CONFIGS)
def test_peft_builds_what_the_manifest_says(options: str, ranks: str) -> None:
    """Shapes of each tensor and scaling of each layer, which stays what it was."""
    before = describe(build(config(**CONFIGS[options])))
    wanted = named(RANKS[ranks])
    resized = at_ranks(before, wanted)
    built = describe(build(peft_config(resized)))
    assert_same_adapter(resized, built)
    assert built.scaling == pytest.approx(before.scaling, rel=EXACT, abs=0)
    assert ranks_of(built) == (
        dict.fromkeys(before.scaling, wanted) if isinstance(wanted, int) else wanted
    )


@pytest.mark.parametrize("options", CONFIGS)
def test_the_way_back(options: str) -> None:
    first = describe(build(config(**CONFIGS[options])))
    again = at_ranks(at_ranks(first, 9), ranks_of(first))
    assert_same_adapter(again, first)
    assert at_ranks(first, ranks_of(first)) is first


def test_what_a_site_builds_at_its_rank_and_alpha_is_accepted() -> None:
    """alpha = s r; another alpha is another adapter."""
    run = describe(build(config(r=6, lora_alpha=12)))
    fits = describe(build(config(r=2, lora_alpha=4)))
    assert like(run, fits).hash == fits.hash
    other = describe(build(config(r=2, lora_alpha=12)))
    message = like(run, other).objection_to(other)
    assert "expected lora_alpha 4, built 12; set lora_alpha so that lora_alpha / r" in message


def test_only_the_layers_of_the_run_are_resized() -> None:
    run = describe(build(config()))
    other = describe(build(config(r=2, target_modules=["conv"])))
    assert like(run, other) is run
    assert "target_modules" in like(run, other).objection_to(other)


def terms(seed: int, names: list[str]) -> Cumulative:
    """Two rounds' additions to some layers of `Net`, each of rank 2."""
    sizes = {"emb": (6, 11), "lin": (8, 6), "inner.lin": (8, 8), "conv": (7, 8)}
    generator = torch.Generator().manual_seed(seed)
    total = Cumulative()
    for _ in range(2):
        added = {
            f"base_model.model.{name}": Factors(
                torch.randn(sizes[name][0], 2, generator=generator, dtype=torch.float64),
                torch.randn(2, sizes[name][1], generator=generator, dtype=torch.float64),
            )
            for name in names
        }
        total = accumulate(total, added)
    return total


@pytest.mark.parametrize("names", [MODULES, ["lin"]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("options", CONFIGS)
def test_an_adapter_and_what_was_added_to_the_base_are_one_for_peft(
    options: str, names: list[str], tmp_path: Path
) -> None:
    """Logits of the loaded file: those of the adapter on a base with the terms in its weights."""
    tokens = torch.arange(11).reshape(1, -1)
    model = build(config(**CONFIGS[options]))
    params, base = trained(collect(model), 3), terms(4, names)
    whole, manifest = joined(params, describe(model), base)
    export_adapter(tmp_path / "adapter", whole, {}, manifest)
    loaded = PeftModel.from_pretrained(net(), tmp_path / "adapter", is_trainable=True).double()
    put(model, params)
    without = model(tokens)
    add_to_base(model, base.terms)
    expected = model(tokens)
    # fp64 but for recompression (1e-7 of each round's total, here of full rank) and sums.
    torch.testing.assert_close(loaded(tokens), expected, rtol=1e-6, atol=1e-6)
    assert float((without - expected).detach().norm() / expected.detach().norm()) > 0.1
    assert describe(loaded).scaling == pytest.approx(manifest.scaling, rel=EXACT, abs=0)


def test_nothing_added_leaves_the_adapter_alone() -> None:
    model = build(config())
    params, manifest = collect(model), describe(model)
    assert joined(params, manifest, Cumulative()) == (params, manifest)


def test_half_precision_is_joined_in_fp32() -> None:
    """Rounding the terms to bf16 would cost more than they add in a late round."""
    model = build(config()).to(torch.bfloat16)
    whole, manifest = joined(collect(model), describe(model), terms(4, ["lin"]))
    modules = lora_modules(whole).values()
    assert all(whole[m.a].dtype == whole[m.b].dtype for m in modules)
    assert {whole[m.a].dtype for m in modules} <= {torch.float32, torch.float64}
    assert all(entry.dtype in ("float32", "float64") for entry in manifest.entries.values())
    s = manifest.scaling
    assert all(math.isclose(value, 1.0) for value in s.values())
