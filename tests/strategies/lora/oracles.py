"""The slow definitions: real PEFT layers with dense weights; and updates as if from training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.adapters import collect
from fedtune.adapters.names import receivers
from fedtune.strategies.lora.factors import Factors

Params = dict[str, Tensor]
TARGETS = ["emb", "lin", "conv"]


class Net(nn.Module):
    """One layer of each kind, none square: Embedding (11, 6), Linear 6 -> 8, Conv1D 8 -> 7."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 8)
        self.conv = Conv1D(7, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.lin(self.emb(tokens))))


def peft_net(rank: int = 3, alpha: float = 5, dtype: torch.dtype = torch.float64, **options):
    """The same base weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, **options)
        return get_peft_model(Net(), config).to(dtype)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def scaling(model: PeftModel) -> dict[str, float]:
    return {name: float(layer.scaling["default"]) for name, layer in lora_layers(model).items()}


def put(model: PeftModel, params: Mapping[str, Tensor]) -> None:
    live = receivers(model, "default")
    with torch.no_grad():
        for name, value in params.items():
            live[name].copy_(value)


def deltas(model: PeftModel, params: Mapping[str, Tensor]) -> Params:
    """What PEFT adds to each layer's weight, in the layout of that weight."""
    put(model, params)
    return {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in lora_layers(model).items()
    }


def add_to_base(model: PeftModel, base: Mapping[str, Factors]) -> None:
    """Fold base terms into the frozen weights; Embedding and Conv1D store theirs transposed."""
    layers = lora_layers(model)
    for name, (b, a) in base.items():
        weight = layers[name].get_base_layer().weight
        stored = layers[name].get_base_layer()
        turned = isinstance(stored, Conv1D | nn.Embedding)
        weight.data += ((b @ a).T if turned else b @ a).to(weight.dtype)


def base_weights(model: PeftModel) -> Params:
    return {
        name: layer.get_base_layer().weight.detach().double().clone()
        for name, layer in lora_layers(model).items()
    }


def trained(
    params: Mapping[str, Tensor], seed: int, moves: Callable[[str], bool] = lambda name: True
) -> Params:
    """`params` after a client's training: every tensor that moves is somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in sorted(params.items())
    }
    return {
        name: (value + 0.5 * noise[name]).to(value.dtype) if moves(name) else value.clone()
        for name, value in params.items()
    }


def clients(model: PeftModel, count: int = 3, **options) -> list[Params]:
    return [trained(collect(model), seed, **options) for seed in range(count)]


def relative(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the difference, over that of what is wanted."""
    assert got.keys() == want.keys()
    off = sum(float((got[name] - want[name]).square().sum()) for name in want)
    size = sum(float(value.square().sum()) for value in want.values())
    return (off / size) ** 0.5


def weighted(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Params:
    """sum_k p_k x_k, by the definition."""
    total = sum(weights)
    return {
        name: sum(w / total * part[name] for w, part in zip(weights, parts, strict=True))
        for name in parts[0]
    }


def pair(generator: torch.Generator, out_dim: int, in_dim: int, rank: int) -> Factors:
    return Factors(
        torch.randn(out_dim, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, in_dim, generator=generator, dtype=torch.float64),
    )
