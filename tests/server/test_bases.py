"""Which base weights a run has, and who does not have them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from fedtune.adapters.base_weights import read_base
from fedtune.adapters.fingerprint import Fingerprint
from fedtune.server.bases import Bases
from tests.adapters.variants import lora
from tests.tiny import tiny_llama


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> Fingerprint:
    return read_base(get_peft_model(tiny_llama(seed).to(dtype), lora()))


def touched(dtype: torch.dtype) -> Fingerprint:
    """One value is another one, by less than can be seen from another dtype."""
    model = tiny_llama().to(dtype)
    with torch.no_grad():
        model.lm_head.weight[3, 3] *= 1.01
    return read_base(get_peft_model(model, lora()))


def test_most_sites_decide_and_the_first_by_name_among_as_many() -> None:
    most = Bases()
    most.choose({"a": base(1), "b": base(), "c": base(dtype=torch.bfloat16)})
    assert most.objection(base()) == ""
    assert most.objection(base(1)).startswith("base weights: expected those of b, received others")
    assert "`lm_head.weight`" in most.objection(base(1))
    assert "modules_to_save" in most.objection(base(1))
    as_many = Bases()
    as_many.choose({"b": base(), "a": base(1)})
    assert as_many.objection(base(1)) == ""
    assert "expected those of a" in as_many.objection(base())
    as_many.choose({"b": base(), "c": base()})  # it stays as it is
    assert as_many.objection(base(1)) == ""


def test_sites_of_one_dtype_are_held_against_each_other() -> None:
    """Although the run began with another one, from which the difference cannot be seen."""
    bases = Bases()
    bases.choose({"a": base()})
    half = base(dtype=torch.bfloat16)
    assert bases.objection(touched(torch.bfloat16)) == ""
    bases.accept("b", half)
    assert "expected those of b" in bases.objection(touched(torch.bfloat16))
    assert bases.objection(half) == ""


def test_what_cannot_be_known_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    bases = Bases()
    with caplog.at_level(logging.WARNING):
        bases.choose({"a": base()})
        for _ in range(2):
            bases.accept("a", base())
            bases.accept("b", base(dtype=torch.bfloat16))
            bases.accept("script", None)
    (seen, silent) = caplog.messages
    assert seen.startswith("b: base weights look equal; 16 tensors are of other kinds")
    assert "cannot be seen" in seen
    assert silent == "script: it does not say on which base weights it trains"


def test_a_resumed_run_keeps_its_base(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "bases.json"
    first = Bases(file)
    first.choose({"a": base()})
    first.accept("b", base(dtype=torch.bfloat16))
    again = Bases(file, resume=True)
    again.choose({"x": base(1), "y": base(1)})
    assert "expected those of a" in again.objection(base(1))
    assert "expected those of b" in again.objection(touched(torch.bfloat16))
    anew = Bases(file)
    anew.choose({"x": base(1)})
    assert anew.objection(base(1)) == ""


def test_without_a_fingerprint_nobody_is_refused() -> None:
    bases = Bases()
    bases.choose({"a": None, "b": None})
    assert bases.objection(None) == bases.objection(base()) == ""
    empty = Bases()
    empty.choose({"a": Fingerprint(1, {})})  # models that are trained in full
    assert empty.objection(Fingerprint(1, {})) == ""
    assert "is not in the run's base" in empty.objection(replace(base()))
