"""What holds for every codec, and the error of each against its own definition."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ConfigError, ManifestError
from fedtune.transport import decode, encode
from fedtune.transport.codecs import CODECS
from fedtune.transport.codecs.base import CHUNK
from fedtune.transport.codecs.scales import MAX_EXCESS
from tests.transport.codecs.cases import (
    EVERY,
    FLOATS,
    LOSSY_BLOCKS,
    NAMES,
    block_maxima,
    relative_l2,
    spread,
)

CODEC_BYTE = 5
names = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
some = settings(max_examples=40, deadline=None)


def there_and_back(x, name):
    return decode(encode(x, name))


def widest_gap(codec):
    levels = sorted(codec.book)
    return max(b - a for a, b in zip(levels, levels[1:], strict=False))


def half_gap(name):
    """The bound of |x - x'| / max|x| over a block, as the module that codes it derives it."""
    if name == "int8":  # roundings of 2^-24 of max|x|: to fp32, of 1 / step, of x / step, of x'
        return 1 / 254 * (1 + 2**-14)
    return (widest_gap(CODECS[name]) / 2 + 2**-15) * (1 + MAX_EXCESS)


@names
@some
@given(st.sampled_from(FLOATS), st.lists(st.integers(0, 6), max_size=4), st.integers(0, 2**32))
def test_shape_and_dtype_stay_and_the_argument_too(name, dtype, shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = x.clone()
    y = there_and_back(x, name)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert torch.equal(x, before)
    assert math.isfinite(float(y.abs().sum()))


@pytest.mark.parametrize("name", LOSSY_BLOCKS)
@some
@given(spread())
def test_the_error_stays_below_the_bound_of_its_block_at_any_magnitude(name, x):
    y = there_and_back(x, name)
    # The dtype rounds x' once, by at most eps / 2 of it, or of fp16's smallest normal number.
    info = torch.finfo(x.dtype)
    rounding = info.eps / 2 * y.double().abs().clamp(min=info.tiny)
    bound = half_gap(name) * block_maxima(x, LOSSY_BLOCKS[name]) + rounding
    assert torch.all((x.double() - y.double()).abs() <= bound)


@names
@some
@given(spread())
def test_coding_again_changes_nothing(name, x):
    if name == "fp16":
        x = x.clamp(-6e4, 6e4)
    y = there_and_back(x, name)
    assert torch.equal(there_and_back(y, name), y)


def test_every_step_of_int8_is_found_again():
    """All 2^23 significands of a block's maximum m; 127 times its step need not be m."""
    m = torch.arange(2**23, 2**24).float()
    again = m / 127 * 127
    assert not torch.equal(again, m)
    assert torch.equal(again / 127, m / 127)


@names
@dtypes
@pytest.mark.parametrize("count", [0, 1, 64, 257, 20000])
def test_zero_stays_zero(name, dtype, count):
    x = torch.zeros(count, dtype=dtype)
    assert torch.equal(there_and_back(x, name), x)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nf4"])  # its book has 7 and 8 levels
@some
@given(spread())
def test_signs_are_alike(name, x):
    if name == "fp16":
        x = x.clamp(-6e4, 6e4)
    assert torch.equal(there_and_back(-x, name), -there_and_back(x, name))


def test_nothing_is_shared_between_threads():
    """torch makes its threads when it first shares work; they wait for each other, work or not."""
    done = subprocess.run([sys.executable, "-c", ONE_THREAD], capture_output=True, text=True)
    assert done.stdout == "all alike\n", done.stdout + done.stderr


ONE_THREAD = f"""
import os, torch
from fedtune.transport import decode, encode
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
encode(torch.zeros(3))
before = count()
for name in {NAMES}:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.empty(300001, dtype=dtype)
        x.view(torch.uint8).numpy()[:] = 1
        decode(encode(x, name))
        assert count() == before, (name, dtype)
torch.ones(300001)
assert count() > before, "torch shares nothing here: the test shows nothing"
print("all alike")
"""


@names
@pytest.mark.parametrize("count", [CHUNK, CHUNK + 1, 2 * CHUNK - 1])
@dtypes
def test_chunks_do_not_show(name, count, dtype):
    """A whole tensor decodes to what its parts decode to: groups of scales have the same ends."""
    x = torch.randn(count).to(dtype)
    whole = there_and_back(x, name)
    cut = 16384  # the values of a group of scales
    assert torch.equal(whole, torch.cat([there_and_back(part, name) for part in x.split(cut)]))


@names
def test_views_and_tensors_of_one_value(name):
    x = torch.randn(30, 50)
    assert encode(x.t(), name) == encode(x.t().contiguous(), name)
    assert encode(x[::2, 3:], name) == encode(x[::2, 3:].clone(), name)
    assert encode(x[0, ::2], name) == encode(x[0, ::2].clone(), name)
    assert encode(x[0, :1].expand(9), name) == encode(x[0, :1].repeat(9), name)
    scalar = torch.tensor(-1.5, requires_grad=True)
    # The largest of its block comes back as it was; under int8, after two roundings of 2^-24.
    rtol = 2**-23 if name == "int8" else 0
    torch.testing.assert_close(there_and_back(scalar, name), scalar.detach(), rtol=rtol, atol=0)
    assert not there_and_back(scalar, name).requires_grad


@names
@pytest.mark.parametrize(
    "x",
    [
        torch.arange(-5, 5, dtype=torch.int64).view(2, 5),
        torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        torch.tensor([-7], dtype=torch.int16),
        torch.tensor(-3, dtype=torch.int8),
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.tensor([[True, False]]),
    ],
    ids=lambda x: str(x.dtype),
)
def test_integers_and_bools_go_as_they_are(name, x):
    payload = encode(x, name)
    assert payload[CODEC_BYTE] == EVERY["zstd" if name == "zstd" else "none"].number
    assert torch.equal(decode(payload), x)
    assert decode(payload).dtype == x.dtype


@pytest.mark.parametrize(("name", "wire"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_halves_are_what_torch_rounds_to(name, wire, dtype):
    x = torch.cat([torch.randn(1000) * 10.0**e for e in range(-9, 4)]).to(dtype)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    x = torch.cat([x, ties.to(dtype)])
    assert torch.equal(there_and_back(x, name), x.to(wire).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["none", "bf16", "fp16"])
def test_halves_travel_as_they_are(name, dtype):
    x = torch.cat([torch.randn(100).to(dtype), torch.tensor([torch.finfo(dtype).max]).to(dtype)])
    assert torch.equal(there_and_back(x, name), x)


@names
@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1234, -1])
def test_nan_and_inf_are_refused_by_name(name, dtype, bad, at):
    x = torch.randn(3000).to(dtype)
    x[at] = bad
    with pytest.raises(ManifestError, match="layer.lora_A: expected finite values"):
        encode(x, name, name="layer.lora_A")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "dtype", "fits", "too_large"),
    [
        ("fp16", torch.float32, 65519.0, 65520.0),
        ("fp16", torch.float64, 65519.0, 1e300),
        ("bf16", torch.float32, 3.3961e38, 3.3962e38),
        ("bf16", torch.float64, 3.3961e38, 1e300),
        *((name, torch.float64, 3.4028234e38, 3.41e38) for name in LOSSY_BLOCKS),
    ],
)
def test_what_would_become_inf_is_refused_not_clamped(name, dtype, fits, too_large, sign):
    x = torch.tensor([0.5, sign * fits], dtype=dtype)
    assert math.isfinite(float(there_and_back(x, name)[1]))
    x[1] = sign * too_large
    with pytest.raises(ManifestError, match=f"w: expected magnitudes below .* --codec {name}"):
        encode(x, name, name="w")


