"""The mean of client updates: exact, whatever the order of arrival."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.strategies import RunningMean
from fedtune.strategies.mean import unrounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANTISSA_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}

weights = st.one_of(st.integers(1, 9), st.integers(1, 2**28))


def fold(updates: list[Tensor], by: list[int]) -> Tensor:
    mean = RunningMean()
    for update, weight in zip(updates, by, strict=True):
        mean.add({"x": update}, float(weight))
    result = mean.result()["x"]
    assert result.dtype == unrounded(updates[0].dtype)
    return result.to(updates[0].dtype)


def any_values(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Every finite number of the dtype, subnormal ones and zeros included."""
    width = 16 if dtype == torch.float16 else 32
    return st.floats(width=width, allow_nan=False, allow_infinity=False).filter(
        lambda value: math.isfinite(float(torch.tensor(value).to(dtype)))
    )


def magnitudes(low: float, high: float) -> st.SearchStrategy[float]:
    """Sizes within [low, high], both ends more often than the middle."""
    ends = [st.floats(low, 2 * low, width=32), st.floats(high / 2, high, width=32)]
    return st.one_of(*ends, st.floats(low, high, width=32))


@st.composite
def adapters(draw: st.DrawFn) -> tuple[list[Tensor], list[int], list[int]]:
    """3 to 6 clients, their weights and a permutation; magnitudes from 2^-20 to 2^20.

    A product has its last bit at 2^-43 or above and the sum stays below 2^51, so high and low part
    (106 bits) hold it exactly. Terms cancel: each value may be another's negative, at equal weight.
    """
    dtype = draw(st.sampled_from(DTYPES))
    clients, size = draw(st.integers(3, 6)), draw(st.integers(1, 4))
    half = dtype == torch.float16
    sizes = magnitudes(2.0**-14 if half else 2.0**-20, 2.0**15 if half else 2.0**20)
    pool = [0.0, *draw(st.lists(sizes, min_size=2, max_size=4))]
    values = st.sampled_from([sign * value for value in pool for sign in (1, -1)])
    row = st.lists(values, min_size=size, max_size=size)
    updates = draw(st.lists(row, min_size=clients, max_size=clients))
    heavy = draw(st.lists(weights, min_size=1, max_size=2))
    by = draw(st.lists(st.sampled_from(heavy), min_size=clients, max_size=clients))
    order = draw(st.permutations(range(clients)))
    return [torch.tensor(update).to(dtype) for update in updates], by, list(order)


@given(adapters())
@settings(max_examples=300, deadline=None)
def test_order_of_arrival_does_not_matter(
    case: tuple[list[Tensor], list[int], list[int]],
) -> None:
    updates, by, order = case
    straight = fold(updates, by)
    shuffled = fold([updates[k] for k in order], [by[k] for k in order])
    assert torch.equal(straight, shuffled)
    assert straight.dtype == updates[0].dtype


