"""A difference of bits is exact for every pattern, and small for neighbours."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune.errors import ManifestError
from fedtune.transport import decode, encode
from fedtune.transport.bits import bit_difference, bit_sum

INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
dtypes = pytest.mark.parametrize("dtype", INTEGERS, ids=str)


def bits(tensor):
    return tensor.view(INTEGERS[tensor.dtype])


@st.composite
def patterns(draw, dtype):
    """Two tensors of any bits at all: NaN, Inf, subnormal numbers, -0.0."""
    kind = {2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
    one, two = (draw(arrays.arrays(kind, shape)) for _ in range(2))
    return tuple(torch.from_numpy(np.array(x)).view(dtype) for x in (one, two))


@dtypes
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_pattern_comes_back(dtype, data):
    new, old = data.draw(patterns(dtype))
    before = bits(new).clone(), bits(old).clone()
    difference = bit_difference(new, old)
    again = bit_sum(old, difference)
    assert (again.dtype, again.shape) == (new.dtype, new.shape)
    assert torch.equal(bits(again), bits(new))
    assert torch.equal(bits(new), before[0])
    assert torch.equal(bits(old), before[1])
    assert torch.equal(difference, bit_difference(new, old))  # bit_sum left it as it was
    travelled = decode(encode(difference, "zstd"))
    assert torch.equal(bits(bit_sum(old, travelled)), bits(new))


@dtypes
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_difference_is_that_of_whole_numbers(dtype, data):
    """The slow definition, with Python's numbers: modulo 2^bits, then 0, -1, 1, -2, 2 ..."""
    new, old = data.draw(patterns(dtype))
    size = 2 ** (8 * dtype.itemsize)
    for n, o, d in zip(
        *(t.flatten().tolist() for t in (bits(new), bits(old), bit_difference(new, old))),
        strict=True,
    ):
        signed = (n - o + size // 2) % size - size // 2
        assert d % size == (2 * signed if signed >= 0 else -2 * signed - 1)


@dtypes
def test_neighbours_differ_by_one_or_two(dtype):
    old = torch.tensor([1.0, -1.0, 3e-5, 0.99999, 1 + 2**-7]).to(dtype)
    away = (bits(old) + 1).view(dtype)
    assert bit_difference(away, old).tolist() == [2] * 5
    assert bit_difference(old, away).tolist() == [1] * 5
    assert bit_difference(old, old).tolist() == [0] * 5


@dtypes
def test_views_and_special_values(dtype):
    old = torch.randn(6, 8).to(dtype)
    new = old.clone()
    new[0, 0], new[1, 1], new[2, 2], new[3, 3] = -0.0, math.nan, math.inf, -math.inf
    for cut in (lambda x: x.t(), lambda x: x[::2, 1::3], lambda x: x[1, 1]):
        again = bit_sum(cut(old), bit_difference(cut(new), cut(old)))
        assert torch.equal(bits(again), bits(cut(new)))
    parameter = torch.nn.Parameter(old)
    assert torch.equal(bits(bit_sum(parameter, bit_difference(new, parameter))), bits(new))


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (torch.zeros(3), torch.zeros(4), r"expected torch.float32 \(4,\), received .* \(3,\)"),
        (torch.zeros(3), torch.zeros(3).half(), "expected torch.float16"),
        (torch.zeros(3).int(), torch.zeros(3).int(), "expected floating values"),
        (torch.zeros(3).to(torch.float8_e4m3fn),) * 2 + ("expected floating values",),
    ],
)
def test_tensors_that_do_not_go_together_are_refused_by_name(new, old, expected):
    with pytest.raises(ManifestError, match=f"layer.weight: {expected}"):
        bit_difference(new, old, name="layer.weight")


@pytest.mark.parametrize(
    "difference",
    [torch.zeros(4, dtype=torch.int16), torch.zeros(3, dtype=torch.int32), torch.zeros(3)],
    ids=["shape", "width", "dtype"],
)
def test_a_difference_of_another_tensor_is_refused_by_name(difference):
    with pytest.raises(ManifestError, match="w: expected torch.int16"):
        bit_sum(torch.zeros(3, dtype=torch.bfloat16), difference, name="w")
