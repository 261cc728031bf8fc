"""The factored algebra against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.strategies.lora.factors import (
    Factors,
    distances,
    inner,
    norm,
    rank_within,
    stack,
    svd,
    tail,
    truncate,
)
from tests.strategies.lora.oracles import pair

# fp64 QR and SVD of well scaled matrices: some tens of eps.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
few = st.integers(1, 9)


def dense(factors: Factors) -> torch.Tensor:
    return factors.B @ factors.A


@st.composite
def some_factors(draw: st.DrawFn) -> Factors:
    """Wide, tall, square, and ranks beyond both sides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return pair(generator, draw(few), draw(few), draw(few))


@given(some_factors())
@settings(max_examples=60, deadline=None)
def test_svd_is_that_of_the_dense_matrix(factors: Factors) -> None:
    spectrum = svd(factors)
    want = torch.linalg.svdvals(dense(factors))[: len(spectrum.S)]
    torch.testing.assert_close(spectrum.S, want, **EXACT)
    torch.testing.assert_close(dense(spectrum.balanced(len(spectrum.S))), dense(factors), **EXACT)


@given(some_factors(), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_truncation_error_is_the_tail_energy(factors: Factors, rank: int) -> None:
    cut, error = truncate(factors, rank)
    assert cut.rank <= rank
    actual = float(torch.linalg.matrix_norm(dense(cut) - dense(factors)))
    assert actual == pytest.approx(error, rel=1e-9, abs=1e-11)
    assert error == pytest.approx(tail(torch.linalg.svdvals(dense(factors)), rank), abs=1e-11)


def test_truncation_is_balanced() -> None:
    cut, _ = truncate(pair(torch.Generator().manual_seed(0), 9, 5, 4), 3)
    torch.testing.assert_close(cut.B.T @ cut.B, cut.A @ cut.A.T, **EXACT)


@given(some_factors(), st.integers(0, 2**20), few)
@settings(max_examples=60, deadline=None)
def test_inner_products_and_norms(left: Factors, seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    right = pair(generator, left.B.shape[0], left.A.shape[1], rank)
    assert inner(left, right) == pytest.approx(float((dense(left) * dense(right)).sum()), abs=1e-10)
    assert norm(left) == pytest.approx(float(torch.linalg.matrix_norm(dense(left))), abs=1e-11)
    length, off = distances(left, [right])
    assert length == pytest.approx(norm(left), abs=1e-11)
    want = float(torch.linalg.matrix_norm(dense(right) - dense(left)))
    assert off == pytest.approx(want, abs=1e-10)


def test_small_distances_are_not_rounding_noise() -> None:
    """A Gram sum would say 1e-8 at best: the square of the difference drowns in the squares."""
    one = pair(torch.Generator().manual_seed(0), 9, 7, 4)
    other = Factors(one.B * (1 + 1e-12), one.A)
    length, off = distances(one, [other])
    assert off / length == pytest.approx(1e-12, rel=1e-2)


def test_stack_is_the_weighted_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [(0.5, pair(generator, 5, 4, 2)), (-2.0, pair(generator, 5, 4, 3))]
    whole = stack(terms)
    assert whole.rank == 5
    torch.testing.assert_close(dense(whole), sum(c * dense(f) for c, f in terms), **EXACT)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 3))
def test_rank_within_is_the_smallest_that_will_do(values: list[float], error: float) -> None:
    singular = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_within(singular, error)
    assert tail(singular, rank) <= error
    assert rank == 0 or tail(singular, rank - 1) > error
