"""A run that is killed anywhere and resumed ends where the uninterrupted run ends, bit by bit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.adapters import load_exported
from fedtune.server.checkpoint import load_latest
from tests.federation.killing import Ended, Killer
from tests.federation.small import same_tensors, small_rows

KILLED = -9
TIMES = {"wall_s", "time", "train_s", "time_split"}


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    helper = Killer()
    yield helper
    helper.close()


def timeless(value: Any) -> Any:
    """The value without what a clock says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def lines(directory: Path) -> list[Any]:
    return [timeless(json.loads(line)) for line in (directory / "rounds.jsonl").open()]


def assert_same_run(directory: Path, expected: Path) -> None:
    assert lines(directory) == lines(expected)
    for name in ("adapter", "best"):
        ours, theirs = load_exported(directory / name), load_exported(expected / name)
        assert same_tensors(ours[0], theirs[0])
    left, right = load_latest(directory / "checkpoints"), load_latest(expected / "checkpoints")
    assert left is not None
    assert right is not None
    assert same_tensors(left.params, right.params)
    assert timeless(left.history) == timeless(right.history)
    assert (left.client_rounds, left.durable, left.best) == (
        right.client_rounds,
        right.durable,
        right.best,
    )
    assert not [path for path in directory.rglob(".*") if path.suffix in (".new", ".old", ".tmp")]


# --- the server's own writes, every one of them ---


@pytest.mark.parametrize(
    ("save_every_rounds", "stride"),
    [
        (1, 11),
        (2, 11),
        *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (1, 2, 3)),
    ],
)
def test_killed_before_durable_operations_of_the_server(
    killer: Killer, tmp_path: Path, save_every_rounds: int, stride: int
) -> None:
    """4 rounds of scripted clients. Killed before each fsync, mkdir, rename and unlink in turn:
    what is on disk is then the state before or after that write, and resuming completes the run.
    """
    calm = tmp_path / "calm"
    whole = killer.run("scripted", calm, save_every_rounds=save_every_rounds)
    assert whole.status == 0
    assert whole.operations > 100
    good = [load_exported(calm / "adapter")[0]["b"][0].item() - 1.5 * k for k in range(5)]
    for point in range(1, whole.operations + 1, stride):
        directory = tmp_path / f"killed-{point}"
        ended = killer.run(
            "scripted", directory, kill_at=point, save_every_rounds=save_every_rounds
        )
        assert ended.status == KILLED
        if (directory / "adapter").is_dir():
            assert load_exported(directory / "adapter")[0]["b"][0].item() in good
        ended = killer.run("scripted", directory, save_every_rounds=save_every_rounds)
        assert ended.status == 0, (point, (tmp_path / f"{directory.name}.log").read_text()[-2000:])
        assert_same_run(directory, calm)


# --- whole runs with Trainers ---


class Lab:
    """Runs of one recipe: one calm, the others killed and resumed until they end."""

    def __init__(self, killer: Killer, directory: Path, **settings: Any) -> None:
        self.killer, self.directory, self.settings = killer, directory, settings
        self.calm = directory / "calm" / "run"
        self.whole = self.attempt(self.calm.parent)
        assert self.whole.status == 0, self.log("calm")

    def attempt(self, directory: Path, **kill: Any) -> Ended:
        directory.mkdir(exist_ok=True)
        rows = directory / "rows.jsonl"
        if not rows.is_file():
            ids = small_rows(24)["input_ids"]
            rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        return self.killer.run("recipe", directory, **kill, **self.settings)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()[-3000:]

    def survive(self, name: str, kills: list[dict[str, float]]) -> int:
        """Kill one run after the other, then let it end; how many kills hit."""
        directory = self.directory / name
        statuses = [self.attempt(directory, **kill).status for kill in kills]
        assert set(statuses) <= {KILLED, 0}, self.log(name)
        assert self.attempt(directory).status == 0, self.log(name)
        assert_same_run(directory / "run", self.calm)
        ours, theirs = (
            json.loads((path / "summary.json").read_text())
            for path in (directory / "run", self.calm)
        )
        assert timeless(ours["arms"]) == timeless(theirs["arms"])
        assert ours["data"]["clients"] == theirs["data"]["clients"]
        # the rows lie in another directory
        assert [*ours["data"]["files"].values()] == [*theirs["data"]["files"].values()]
        assert ours["verdict"]["parity"] == theirs["verdict"]["parity"]
        return statuses.count(KILLED)


@pytest.fixture(scope="module")
def lab(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """3 clients of which 2 are asked, dropout: random state and absent clients matter."""
    return Lab(killer, tmp_path_factory.mktemp("lab"))


def random_kills(lab: Lab, seed: int) -> list[dict[str, float]]:
    """One to three kills, the later ones in the middle of resumed runs."""
    draw = random.Random(seed)
    return [
        {"kill_after_s": draw.uniform(0, lab.whole.seconds / (1 + 0.5 * k))}
        for k in range(draw.choice([1, 1, 2, 3]))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment(lab: Lab, seed: int) -> None:
    lab.survive(f"moment-{seed}", random_kills(lab, seed))


@pytest.mark.parametrize(
    "part", [0.3, 0.6, *(pytest.param(k / 16, marks=pytest.mark.slow) for k in range(1, 16))]
)
def test_killed_before_a_durable_operation(lab: Lab, part: float) -> None:
    """Of server and clients: also inside the Trainer's checkpoints and their renaming."""
    point = int(part * lab.whole.operations)
    assert lab.survive(f"operation-{part}", [{"kill_at": point}]) == 1


def test_killed_between_durable_rounds(
    killer: Killer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Durable after rounds 3 and 6: killed in rounds 5 and 6, clients roll back to round 3."""
    lab = Lab(killer, tmp_path_factory.mktemp("three"), save_every_rounds=3, num_rounds=6)
    operations = lab.whole.operations
    assert lab.survive("late", [{"kill_at": int(0.85 * operations)}]) == 1
    kills = [{"kill_at": int(0.75 * operations)}, {"kill_at": operations // 3}]
    assert lab.survive("twice", kills) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_between_durable_rounds_at_random(
    killer: Killer, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    lab = Lab(killer, tmp_path_factory.mktemp("two"), save_every_rounds=3, num_rounds=7)
    lab.survive("a", random_kills(lab, 100 + seed))


def test_killed_among_the_arms(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An arm that was finished is kept, a torn one starts again from the same first adapter."""
    lab = Lab(
        killer, tmp_path_factory.mktemp("arms"), compare="local,fixed_global,parity", num_rounds=2
    )
    operations = lab.whole.operations
    assert lab.survive("a", [{"kill_at": int(0.8 * operations)}]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_among_all_arms_at_random(
    killer: Killer, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    lab = Lab(killer, tmp_path_factory.mktemp("arms"), compare="all", num_rounds=2)
    draw = random.Random(seed)
    kills = [{"kill_after_s": draw.uniform(0.2, 0.9) * lab.whole.seconds} for _ in range(2)]
    lab.survive("a", kills)