@pytest.mark.parametrize("name", LOSSY_BLOCKS)
@dtypes
def test_the_largest_number_of_a_dtype_does_not_become_inf(name, dtype):
    """A scale rounded up must not lead beyond the dtype."""
    largest = torch.finfo(dtype if dtype != torch.float64 else torch.float32).max
    x = torch.randn(640).to(dtype)
    x[::64] = largest * torch.linspace(0.5, 1, 10, dtype=torch.float64).to(dtype)
    x[1::64] = -x[::64]
    y = there_and_back(x, name)
    assert torch.all(torch.isfinite(y))
    # A scale is off by MAX_EXCESS at most.
    torch.testing.assert_close(y[::64], x[::64], rtol=MAX_EXCESS, atol=0)


@pytest.mark.parametrize("name", LOSSY_BLOCKS)
def test_blocks_below_the_floor_become_zero(name):
    x = torch.cat([torch.full((256,), 2.0**-111), torch.full((256,), 2.0**-110)])
    y = there_and_back(x, name)
    assert torch.equal(y[:256], torch.zeros(256))
    torch.testing.assert_close(y[256:], x[256:], rtol=2**-23, atol=0)  # int8: as above


@pytest.mark.parametrize(
    ("name", "bytes_each", "error"),
    [  # errors: an ideal scale gives .0917 and .1216; int8: rms of the maxima / 127 / sqrt(12)
        ("none", 4, 0),
        ("bf16", 2, 0.0017),
        ("fp16", 2, 0.00021),
        ("int8", 1.016, 0.0070),
        ("nf4", 0.516, 0.0925),
        ("fp4", 0.516, 0.1226),
    ],
)
def test_bytes_and_error_of_normal_values(name, bytes_each, error):
    x = torch.randn(2_000_000) * 1e-3
    payload = encode(x, name)
    assert len(payload) <= bytes_each * len(x) + 100
    assert relative_l2(x, decode(payload)) <= error


@pytest.mark.parametrize(("name", "share"), [("nf4", 0.131), ("fp4", 0.131), ("int8", 0.2555)])
def test_an_adapter_of_5_mb_with_all_headers(name, share):
    """r = 8 on 1024-wide layers: 152 tensors."""
    shapes = [(8, 1024), (1024, 8)] * 76
    tensors = [torch.randn(shape) for shape in shapes]
    raw = sum(t.nbytes for t in tensors)
    assert 4.9e6 < raw < 5.1e6
    assert sum(len(encode(t, name)) for t in tensors) <= share * raw


def test_an_unknown_codec_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown codec 'nf5'. Did you mean nf4?"):
        encode(torch.zeros(3), "nf5")


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3).to(torch.float8_e4m3fn),
        torch.zeros(3).to_sparse(),
    ],
    ids=["complex", "fp8", "sparse"],
)
def test_a_form_that_cannot_travel_is_refused_by_name(x):
    with pytest.raises(ManifestError, match="w: expected a dense tensor of float32"):
        encode(x, "int8", name="w")
