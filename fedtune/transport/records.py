"""Parameters and plain values as Flower records.

fp32, fp16, fp64 and integers travel as Flower's own numpy arrays, so that stock strategies can
read them. bf16, which numpy lacks, travels as raw bytes:
`Array("bfloat16", shape, "fedtune.raw", data)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedtune.adapters import Entry
from fedtune.errors import ManifestError

__all__ = ["RAW_STYPE", "config_of", "count_bytes", "metrics_of", "params_of", "to_arrays"]

RAW_STYPE = "fedtune.raw"
ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"


def to_arrays(params: Mapping[str, Tensor]) -> ArrayRecord:
    """Encode CPU tensors of any shape; bf16 as raw bytes, everything else as numpy arrays."""
    return ArrayRecord({name: _to_array(tensor) for name, tensor in params.items()})


def params_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Decode every array; raises ManifestError that names an array which is not what it says."""
    return {name: _to_tensor(name, array) for name, array in record.items()}


def config_of(content: RecordDict) -> ConfigRecord:
    """The config record of a message; empty when there is none."""
    return content.config_records.get(CONFIG, ConfigRecord())


def metrics_of(content: RecordDict) -> MetricRecord:
    """The metrics record of a message; empty when there is none."""
    return content.metric_records.get(METRICS, MetricRecord())


def count_bytes(content: RecordDict) -> int:
    """Bytes of all records of a message: array payloads, names and scalars (8 bytes each)."""
    total = 0
    for arrays in content.array_records.values():
        total += sum(len(name) + len(array.data) for name, array in arrays.items())
    for metrics in content.metric_records.values():
        total += sum(len(name) + _scalar_bytes(value) for name, value in metrics.items())
    for config in content.config_records.values():
        total += sum(len(name) + _scalar_bytes(value) for name, value in config.items())
    return total


def _scalar_bytes(value: object) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list):
        return sum(_scalar_bytes(item) for item in value)
    return 8


def _to_array(tensor: Tensor) -> Array:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        data = tensor.view(torch.int16).numpy().tobytes()
        return Array("bfloat16", tuple(tensor.shape), RAW_STYPE, data)
    return Array(tensor.numpy())


def _to_tensor(name: str, array: Array) -> Tensor:
    announced = Entry(tuple(array.shape), array.dtype)
    try:
        tensor = _from_raw(array) if array.stype == RAW_STYPE else torch.from_numpy(array.numpy())
        if Entry.of(tensor) != announced:
            raise ValueError(f"they hold {Entry.of(tensor)}")
    except Exception as error:  # bytes from outside: numpy and torch raise a dozen kinds on them
        raise ManifestError(
            f"{name}: expected a tensor {announced}, received {len(array.data)} bytes that do not "
            f"decode ({' '.join(str(error).split())}); send it again."
        ) from None
    return tensor


def _from_raw(array: Array) -> Tensor:
    if array.dtype != "bfloat16":
        raise ValueError(f"unknown raw dtype {array.dtype!r}")
    flat = np.frombuffer(bytearray(array.data), dtype=np.int16)
    return torch.from_numpy(flat).view(torch.bfloat16).reshape(tuple(array.shape))
