"""Server optimizers against their formulas, step by step, and against torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.strategies import Method, build_method
from fedtune.strategies.diloco import DiLoCo
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedavgm import FedAvgM
from fedtune.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from tests.strategies.one_round import State, one_fold, one_round

LR, B1, B2, TAU = 0.1, 0.9, 0.99, 1e-3
ADAPTIVE: list[FedAdam | FedYogi | FedAdagrad] = [
    FedAdam(lr=LR, beta1=B1, beta2=B2, tau=TAU),
    FedYogi(lr=LR, beta1=B1, beta2=B2, tau=TAU),
    FedAdagrad(lr=LR, beta1=0.0, tau=TAU),
]
SECOND: dict[str, Callable[[float, float], float]] = {
    "FedAdam": lambda v, d: B2 * v + (1 - B2) * d**2,
    "FedYogi": lambda v, d: v - (1 - B2) * d**2 * math.copysign(1, v - d**2),
    "FedAdagrad": lambda v, d: v + d**2,
}
# Above and below tau, of both signs.
DELTAS = [0.02, -0.5, 3e-4, -0.01, 0.2]


def follow(method: Method, deltas: list[float], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Global values when the clients' mean is off by a scripted delta in each round."""
    x, state, seen = torch.ones(1, dtype=dtype), State(), []
    for delta in deltas:
        params, state = one_round(method, {"x": x}, [{"x": x + delta}], state=state)
        x = params["x"]
        seen.append(x)
    return seen


@pytest.mark.parametrize("method", ADAPTIVE, ids=lambda method: type(method).__name__)
def test_adaptive_steps_follow_algorithm_2(method: FedAdam | FedYogi | FedAdagrad) -> None:
    """In plain numbers; both sides are fp64, x + delta - x loses 1e-16 of 1."""
    x, m, v = 1.0, 0.0, TAU**2
    for found, delta in zip(follow(method, DELTAS), DELTAS, strict=True):
        m = method.beta1 * m + (1 - method.beta1) * delta
        v = SECOND[type(method).__name__](v, delta)
        x += LR * m / (math.sqrt(v) + TAU)
        assert found.item() == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("delta", [0.02, 3e-4])
def test_the_first_adaptive_step_has_no_bias_correction(delta: float) -> None:
    second = {
        "FedAdam": B2 * TAU**2 + (1 - B2) * delta**2,
        "FedYogi": TAU**2 - (1 - B2) * delta**2 * math.copysign(1, TAU**2 - delta**2),
        "FedAdagrad": TAU**2 + delta**2,
    }
    for method in ADAPTIVE:
        root = math.sqrt(second[type(method).__name__])
        expected = LR * (1 - method.beta1) * delta / (root + TAU)
        assert follow(method, [delta])[0].item() - 1 == pytest.approx(expected, rel=1e-10)


def test_diloco_is_torchs_nesterov() -> None:
    """The outer gradient is -delta; fp64 on both sides."""
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for found, delta in zip(follow(DiLoCo(), DELTAS), DELTAS, strict=True):
        parameter.grad = torch.tensor([-delta], dtype=torch.float64)
        sgd.step()
        torch.testing.assert_close(found, parameter.detach(), rtol=0, atol=1e-14)


