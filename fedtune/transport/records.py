"""Parameters and plain values as Flower records.

fp32, fp16, fp64 and integers travel as Flower's own numpy arrays, so that stock strategies can
read them. bf16, which numpy lacks, travels as raw bytes:
`Array("bfloat16", shape, "fedtune.raw", data)`. Encoding copies the values once,
decoding once or not at all.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from fedtune.adapters import Entry
from fedtune.errors import ManifestError

__all__ = ["RAW_STYPE", "config_of", "count_bytes", "metrics_of", "params_of", "to_arrays"]

RAW_STYPE = "fedtune.raw"
NUMPY_STYPE = "numpy.ndarray"  # Flower's own: the bytes that np.save writes
ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"


def to_arrays(params: Mapping[str, Tensor]) -> ArrayRecord:
    """Encode CPU tensors of any shape; bf16 as raw bytes, everything else as numpy arrays."""
    return ArrayRecord({name: _to_array(tensor) for name, tensor in params.items()})


def params_of(record: ArrayRecord, *, shared: bool = False) -> dict[str, Tensor]:
    """Decode every array; raises ManifestError that names an array which is not what it says.

    Shared tensors lie in the record's own bytes: only for reading.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: _to_tensor(name, array, shared) for name, array in record.items()}


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
    values, header = tensor.numpy(), io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(values))
    data = b"".join([header.getvalue(), values.reshape(-1).view(np.uint8).data])
    return Array(str(values.dtype), tuple(values.shape), NUMPY_STYPE, data)


def _to_tensor(name: str, array: Array, shared: bool) -> Tensor:
    announced = Entry(tuple(array.shape), array.dtype)
    try:
        data = array.data if shared else bytearray(array.data)
        tensor = (_from_raw if array.stype == RAW_STYPE else _from_npy)(array, data)
        if Entry.of(tensor) != announced:
            raise ValueError(f"they hold {Entry.of(tensor)}")
    except Exception as error:  # bytes from outside: numpy and torch raise a dozen kinds on them
        raise ManifestError(
            f"{name}: expected a tensor {announced}, received {len(array.data)} bytes that do not "
            f"decode ({' '.join(str(error).split())}); send it again."
        ) from None
    return tensor


def _from_npy(array: Array, data: bytes | bytearray) -> Tensor:
    if array.stype != NUMPY_STYPE:
        raise ValueError(f"unknown serialization type {array.stype!r}")
    file = io.BytesIO(array.data)
    if (version := npy.read_magic(file)) != (1, 0):
        raise ValueError(f"unknown npy version {version}")
    shape, fortran, dtype = npy.read_array_header_1_0(file)
    flat = _view(data, dtype, math.prod(shape), file.tell())
    return torch.from_numpy(flat.reshape(shape, order="F" if fortran else "C"))


def _from_raw(array: Array, data: bytes | bytearray) -> Tensor:
    if array.dtype != "bfloat16":
        raise ValueError(f"unknown raw dtype {array.dtype!r}")
    flat = _view(data, np.dtype(np.int16), len(data) // 2, 0)
    if flat.nbytes != len(data):
        raise ValueError("half a value at the end")
    return torch.from_numpy(flat).view(torch.bfloat16).reshape(tuple(array.shape))


def _view(data: bytes | bytearray, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
    """`count` values in the bytes themselves; a copy only where they are not aligned."""
    if count < 0:
        raise ValueError("a negative shape")
    if count == 0:  # which numpy refuses
        return np.empty(0, dtype)
    return np.require(np.frombuffer(data, dtype, count, offset), requirements=["A"])
