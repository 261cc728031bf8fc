"""Differences: both sides make the same of them, and what a codec loses stays where it was lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fedtune.transport import differences
from fedtune.transport.bundle import read_bundle
from fedtune.transport.codecs import CODECS
from fedtune.transport.differences import SAME, Form, code, undo
from tests.transport.tensors import (
    DTYPES,
    FLOATS,
    LOSSY,
    NAMES,
    SHAPES,
    assert_bits,
    block_bound,
    forms_of,
    made,
)


@pytest.fixture(autouse=True)
def _large_from_1000_values_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "ALONE", 1000)


# --- both sides agree ---


@pytest.mark.parametrize("on", ["delta", "weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", NAMES)
def test_the_receiver_has_what_the_sender_thinks(codec: str, dtype: torch.dtype, on: str) -> None:
    """To the bit; with something to take a difference to, without, and with half of it."""
    tensors, old = made(dtype, 1), made(dtype, 2)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for known in (old, {}, {name: old[name] for name in list(old)[::2]}):
        coded = code(tensors, forms_of(tensors, known, codec, on=on), known)
        assert coded.received.keys() == tensors.keys()
        assert_bits(undo(coded.data, known), coded.received)
        assert coded.residual == {}
    assert_bits(tensors, copies)
    assert_bits(old, made(dtype, 2))


KINDS = st.sampled_from(["value", "delta", "same"])


@examples(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            KINDS,
            st.sampled_from(NAMES),
            st.sampled_from((torch.float32, torch.float64)),
            st.lists(st.integers(0, 40), max_size=3),
            st.integers(-40, 40),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_any_mixture_in_one_bundle(rows: list[Any], feeds_back: bool) -> None:
    """Kinds, codecs, dtypes, shapes and magnitudes, each tensor its own."""
    generator = torch.Generator().manual_seed(len(rows))
    old, tensors, forms = {}, {}, {}
    for number, (kind, codec, dtype, shape, exponent) in enumerate(rows):
        name = f"n{number}"
        scale = 2.0 ** min(exponent, 10)
        old[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
        new = old[name] + (torch.randn(shape, generator=generator) * scale).to(dtype)
        tensors[name] = old[name] if kind == SAME else new
        forms[name] = Form(kind) if kind == SAME else Form(kind, codec, fed_back=kind == "delta")
    coded = code(tensors, forms, old, residual={} if feeds_back else None)
    assert_bits(undo(coded.data, old), coded.received)
    fed_back = {name for name, form in forms.items() if form.fed_back}
    assert coded.residual.keys() == (fed_back if feeds_back else set())


def test_tensors_of_one_payload_do_not_keep_each_other_alive() -> None:
    tensors = made(torch.float32, 1)
    coded = code(tensors, forms_of(tensors, {}, "nf4"), {})
    for name, tensor in undo(coded.data, {}).items():
        assert tensor.untyped_storage().nbytes() <= max(4, 4 * tensor.numel()), name


def test_small_tensors_share_a_payload_and_large_ones_do_not() -> None:
    tensors, old = made(torch.float32, 1), made(torch.float32, 2)
    parts = read_bundle(code(tensors, forms_of(tensors, old, "int8"), old).data)
    together = [sorted(slot.name for slot in part.slots) for part in parts]
    as_they_are, small = (
        ["empty", "flat empty", "row", "scalar"],
        ["blocks", "one", "ragged", "small"],
    )
    assert sorted(together) == sorted([["large"], ["larger"], as_they_are, small])


# --- how exact it is ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codec", LOSSY)
def test_each_tensor_keeps_the_error_of_its_own_blocks(codec: str, dtype: torch.dtype) -> None:
    """Of all magnitudes side by side, with ragged ends: no scale reaches over a tensor's end."""
    exponents = range(-12, 9) if codec == "fp16" or dtype == torch.float16 else range(-60, 40, 7)
    generator = torch.Generator().manual_seed(0)
    old, tensors = {}, {}
    for number, exponent in enumerate(exponents):
        name, shape = f"{number:02d}", (5 + number % 3, 13)
        old[name] = (torch.randn(shape, generator=generator) * 2.0**exponent).to(dtype)
        step = torch.randn(shape, generator=generator) * 2.0**exponent / 8
        tensors[name] = (old[name] + step).to(dtype)
    coded = code(tensors, forms_of(tensors, old, codec), old)
    assert len(read_bundle(coded.data)) == 1
    # The difference is rounded to fp32 (fp64), the sum to it and to the dtype.
    unit = torch.finfo(dtype).eps if dtype != torch.float64 else 0
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, tensor in tensors.items():
        exact, found = tensor.double().reshape(-1), coded.received[name].double().reshape(-1)
        bound = block_bound(codec, tensor.double() - old[name].double())
        rounding = 2 * unit * torch.maximum(exact.abs(), old[name].double().reshape(-1).abs())
        assert ((found - exact).abs() <= bound + rounding + 2e-15 * exact.abs() + least).all(), name


