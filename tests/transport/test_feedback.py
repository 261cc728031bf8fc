"""What is sent and what is kept add up to what was asked to be sent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.transport import decode, feed_back
from tests.transport.codecs.cases import NAMES

ROUNDS = 10


@pytest.mark.parametrize("codec", NAMES)
@settings(max_examples=20, deadline=None)
@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(0, 2**32))
def test_sent_and_residual_are_the_sum_of_deltas(codec, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    residual, sent, total = None, 0.0, 0.0
    for _ in range(ROUNDS):
        delta = torch.randn(7, 30, generator=generator).to(dtype)
        payload, residual = feed_back(delta, residual, codec)
        assert decode(payload).dtype == dtype
        sent, total = sent + decode(payload).double(), total + delta.double()
    # A round adds and subtracts once in fp32 (fp64), on numbers below 8: 2 half units of 2^3.
    unit = torch.finfo(residual.dtype).eps / 2 * 8
    torch.testing.assert_close(sent + residual.double(), total, rtol=0, atol=2 * unit * ROUNDS)


@pytest.mark.parametrize("codec", ["int8", "nf4", "fp4"])
def test_the_error_of_a_sum_does_not_grow_with_rounds(codec):
    """With feedback the sum is off by one residual; without, by all errors, about sqrt(rounds)."""
    generator = torch.Generator().manual_seed(0)
    residual, fed, plain, total = None, 0.0, 0.0, 0.0
    for _ in range(100):
        delta = torch.randn(4096, generator=generator)
        payload, residual = feed_back(delta, residual, codec)
        fed, total = fed + decode(payload), total + delta
        plain = plain + decode(feed_back(delta, None, codec).payload)
    # Half of sqrt(100): a residual is as large as the error of one delta, or a little more.
    assert (plain - total).norm() > 5 * (fed - total).norm()


def test_a_constant_too_small_to_be_sent_arrives_in_the_end():
    delta = torch.full((64,), 0.001)
    delta[0] = 1.0
    residual, sent = None, torch.zeros(64)
    for _ in range(1000):
        payload, residual = feed_back(delta, residual, "nf4")
        sent += decode(payload)
    # All but one residual, below half of nf4's step at zero, 0.04 of a scale near 1.
    torch.testing.assert_close(sent[1:], torch.full((63,), 1.0), rtol=0, atol=0.08)


def test_arguments_stay_and_integers_have_no_residual():
    delta, residual = torch.randn(64), torch.randn(64)
    copies = delta.clone(), residual.clone()
    feed_back(delta, residual, "fp4")
    assert torch.equal(delta, copies[0])
    assert torch.equal(residual, copies[1])
    payload, nothing = feed_back(torch.arange(5), None, "nf4")
    assert nothing is None
    assert torch.equal(decode(payload), torch.arange(5))
