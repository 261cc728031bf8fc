"""Two clients with f_k(y) = h_k / 2 (y - b_k)^2, whose fixed points are known in closed form.

The clients are `torch.optim.SGD` on one fp64 number, with the corrections of
`fedtune.client.corrections` between gradient and step; the server is the method itself. With
h = (1, 10), b = (0, 1) the minimum of the mean is 10/11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fedtune.client.corrections import ControlVariates, GradientCorrection, ProximalTerm
from fedtune.strategies import FedAvg, Method
from fedtune.strategies.fednova import FedNova, path_length
from fedtune.strategies.scaffold import Scaffold, next_control
from tests.strategies.one_round import one_round, stats_of

H, B = (1.0, 10.0), (0.0, 1.0)
RATE = 0.05
OPTIMUM = 10 / 11


class Number(nn.Module):
    """One parameter."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(x.clone())


def train(
    x: Tensor,
    client: int,
    steps: int,
    *,
    h: Sequence[float] = H,
    rate: float = RATE,
    momentum: float = 0.0,
    correction: GradientCorrection | None = None,
) -> Tensor:
    """y after `steps` steps of client `client` from x."""
    model = Number(x)
    sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    if correction is not None:
        correction.begin(model)
    for _ in range(steps):
        model.y.grad = h[client] * (model.y.detach() - B[client])
        if correction is not None:
            correction.apply()
        sgd.step()
    return model.y.detach()


def fixed_point(one: Callable[[Tensor], Tensor]) -> float:
    """Where an affine map stays: F(x) = a x + F(0)."""
    at_0 = one(torch.zeros(1, dtype=torch.float64)).item()
    at_1 = one(torch.ones(1, dtype=torch.float64)).item()
    return at_0 / (1 - (at_1 - at_0))


def limit(
    method: Method,
    steps: Sequence[int],
    correction: Callable[[], GradientCorrection | None] = lambda: None,
    **local: float | Sequence[float],
) -> float:
    """Fixed point of the rounds of a method without memory."""

    def rounds(x: Tensor) -> Tensor:
        updates = [
            {"x": train(x, k, steps[k], correction=correction(), **local)}  # type: ignore[arg-type]
            for k in range(2)
        ]
        return one_round(method, {"x": x}, updates, [stats_of(s) for s in steps])[0]["x"]

    return fixed_point(rounds)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((1, 1), 0.909091), ((10, 10), 0.713442), ((10, 2), 0.651458)],
)
def test_fedavg_drifts_to_where_its_clients_pull_equally(
    steps: tuple[int, int], expected: float
) -> None:
    """sum a_k b_k / sum a_k with a_k = 1 - (1 - rate h_k)^steps; equal to 1e-12, quoted to 1e-6."""
    a = [1 - (1 - RATE * h) ** s for h, s in zip(H, steps, strict=True)]
    found = limit(FedAvg(weight_by="uniform"), steps)
    assert found == pytest.approx(a[1] / sum(a), abs=1e-12)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("steps", "expected"), [((10, 10), 0.713442), ((10, 2), 0.903340)])
def test_fednova_undoes_unequal_steps_and_nothing_else(
    steps: tuple[int, int], expected: float
) -> None:
    assert limit(FedNova(weight_by="uniform"), steps) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rate", "expected"), [(0.1, 0.593), (0.01, 0.5099), (0.001, 0.5010)], ids=str
)
def test_fednova_of_equal_curvature_tends_to_the_middle(rate: float, expected: float) -> None:
    found = limit(FedNova(weight_by="uniform"), (10, 2), h=(1.0, 1.0), rate=rate)
    assert found == pytest.approx(expected, abs=10 ** -len(str(expected)[2:]))


def test_fedavg_of_equal_curvature_tends_to_the_share_of_steps() -> None:
    found = limit(FedAvg(weight_by="uniform"), (10, 2), h=(1.0, 1.0), rate=1e-3)
    assert found == pytest.approx(0.167223, abs=1e-6)  # 1/6 as the rate goes to 0


