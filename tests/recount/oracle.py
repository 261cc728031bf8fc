"""Closed forms and forward passes of the tests' own: loss per token, means, schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.assets import MODEL_DIR
from tests.recount.recorder import IGNORED, Tensors, innermost, seen_labels
from tests.recount.rows import Encoded


class Score(NamedTuple):
    """Of rows: mean loss of a label token, share of those that are the likeliest, their number."""

    loss: float
    accuracy: float
    tokens: int


def loss_per_token(model: nn.Module, rows: Iterable[Encoded], **more: Any) -> float:
    """The mean loss of a label token."""
    return score(model, rows, **more).loss


@torch.no_grad()
def score(
    model: nn.Module,
    rows: Iterable[Encoded],
    *,
    tensors: Tensors | None = None,
    smoothing: float = 0.0,
) -> Score:
    """Sums over label tokens / their number: row by row, unpadded, in fp64.

    Of the labels that the innermost model gets, behind virtual tokens if there are some.
    `tensors` are put into the model first.
    """
    if tensors is not None:
        put(model, tensors)
    got: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, kw: dict[str, Any], out: Any) -> None:
        got.update(labels=kw["labels"], logits=out.logits)

    was_training = model.training
    model.eval()
    handle = innermost(model).register_forward_hook(keep, with_kwargs=True)
    loss, hits, count = 0.0, 0, 0
    try:
        for row in rows:
            ids = torch.tensor([row.ids])
            labels = torch.tensor(row.labels if _is_class(row) else [row.labels])
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
            wanted = seen_labels(got["labels"]).flatten()
            logits = got["logits"] if _is_class(row) else got["logits"][0, :-1]
            kept = wanted != IGNORED
            logits, wanted = logits.double()[kept], wanted[kept]
            losses = nn.functional.cross_entropy(
                logits, wanted, reduction="sum", label_smoothing=smoothing
            )
            loss += float(losses)
            hits += int((logits.argmax(-1) == wanted).sum())
            count += len(wanted)
    finally:
        handle.remove()
        model.train(was_training)
    return Score(loss / count, hits / count, count)


def put(model: nn.Module, tensors: Tensors) -> None:
    live = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            live[name].copy_(value)


def _is_class(row: Encoded) -> bool:
    return len(row.labels) == 1 < len(row.ids)


def bare_model(classes: int = 0) -> nn.Module:
    """The embedded base model, without any adapter."""
    if classes:
        return AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=classes)
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


def on_disk(directory: Path, classes: int = 0) -> nn.Module:
    """What anyone would load: a full model, or an adapter on the base."""
    if (directory / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(bare_model(classes), directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def weighted_mean(updates: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """sum w y / sum w in fp64, rounded once."""
    whole = math.fsum(weights)
    return {
        name: (sum(w * u[name].double() for u, w in zip(updates, weights, strict=True)) / whole).to(
            updates[0][name].dtype
        )
        for name in updates[0]
    }


def furthest(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest difference, relative to the largest value of its tensor."""
    worst = 0.0
    for name, value in left.items():
        scale = float(value.abs().max()) or 1.0
        worst = max(worst, float((value.double() - right[name].double()).abs().max()) / scale)
    return worst


def squared(tensors: Tensors) -> float:
    """Sum of squares over all values."""
    return math.fsum(float(value.double().square().sum()) for value in tensors.values())


def minus(left: Tensors, right: Tensors) -> Tensors:
    return {name: value.double() - right[name].double() for name, value in left.items()}


def residual(updates: Sequence[Tensors], weights: Sequence[float]) -> float | None:
    """Distance of the product of LoRA's mean factors from the mean product, relative to that."""
    lower = [name for name in updates[0] if "lora_A" in name]
    if not lower or len(updates[0]) != 2 * len(lower):
        return None
    mean = weighted_mean([{n: v.double() for n, v in u.items()} for u in updates], weights)
    off, whole = 0.0, 0.0
    for name in lower:
        upper = name.replace("lora_A", "lora_B")
        products = [{"": u[upper].double() @ u[name].double()} for u in updates]
        wanted = weighted_mean(products, weights)[""]
        off += float((mean[upper] @ mean[name] - wanted).square().sum())
        whole += float(wanted.square().sum())
    return math.sqrt(off / whole)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(v, right[n]) for n, v in left.items())


def size(tensors: Tensors) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def linear_lr(base: float, step: int, steps: int) -> float:
    """Of the optimizer step that follows `step` others, of `steps`."""
    return base * max(0.0, (steps - step) / steps)


def steps_per_round(rows: int, batch: int, accumulation: int, epochs: float, drop: bool) -> int:
    """Optimizer steps of so many passes, as the Trainer counts them."""
    batches = rows // batch if drop else math.ceil(rows / batch)
    return max(1, round(epochs * math.ceil(batches / accumulation)))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
