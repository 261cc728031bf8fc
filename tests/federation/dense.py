"""A dense oracle beside a federation: every adapted weight in fp64, from the updates alone.

    W <- W_0 + C + T,    T = sum p_k s B_k A_k,    C <- C + T - s B A

with (B, A) the adapter that the next round starts from. It knows of a rule only whether that is the
mean of what clients sent, or a fresh one (FLoRA), whose product is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.adapters import load_base
from fedtune.client.worker import Worker
from fedtune.config import ModelArguments
from fedtune.server.checkpoint import ServerState
from fedtune.strategies.aggregator import Aggregation, Contribution
from fedtune.strategies.lora.names import lora_modules
from tests.federation.small import small_rows, small_worker
from tests.tiny import tiny_gpt2, tiny_llama, tokens

Dense = dict[str, Tensor]
WRAPPER = "base_model.model."


def llama() -> nn.Module:
    return tiny_llama(1)


def gpt2() -> nn.Module:
    """In fp64; its head is no copy of its embedding."""
    return tiny_gpt2(1, tie_word_embeddings=False).double()


# All kinds of layers, none square but Llama's q; the patterns give 4 ranks and 4 scalings.
KINDS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "every layer, fp64": (gpt2, {"target_modules": ["wte", "c_attn", "lm_head"]}, 1e-6),
    "patterns, rsLoRA, fp32": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"v_proj": 5, "layers.0.mlp.down_proj": 3},
        },
        1e-5,
    ),
}


def lora_worker(
    directory: Path, kind: str, *, base: Callable[[], nn.Module] | None = None, **given: Any
) -> Worker:
    """Clients that never weigh the same: their two batches are of 1, of 2, or of 2 and 1 rows."""
    build, options, _ = KINDS[kind]

    def build_model(args: Any) -> tuple[nn.Module, None]:
        model = (base or build)()
        torch.manual_seed(args.training.seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
        return get_peft_model(model, config), None

    worker = small_worker(directory, clients=3, **{"warmup_steps": 0, **given})
    worker.build_model = build_model
    worker.train |= {f"client-{k}": small_rows(rows, seed=k) for k, rows in enumerate((1, 14, 3))}
    return worker


class Oracle:
    """A round hook; records the updates on their way into the fold."""

    def __init__(self, worker: Worker, patch: pytest.MonkeyPatch, *, fresh: bool = False) -> None:
        self._worker, self._fresh = worker, fresh
        self._updates: list[tuple[float, Dense]] = []
        self.base: Dense = {}
        self.factors: Dense = {}
        self.delta: Dense = {}
        self.asked: Dense = {}
        self.averaged: Dense = {}
        add = Aggregation.add

        def spy(aggregation: Aggregation, one: Contribution) -> None:
            add(aggregation, one)
            params = {name: value.double() for name, value in one.params.items()}
            self._updates.append((float(one.stats.num_tokens), params))

        patch.setattr(Aggregation, "add", spy)

    def __call__(self, state: ServerState, record: dict[str, Any]) -> None:
        """After a round."""
        whole = {n: t.double() for n, t in {**state.static, **state.params}.items()}
        if not state.round:
            self.factors = whole
            return
        updates, self._updates = self._updates, []
        assert len({weight for weight, _ in updates}) == len(updates)  # else weights are untested
        total = sum(weight for weight, _ in updates)
        mean = {
            name: sum((w / total * params[name] for w, params in updates), torch.zeros(()))
            for name in updates[0][1]
        }
        after = whole if self._fresh else {**self.factors, **mean}
        for name, module in lora_modules(self.factors).items():
            s = live_scaling(self._worker.model, name)
            terms = ((w / total, {**self.factors, **params}) for w, params in updates)
            products = [p * s * (own[module.b] @ own[module.a]) for p, own in terms]
            self.asked[name] = torch.stack(products).sum(0)
            averaged = {**self.factors, **mean}
            self.averaged[name] = s * averaged[module.b] @ averaged[module.a]
            base = self.base.get(name, torch.zeros(()))
            self.delta[name] = base + self.asked[name]
            self.base[name] = self.delta[name] - s * after[module.b] @ after[module.a]
        self.factors = after

    @property
    def lost_by_averaging(self) -> float:
        """Relative error of FedAvg in this round."""
        return distance(self.averaged, self.asked) / distance(self.asked)

    def logits(self, base: nn.Module) -> Tensor:
        """Of the base with the dense weights."""
        with torch.no_grad():
            for name, delta in self.delta.items():
                layer: Any = base.get_submodule(name.removeprefix(WRAPPER))
                turned = isinstance(layer, Conv1D | nn.Embedding)
                layer.weight += (delta.T if turned else delta).to(layer.weight.dtype)
        return logits(base)


def four_bit(saved: Path) -> nn.Module:
    """The saved base in nf4."""
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    base, _ = load_base(ModelArguments(model_name_or_path=str(saved), **given), task="causal_lm")
    return base


def dequantized(base: nn.Module) -> nn.Module:
    """A plain Llama with the weights that a 4-bit one computes with."""
    plain = llama()
    plain.load_state_dict(
        {
            name: value.float()
            for name, value in base.state_dict().items()
            if name in plain.state_dict() and value.is_floating_point()
        },
        strict=False,
    )
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            value = dequantize_4bit(weight.data, weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(value)
    return plain


def live_scaling(model: nn.Module, module: str) -> float:
    layer = model.get_submodule(module)
    assert isinstance(layer, LoraLayer)
    return float(layer.scaling["default"])


def exported(base: nn.Module, directory: Path) -> Tensor:
    """Logits of a fresh base with an adapter that plain PEFT loads."""
    return logits(PeftModel.from_pretrained(base, str(directory)))


def logits(model: nn.Module) -> Tensor:
    """Without dropout; the model's mode stays as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens(3, seed=5)).logits.double()
    model.train(training)
    return found


def distance(left: Dense, right: Dense | None = None) -> float:
    """Frobenius norm of the difference over all layers."""
    parts = (value if right is None else value - right[name] for name, value in left.items())
    return float(sum(float(part.square().sum()) for part in parts) ** 0.5)


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative error."""
    return float((found - wanted).norm() / wanted.norm())
