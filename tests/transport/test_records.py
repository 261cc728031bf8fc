"""Tensors as Flower records: the same bits on the other side, or an error that names the array."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.errors import ManifestError
from fedtune.transport.messages import RoundTask, pack
from fedtune.transport.records import RAW_STYPE, config_of, count_bytes, params_of, to_arrays

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": lambda t: t,
    "0-d": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
    "empty-matrix": lambda t: t[:, :0],
    "transposed": lambda t: t.T,
    "strided": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(5, -1),
}


def over_the_wire(record: ArrayRecord) -> ArrayRecord:
    """Each array rebuilt from the four fields that travel."""
    return ArrayRecord(
        {
            name: Array(array.dtype, tuple(array.shape), array.stype, bytes(array.data))
            for name, array in record.items()
        }
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(dtype: torch.dtype, shape: str) -> None:
    tensor = SHAPES[shape]((torch.arange(24).reshape(4, 6) * 37 - 300).to(dtype))
    record = over_the_wire(to_arrays({"x": tensor, "p": torch.nn.Parameter(torch.ones(2))}))
    decoded = params_of(record)["x"]
    assert decoded.dtype == tensor.dtype
    assert decoded.shape == tensor.shape
    assert torch.equal(decoded, tensor)
    decoded += decoded  # writable, and a copy: the record may be shared by all messages
    assert torch.equal(params_of(record)["x"], tensor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_compare_oddly_keep_their_bits(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.max, info.tiny, info.tiny / 2]
    tensor = torch.tensor(odd, dtype=torch.float64).to(dtype)
    (decoded,) = params_of(over_the_wire(to_arrays({"x": tensor}))).values()
    assert torch.equal(decoded.view(torch.uint8), tensor.view(torch.uint8))


def test_only_bf16_needs_a_format_of_our_own() -> None:
    """Stock strategies read the others through Flower's own numpy arrays."""
    record = to_arrays({str(dtype): torch.ones(2, dtype=dtype) for dtype in DTYPES})
    assert {name for name, array in record.items() if array.stype == RAW_STYPE} == {
        "torch.bfloat16"
    }
    assert np.array_equal(record["torch.float16"].numpy(), np.ones(2, np.float16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.bfloat16], ids=str)
def test_encoded_bytes_are_those_of_numpy(dtype: torch.dtype, shape: str) -> None:
    tensor = SHAPES[shape]((torch.arange(24).reshape(4, 6) * 37 - 300).to(dtype)).contiguous()
    ours, flowers = to_arrays({"x": tensor})["x"], Array(tensor.numpy())
    assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
    assert ours.data == flowers.data


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_tensors_lie_in_the_record(dtype: torch.dtype) -> None:
    record = to_arrays({"x": torch.ones(3, 5, dtype=dtype)})
    first, second = (params_of(record, shared=True)["x"] for _ in range(2))
    assert torch.equal(first, params_of(record)["x"])
    assert first.data_ptr() == second.data_ptr() != params_of(record)["x"].data_ptr()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_other_writers_leave_is_read(order: Literal["C", "F"], shared: bool) -> None:
    """Columns first, and values that are not aligned."""
    values = np.asarray(np.arange(6, dtype=np.float32).reshape(2, 3), order=order)
    data = npy(values)
    odd = data[:8] + (int.from_bytes(data[8:10], "little") + 1).to_bytes(2, "little")
    for payload in (data, odd + b" " + data[10:]):
        (tensor,) = params_of(
            ArrayRecord({"x": Array("float32", (2, 3), NUMPY, payload)}), shared=shared
        ).values()
        assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3))


def npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def header(text: str, data: bytes = bytes(16)) -> bytes:
    line = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + data


