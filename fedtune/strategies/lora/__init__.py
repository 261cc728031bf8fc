"""How LoRA updates are combined: `LORA_RULES` names the rules, one file each.

The names are those of the papers. Each is a `Rule`; its properties say
what it is exact for and what it needs.
"""

from __future__ import annotations

from fedtune.strategies.base import Rule
from fedtune.strategies.lora.fedex_lora import FedExLoRA
from fedtune.strategies.lora.fedit import FedIT
from fedtune.strategies.lora.fedsa_lora import FedSALoRA
from fedtune.strategies.lora.ffa_lora import FFALoRA
from fedtune.strategies.lora.flexlora import FlexLoRA
from fedtune.strategies.lora.flora import FLoRA
from fedtune.strategies.lora.hetlora import HetLoRA
from fedtune.strategies.lora.raflora import RaFLoRA
from fedtune.strategies.lora.rolora import RoLoRA

__all__ = [
    "LORA_RULES",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedIT",
    "FedSALoRA",
    "FlexLoRA",
    "HetLoRA",
    "RaFLoRA",
    "RoLoRA",
]

LORA_RULES: dict[str, type[Rule]] = {
    "fedit": FedIT,
    "ffa_lora": FFALoRA,
    "rolora": RoLoRA,
    "fedsa_lora": FedSALoRA,
    "flora": FLoRA,
    "fedex_lora": FedExLoRA,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "raflora": RaFLoRA,
}
