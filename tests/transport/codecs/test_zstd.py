"""The lossless codec: nothing changes, little is added, and no frame makes more than it may."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FrameError
from fedtune.transport import decode, encode
from fedtune.transport.codecs.payload import DTYPES, Header, read_payload, write_payload
from fedtune.transport.codecs.zstd import LEAST, LENGTH, ROWS
from tests.transport.codecs.cases import EVERY

NUMBER = EVERY["zstd"].number


def payload_of(*frames, dtype=torch.uint8, count=100):
    data = b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)
    return write_payload(Header(NUMBER, dtype, (count,)), [np.frombuffer(data, np.uint8)])


def compressed(data, **settings):
    return zstandard.ZstdCompressor(**settings).compress(bytes(data))


def header(size, *, window=None, dictionary=b""):
    """Of a frame of RFC 8878, with a size of 8 bytes."""
    flags = 0xC0 | (0x20 if window is None else 0) | len(dictionary)
    place = b"" if window is None else bytes([(window - 10) << 3])
    return b"\x28\xb5\x2f\xfd" + bytes([flags]) + place + dictionary + struct.pack("<Q", size)


def repeated(size, byte=7):
    """The one block of a frame: `byte`, `size` times."""
    return struct.pack("<I", size << 3 | 1 << 1 | 1)[:3] + bytes([byte])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([d for d in DTYPES if not d.is_floating_point and d != torch.bool]),
    st.integers(0, 300) | st.sampled_from([ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5]),
    st.integers(0, 63),
    st.integers(0, 2**32),
)
def test_integers_of_any_width_come_back(dtype, count, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.iinfo(dtype).min >> bits, torch.iinfo(dtype).max >> bits)
    x = torch.randint(low, high + 1 if high < 2**62 else high, (count,), generator=generator)
    x = x.to(dtype)
    payload = encode(x, "zstd")
    assert torch.equal(decode(payload), x)
    # What cannot be compressed costs a length, a frame's header of 9 bytes and that of its block.
    assert len(payload) <= x.nbytes + (LEAST + 8) * dtype.itemsize * math.ceil(count / ROWS) + 16


def test_the_sign_of_zero_comes_back():
    x = torch.tensor([0.0, -0.0] * 500)
    assert torch.equal(decode(encode(x, "zstd")).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_small_integers_take_what_their_entropy_says(dtype):
    """Geometric, as differences of bits are; a Huffman code of bytes is within 5 % of it here."""
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.geometric(0.1, 4 * ROWS) - 1)
    _, counts = x.unique(return_counts=True)
    share = counts / len(x)
    entropy = float(-(share * share.log2()).sum()) / 8
    assert len(encode(x.to(dtype), "zstd")) <= 1.05 * entropy * len(x)


def test_zeros_take_the_least():
    """The bound that a reader relies on is no higher than what a writer can need."""
    count = 10 * ROWS
    payload = encode(torch.zeros(count, dtype=torch.int16), "zstd")
    assert 20 * LEAST <= len(read_payload(payload)[1]) <= 20 * (LEAST + 10)


def test_a_frame_made_by_hand_is_read():
    """So that the refusals below are for the reason they name."""
    x = torch.full((100,), 7, dtype=torch.uint8)
    assert torch.equal(decode(payload_of(header(100) + repeated(100))), x)
    assert torch.equal(decode(payload_of(header(100, window=10) + repeated(100))), x)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (payload_of(), "at least 14 bytes of frames, received 0"),
        (payload_of(compressed(range(100))[:-1]), "a whole frame"),
        (payload_of(compressed(range(100)) + b"x"), "a whole frame"),
        (payload_of(compressed(range(100)) + compressed(range(100))), "a whole frame"),
        (payload_of(compressed(range(100)), compressed(range(100))), "the end .* 1.. bytes more"),
        (payload_of(compressed(range(99))), "a frame of 100 values, received 99"),
        (payload_of(compressed(range(101))), "a frame of 100 values, received 101"),
        (payload_of(compressed(range(100), write_content_size=False)), "a frame of 100 values"),
        (payload_of(header(100) + repeated(99)), "a whole frame"),
        (payload_of(header(100) + repeated(101)), "a whole frame"),
        (payload_of(header(2**62) + repeated(100)), "a frame of 100 values"),
        (payload_of((header(100, window=27) + repeated(100))[:-1]), "too much memory"),
        (payload_of(header(100, dictionary=b"\x09") + repeated(100)), "a whole frame"),
        (payload_of(b"\x50\x2a\x4d\x18" + struct.pack("<I", 40) + bytes(40)), "100 values"),
        (payload_of(bytes(40)), "a whole frame"),
        (payload_of(compressed(range(100)), dtype=torch.int16), "at least 28|the length"),
        (payload_of(header(3) + repeated(3), dtype=torch.bool, count=3), "0 or 1 as a bool"),
        (
            payload_of(*[compressed(b) for b in (b"\0", b"\xfc")], dtype=torch.float16, count=1),
            "finite values",
        ),
    ],
)
def test_a_frame_that_is_not_what_the_header_says_is_refused(payload, expected):
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match=f"payload: expected .*({expected})"):
            decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [2**32 - 1, 2**31, 30])
def test_the_length_of_a_frame_beyond_the_payload_is_refused(length):
    data = LENGTH.pack(length) + compressed(bytes(100))
    payload = write_payload(Header(NUMBER, torch.uint8, (100,)), [np.frombuffer(data, np.uint8)])
    with pytest.raises(FrameError, match=f"a frame of {length} bytes, received {len(data) - 4}"):
        decode(payload)
