"""A payload that is not whole, or not one, is refused: no crash, no large allocation."""

import math
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FrameError
from fedtune.transport import decode, encode
from fedtune.transport.codecs import CODECS
from fedtune.transport.codecs.payload import DTYPES
from fedtune.transport.codecs.zstd import LEAST, ROWS
from tests.transport.codecs.cases import EVERY, FLOATS, NAMES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "wire-format.md"
VERSION, CODEC, DTYPE, DIMENSIONS = 4, 5, 6, 7

names = pytest.mark.parametrize("name", NAMES)
fuzz = settings(max_examples=150, deadline=None)


def sealed(body):
    """With a checksum that is right, so that what lies behind it is reached."""
    return bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))


def crafted(codec, dtype, shape, data=b""):
    head = struct.pack("<4s4B", b"FTQT", 1, codec, dtype, len(shape))
    return sealed(head + struct.pack(f"<{len(shape)}I", *shape) + data)


@st.composite
def payloads(draw):
    dtype = draw(st.sampled_from([*FLOATS, torch.int16, torch.bool]))
    shape = draw(st.lists(st.integers(0, 12), max_size=3))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return encode(x.to(dtype), draw(st.sampled_from(NAMES)))


@fuzz
@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda b: b"FTQT\x01" + b))
def test_other_bytes_are_refused(data):
    with pytest.raises(FrameError, match="payload: expected"):
        decode(data)


@fuzz
@given(payloads(), st.data())
def test_a_flipped_bit_a_cut_and_padding_are_refused(payload, data):
    at = data.draw(st.integers(0, 8 * len(payload) - 1))
    flipped = bytearray(payload)
    flipped[at // 8] ^= 1 << at % 8
    cut = payload[: at // 8]
    padded = payload + data.draw(st.binary(min_size=1, max_size=9))
    for broken in (bytes(flipped), cut, padded):
        with pytest.raises(FrameError, match="payload: expected"):
            decode(broken)


@fuzz
@given(payloads(), st.data())
def test_a_sealed_change_is_refused_or_decodes_to_finite_values(payload, data):
    """Whoever changes bytes may also mend the checksum."""
    body = bytearray(payload[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(5, len(body) - 1))] = data.draw(st.integers(0, 255))
    keep = data.draw(st.integers(5, len(body)))
    try:
        x = decode(sealed(body[:keep]))
    except FrameError:
        return
    assert torch.all(torch.isfinite(x.double()))
    # The tightest code is 4 bits, the widest number 64; a frame of zstd may say a plane of zeros.
    assert x.nbytes <= (ROWS / LEAST if body[CODEC] == EVERY["zstd"].number else 16) * len(payload)


@pytest.mark.parametrize("codec", range(7))
@pytest.mark.parametrize("shape", [(2**32 - 1,), (2**31, 2**31), (2**16,) * 3, (1000, 1000)])
def test_a_shape_that_the_bytes_do_not_hold_allocates_nothing(codec, shape):
    payload = crafted(codec, 0, shape, bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="payload: expected"):
            decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"", "at least 12 bytes, received 0"),
        (sealed(b"GGUF" + bytes(8)), "at the start"),
        (sealed(b"FTQT\x02" + bytes(8)), "format 1, received 2. Use the same fedtune"),
        (crafted(7, 0, (0,)), "codec 0 to 6, received 7. Use the same fedtune"),
        (crafted(0, 10, (0,)), "a dtype from 0 to 9, received 10"),
        (crafted(0, 0, (0,) * 65), "up to 64 dimensions"),
        (crafted(0, 0, (2**32 - 1, 2**32 - 1, 0)), "a shape below 2.63 values"),
        (crafted(3, DTYPES.index(torch.int32), (0,)), "torch.int32 under codec none"),
        (crafted(1, DTYPES.index(torch.bfloat16), (0,)), "torch.bfloat16 under codec none"),
        (crafted(0, DTYPES.index(torch.bool), (1,), b"\x02"), "0 or 1 as a bool"),
        (crafted(0, 0, (1,), struct.pack("<f", math.nan)), "finite values"),
        (crafted(2, 0, (1,), struct.pack("<H", 0x7C00)), "finite values"),
        (crafted(3, 0, (1,), struct.pack("<fb", math.inf, 1)), "finite steps"),
        (crafted(3, 0, (1,), struct.pack("<fb", -1, 1)), "finite steps"),
        (crafted(4, 2, (1,), struct.pack("<IBBB", 0x7F000000, 0, 0, 0)), "scales within"),
    ],
)
def test_a_refusal_says_what_is_wrong(payload, expected):
    with pytest.raises(FrameError, match=f"payload: expected .*{expected}"):
        decode(payload)


def test_steps_beyond_the_dtype_are_clamped():
    """int8: 127 times a rounded step may exceed the dtype's largest number, by 2^-23 of it."""
    for dtype, step in ((torch.float16, 516.5), (torch.float16, 3e38), (torch.float64, 3e38)):
        payload = crafted(3, DTYPES.index(dtype), (2,), struct.pack("<fbb", step, 127, -128))
        largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        assert decode(payload).tolist() == [largest, -largest]


@names
def test_any_buffer_will_do(name):
    x = torch.randn(3, 50)
    payload = encode(x, name)
    assert isinstance(payload, bytes)
    y = decode(payload)
    for buffer in (bytearray(payload), memoryview(payload), np.frombuffer(payload, np.uint8)):
        assert torch.equal(decode(buffer), y)
    y += 1  # its own memory
    assert not torch.equal(decode(payload), y)


def test_the_page_lists_the_numbers_of_codecs_and_dtypes():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE.read_text(), re.M)
    numbers = [(str(codec.number), name) for name, codec in EVERY.items()]
    numbers += [(str(i), str(dtype).removeprefix("torch.")) for i, dtype in enumerate(DTYPES)]
    assert rows == numbers


def test_the_example_of_the_page_is_what_the_code_writes():
    lines = re.findall(r"^\d+ +((?:[0-9a-f]{2} )+) +# (\w+)", PAGE.read_text(), re.M)
    examples = {}
    for digits, field in lines:
        if field == "magic":
            example = []
        example += bytes.fromhex(digits)
        if field == "crc32":
            examples[example[CODEC]] = bytes(example)
    x = torch.tensor([[1.0, -0.5, 0.25], [0.0, 3.0, -4.0]])
    assert examples == {CODECS[name].number: encode(x, name) for name in ("int8", "nf4")}
