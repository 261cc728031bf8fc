"""Which tensors of an update are LoRA factors, by PEFT's names without the adapter's.

    model.q_proj.lora_A.weight, model.q_proj.lora_B.weight     Linear, Conv1D, Conv2d
    model.wte.lora_embedding_A, model.wte.lora_embedding_B     Embedding

An Embedding applies (B @ A)' and a Conv1D stores its weight transposed: that concerns who merges,
not the factors. PEFT starts the A of a Linear and the B of an Embedding at random, the other at 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["LoraModule", "is_lora_a", "is_lora_b", "lora_modules", "starts_random", "variants"]

LINEAR = ("lora_B.weight", "lora_A.weight")
EMBEDDING = ("lora_embedding_B", "lora_embedding_A")
KNOWN = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
MAGNITUDE = "lora_magnitude_vector"


class LoraModule(NamedTuple):
    """One adapted layer and the names of its two factors, whether or not both travel."""

    name: str
    b: str
    a: str

    @property
    def embedding(self) -> bool:
        """Whether PEFT starts B at random and A at zero."""
        return self.a.endswith(EMBEDDING[1])


def lora_modules(names: Iterable[str]) -> dict[str, LoraModule]:
    """Module -> its factors' names, sorted; one factor is enough to find a module."""
    found = {}
    for name in sorted(names):
        for kind in (LINEAR, EMBEDDING):
            for suffix in kind:
                if _ends(name, suffix):
                    prefix = name.removesuffix(suffix)
                    module = prefix.removesuffix(".")
                    found[module] = LoraModule(module, prefix + kind[0], prefix + kind[1])
    return found


def is_lora_a(name: str) -> bool:
    """Whether a tensor is the factor A, (r, in)."""
    return _ends(name, LINEAR[1]) or _ends(name, EMBEDDING[1])


def is_lora_b(name: str) -> bool:
    """Whether a tensor is the factor B, (out, r)."""
    return _ends(name, LINEAR[0]) or _ends(name, EMBEDDING[0])


def starts_random(name: str) -> bool:
    """Whether PEFT starts this factor at random, so that training the other one alone can work."""
    return _ends(name, LINEAR[1]) or _ends(name, EMBEDDING[0])


def variants(names: Iterable[str]) -> set[str]:
    """Kinds of PEFT tensors among the names: lora, dora, lora_bias, other.

    A part of LoRA that is not known here (KaSA's `lora_diag`) is its own kind. `other` means that
    there is no LoRA at all: prompts, IA3, a full model.
    """
    kinds = set()
    for name in names:
        for part in name.split("."):
            if part == MAGNITUDE:
                kinds.add("dora")
            elif part in KNOWN:
                kinds.add("lora_bias" if name.endswith(".bias") else "lora")
            elif part.startswith("lora_"):
                kinds.add(part)
    return kinds or {"other"}


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)
