"""Which form a tensor travels in, and which tensors and differences are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.errors import FrameError, ManifestError
from fedtune.transport.differences import SAME, Form, code, form_of, undo
from tests.transport.tensors import NAMES, forms_of, made, settings_of

F, H = torch.ones(4, 64), torch.ones(4, 64, dtype=torch.bfloat16)
VALUE, DELTA, BITS = Form("value"), Form("delta", "nf4", True), Form("bits", "zstd")
TABLE: dict[str, tuple[Tensor, Tensor | None, str, dict[str, Any], Form]] = {
    "a difference": (F, F, "nf4", {}, DELTA),
    "the first time": (F, None, "nf4", {}, Form("value", "bf16")),
    "the first time at 16 bits": (F, None, "fp16", {}, Form("value", "bf16")),
    "another shape": (F, F[:2], "int8", {}, Form("value", "bf16")),
    "another dtype": (F, H, "int8", {}, Form("value", "bf16")),
    "narrow, by a narrower codec": (H, H, "nf4", {}, DELTA),
    "as narrow as the codec": (H, H, "bf16", {}, BITS),
    "of the other 16 bits": (H, H, "fp16", {}, BITS),
    "as narrow, the first time": (H, None, "bf16", {}, Form("value", "bf16")),
    "weights": (F, F, "nf4", {"on": "weights"}, Form("value", "nf4")),
    "weights the first time": (F, None, "nf4", {"on": "weights"}, Form("value", "nf4")),
    "one dimension": (F[0], F[0], "nf4", {}, VALUE),
    "no dimension": (F[0, 0], F[0, 0], "nf4", {}, VALUE),
    "integers": (F.long(), F.long(), "nf4", {}, VALUE),
    "bools": (F.bool(), F.bool(), "nf4", {"on": "weights"}, VALUE),
    "too small": (F, F, "nf4", {"min_size": 257}, VALUE),
    "just large enough": (F, F, "nf4", {"min_size": 256}, DELTA),
    "included": (F, F, "nf4", {"include": ("a*", "n*")}, DELTA),
    "not included": (F, F, "nf4", {"include": ("a*",)}, VALUE),
    "excluded": (F, F, "nf4", {"exclude": ("a*", "*me")}, VALUE),
    "in and out": (F, F, "nf4", {"include": ("n*",), "exclude": ("n*",)}, VALUE),
    "not included weights": (F, F, "nf4", {"include": ("a*",), "on": "weights"}, VALUE),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_form_of_a_tensor(case: str) -> None:
    tensor, old, codec, given, expected = TABLE[case]
    assert form_of("name", tensor, old, codec, settings_of(codec, **given)) == expected


@pytest.mark.parametrize("on", ["delta", "weights"])
def test_what_is_a_difference_already_is_coded_as_it_is(on: str) -> None:
    settings = settings_of("fp4", on=on)
    for old in (None, F):
        form = form_of("name", F, old, "fp4", settings, is_difference=True)
        assert form == Form("value", "fp4", fed_back=True)
    assert form_of("name", F[0], None, "fp4", settings, is_difference=True) == VALUE


# --- what is refused ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("name", ["scalar", "row", "small", "large"])
def test_what_is_not_finite_is_refused_by_its_own_name(codec: str, bad: float, name: str) -> None:
    """Also when it lies in one payload with others."""
    tensors, old = made(torch.float32, 1), made(torch.float32, 2)
    tensors[name].view(-1)[-1] = bad
    for known in (old, {}):
        with pytest.raises(ManifestError, match=f"^{name}: expected finite"):
            code(tensors, forms_of(tensors, known, codec), known)
    with pytest.raises(ManifestError, match=f"^{name}: expected finite"):
        code(tensors, forms_of(tensors, old, codec), old, residual={})


def test_what_is_too_large_for_a_codec_is_refused_by_its_own_name() -> None:
    tensors, old = made(torch.float32, 1), made(torch.float32, 2)
    tensors["ragged"][-1, -1] = 7e4
    with pytest.raises(ManifestError, match=r"^ragged: .*below 65520 .*Use --codec bf16"):
        code(tensors, forms_of(tensors, old, "fp16"), old)
    whole = code(tensors, forms_of(tensors, {}, "fp16"), {})  # the first time it has bf16's range
    assert (whole.received["ragged"][-1, -1] - 7e4).abs() <= 7e4 * 2**-8


def test_what_feedback_makes_too_large_is_refused_by_its_own_name() -> None:
    old = {name: torch.zeros(2, 3) for name in "abc"}
    new = {**old, "b": torch.full((2, 3), 6e4)}
    residual = {"b": torch.full((2, 3), 6e3), "c": torch.ones(2, 3)}
    with pytest.raises(ManifestError, match="^b: "):
        code(new, forms_of(new, old, "fp16"), old, residual=residual)


@pytest.mark.parametrize("codec", ["nf4", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_difference_to_something_else_is_refused(codec: str, dtype: torch.dtype) -> None:
    """Deltas, differences of bits, and what has not changed."""
    old, new = {"x": F.to(dtype), "y": F.to(dtype)}, {"x": 2 * F.to(dtype), "y": F.to(dtype)}
    for forms in (forms_of(new, old, codec), dict.fromkeys(new, Form(SAME))):
        data = code(new if forms["x"].kind != SAME else old, forms, old).data
        for known in (
            {},
            {"x": old["x"]},
            {**old, "y": F.to(dtype)[:2]},
            {**old, "y": F.to(dtype).reshape(2, 128)},
            {**old, "y": F.half()},
            {**old, "y": F.long()},
        ):
            with pytest.raises(FrameError, match="expected a difference to [xy] "):
                undo(data, known)
