"""Held-out losses per label token: sum of token losses / number of label tokens, in any Trainer.

The Trainer's own `eval_loss` is the mean over batches of each batch's mean, so that a short row
weighs as much as a long one and the batch size moves the number. While a `PerToken` is entered,
each batch's mean counts as often as the loss has seen labels in it (without labels: rows), and
`eval_loss` is replaced before callbacks, trackers and `metric_for_best_model` see it. So are trl's
means over batches. The model runs as often as before.

Over several processes the rows that a sampler repeats to fill the last batch do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from fedtune.client.batches import IGNORED
from fedtune.client.counter import held_out, size_of
from fedtune.client.instead import instead
from fedtune.client.score import HeldOut, Score

__all__ = ["PerToken", "SetScore"]

LOOP_PREFIX = 4  # position of `metric_key_prefix` in `evaluation_loop`
TOKEN_MEANS = ("mean_token_accuracy", "entropy")  # of trl's, which others are means over rows


@dataclass(frozen=True)
class SetScore:
    """One held-out set: its mean loss over `tokens` label tokens, or over `rows` where it has none.

    `loss` is None where the Trainer reported none. `means` are trl's, such as its accuracy.
    """

    loss: float | None
    rows: int
    tokens: int
    means: Mapping[str, float] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """What the mean is over."""
        return self.tokens or self.rows

    def weight_of(self, mean: str) -> int:
        """What one of trl's means is over."""
        return self.weight if mean in TOKEN_MEANS else self.rows


