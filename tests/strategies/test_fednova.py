"""FedNova's two sums against its definition; `test_quadratics.py` has its fixed points."""

from __future__ import annotations

import torch

from fedtune.strategies.fednova import FedNova
from tests.strategies.one_round import one_round, stats_of


def test_the_definition() -> None:
    """x + tau_eff sum p_k (y_k - x) / tau_k, in fp64: a few roundings of 1e-16."""
    generator = torch.Generator().manual_seed(0)
    x, *ys = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    stats = [stats_of(7, 30), stats_of(1, 4), stats_of(50, 11)]
    p = [one.num_tokens / 45 for one in stats]
    effective = sum(p_k * one.num_steps for p_k, one in zip(p, stats, strict=True))
    change = sum(p_k * (y - x) / s.num_steps for p_k, y, s in zip(p, ys, stats, strict=True))
    found, _ = one_round(FedNova(), {"x": x}, [{"x": y} for y in ys], stats)
    torch.testing.assert_close(found["x"], x + effective * change, rtol=0, atol=1e-13)


def test_equal_steps_are_fedavg_to_the_bit() -> None:
    """The rate is a rational number, so it is 1 and not nearly 1."""
    stats = [stats_of(steps, weight) for steps, weight in ((49, 3), (49, 10**9 + 7), (49, 11))]
    assert FedNova().server_rate(stats) == 1.0
    assert FedNova(client_momentum=0.9).server_rate(stats) == 1.0
    assert FedNova().server_rate(stats[:1]) == 1.0


def test_the_rate_does_not_depend_on_the_order() -> None:
    stats = [stats_of(s, w) for s, w in ((7, 30), (1, 4), (50, 11), (3, 3))]
    rates = {FedNova(client_momentum=0.3).server_rate(stats[k:] + stats[:k]) for k in range(4)}
    assert len(rates) == 1
    assert rates.pop() > 1


def test_integers_are_not_lengthened() -> None:
    updates = [{"x": torch.tensor([2])}, {"x": torch.tensor([4])}]
    found, _ = one_round(FedNova(), {"x": torch.tensor([0])}, updates, [stats_of(1), stats_of(1)])
    assert found["x"].dtype == torch.int64
