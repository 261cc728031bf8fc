"""The processes of one training: rank 0 talks to the server, the others do what it does.

What rank 0 hears is broadcast as the bytes of a frame, errors included, before anyone acts on it;
so no process trains on other parameters than the others, and none waits for one that has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainingArguments

from fedtune.errors import FedtuneError, RoundError

__all__ = ["Ranks"]

CHUNK_BYTES = 2**26
T = TypeVar("T")


class Ranks:
    """What the processes of a training tell each other; all of them call each method together.

    Args:
        args: of the Trainer; they say how many processes there are, and on which device.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.count = args.world_size
        self.first = args.process_index == 0
        self._device = torch.device("cpu")
        if self.count > 1 and "gloo" not in dist.get_backend():
            self._device = args.device

    def share(self, data: bytes = b"") -> bytes:
        """The bytes that rank 0 gives; what the others give is ignored."""
        if self.count == 1:
            return data
        size = self._broadcast(torch.tensor([len(data)]))
        total = int(size)
        parts = []
        for start in range(0, total, CHUNK_BYTES):
            length = min(CHUNK_BYTES, total - start)
            if self.first:
                part = torch.frombuffer(bytearray(data[start : start + length]), dtype=torch.uint8)
            else:
                part = torch.empty(length, dtype=torch.uint8)
            parts.append(self._broadcast(part).numpy().tobytes())
        return b"".join(parts)

    def beat(self) -> None:
        """Rank 0 is alive: the others wait for something it `share`s, and get empty bytes."""
        self.share()

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the processes, in fp64."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        return summed.tolist()

    def together(self, act: Callable[[], T]) -> T:
        """Run `act` everywhere; when it fails anywhere, it fails everywhere with the first reason.

        Raises:
            FedtuneError: what `act` raised here, or a RoundError with another process's reason.
        """
        result: T | None = None
        problem: FedtuneError | None = None
        try:
            result = act()
        except FedtuneError as error:
            problem = error
        reason = self._first_problem("" if problem is None else problem.outside)
        if problem is not None:
            raise problem
        if reason:
            raise RoundError(reason)
        return result  # type: ignore[return-value]

    def _first_problem(self, text: str) -> str:
        if self.count == 1:
            return text
        sizes = torch.zeros(self.count, dtype=torch.int64, device=self._device)
        sizes[dist.get_rank()] = len(text.encode())
        dist.all_reduce(sizes)
        failed = sizes.nonzero()
        if not len(failed):
            return ""
        source = int(failed[0])
        buffer = torch.zeros(int(sizes[source]), dtype=torch.uint8)
        if dist.get_rank() == source:
            buffer = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return self._broadcast(buffer, source).numpy().tobytes().decode()

    def _broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        moved = tensor.to(self._device)
        dist.broadcast(moved, source)
        return moved.cpu()