class PerToken:
    """While entered, `trainer` reports losses per token; this knows what they are means over."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._sets: dict[str, SetScore] = {}

    def __enter__(self) -> PerToken:
        loop = self._trainer.evaluation_loop

        def weighted(*args: Any, **kwargs: Any) -> Any:
            given = args[LOOP_PREFIX] if len(args) > LOOP_PREFIX else None
            prefix = str(given or kwargs.get("metric_key_prefix", "eval"))
            batches = _Batches(self._trainer)
            with batches.recorded():
                output = loop(*args, **kwargs)
            if batches.rows:
                found = batches.score()
                self._sets[prefix] = found
                if found.loss is not None and output.metrics is not None:
                    output.metrics[f"{prefix}_loss"] = found.loss
            return output

        whole = _undropped(self._trainer)
        self._replaced = instead(self._trainer, evaluation_loop=weighted, get_eval_dataloader=whole)
        self._replaced.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._replaced.__exit__(*raised)

    @property
    def prefixes(self) -> list[str]:
        """What the metrics of each held-out set begin with."""
        sets = self._trainer.eval_dataset
        return [f"eval_{name}" for name in sets] if isinstance(sets, dict) else ["eval"]

    def score(self, metrics: Mapping[str, Any]) -> Score:
        """The last evaluation of every set, of which the Trainer reported `metrics`."""
        prefixes = self.prefixes
        if not all(prefix in self._sets for prefix in prefixes):  # an evaluation of its own kind
            return Score(dict(metrics), held_out(self._trainer))
        sets = {prefix: self._sets[prefix] for prefix in prefixes}
        sizes = {prefix: HeldOut(one.rows, one.tokens) for prefix, one in sets.items()}
        size = HeldOut(*map(sum, zip(*sizes.values(), strict=True)))
        losses = [(one.loss, one.weight) for one in sets.values() if one.loss is not None]
        if prefixes == ["eval"] or not losses:
            return Score(dict(metrics), size)
        # trl names its means the same for every set, so that only those of the last are left.
        means = {
            f"eval_{key}": _mean((one.means[key], one.weight_of(key)) for one in sets.values())
            for key in set.intersection(*(set(one.means) for one in sets.values()))
        }
        return Score({**metrics, **means, "eval_loss": _mean(losses)}, size, sizes)


def _undropped(trainer: Trainer) -> Callable[..., Any]:
    """Its eval loader with the last, short batch, which `dataloader_drop_last` is not meant for."""
    make = trainer.get_eval_dataloader

    def whole(*args: Any, **kwargs: Any) -> Any:
        dropped, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
        try:
            return make(*args, **kwargs)
        finally:
            trainer.args.dataloader_drop_last = dropped

    return whole


class _Batches:
    """The batches of one evaluation loop."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.rows: list[int] = []
        self._labels: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._labelled = True
        self._logged: dict[str, list[float]] = {}
        self._means: dict[str, float] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record every `prediction_step` inside; trl's means are weighted at the end."""
        trainer = self._trainer
        step = trainer.prediction_step
        args, averaged = trainer.args, trainer.args.average_tokens_across_devices

        def recorded(model: Any, inputs: Any, *others: Any, **kwargs: Any) -> Any:
            inputs = self._take(inputs)
            before = {key: len(values) for key, values in self._shown().items()}
            result = step(model, inputs, *others, **kwargs)
            if result[0] is not None:
                self._losses.append(result[0].detach().float().mean())
            for key, values in self._shown().items():
                if len(values) == before.get(key, 0) + 1:
                    self._logged.setdefault(key, []).append(values[-1])
            return result

        methods: dict[str, Callable[..., Any]] = {"prediction_step": recorded}
        # Each process's own mean, over what the loss sees; a loss of one's own may need a count.
        args.average_tokens_across_devices = False
        if trainer.compute_loss_func is None:
            methods["_get_num_items_in_batch"] = lambda *_: None
        try:
            with instead(trainer, **methods):
                yield
        finally:
            args.average_tokens_across_devices = averaged
        self._replace_shown()

    def score(self) -> SetScore:
        """Mean by label tokens, in fp64; NaN where the loss has seen none at all."""
        rows, weights = self._sums(self.rows).sum(), self._weights
        tokens = int(weights.sum()) if self._labelled else 0
        if len(self._losses) != len(self.rows):
            return SetScore(None, int(rows), tokens, self._means)
        own = torch.stack(self._losses).cpu().double()
        mine = self._own_weights
        # A batch without labels has no loss: 0 / 0 in one Trainer, 0 in another.
        total = self._sums(torch.where(mine > 0, own * mine, 0.0)).sum()
        whole = float(weights.sum())
        mean = float(total) / whole if whole else math.nan
        return SetScore(mean, int(rows), tokens, self._means)

    @property
    def _own_weights(self) -> Tensor:
        if not self._labelled:
            return torch.tensor(self.rows, dtype=torch.float64)
        return torch.stack(self._labels).cpu().double()

    @property
    def _weights(self) -> Tensor:
        """Of each batch, over all processes."""
        return self._sums(self._own_weights)

    def _sums(self, values: Any) -> Tensor:
        """Sums over processes, batch by batch, which all have equally many."""
        tensor = torch.as_tensor(values, dtype=torch.float64)
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return tensor
        gathered: Any = accelerator.gather(tensor[None].to(accelerator.device))
        return torch.as_tensor(gathered.sum(0)).cpu()

    def _take(self, inputs: Any) -> Any:
        """Count a batch; returns it without labels in the rows that are repetitions."""
        size, labels = size_of(self._trainer, inputs), _labels(inputs)
        rows = size.rows
        lines = min(rows, rows if labels is None else len(labels))  # packed, rows share a line
        own = self._not_repeated(lines)
        if own < lines:
            rows = own
            if labels is not None and not labels.is_floating_point():
                inputs = {**inputs, "labels": labels.clone()}
                inputs["labels"][own:] = IGNORED
                size = size_of(self._trainer, inputs)
        self.rows.append(rows)
        if labels is None:
            self._labelled = False
        else:
            self._labels.append(torch.as_tensor(size.tokens))
        return inputs

    def _not_repeated(self, lines: int) -> int:
        """How many of `lines` the sampler has not added to give every process a whole batch."""
        accelerator = self._trainer.accelerator
        state = accelerator.gradient_state
        if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return lines
        before = int(accelerator.process_index) * lines
        return min(max(int(state.remainder) - before, 0), lines)

    def _shown(self) -> dict[str, list[float]]:
        """Where trl keeps one value per batch until it logs their mean."""
        kept = getattr(self._trainer, "_metrics", None)
        return kept["eval"] if isinstance(kept, dict) and "eval" in kept else {}

    def _replace_shown(self) -> None:
        shown = self._shown()
        for key, values in self._logged.items():
            if len(values) != len(self.rows) or key not in shown:
                continue
            by_tokens = self._labelled and key in TOKEN_MEANS
            weights = self._weights if by_tokens else self._sums(self.rows)
            total = (torch.tensor(values, dtype=torch.float64) * weights).sum()
            if weights.sum():
                self._means[key] = float(total / weights.sum())
                shown[key][:] = [self._means[key]]


def _mean(weighted: Iterable[tuple[float, int]]) -> float:
    values = list(weighted)
    return sum(v * weight for v, weight in values) / sum(weight for _, weight in values)


def _labels(inputs: Any) -> Tensor | None:
    """The labels that a batch's loss is a mean over."""
    found = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return found if isinstance(found, Tensor) else None