def test_fednova_with_momentum_tends_to_the_middle_too() -> None:
    """To first order in the rate a client goes rate * |a_k|: 0.5 + O(rate |a|), here 1e-4 * 40."""
    steps, rho = (10, 2), 0.9
    right = limit(
        FedNova(weight_by="uniform", client_momentum=rho), steps, h=(1, 1), rate=1e-4, momentum=rho
    )
    blind = limit(FedNova(weight_by="uniform"), steps, h=(1, 1), rate=1e-4, momentum=rho)
    assert right == pytest.approx(0.5, abs=4e-3)
    assert blind < 0.3


def test_fedprox_with_exact_local_solves() -> None:
    """a_k = h_k / (h_k + mu); 200 steps leave 0.9^200 = 7e-10 of the way to the local solution."""
    found = limit(FedAvg(weight_by="uniform"), (200, 200), correction=lambda: ProximalTerm(1.0))
    assert found == pytest.approx(0.645161, abs=1e-6)


def test_fedprox_without_strength_is_fedavg() -> None:
    found = limit(FedAvg(weight_by="uniform"), (10, 2), correction=lambda: ProximalTerm(0.0))
    assert found == pytest.approx(0.651458, abs=1e-6)


@pytest.mark.parametrize("steps", [(10, 10), (10, 2)])
def test_scaffold_finds_the_minimum(steps: tuple[int, int]) -> None:
    x, found = scaffold(steps, rounds=150)
    assert x.item() == pytest.approx(OPTIMUM, abs=1e-6)
    assert found == pytest.approx(0.0, abs=1e-6)  # c is the gradient of the mean


def test_scaffold_of_unequal_weights_finds_the_weighted_minimum() -> None:
    """3 f_1 + f_2: 10 / 13."""
    x, _ = scaffold((10, 10), rounds=150, weights=(3, 1))
    assert x.item() == pytest.approx(10 / 13, abs=1e-6)


def test_absent_clients_keep_their_part_of_the_control() -> None:
    """One of four changes its own by 1: c, the mean of all four, changes by a quarter."""
    control = next_control({"y": torch.tensor([0.5])}, {"y": torch.ones(1)}, share=1 / 4)
    assert control["y"].item() == 0.75
    assert next_control({}, {"y": torch.ones(1)}, share=1 / 4)["y"].item() == 0.25


def scaffold(
    steps: tuple[int, int], *, rounds: int, weights: tuple[int, int] = (1, 1)
) -> tuple[Tensor, float]:
    """Parameters and server control after some rounds; checks option II on the way."""
    method = Method(correction=Scaffold())
    x = torch.zeros(1, dtype=torch.float64)
    control: dict[str, Tensor] = {}
    own: list[dict[str, Tensor]] = [{}, {}]
    stats = [stats_of(s, w) for s, w in zip(steps, weights, strict=True)]
    zero = torch.zeros_like(x)
    for _ in range(rounds):
        updates, mean_change = [], torch.zeros_like(x)
        for k in range(2):
            variates = ControlVariates(control, own[k])
            y = train(x, k, steps[k], correction=variates)
            new, change = variates.finish()
            option_2 = own[k].get("y", zero) - control.get("y", zero) + (x - y) / (steps[k] * RATE)
            torch.testing.assert_close(new["y"], option_2, rtol=0, atol=1e-12)
            own[k] = new
            mean_change += method.rule.share(stats[k]) / sum(weights) * change["y"]
            updates.append({"x": y})
        x = one_round(method, {"x": x}, updates, stats)[0]["x"]
        control = next_control(control, {"y": mean_change}, share=1.0)
    return x, control["y"].item()


def test_path_lengths_are_the_papers() -> None:
    tau, rho, prox = 7, 0.9, 0.05
    ones = [1.0] * tau
    momentum = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert path_length(ones) == tau
    assert path_length(ones, momentum=rho) == pytest.approx(momentum, rel=1e-14)
    assert path_length(ones, prox=prox) == pytest.approx((1 - (1 - prox) ** tau) / prox, rel=1e-14)
    assert path_length([1.0, 0.5, 0.25]) == 1.75  # a schedule: sum of rates over the first
