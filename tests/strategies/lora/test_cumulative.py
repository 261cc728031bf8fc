"""The frozen cumulative adapter: its error bound, and a 4-bit base that is never written to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

import fedtune
from fedtune.adapters import collect, load_base
from fedtune.config import ModelArguments
from fedtune.strategies.lora.cumulative import Cumulative, accumulate, one_adapter
from fedtune.strategies.lora.factors import Factors
from tests.strategies.lora.oracles import pair, put, trained
from tests.tiny import tiny_llama, tiny_tokenizer, tokens

few = st.integers(1, 6)


def error_of(total: Cumulative, terms: list[Factors]) -> float:
    kept = total.terms["x"]
    whole = sum(term.B.double() @ term.A.double() for term in terms)
    return float(torch.linalg.matrix_norm(kept.B.double() @ kept.A.double() - whole))


@example(rounds=1, rank=3, max_rank=3, tolerance=0.0, seed=171)  # 17 ulps
@given(few, few, st.integers(1, 8), st.sampled_from([0.0, 1e-6, 1e-2, 0.5]), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_stays_within_its_bound(
    dtype: torch.dtype, rounds: int, rank: int, max_rank: int, tolerance: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [pair(generator, 9, 7, rank).to(dtype) for _ in range(rounds)]
    total = Cumulative()
    for term in terms:
        total = accumulate(total, {"x": term}, tolerance=tolerance, max_rank=max_rank)
        assert total.terms["x"].rank <= max_rank
        assert total.terms["x"].B.dtype == torch.float64
    assert error_of(total, terms) <= total.error["x"]


def test_the_bound_is_tight_where_nothing_is_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [pair(generator, 20, 30, 2).to(torch.float32) for _ in range(3)]
    total = Cumulative()
    for term in terms:
        total = accumulate(total, {"x": term}, tolerance=1e-9)
    assert total.terms["x"].rank == 6
    # Rounding to fp64 only, three times over sums of norm 40.
    assert error_of(total, terms) <= total.error["x"] <= 1e-11


def test_what_clients_hold_is_rounded_once() -> None:
    """After 50 rounds within the logged error, of which half is one rounding to fp32."""
    generator = torch.Generator().manual_seed(0)
    terms = [pair(generator, 20, 30, 2) for _ in range(50)]
    total = Cumulative()
    for term in terms:
        total = accumulate(total, {"x": term})
    for dtype, precise in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        sent = total.sent({"x.lora_B.weight": torch.zeros(20, 2, dtype=dtype)})
        assert {tensor.dtype for tensor in sent.values()} == {precise}
        held = Cumulative.of(sent, {})
        whole = sum(term.B @ term.A for term in terms)
        error = error_of(held, terms) / float(torch.linalg.matrix_norm(whole))
        assert error <= total.relative_error <= 1e-6


def test_a_late_round_is_not_lost_in_a_large_total() -> None:
    """What a millionth of the total asks for arrives as exactly as any other."""
    generator = torch.Generator().manual_seed(0)
    large, small = pair(generator, 20, 30, 2), pair(generator, 20, 30, 2)
    small = Factors(1e-6 * small.B, small.A)
    before = accumulate(Cumulative(), {"x": large})
    change = accumulate(before, {"x": small}).change_since(before)["x"]
    wanted = small.B @ small.A
    # 1e-16 of the total is 1e-10 of its millionth
    assert float((change.B @ change.A - wanted).norm() / wanted.norm()) <= 1e-8


def test_a_tolerance_is_spent_and_a_module_without_a_term_rests() -> None:
    generator = torch.Generator().manual_seed(0)
    large, small = pair(generator, 9, 7, 1), pair(generator, 9, 7, 3)
    first = accumulate(Cumulative(), {"x": large, "y": large})
    term = Factors(torch.cat([large.B, 1e-6 * small.B], 1), torch.cat([large.A, small.A]))
    second = accumulate(first, {"x": term}, tolerance=1e-3)
    assert second.terms["x"].rank == 1
    assert second.terms["y"] is first.terms["y"]
    assert first.terms["x"].rank == 1  # unchanged


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_ten_rounds_on_a_four_bit_base(name: str, tmp_path: Path) -> None:
    """Logits within 1e-3 of a base that is dequantized and written to, at a bounded rank."""
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer(pad_token="<unk>").save_pretrained(tmp_path)
    quantized, _ = load_base(
        ModelArguments(model_name_or_path=str(tmp_path), load_in_4bit=True), task="causal_lm"
    )
    model = attach(quantized, rank=2)
    params, scaling, total = collect(model), 2.0, Cumulative()
    written = {n: dequantized(layer) for n, layer in adapted(model).items()}
    for server_round in range(10):
        updates = [small_step(params, trained(params, 10 * server_round + k)) for k in range(3)]
        out = fedtune.aggregate(name, updates, [1, 2, 3], scaling=scaling)
        params = out.params
        total = accumulate(total, out.base, tolerance=1e-4, max_rank=24)
        written = {
            n: weight + out.base[n].B.double() @ out.base[n].A.double()
            for n, weight in written.items()
        }
    assert max(term.rank for term in total.terms.values()) <= 24
    before = base_of(model)
    for n, layer in adapted(model).items():
        b, a = params[f"{n}.lora_B.weight"].double(), params[f"{n}.lora_A.weight"].double()
        written[n] += scaling * b @ a
        assert float((written[n] - dequantized(layer)).norm()) > 0.1  # the rounds did something
    want = logits_of_written(quantized, model, written)
    joined = one_adapter(params, dict.fromkeys(adapted(model), scaling), total)
    ranks = {n: joined[f"{n}.lora_A.weight"].shape[0] for n in adapted(model)}
    torch.testing.assert_close(logits_of(tmp_path, joined, ranks), want, rtol=0, atol=1e-3)
    forgotten = one_adapter(params, dict.fromkeys(adapted(model), scaling), Cumulative())
    without = logits_of(tmp_path, forgotten, dict.fromkeys(adapted(model), 2))
    assert float((without - want).abs().max()) > 1e-2
    assert all(map(torch.equal, before, base_of(model)))


def attach(base, rank: int, **options):
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(base, config)


def adapted(model) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def dequantized(layer: LoraLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    return dequantize_4bit(weight.data, weight.quant_state).double()


def small_step(start: dict[str, Tensor], end: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: start[name] + 0.1 * (end[name] - start[name]) for name in start}


def base_of(model) -> list[Tensor]:
    return [layer.get_base_layer().weight.data.clone() for layer in adapted(model).values()]


def logits_of_written(quantized, model, written: dict[str, Tensor]) -> Tensor:
    """A plain model of the same config: dequantized weights, the adapted ones as written."""
    plain = tiny_llama()
    plain.load_state_dict(
        {
            key: value
            for key, value in quantized.state_dict().items()
            if key in plain.state_dict() and value.is_floating_point()
        },
        strict=False,
    )
    plain = plain.float()
    inner = dict(plain.named_modules())
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            key = name.replace(".base_layer", "")
            full = f"base_model.model.{key}"
            weight = module.weight
            value = written.get(full, dequantize_4bit(weight.data, weight.quant_state))
            inner[key].weight.data.copy_(value)
    with torch.no_grad():
        return plain.eval()(tokens()).logits


def logits_of(saved: Path, joined: dict[str, Tensor], ranks: dict[str, int]) -> Tensor:
    """The 4-bit base with one ordinary adapter of scaling 1."""
    base, _ = load_base(
        ModelArguments(model_name_or_path=str(saved), load_in_4bit=True), task="causal_lm"
    )
    pattern = {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()}
    model = attach(base, 1, rank_pattern=pattern, alpha_pattern=pattern)
    put(model, joined)
    with torch.no_grad():
        return model.eval()(tokens()).logits.float()
