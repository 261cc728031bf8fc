"""Bundles: what was written is read, and no bytes from outside do more than be refused."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.adapters import Entry
from fedtune.errors import FrameError
from fedtune.transport.bundle import FIXED, MAGIC, MAX_INDEX_BYTES, Part, Slot, write_bundle
from fedtune.transport.bundle import read_bundle as read
from fedtune.transport.codecs import decode, encode
from fedtune.transport.differences import undo
from fedtune.transport.records import params_of, to_arrays

A, B, C = (
    Slot("arrays/a", Entry((2, 3), "float32")),
    Slot("arrays/b", Entry((5,), "float32")),
    Slot("control/ä", Entry((), "int64")),
)
PAYLOAD = encode(torch.arange(13.0))  # a in 0 to 5, b in 8 to 12
PARTS = [
    Part("value", 8, (A, B), PAYLOAD),
    Part("value", 1, (C,), encode(torch.tensor([7]))),
    Part("same", 1, (Slot("arrays/c", Entry((4, 0), "bfloat16")),), b""),
]
OLD = {"arrays/c": torch.empty(4, 0, dtype=torch.bfloat16)}
WHOLE = write_bundle(PARTS)


def bundle(index: Any, payloads: bytes = b"", *, text: bytes | None = None) -> bytes:
    """A bundle whose index says anything at all."""
    packed = zlib.compress(json.dumps(index).encode() if text is None else text)
    return FIXED.pack(MAGIC, 1, len(packed)) + packed + payloads


def row(**change: Any) -> list[Any]:
    """The index of one value in one tensor, `change` apart."""
    whole = {"kind": "value", "align": 1, "size": len(ONE), "slots": [["arrays/x", [1], "float32"]]}
    return [{**whole, **change}[key] for key in whole]


ONE = encode(torch.ones(1))


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """What Python and numpy hold at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


def plain(parts: list[Part]) -> list[Part]:
    return [part._replace(payload=bytes(part.payload)) for part in parts]


def test_what_was_written_is_read() -> None:
    assert plain(read(WHOLE)) == PARTS
    assert [part.payload for part in read(WHOLE)] == [part.payload for part in PARTS]


def test_a_payload_is_not_copied() -> None:
    part = read(WHOLE)[0]
    assert isinstance(part.payload, memoryview)
    assert part.payload.obj is WHOLE


def test_every_tensor_starts_at_a_multiple_of_align() -> None:
    (first, *_), tensors = PARTS, undo(WHOLE, OLD)
    assert list(first.places()) == [(A, 0), (B, 8)]
    flat = decode(PAYLOAD)
    assert torch.equal(tensors["arrays/a"], flat[:6].reshape(2, 3))
    assert torch.equal(tensors["arrays/b"], flat[8:])
    assert tensors["control/ä"] == 7
    assert tensors["arrays/c"].shape == (4, 0)


def test_nothing_is_a_bundle_too() -> None:
    assert read(write_bundle([])) == []
    assert undo(write_bundle([]), {}) == {}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=5),
            st.integers(1, 300),
            st.lists(st.lists(st.integers(0, 2**14), max_size=4), max_size=3),
            st.binary(max_size=20),
        ),
        max_size=4,
    )
)
def test_any_parts_come_back(rows: list[tuple[str, int, list[list[int]], bytes]]) -> None:
    parts, number = [], 0
    for kind, align, shapes, payload in rows:
        slots = []
        for shape in shapes:
            number += 1
            slots.append(Slot(f"n/{number}", Entry(tuple(shape), "float16")))
        parts.append(Part(kind, align, tuple(slots), payload))
    assert plain(read(write_bundle(parts))) == parts


def test_a_part_of_a_bundle_is_refused() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(FrameError, match="payload: expected "):
            read(WHOLE[:end])


