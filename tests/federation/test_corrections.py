"""FedProx and SCAFFOLD in a real Trainer: the gradient that the optimizer gets is the formula's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from fedtune.adapters.names import trainable_tensors
from fedtune.client.client_round import refuse_fp16
from fedtune.client.corrections import (
    ControlVariates,
    GradientCorrection,
    ProximalTerm,
    make_correction,
)
from fedtune.client.memory import ClientMemory, Kept
from fedtune.errors import ConfigError
from fedtune.strategies import METHODS
from fedtune.transport.messages import RoundTask
from tests.federation.small import (
    arguments,
    build_model,
    same_tensors,
    small_rows,
    training_arguments,
)
from tests.methods import named

STEPS, RATE, MU = 4, 0.1, 0.7
Tensors = dict[str, Tensor]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 0.0},
    "clip": {"max_grad_norm": 0.05},
    "clip, accumulate 3": {"max_grad_norm": 0.05, "gradient_accumulation_steps": 3},
    "accumulate 3, bf16": {"max_grad_norm": 1.0, "gradient_accumulation_steps": 3, "bf16": True},
    "adamw, cosine": {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "max_grad_norm": 0.05},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


class Probe(TrainerCallback):
    """Gradients and parameters as the callbacks before and after it see them."""

    def __init__(self) -> None:
        self.gradients: list[Tensors] = []
        self.parameters: list[Tensors] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        live = trainable_tensors(kwargs["model"], "default")
        self.gradients.append({n: p.grad.clone() for n, p in live.items() if p.grad is not None})
        self.parameters.append({n: p.detach().clone() for n, p in live.items()})


class Correcting(TrainerCallback):
    """Calls a correction where a round calls it."""

    def __init__(self, correction: GradientCorrection) -> None:
        self._correction = correction

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._correction.begin(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._correction.apply()


def run(
    directory: Path, correction: GradientCorrection | None, **given: Any
) -> tuple[Probe, Probe, Tensors]:
    """Train; returns what was seen before and after the correction, and the last parameters."""
    sgd = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0}
    training = training_arguments(
        directory, **{**sgd, "learning_rate": RATE, "max_steps": STEPS, **given}
    )
    model, _ = build_model(arguments(training, dropout=0.0))
    before, after = Probe(), Probe()
    callbacks = [before, *([] if correction is None else [Correcting(correction)]), after]
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=small_rows(24),
        callbacks=callbacks,
    )
    trainer.train()
    last = {n: p.detach().clone() for n, p in trainable_tensors(model, "default").items()}
    return before, after, last


def controls(directory: Path) -> tuple[Tensors, Tensors]:
    """c and c_k of the size of gradients."""
    names = run(directory, None, max_steps=1)[2]
    generator = torch.Generator().manual_seed(1)
    draw: Callable[[], Tensors] = lambda: {  # noqa: E731
        name: 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in names.items()
    }
    return draw(), draw()


@every_setting
def test_the_proximal_gradient_is_added_once_a_step(tmp_path: Path, setting: str) -> None:
    """After clipping and accumulation; 1e-7 is the last bit of the largest gradients, below 1."""
    before, after, _ = run(tmp_path, ProximalTerm(MU), **SETTINGS[setting])
    start = before.parameters[0]
    assert len(before.gradients) == STEPS
    for raw, y, corrected in zip(before.gradients, before.parameters, after.gradients, strict=True):
        for name, gradient in raw.items():
            expected = gradient + MU * (y[name] - start[name])
            torch.testing.assert_close(corrected[name], expected, rtol=0, atol=1e-7)
    moved = sum(float((y - start[n]).norm()) for n, y in before.parameters[-1].items())
    assert moved > 0.01  # or nothing was tested


@every_setting
def test_control_variates_shift_the_gradient_and_average_it(tmp_path: Path, setting: str) -> None:
    control, own = controls(tmp_path)
    variates = ControlVariates(control, own)
    before, after, _ = run(tmp_path, variates, **SETTINGS[setting])
    for raw, corrected in zip(before.gradients, after.gradients, strict=True):
        for name, gradient in raw.items():
            expected = gradient - own[name] + control[name]
            torch.testing.assert_close(corrected[name], expected, rtol=0, atol=1e-7)
    new, change = variates.finish()
    assert new.keys() == change.keys() == control.keys()
    for name, value in new.items():
        mean = torch.stack([raw[name].double() for raw in before.gradients]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(change[name], value - own[name])


@pytest.mark.parametrize("setting", ["plain", "clip", "clip, accumulate 3"])
def test_the_mean_is_the_papers_option_2_under_sgd(tmp_path: Path, setting: str) -> None:
    """c_k - c + (x - y) / (steps rate): fp32 parameters near 1, 6e-8 / (4 * 0.1) each way."""
    control, own = controls(tmp_path)
    variates = ControlVariates(control, own)
    before, _, y = run(tmp_path, variates, **SETTINGS[setting])
    new, _ = variates.finish()
    for name, value in new.items():
        x = before.parameters[0][name]
        option_2 = own[name] - control[name] + (x - y[name]) / (STEPS * RATE)
        torch.testing.assert_close(value, option_2, rtol=0, atol=5e-7)


@pytest.mark.parametrize("kind", ["fedprox", "scaffold"])
def test_accumulation_changes_nothing(tmp_path: Path, kind: str) -> None:
    """6 rows at once or 3 times 2: a correction of the loss would count three times.

    The sums of gradients differ in order only: a few bits of fp32 values below 1.
    """
    control, own = controls(tmp_path)

    def correction() -> GradientCorrection:
        return ProximalTerm(MU) if kind == "fedprox" else ControlVariates(control, own)

    whole = run(tmp_path, correction(), per_device_train_batch_size=6)[2]
    parts = run(tmp_path, correction(), gradient_accumulation_steps=3)[2]
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-6)


def test_without_strength_and_controls_nothing_changes(tmp_path: Path) -> None:
    plain = run(tmp_path, None)[2]
    for correction in (ProximalTerm(0.0), ControlVariates({}, {})):
        found = run(tmp_path, correction)[2]
        assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_second_round_starts_from_its_own_parameters() -> None:
    """`begin` again: the anchor moves, and the mean is of the new round alone."""
    model = nn.Linear(2, 1, bias=False)
    prox, variates = ProximalTerm(1.0), ControlVariates({}, {})
    for number in (1.0, 2.0):
        with torch.no_grad():
            model.weight.fill_(number)
        prox.begin(model)
        variates.begin(model)
        model.weight.grad = torch.full_like(model.weight, number)
        variates.apply()
        prox.apply()
        assert torch.equal(model.weight.grad, torch.full_like(model.weight, number))
        assert torch.equal(variates.finish()[0]["weight"], torch.full((1, 2), number))


def test_half_precision_parameters_are_corrected_in_fp32() -> None:
    """c - c_k = 2^-10 beside gradients of 1 is lost in bf16 once, not in the mean."""
    model = nn.Linear(2, 1, bias=False).bfloat16()
    variates = ControlVariates({}, {})
    variates.begin(model)
    for gradient in (1.0, 1.0 + 2**-7):
        model.weight.grad = torch.full_like(model.weight, gradient)
        variates.apply()
    own, _ = variates.finish()
    assert own["weight"].dtype == torch.float32
    assert torch.equal(own["weight"], torch.full((1, 2), 1 + 2**-8))


def test_what_was_not_trained_keeps_its_control() -> None:
    """A round in which a factor is frozen (RoLoRA) must not make its control zero."""
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    variates = ControlVariates({"bias": torch.ones(1)}, {"bias": torch.full((1,), 3.0)})
    variates.begin(model)
    model.weight.grad = torch.ones_like(model.weight)
    variates.apply()
    own, change = variates.finish()
    assert own["bias"].item() == 3.0
    assert "bias" not in change  # so that the server's stays too
    assert torch.equal(change["weight"], torch.ones(1, 2))


@pytest.mark.parametrize("kind", ["fedprox", "scaffold"])
def test_what_stays_with_the_client_is_not_corrected(kind: str) -> None:
    """It has no global value to be pulled to; the weight beside it is corrected by 1."""
    model = nn.Linear(2, 1)
    control = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    correction: Any = ProximalTerm(1.0) if kind == "fedprox" else ControlVariates(control, {})
    correction.begin(model, {"bias"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
            parameter.grad = torch.zeros_like(parameter)
    correction.apply()
    assert torch.equal(model.bias.grad, torch.zeros(1))
    torch.testing.assert_close(model.weight.grad, torch.ones(1, 2))  # (y + 1) - y, rounded
    if kind == "scaffold":
        own, change = correction.finish()
        assert own.keys() == change.keys() == {"weight"}


def test_a_round_of_no_steps_changes_no_control() -> None:
    variates = ControlVariates({}, {"weight": torch.ones(1, 2)})
    variates.begin(nn.Linear(2, 1, bias=False))
    own, change = variates.finish()
    assert torch.equal(own["weight"], torch.ones(1, 2))
    assert not change["weight"].any()


@pytest.mark.parametrize("correction", [ProximalTerm(1.0), ControlVariates({}, {})])
def test_hidden_gradients_are_an_error(correction: GradientCorrection) -> None:
    correction.begin(nn.Linear(2, 1))
    with pytest.raises(ConfigError, match="found none"):
        correction.apply()


@pytest.mark.parametrize("name", METHODS)
def test_clients_know_what_every_method_asks_for(name: str) -> None:
    wanted = named(name).correction
    if wanted is not None:
        made = make_correction(wanted.name, wanted.settings, {}, {})
        assert isinstance(made, ControlVariates) == bool(wanted.extras)


def test_an_unknown_correction_is_an_error() -> None:
    with pytest.raises(ConfigError, match="received 'fedfoo'"):
        make_correction("fedfoo", {}, {}, {})


def task(correction: str = "", **given: Any) -> RoundTask:
    return RoundTask(
        run="run",
        round=1,
        num_rounds=3,
        attempt=1,
        manifest="",
        steps=4,
        epochs=0.0,
        carry=True,
        seed=42,
        correction=correction,
        **given,
    )


def test_scaffold_refuses_a_loss_scaler() -> None:
    scaled, plain = SimpleNamespace(fp16=True), SimpleNamespace(fp16=False)
    for name in ("", "fedprox"):
        refuse_fp16(task(name), scaled)
    refuse_fp16(task("scaffold"), plain)
    with pytest.raises(ConfigError, match="Use --bf16"):
        refuse_fp16(task("scaffold"), scaled)


def test_a_memory_is_kept_with_its_round(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path / "memory")
    kept = Kept({"a.weight": torch.randn(3, 2).T, "b": torch.tensor(1.0)}, {"b": torch.ones(2)})
    memory.write(1, kept, [])
    for field, tensors in vars(kept).items():
        assert same_tensors(getattr(memory.read(1), field), dict(tensors))
    assert memory.read(0) == Kept()
    with pytest.raises(ConfigError, match=r"another --strategy.*submit a new run"):
        memory.read(2)


def test_a_memory_keeps_the_rounds_that_may_be_asked_for_again(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    for number in range(1, 5):
        memory.write(number, Kept({"c": torch.full((1,), float(number))}), [1, number - 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"round-{number:05d}.safetensors" for number in (1, 3, 4)
    ]
    assert [memory.read(number).control["c"].item() for number in (1, 3, 4)] == [1.0, 3.0, 4.0]