@pytest.mark.parametrize("codec", LOSSY)
def test_a_whole_value_is_never_coarser_than_bf16(codec: str) -> None:
    tensors = made(torch.float32, 3)
    received = code(tensors, forms_of(tensors, {}, codec), {}).received
    for name, tensor in tensors.items():
        if len(SHAPES[name]) < 2:
            assert torch.equal(received[name], tensor)
        else:
            assert ((received[name] - tensor).abs() <= tensor.abs() * 2**-8).all()


def test_what_a_codec_rounds_up_stays_a_number_of_the_dtype() -> None:
    """0.88 of a scale becomes the scale: 60000 + 6000 would be Inf in fp16."""
    old = {"x": torch.tensor([[0.0, 6e4, -6e4]], dtype=torch.float16)}
    new = {"x": torch.tensor([[6e3, 65312, -65312]], dtype=torch.float16)}
    coded = code(new, forms_of(new, old, "nf4"), old)
    assert coded.received["x"].tolist() == [[6000.0, 65504.0, -65504.0]]
    assert_bits(undo(coded.data, old), coded.received)


def test_what_has_not_changed_costs_no_payload() -> None:
    old = made(torch.float32, 1)
    coded = code(old, dict.fromkeys(old, Form(SAME)), old)
    assert all(not part.payload for part in read_bundle(coded.data))
    assert len(coded.data) < 250  # names, shapes and dtypes of ten tensors
    assert_bits(undo(coded.data, old), old)


# --- what is fed back ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codec", LOSSY)
def test_what_was_received_and_what_is_left_are_all_that_was_sent(
    codec: str, dtype: torch.dtype
) -> None:
    """sum(x' - old) + residual = sum(x - old), over rounds in which some tensors rest."""
    residual, sums = {}, {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    received = {name: total.clone() for name, total in sums.items()}
    for number in range(8):
        old = made(dtype, number)
        moved = [name for k, name in enumerate(SHAPES) if number == 7 or (k + number) % 3]
        new = {name: (old[name] + made(dtype, 100 + number)[name] / 64).to(dtype) for name in moved}
        coded = code(new, forms_of(new, old, codec), old, residual=residual)
        residual = coded.residual
        for name in moved:
            sums[name] += new[name].double() - old[name].double()
            received[name] += coded.received[name].double() - old[name].double()
    # Values are below 128 + 2. A round rounds once to the dtype, and three times to fp32 (fp64).
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = 8 * 128 * (torch.finfo(dtype).eps + 3 * torch.finfo(wide).eps)
    for name, total in sums.items():
        found = received[name] + residual.get(name, torch.zeros(()))
        torch.testing.assert_close(found, total, rtol=0, atol=tolerance)
    lossless = torch.finfo(dtype).bits <= 8 * CODECS[codec].item_bytes
    many = {name for name, shape in SHAPES.items() if len(shape) > 1 and name != "flat empty"}
    assert residual.keys() == (set() if lossless else many)


@pytest.mark.parametrize("codec", ["nf4", "fp4"])
def test_without_feedback_the_sum_is_further_off(codec: str) -> None:
    """By all errors, about sqrt(rounds) of one; what is left over is one, or a little more."""
    old, found = {"x": torch.zeros(64, 64)}, {}
    for feeds_back in (True, False):
        generator = torch.Generator().manual_seed(0)
        total, sent, residual = torch.zeros(64, 64), torch.zeros(64, 64), {}
        for _ in range(25):
            new = {"x": torch.randn(64, 64, generator=generator)}
            kept = residual if feeds_back else None
            coded = code(new, forms_of(new, old, codec), old, residual=kept)
            total, sent, residual = total + new["x"], sent + coded.received["x"], coded.residual
        found[feeds_back] = float((total - sent).norm())
    assert found[False] > 2.5 * found[True]  # half of sqrt(25)


def test_what_is_left_of_another_tensor_stays() -> None:
    old, new = {"x": torch.zeros(2, 3)}, {"x": torch.full((2, 3), 0.3)}
    residual = {"y": torch.ones(2)}
    coded = code(new, forms_of(new, old, "nf4"), old, residual=residual)
    assert coded.residual.keys() == {"x", "y"}
    assert coded.residual["y"] is residual["y"]
    assert residual.keys() == {"y"}


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensors_as_narrow_as_the_codec_lose_nothing(codec: str, dtype: torch.dtype) -> None:
    """As differences of bits; of values that hardly moved these are few bytes."""
    old = made(dtype, 1)
    new = {name: (tensor * 1.01).to(dtype) for name, tensor in old.items()}
    forms = forms_of(new, old, codec)
    assert {form.kind for name, form in forms.items() if len(SHAPES[name]) > 1} >= {"bits"}
    coded = code(new, forms, old, residual={})
    assert_bits(coded.received, new)
    assert_bits(undo(coded.data, old), new)
    assert coded.residual == {}
