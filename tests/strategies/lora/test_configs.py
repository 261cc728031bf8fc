"""PEFT's LoRA options: a rule is right for the layers they make, or refuses them by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import fedtune
from fedtune.adapters import collect, describe, load
from fedtune.errors import ConfigError
from fedtune.strategies import METHODS, Method
from fedtune.strategies.agreement import check_manifest
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.residuals import certifies
from tests.methods import named
from tests.tiny import tiny_llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
ON_PRODUCTS = {"fedex_lora", "flexlora", "flora", "hetlora", "raflora"}
ON_THE_BASE = {"fedex_lora", "flora"}
RIGHT = ["fedavg", "fedit", "ffa_lora", "rolora", "median"]


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SIZE, **heads, num_experts_per_tok=2))


def attached(**options: Any) -> nn.Module:
    base = mixtral() if "target_parameters" in options else tiny_llama()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(base, LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options}))


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# Options -> the rules that are wrong for them.
OPTIONS: list[tuple[dict[str, Any], set[str]]] = [
    (EXPERTS, ON_PRODUCTS),
    ({"alora_invocation_tokens": [9]}, ON_THE_BASE),
    ({"use_qalora": True, "qalora_group_size": 16}, ON_THE_BASE),
    ({"init_lora_weights": "pissa"}, ON_PRODUCTS),
    ({"init_lora_weights": "olora"}, ON_PRODUCTS),
    ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 32}}, set()),
    ({"trainable_token_indices": [3, 5]}, set()),
    ({"layer_replication": [(0, 2), (1, 2)]}, set()),
    ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, set()),
    ({"init_lora_weights": "gaussian"}, set()),
    ({"use_dora": True}, set(LORA_RULES) - {"fedit", "fedsa_lora"}),
]


def shown(value: Any) -> str:
    """An id that is the same in every process, whatever the order of a set."""
    return (" ".join(sorted(value)) if isinstance(value, set) else str(value))[:40]


@pytest.mark.parametrize(("options", "wrong"), OPTIONS, ids=shown)
def test_what_is_wrong_is_refused_by_name_before_anything_starts(
    options: dict[str, Any], wrong: set[str]
) -> None:
    manifest = describe(attached(**options))
    for name, method in ((name, named(name)) for name in METHODS):
        if name not in wrong:
            check_manifest(name, method.properties, manifest)
            continue
        with pytest.raises(ConfigError, match=f"^{name}: .*Use fedavg or fedit") as caught:
            check_manifest(name, method.properties, manifest)
        assert any(option in str(caught.value) for option in [*options, "dora"])
        assert "\n" not in str(caught.value)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def moved(first: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in first.items()}


@pytest.mark.parametrize(("options", "wrong"), OPTIONS[:-1], ids=shown)
def test_equal_clients_change_nothing_in_the_live_model(
    options: dict[str, Any], wrong: set[str]
) -> None:
    """Through PEFT's own layers: what is not refused gives the logits of the one update."""
    model = attached(**options)
    manifest, first, ids = describe(model), collect(model), tokens()
    update = moved(first, 1)
    load(model, update, manifest)
    want = logits(model, ids)
    for name in (*RIGHT, *sorted(ON_PRODUCTS - wrong)):
        out = fedtune.aggregate(name, [update] * 3, reference=first, scaling=manifest.scaling)
        terms = {
            f"{module}.base_{kind}": factor.float()
            for module, pair in out.base.items()
            for kind, factor in zip("BA", pair, strict=True)
        }
        load(model, out.params, manifest, base=terms)
        # An SVD of fp32 factors; flora's sum is a base term of another order of additions.
        torch.testing.assert_close(logits(model, ids), want, rtol=0, atol=1e-4)


def test_averages_act_only_from_the_invocation_tokens_on() -> None:
    model = attached(alora_invocation_tokens=[9])
    manifest, first = describe(model), collect(model)
    plain = torch.randint(10, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    before = logits(model, plain)
    called = torch.cat([plain[:, :6], torch.full((2, 1), 9), plain[:, 6:]], dim=1)
    unmoved = logits(model, called)
    for name in (*RIGHT[:2], "flexlora", "hetlora"):
        out = fedtune.aggregate(
            name, [moved(first, 1), moved(first, 2)], reference=first, scaling=manifest.scaling
        )
        load(model, out.params, manifest)
        assert torch.equal(logits(model, plain), before)
        assert not torch.allclose(logits(model, called), unmoved, atol=1e-3)


def test_no_residual_of_products_that_no_layer_computes() -> None:
    assert not certifies(Method(), describe(attached(**EXPERTS)), 2)
    assert certifies(Method(), describe(attached()), 2)
