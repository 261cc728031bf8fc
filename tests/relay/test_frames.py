"""Frames: every record comes back to the bit, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import json
import math
import struct

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FrameError
from fedtune.relay.frames import Frame, decode, encode, request_key

NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
SCALARS = NUMBERS | st.text(max_size=8) | st.booleans()
NAMES = st.text(min_size=1, max_size=8)
ARRAYS = st.builds(
    Array,
    st.sampled_from(["float32", "bfloat16", "int4?"]),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", "fedtune.raw"]),
    st.binary(max_size=40),
)
RECORDS = (
    st.dictionaries(NAMES, ARRAYS, max_size=4).map(ArrayRecord)
    | st.dictionaries(NAMES, NUMBERS, max_size=4).map(MetricRecord)
    | st.dictionaries(NAMES, SCALARS | st.lists(st.text(max_size=4), max_size=3), max_size=4).map(
        ConfigRecord
    )
)
CONTENTS = st.dictionaries(NAMES, RECORDS, max_size=4).map(RecordDict)


def sample() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord(
                {
                    "numpy": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
                    "scalar": Array(np.array(3.5, dtype=np.float16)),
                    "empty": Array(np.zeros((0, 4), dtype=np.int64)),
                    "bf16": Array(
                        "bfloat16", (2, 2), "fedtune.raw", b"\x80\x3f\x00\x00\xff\xff\0\1"
                    ),
                }
            ),
            "static": ArrayRecord(),
            "metrics": MetricRecord({"loss": 0.1, "steps": 3, "many": [1.5, 2.5]}),
            "config": ConfigRecord({"run": "r", "round": 1, "carry": True, "names": ["ä", "\n"]}),
        }
    )


def same(left: RecordDict, right: RecordDict) -> bool:
    """Equal records with equal values in equal order; equal bits, for `repr` shows NaN and -0.0."""
    return plain(left) == plain(right)


def plain(content: RecordDict) -> dict[str, str]:
    return {
        name: repr((type(record), [(key, fields(value)) for key, value in record.items()]))
        for name, record in content.items()
    }


def fields(value: object) -> object:
    if isinstance(value, Array):
        return value.dtype, tuple(value.shape), value.stype, value.data
    return value


def test_round_trip() -> None:
    content = sample()
    frame = decode(encode("train", content))
    assert frame.kind == "train"
    assert frame.error is None
    assert same(frame.content, content)
    arrays = frame.content.array_records["arrays"]
    np.testing.assert_array_equal(arrays["numpy"].numpy(), [[0, 1, 2], [3, 4, 5]])
    assert arrays["scalar"].numpy().shape == ()
    assert arrays["empty"].numpy().shape == (0, 4)
    assert type(arrays["bf16"].data) is bytes


@settings(max_examples=200, deadline=None)
@given(kind=st.text(max_size=10), content=CONTENTS, error=st.none() | st.text(max_size=20))
def test_round_trip_of_anything(kind: str, content: RecordDict, error: str | None) -> None:
    frame = decode(encode(kind, content, error=error))
    assert (frame.kind, frame.error) == (kind, error)
    assert same(frame.content, content)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324])
def test_odd_metrics(value: float) -> None:
    frame = decode(encode("train", RecordDict({"metrics": MetricRecord({"loss": value})})))
    assert struct.pack("d", frame.content.metric_records["metrics"]["loss"]) == struct.pack(
        "d", value
    )


def test_refusal_without_content() -> None:
    assert decode(encode("train", error="no")) == Frame("train", RecordDict(), "no")


def test_bytes_in_a_config_are_refused() -> None:
    with pytest.raises(FrameError, match="numbers and text beside arrays"):
        encode("train", RecordDict({"config": ConfigRecord({"key": b"x"})}))


def test_every_cut_is_refused() -> None:
    frame = encode("train", sample())
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length])


@pytest.mark.parametrize("padding", [b"\0", b"more", b"{}" * 100])
def test_padding_is_refused(padding: bytes) -> None:
    with pytest.raises(FrameError, match="too many"):
        decode(encode("train", sample()) + padding)


@settings(max_examples=300, deadline=None)
@given(garbage=st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FrameError):
        decode(garbage)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_wrong_byte_is_refused_or_read_as_another_message(position: int, value: int) -> None:
    frame = bytearray(encode("train", sample()))
    frame[position % len(frame)] = value
    with contextlib.suppress(FrameError):
        decode(bytes(frame))


def header(**changes: object) -> bytes:
    fields = {
        "version": 1,
        "kind": "train",
        "error": None,
        "arrays": {},
        "metrics": {},
        "config": {},
        **changes,
    }
    text = json.dumps(fields).encode()
    return struct.pack(">I", len(text)) + text


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": "1"},
        {"kind": 3},
        {"kind": None},
        {"error": ["x"]},
        {"arrays": []},
        {"arrays": {"arrays": [["w", "float32", [1], "numpy.ndarray", -4]]}},
        {"arrays": {"arrays": [["w", "float32", [1], "numpy.ndarray", 4]]}},
        {"arrays": {"arrays": [["w", "float32", [1], "numpy.ndarray", 1e99]]}},
        {"arrays": {"arrays": [["w", "float32"]]}},
        {"metrics": {"metrics": {"loss": "low"}}},
        {"config": {"config": {"x": {"y": 1}}}},
        {"config": None},
    ],
    ids=str,
)
def test_headers_that_lie_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FrameError):
        decode(header(**changes))


def test_another_version_says_so() -> None:
    with pytest.raises(FrameError, match="expected version 1, received 2"):
        decode(header(version=2))


def request(**changes: object) -> RecordDict:
    config = {"run": "r", "round": 1, "manifest": "m", "attempt": 1, **changes}
    content = sample()
    content["config"] = ConfigRecord(config)  # type: ignore[arg-type]
    return content


def test_request_key_is_that_of_the_same_request() -> None:
    key = request_key("train", request())
    assert key == request_key("train", request(attempt=2))  # a retry trains nothing twice
    assert key == request_key("train", decode(encode("train", request())).content)
    backwards = RecordDict(dict(reversed(request().items())))
    assert key == request_key("train", backwards)


@pytest.mark.parametrize("change", [{"run": "s"}, {"round": 2}, {"manifest": "n"}], ids=str)
def test_request_key_tells_requests_apart(change: dict[str, object]) -> None:
    assert request_key("train", request()) != request_key("train", request(**change))


def test_request_key_tells_kinds_and_tensors_apart() -> None:
    keys = {request_key("train", request()), request_key("evaluate", request())}
    for data in (b"", b"\1", b"\1\2"):
        content = request()
        content["arrays"] = ArrayRecord({"w": Array("uint8", (len(data),), "fedtune.raw", data)})
        keys.add(request_key("train", content))
    assert len(keys) == 5


def test_request_key_sees_where_one_tensor_ends() -> None:
    def key(**arrays: bytes) -> str:
        rows = {name: Array("uint8", (1,), "fedtune.raw", data) for name, data in arrays.items()}
        return request_key("train", RecordDict({"arrays": ArrayRecord(rows)}))

    assert key(a=b"1", b=b"2") != key(a=b"1arrays/b2")
    assert key(a=b"1", b=b"") != key(a=b"", b=b"1")
