"""Prompt learning: compute the prompt that PEFT's checkpoint holds, without a base model.

P-tuning: p = MLP(E) or MLP(LSTM(E)). Prefix tuning with projection: p = W2 tanh(W1 E).
Prompt tuning and plain prefix tuning: p = E. All in the dtype of the parameters, on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedtune.adapters.manifest import Manifest
from fedtune.errors import ManifestError

__all__ = ["PROMPT_KEY", "is_prompt", "prompt_embeddings", "prompt_params"]

PROMPT_KEY = "prompt_embeddings"  # PEFT's key, the same for every prompt method
PREFIX = "prompt_encoder."
EMBEDDING = PREFIX + "embedding.weight"


def is_prompt(manifest: Manifest) -> bool:
    """Whether PEFT's checkpoint holds a computed prompt."""
    return any(name.startswith(PREFIX) for name in manifest.entries)


def prompt_embeddings(params: dict[str, Tensor], manifest: Manifest) -> Tensor:
    """The prompt of canonical `params`, shape (virtual tokens, width), as PEFT would save it."""
    if not _has_encoder(manifest):
        return params[EMBEDDING].clone()
    state = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in params.items()
        if name.startswith(PREFIX)
    }
    encoder = _encoder(manifest)
    encoder.load_state_dict(state, assign=True)
    tokens = torch.arange(len(state["embedding.weight"]))[None]
    with torch.no_grad():
        prompt: Tensor = encoder.eval()(tokens)[0]
    return prompt.contiguous()


def prompt_params(prompt: Tensor, manifest: Manifest) -> dict[str, Tensor]:
    """Inverse of `prompt_embeddings` where the prompt is what is trained.

    Raises:
        ManifestError: an encoder computes the prompt and cannot be recovered from it.
    """
    if _has_encoder(manifest):
        raise ManifestError(
            f"`{PROMPT_KEY}`: expected the encoder that {manifest.peft_type} trains, received only "
            "the prompt it computed. Continue from a directory with fedtune_params.safetensors."
        )
    return {EMBEDDING: prompt}


def _has_encoder(manifest: Manifest) -> bool:
    return any(name.startswith(PREFIX) and name != EMBEDDING for name in manifest.entries)


def _encoder(manifest: Manifest) -> nn.Module:
    """PEFT's own module, without values: on the meta device no random number is drawn."""
    from peft import PeftConfig, PrefixEncoder, PromptEncoder

    settings = {**manifest.adapter_config, "inference_mode": False}
    config = PeftConfig.from_peft_type(**settings)  # type: ignore[no-untyped-call]
    kind = PromptEncoder if manifest.peft_type == "P_TUNING" else PrefixEncoder
    with torch.device("meta"):
        encoder: nn.Module = kind(config)
    return encoder