def test_more_than_a_bundle_is_refused() -> None:
    for more in (b"\0", WHOLE):
        with pytest.raises(FrameError, match="too many"):
            read(WHOLE + more)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_changed_byte_is_noticed(flip: int) -> None:
    """Zlib and crc32 see it; a bit that zlib does not use changes nothing."""
    expected = undo(WHOLE, OLD)
    refused = 0
    for place in range(len(WHOLE)):
        changed = bytearray(WHOLE)
        changed[place] ^= flip
        try:
            found = undo(bytes(changed), OLD)
        except FrameError:
            refused += 1
            continue
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert refused >= len(WHOLE) - 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda data: WHOLE[:9] + data))
def test_alien_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        read(data)


def test_what_is_expected_is_said() -> None:
    with pytest.raises(FrameError, match=r"expected b'FTQB' at the start of a bundle"):
        read(b"FTQT" + WHOLE[4:])
    with pytest.raises(FrameError, match="expected bundle format 1, received 2"):
        read(WHOLE[:4] + b"\2" + WHOLE[5:])


ABSURD = {
    "nothing": None,
    "no list": 7,
    "a text": "value",
    "an object": {"value": 1},
    "a short row": [["value", 1]],
    "rows in rows": [[row()]],
    "a negative payload": [row(size=-1)],
    "half a byte": [row(size=0.5)],
    "a payload of a float": [row(size=float(len(ONE)))],
    "a payload of true": [row(size=True)],
    "a payload beyond the end": [row(size=2**70)],
    "no payload size": [row(size=None)],
    "align 0": [row(align=0)],
    "align -1": [row(align=-1)],
    "align 1.5": [row(align=1.5)],
    "align NaN": [row(align=float("nan"))],
    "align true": [row(align=True)],
    "align of a text": [row(align="1")],
    "align 2^70": [row(align=2**70)],
    "no slots": [row(slots=None)],
    "a slot of a text": [row(slots=["abc"])],
    "a slot of two": [row(slots=[["arrays/x", [1]]])],
    "a negative shape": [row(slots=[["arrays/x", [-1, -1], "float32"]])],
    "a shape of true": [row(slots=[["arrays/x", [True], "float32"]])],
    "a shape of a float": [row(slots=[["arrays/x", [1.0], "float32"]])],
    "a shape of a text": [row(slots=[["arrays/x", "1", "float32"]])],
    "a huge shape": [row(slots=[["arrays/x", [2**40], "float32"]])],
    "a huge empty shape": [row(slots=[["arrays/x", [2**70, 0], "float32"]])],
    "more dimensions than torch has": [row(slots=[["arrays/x", [1] * 65, "float32"]])],
    "a tensor twice in a part": [row(slots=[["arrays/x", [1], "float32"]] * 2)],
    "overlapping payloads": [row(), row(slots=[["arrays/y", [1], "float32"]])],
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_index_is_refused(name: str) -> None:
    with pytest.raises(FrameError), at_most(1):
        read(bundle(ABSURD[name], ONE))


def test_a_tensor_in_two_parts_is_refused() -> None:
    with pytest.raises(FrameError, match="twice"):
        read(bundle([row(), row()], ONE + ONE))


NO_TENSORS = {
    "large": [["arrays/x", [2**31, 2**31], "float32"]],
    "large, and empty": [["arrays/x", [2**32 - 1] * 63 + [0], "float32"]],
    "of another size": [["arrays/x", [2], "float32"]],
    "of another dtype": [["arrays/x", [1], "int64"]],
    "of no dtype": [["arrays/x", [1], "__class__"]],
    "none": [],
    "a second one": [["arrays/x", [1], "float32"], ["arrays/y", [0, 1], "bfloat16"]],
    "a second one that is not there": [
        ["arrays/x", [1], "float32"],
        ["arrays/y", [1], "float32"],
    ],
}


@pytest.mark.parametrize("kind", ["value", "delta", "bits", "same", "other", ""])
@pytest.mark.parametrize("name", NO_TENSORS)
@pytest.mark.parametrize("align", [1, 64, 2**32 - 1])
def test_tensors_that_are_not_in_the_payload_are_refused(kind: str, name: str, align: int) -> None:
    data = bundle([row(kind=kind, align=align, slots=NO_TENSORS[name])], ONE)
    with pytest.raises(FrameError), at_most(1):
        undo(data, {"arrays/x": torch.ones(1)})


M = 2**32 - 1


@pytest.mark.parametrize(
    "shape", [[0, M], [2**30, 2**29, 0], [M, M, 0], [*[M] * 63, 0], [2**32, 0]], ids=str
)
def test_no_values_of_a_huge_shape_are_no_tensor_or_an_empty_one(shape: list[int]) -> None:
    nothing = encode(torch.ones(0))
    data = bundle([row(size=len(nothing), slots=[["arrays/x", shape, "float32"]])], nothing)
    try:
        found = undo(data, {})
    except FrameError:
        assert len(shape) > 2 or max(shape) >= 2**32
    else:
        assert list(params_of(to_arrays(found))["arrays/x"].shape) == shape


def test_an_align_that_the_writer_did_not_have_is_refused() -> None:
    for align in (1, 2, 7, 9, 64):
        index = [["value", align, len(PAYLOAD), [[slot.name, *slot.entry] for slot in (A, B)]]]
        with pytest.raises(FrameError, match="values"):
            undo(bundle(index, PAYLOAD), {})


@pytest.mark.parametrize("text", [b"[" * 10**5, b"[" + b"1" * 10**5 + b"]", b"[nul", b"\xff\xfe"])
def test_an_index_that_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(FrameError):
        read(bundle(None, text=text))


def test_an_index_that_unpacks_to_a_gigabyte_is_not_unpacked() -> None:
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(b" " * 2**20) for _ in range(2**10)) + packer.flush()
    assert len(packed) < 2**21
    data = FIXED.pack(MAGIC, 1, len(packed)) + packed
    # The limit, and the same again while the last piece is put in its place.
    with pytest.raises(FrameError, match="too long"), at_most(2.5 * MAX_INDEX_BYTES / 1e6):
        read(data)