def test_fedavgm_takes_the_whole_delta_into_its_momentum() -> None:
    x, m = 1.0, 0.0
    for found, delta in zip(follow(FedAvgM(lr=0.5, beta=0.9), DELTAS), DELTAS, strict=True):
        m = 0.9 * m + delta
        x += 0.5 * m
        assert found.item() == pytest.approx(x, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_fedavgm_without_momentum_is_fedavg_to_the_bit(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    """Whatever the two values, 2^100 and 2^-100 included, where old + (new - old) is not new."""
    numbers = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3)
    old, new = (torch.tensor(data.draw(numbers)).to(dtype) for _ in range(2))
    params, state = one_round(FedAvgM(lr=1.0, beta=0.0), {"x": old}, [{"x": new}])
    assert torch.equal(params["x"], new)
    params, _ = one_round(FedAvgM(lr=1.0, beta=0.0), params, [{"x": old}], state=state)
    assert torch.equal(params["x"], old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_moves_add_up_in_half_precision(dtype: torch.dtype) -> None:
    """100 moves of a 100th of the last bit at 1: one bit in the end, none without the memory."""
    bit = torch.finfo(dtype).eps
    last = follow(FedAvgM(lr=0.01, beta=0.0), [bit] * 101, dtype)[-1]
    assert last.dtype == dtype
    assert last.item() == 1 + bit


AVERAGING = ["fedavg", "fednova", "fedbuff", "median", "trimmed_mean"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", AVERAGING)
def test_diloco_of_many_clients_is_sgd_on_master_weights(rule: str, dtype: torch.dtype) -> None:
    """The clients' mean is between two bf16 numbers, and torch's SGD has fp32 weights beside them.

    A third of a bf16 step a round: what the aggregate or the step rounds away would be lost. fp32
    moments and `lost` are off by 2^-24 of values below 3 a round.
    """
    joined = "diloco" if rule == "fedavg" else f"{rule}+diloco"
    method = build_method(joined, weight_by="uniform")
    generator = torch.Generator().manual_seed(0)
    x = (1 + torch.rand(40, generator=generator)).to(dtype)
    master = x.float().clone().requires_grad_()
    sgd = torch.optim.SGD([master], lr=0.7, momentum=0.9, nesterov=True)
    state: State = {}
    for _ in range(20):
        steps = [torch.rand(40, generator=generator) < 1 / 3 for _ in range(7)]
        updates = [{"w": x + 2.0**-7 * step.to(dtype)} for step in steps]
        folded, _ = one_fold(method, {"w": x}, updates)
        mean = folded["w"].double()  # which the rules' own tests hold against their definitions
        if rule not in ("median", "trimmed_mean"):
            plain = torch.stack([update["w"].double() for update in updates]).mean(0)
            torch.testing.assert_close(mean, plain, rtol=0, atol=2.0**-23)
        master.grad = (x.double() - mean).float()
        sgd.step()
        params, state = one_round(method, {"w": x}, updates, state=state)
        x = params["w"]
        kept = x.double() + state["w"]["lost"] if "lost" in state["w"] else x.double()
        torch.testing.assert_close(kept, master.detach().double(), rtol=0, atol=20 * 3 * 2.0**-23)
    assert x.dtype == dtype
    assert float((x.float() - 1).abs().max()) > 0.01


def test_fedavg_in_half_precision_keeps_nothing() -> None:
    """K equal updates return that update, whatever was rounded before."""
    x, bit = torch.ones(1, dtype=torch.bfloat16), torch.finfo(torch.bfloat16).eps
    params, state = one_round(FedAvg(), {"w": x}, [{"w": x + bit}, {"w": x}, {"w": x}])
    assert (params["w"].dtype, params["w"].item(), state) == (torch.bfloat16, 1.0, {"w": {}})


def test_memory_rests_in_fp32_and_is_small() -> None:
    for dtype, rests in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        x = torch.ones(2, 3, dtype=dtype)
        _, state = one_round(FedAdam(), {"x": x}, [{"x": x + 0.5}])
        assert {tensor.dtype for tensor in state["x"].values()} == {rests}
        assert set(state["x"]) == {"m", "v"} | ({"lost"} if dtype == torch.bfloat16 else set())


@pytest.mark.parametrize("method", [*ADAPTIVE, DiLoCo(), FedAvgM()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_whole_numbers_take_the_aggregate(method: Method, dtype: torch.dtype) -> None:
    old, new = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    value, state = method.step(old, new, {})
    assert torch.equal(value, new)
    assert value.dtype == dtype
    assert state == {}
