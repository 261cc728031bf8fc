"""How often tensors become Flower's arrays, or arrays tensors, in a round of one client."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedtune.transport import records
from tests.federation.small import run_small, small_worker


def test_a_round_converts_each_tensor_four_times_and_once_for_its_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down: written once, read by the scores and the next training. Up: written and read."""
    counts: Counter[str] = Counter()
    for name in ("_to_array", "_to_tensor"):
        convert = getattr(records, name)

        def counted(*args: Any, convert: Any = convert, name: str = name, **given: Any) -> Any:
            counts[name] += 1
            return convert(*args, **given)

        monkeypatch.setattr(records, name, counted)

    def conversions(rounds: int) -> Counter[str]:
        counts.clear()
        worker = small_worker(tmp_path / str(rounds))
        tensors = len(worker.initial()[0])
        run_small(worker, num_rounds=rounds, steps=1)
        return Counter({name: count // tensors for name, count in counts.items()})

    a_round = conversions(3) - conversions(2)
    assert a_round == {"_to_array": 2, "_to_tensor": 3}
