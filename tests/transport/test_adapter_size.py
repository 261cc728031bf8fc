"""Bytes of a whole adapter on the wire, headers included: 96 LoRA factors, 5.1 MB of fp32."""

from __future__ import annotations

import pytest
import torch
from flwr.app import RecordDict

from fedtune.transport.coded_records import as_record, wrap
from fedtune.transport.differences import code, form_of
from fedtune.transport.records import count_bytes
from fedtune.transport.settings import CodecSettings

NAME = "arrays/base_model.model.model.layers.{}.self_attn.{}.{}.weight"
SHAPES = {  # of a model with hidden size 1024 and grouped queries, r = 16
    ("q_proj", "lora_A"): (16, 1024),
    ("q_proj", "lora_B"): (1024, 16),
    ("v_proj", "lora_A"): (16, 1024),
    ("v_proj", "lora_B"): (256, 16),
}
LAYERS = 24


# 0.516 / 4 = 12.9 % and so on, and 0.2 % of fp32 for names, shapes, checksums and the record.
@pytest.mark.parametrize(
    ("codec", "share"), [("bf16", 0.502), ("int8", 0.256), ("nf4", 0.131), ("fp4", 0.131)]
)
def test_an_adapter_of_5_mb_takes_its_codes_and_little_else(codec: str, share: float) -> None:
    torch.manual_seed(0)
    old = {
        NAME.format(layer, *names): torch.randn(shape)
        for layer in range(LAYERS)
        for names, shape in SHAPES.items()
    }
    new = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in old.items()}
    settings = CodecSettings(codec)
    forms = {name: form_of(name, new[name], old[name], codec, settings) for name in new}
    coded = code(new, forms, old)
    facts = {**settings.record(), "version": "0" * 32, "old": "0" * 32}
    message = wrap(RecordDict(), as_record(coded.data), facts)
    fp32 = sum(4 * tensor.numel() for tensor in new.values())
    assert fp32 > 5e6
    assert count_bytes(message) <= share * fp32
