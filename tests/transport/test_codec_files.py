"""What a client keeps on disk may be lost or damaged; that costs one whole message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.federation.scripted import in_a_task
from tests.transport.coded import Bench, draw


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two clients that have had two rounds."""
    bench = Bench(tmp_path, 2)
    for number in range(2):
        assert len(bench.ask(draw(number))) == 2
    bench.network.pushed.clear()
    return bench


def damaged(path: Path) -> dict[str, Callable[[], object]]:
    whole = path.read_bytes()
    middle = len(whole) // 2
    return {
        "a bit": lambda: path.write_bytes(
            whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        ),
        "a part": lambda: path.write_bytes(whole[:middle]),
        "nothing": lambda: path.write_bytes(b""),
        "no file": lambda: path.unlink(),
        "noise": lambda: path.write_bytes(bytes(range(256)) * 9),
        "other tensors": lambda: save_file({"other": torch.ones(3)}, path),
        "other shapes": lambda: save_file({"arrays/a": torch.ones(3)}, path),
        "other dtypes": lambda: save_file(
            {f"arrays/{name}": tensor.half() for name, tensor in draw(0).items()}, path
        ),
    }


@pytest.mark.parametrize(
    "how",
    ["a bit", "a part", "nothing", "no file", "noise", "other tensors", "other shapes",
     "other dtypes"],
)  # fmt: skip
def test_a_damaged_file_costs_one_whole_message(bench: Bench, how: str) -> None:
    for path in bench.versions(0):
        damaged(path)[how]()
    bench.assert_right(bench.ask(draw(2)), 2)
    assert bench.wholes() == [False, False, True]
    bench.assert_goes_on()


def test_no_byte_of_a_file_can_be_trusted(bench: Bench) -> None:
    """Whatever becomes of its header: a whole message, or it did not matter."""
    last = 2
    for place in range(0, 400, 13):
        last += 1
        for path in bench.versions(0):
            data = bytearray(path.read_bytes())
            data[place] ^= 0x21
            path.write_bytes(data)
        bench.assert_right(bench.ask(draw(last)), last)
        assert sum(bench.wholes()) <= 1
    bench.assert_goes_on()


def test_a_damaged_file_is_mended_though_nothing_changes(bench: Bench) -> None:
    for path in bench.versions(0):
        damaged(path)["a bit"]()
    bench.ask(draw(2))
    for path in bench.versions(0):
        damaged(path)["a bit"]()
    bench.wholes()
    counts = []
    for _ in range(3):
        bench.assert_right(bench.ask(draw(2)), 2)
        counts.append(sum(bench.wholes()))
    assert counts == [1, 0, 0]


def test_a_client_keeps_two_versions(bench: Bench) -> None:
    """What the last message was a difference to may be asked for again."""
    for number in range(5):
        bench.ask(draw(number))
        assert [len(bench.versions(client)) for client in range(2)] == [2, 2]