def test_an_index_expands_only_so_far() -> None:
    """A few kB of it must not become minutes of work."""
    text = json.dumps([["value", 1, 0, [["a", [0], "float32"]] * 200_000]]).encode()
    packed = zlib.compress(text, 9)
    assert len(text) > 300 * len(packed)
    with pytest.raises(FrameError, match="too long"):
        read(FIXED.pack(MAGIC, 1, len(packed)) + packed)


def test_names_that_compress_better_than_that_come_back() -> None:
    slots = tuple(Slot("x" * 5000 + str(number), Entry((0,), "float32")) for number in range(20))
    parts = [Part("same", 1, slots, b"")]
    assert plain(read(write_bundle(parts))) == plain(parts)


@pytest.mark.parametrize("kind", ["value", "bits"])
def test_a_payload_is_held_against_its_places_before_it_is_expanded(kind: str) -> None:
    """zstd makes 30 kB of 200 MB of zeros."""
    zeros = torch.zeros(50_000_000, dtype=torch.int32)
    part = Part(kind, 1, (Slot("a", Entry((4,), "float32")),), encode(zeros, "zstd"))
    assert len(part.payload) < 100_000
    with pytest.raises(FrameError), at_most(1.0):
        undo(write_bundle([part]), {"a": torch.zeros(4)})


def test_long_names_are_cut_in_errors() -> None:
    part = Part("same", 1, (Slot("x" * 10_000, Entry((4,), "float32")),), b"")
    with pytest.raises(FrameError) as caught:
        undo(write_bundle([part]), {})
    assert len(str(caught.value)) < 600


def test_a_padded_index_is_refused() -> None:
    packed = zlib.compress(b"[]") + b"\0"
    with pytest.raises(FrameError, match="padded"):
        read(FIXED.pack(MAGIC, 1, len(packed)) + packed)
