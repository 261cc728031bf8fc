from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from fedtune.adapters import Manifest, Params, collect, collect_static, describe
from tests.adapters.variants import VARIANTS, Variant, train
from tests.tiny import tiny_llama, tiny_tokenizer


@dataclass(frozen=True)
class Trained:
    """A client after a few steps, and what it would send."""

    variant: Variant
    saved: Path
    model: nn.Module
    params: Params
    static: Params
    manifest: Manifest

    def other(self, seed: int = 2) -> nn.Module:
        """Another client: same base, other initial adapter."""
        return self.variant.build(self.saved, seed)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a saved tiny Llama and its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer(eos_token="</s>", unk_token="<unk>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def trained(request: pytest.FixtureRequest, saved: Path) -> Trained:
    model = request.param.build(saved, seed=1)
    train(model)
    return Trained(
        variant=request.param,
        saved=saved,
        model=model,
        params=collect(model),
        static=collect_static(model),
        manifest=describe(model),
    )