@given(adapters())
@settings(max_examples=300, deadline=None)
def test_result_is_the_exact_mean_rounded(
    case: tuple[list[Tensor], list[int], list[int]],
) -> None:
    """Against rational numbers. The result is rounded twice or thrice (fp64, fp32, half), so it may
    be off by half a unit in the last place and a 2^-23rd (half types) or 2^-28th part of that.
    """
    updates, by, _ = case
    result = fold(updates, by)
    bits = MANTISSA_BITS[result.dtype]
    smallest = Fraction(float(torch.finfo(result.dtype).smallest_normal))
    for i, got in enumerate(result.tolist()):
        rows = [Fraction(float(update[i])) for update in updates]
        exact = sum(w * y for w, y in zip(by, rows, strict=True)) / Fraction(sum(by))
        if abs(exact) < smallest:
            assert abs(Fraction(got) - exact) <= smallest / 2 ** (bits - 1)
            continue
        exponent = math.frexp(float(exact))[1]
        half_a_unit = Fraction(2) ** (exponent - bits - 1)
        slack = Fraction(1, 2**28) if bits == 24 else Fraction(1, 2 ** (23 - bits))
        assert abs(Fraction(got) - exact) <= half_a_unit * (1 + slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_one_client_is_reproduced(dtype: torch.dtype, data: st.DataObject) -> None:
    update = torch.tensor(data.draw(st.lists(any_values(dtype), min_size=1))).to(dtype)
    result = fold([update], [data.draw(weights)])
    assert torch.equal(result, update)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_equal_updates_give_that_update(dtype: torch.dtype, data: st.DataObject) -> None:
    update = torch.tensor(data.draw(st.lists(any_values(dtype), min_size=1))).to(dtype)
    by = data.draw(st.lists(weights, min_size=2, max_size=8))
    assert torch.equal(fold([update] * len(by), by), update)


def test_a_small_value_survives_large_ones_that_cancel() -> None:
    """A single fp64 sum would lose it: 2^20 * 2^28 + 2^-20 needs 69 bits."""
    big, small = torch.tensor([2.0**20]), torch.tensor([2.0**-20])
    updates, by = [big, small, -big], [2**28, 1, 2**28]
    exact = torch.tensor([2.0**-20 / (2**29 + 1)], dtype=torch.float64).float()
    assert torch.equal(fold(updates, by), exact)
    assert not torch.equal(
        sum(w * y.double() for w, y in zip(by, updates, strict=True)) / sum(by), exact.double()
    )


def test_the_sum_of_the_weights_is_exact() -> None:
    """2^53 + 1 + 1 loses both ones in fp64, and equal updates would not be their mean."""
    ones = {"x": torch.ones(1, dtype=torch.float64)}
    mean = RunningMean()
    for weight in (2.0**53, 1.0, 1.0):
        mean.add(ones, weight)
    assert torch.equal(mean.result()["x"], ones["x"])


def test_every_block_and_shape_is_folded() -> None:
    """Larger than a block of 32,768, not a multiple of it; 0-d, empty and non-contiguous."""
    updates = [
        {
            "large": torch.randn(3, 70_001, generator=torch.Generator().manual_seed(k)),
            "scalar": torch.tensor(1.0 + k),
            "empty": torch.empty(0, 4),
            "turned": torch.arange(6.0).reshape(2, 3).T + k,
        }
        for k in range(2)
    ]
    mean = RunningMean()
    for update in updates:
        mean.add(update, 1.0)
    for name, value in mean.result().items():
        # fp64 holds the sum of two fp32 numbers of like size; halving is exact
        expected = ((updates[0][name].double() + updates[1][name].double()) / 2).float()
        assert torch.equal(value, expected), name


def test_threads_do_not_change_a_bit() -> None:
    """70 blocks, enough for two threads; the last one is short."""
    updates = [torch.randn(2_280_001, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fold(updates, [3, 1, 7]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    # rounding to fp32 is 2^-24 of the value; 1e-12 is where the terms cancel and fp64 rounds
    expected = sum(w * y.double() for w, y in zip([3, 1, 7], updates, strict=True)) / 11
    assert torch.allclose(found[0].double(), expected, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize("other", [{"y": torch.ones(2)}, {"x": torch.ones(3)}, {}])
def test_another_layout_is_an_error(other: dict[str, Tensor]) -> None:
    mean = RunningMean()
    mean.add({"x": torch.ones(2)}, 1.0)
    with pytest.raises(ValueError, match="first update"):
        mean.add(other, 1.0)


def test_inputs_stay_as_they_are() -> None:
    update = {"x": torch.arange(4.0)}
    mean = RunningMean()
    mean.add(update, 3.0)
    mean.result()["x"].zero_()
    assert torch.equal(update["x"], torch.arange(4.0))
    assert torch.equal(mean.result()["x"], torch.arange(4.0))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_a_weight_that_is_not_positive_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        RunningMean().add({"x": torch.ones(1)}, weight)


def test_no_update_is_an_error() -> None:
    with pytest.raises(ValueError, match="no update"):
        RunningMean().result()