GOOD = npy(np.ones((2, 2), np.float32))
NUMPY = "numpy.ndarray"
HOSTILE: dict[str, tuple[str, tuple[int, ...], str, bytes]] = {
    "nothing": ("float32", (2, 2), NUMPY, b""),
    "truncated": ("float32", (2, 2), NUMPY, GOOD[:-3]),
    "half-a-header": ("float32", (2, 2), NUMPY, GOOD[:20]),
    "noise": ("float32", (2, 2), NUMPY, bytes(range(256))),
    "pickle": ("object", (1,), NUMPY, npy(np.array([{}], object), pickled=True)),
    "bare-pickle": ("float32", (1,), NUMPY, b"\x80\x04]\x94."),
    "zip": ("float32", (2, 2), NUMPY, npz(np.ones(2))),
    "torn-zip": ("float32", (2, 2), NUMPY, npz(np.ones(2))[:40]),
    "text": ("<U3", (1,), NUMPY, npy(np.array(["abc"]))),
    "structured": ("float32", (1,), NUMPY, npy(np.zeros(1, [("a", "f4"), ("b", "i4")]))),
    "complex-long": ("complex256", (1,), NUMPY, npy(np.zeros(1, np.clongdouble))),
    "big-endian": ("float32", (2,), NUMPY, npy(np.ones(2, ">f4"))),
    "datetime": ("datetime64", (1,), NUMPY, npy(np.zeros(1, "M8[s]"))),
    "huge-shape": (
        "float32",
        (2, 2),
        NUMPY,
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }"),
    ),
    "overflowing-shape": (
        "float32",
        (2, 2),
        NUMPY,
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }"),
    ),
    "negative-shape": (
        "float32",
        (2, 2),
        NUMPY,
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }"),
    ),
    "no-dict": ("float32", (2, 2), NUMPY, header("(" * 60)),
    "no-keys": ("float32", (2, 2), NUMPY, header("{}")),
    "unknown-stype": ("float32", (2, 2), "torch.pickle", GOOD),
    "raw-dtype": ("float8", (2,), RAW_STYPE, bytes(4)),
    "raw-short": ("bfloat16", (2, 2), RAW_STYPE, bytes(6)),
    "raw-long": ("bfloat16", (2, 2), RAW_STYPE, bytes(10)),
    "raw-odd": ("bfloat16", (2,), RAW_STYPE, bytes(5)),
    "raw-nothing": ("bfloat16", (2,), RAW_STYPE, b""),
    "raw-negative": ("bfloat16", (-1,), RAW_STYPE, bytes(4)),
    "raw-overflow": ("bfloat16", (2**40, 2**40), RAW_STYPE, bytes(4)),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_array_is_refused_by_name(name: str, shared: bool) -> None:
    record = ArrayRecord(
        {"good": Array("float32", (2, 2), NUMPY, GOOD), "q_proj": Array(*HOSTILE[name])}
    )
    with pytest.raises(ManifestError, match=r"^q_proj: expected .*, received \d+ bytes") as caught:
        params_of(record, shared=shared)
    assert "\n" not in str(caught.value)


def test_a_payload_that_says_something_else_than_its_envelope_is_refused() -> None:
    """The shape that was announced is the shape that is checked and folded."""
    for announced in [("float64", (2, 2)), ("float32", (4,))]:
        with pytest.raises(ManifestError, match="q_proj"):
            params_of(ArrayRecord({"q_proj": Array(*announced, NUMPY, GOOD)}))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_payload_crashes(data: st.DataObject) -> None:
    """Flip, cut and splice bytes of good payloads: a tensor or a ManifestError, nothing else."""
    payload = bytearray(data.draw(st.sampled_from([GOOD, npz(np.ones(2)), bytes(8)])))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "x"]))
    stype = data.draw(st.sampled_from([NUMPY, RAW_STYPE, "?"]))
    record = ArrayRecord({"x": Array(dtype, (2, 2), stype, bytes(payload))})
    try:
        (tensor,) = params_of(record).values()
    except ManifestError:
        return
    assert tensor.shape == (2, 2)


def test_messages_share_one_record() -> None:
    """Two hundred clients are sent one copy of the parameters, and reading them leaves it alone."""
    arrays = to_arrays({"x": torch.ones(3), "h": torch.ones(3, dtype=torch.bfloat16)})
    contents = [pack(arrays=arrays, config={"k": k}) for k in range(3)]
    assert all(content["arrays"] is arrays for content in contents)
    for content in contents:
        for tensor in params_of(content.array_records["arrays"]).values():
            tensor.zero_()
    assert all(float(tensor.sum()) == 3 for tensor in params_of(arrays).values())


def test_bytes_are_counted_by_hand() -> None:
    content = RecordDict(
        {
            "arrays": ArrayRecord({"ab": Array("bfloat16", (3,), RAW_STYPE, bytes(6))}),
            "metrics": MetricRecord({"loss": 1.5, "list": [1, 2]}),
            "config": ConfigRecord({"round": 1, "hash": "0123456789", "raw": b"xyz", "on": True}),
        }
    )
    arrays, metrics = 2 + 6, (4 + 8) + (4 + 16)
    assert count_bytes(content) == arrays + metrics + (5 + 8) + (4 + 10) + (3 + 3) + (2 + 8)
    assert count_bytes(RecordDict()) == 0


def test_a_task_survives_its_record() -> None:
    task = RoundTask("42", 2, 5, 1, "ab", 4, 0.0, True, 7, resume_round=1, keep_rounds=[1])
    assert RoundTask.of(pack(config=task.record())) == task
    empty = RoundTask("42", 1, 5, 1, "ab", 0, 0.5, False, 7)
    assert RoundTask.of(pack(config=empty.record())) == empty


def test_absent_records_read_as_empty() -> None:
    assert dict(config_of(RecordDict())) == {}
    assert list(pack()) == []
