"""A process that has imported everything and forks a child per run, so that killing runs is quick.

It reads one JSON job a line and answers with one JSON line: how the child ended, and when. Run it
with `python -m tests.federation.killing`; it has no threads of its own, so forking is safe.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.processes.signals import Stopped, stoppable

REPOSITORY = Path(__file__).resolve().parents[2]

# What makes a write durable, and what removes an old one.
DURABLE = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit status (negative: the signal), duration, durable operations."""

    status: int
    seconds: float
    operations: int


class Killer:
    """The pytest side: starts the helper, sends jobs."""

    def __init__(self) -> None:
        self._helper = subprocess.Popen(
            [sys.executable, "-m", "tests.federation.killing"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        job: str,
        directory: Path,
        *,
        kill_after_s: float | None = None,
        kill_at: int | None = None,
        kill_when: str | None = None,
        kill_by: int = signal.SIGKILL,
        **settings: Any,
    ) -> Ended:
        """Run `job` in `directory`; kill it after some seconds or at its n-th durable operation.

        Args:
            kill_when: or as soon as this is there, a path below `directory`.
            kill_by: then, and after some seconds, the signal.
        """
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        request = {
            "job": job,
            "directory": str(directory),
            "kill_after_s": kill_after_s,
            "kill_at": kill_at,
            "kill_when": kill_when,
            "kill_by": int(kill_by),
            "settings": settings,
        }
        self._helper.stdin.write(json.dumps(request) + "\n")
        self._helper.stdin.flush()
        return Ended(**json.loads(self._helper.stdout.readline()))

    def close(self) -> None:
        """End the helper."""
        self._helper.stdin.close()  # type: ignore[union-attr]
        self._helper.wait(timeout=10)


def _recipe(directory: Path, settings: dict[str, Any]) -> None:
    """A whole run through the launcher: real Trainers, report and all; resumed if it was begun."""
    from fedtune.run.launch import quiet_libraries, run
    from tests.federation.small import arguments, build_model, training_arguments

    quiet_libraries()
    output = directory / "run"
    resume = (output / "run.json").is_file()
    compare = settings.pop("compare", None)
    args = arguments(
        training_arguments(output, warmup_steps=2, seed=42),
        dropout=0.1,
        run={"resume": resume, "compare": compare},
        **{
            "num_clients": 3,
            "num_rounds": 4,
            "steps_per_round": 3,
            "fraction_train": 0.67,
            **settings,
        },
    )
    args.data.train_file = str(directory / "rows.jsonl")
    run(args, build_model, _build_trainer)


def _build_trainer(args: Any, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> Any:
    from tests.federation.small import build_trainer

    def labelled(rows: Any) -> Any:
        return rows and rows.add_column("labels", rows["input_ids"])

    return build_trainer(args, model, tokenizer, labelled(train), labelled(evaluation))


def _scripted(directory: Path, settings: dict[str, Any]) -> None:
    """Server state alone, with scripted clients: a run of some milliseconds."""
    from fedtune.server.store import RunStore
    from tests.federation.scripted import Script, serve
    from tests.federation.small import result_of, server_run

    store = RunStore(directory, num_rounds=4, save_every_rounds=settings["save_every_rounds"])
    directory.mkdir(exist_ok=True)
    losses = {0.0: 1.0, 1.5: 3.0, 3.0: 1.0, 4.5: 2.0, 6.0: 0.5}
    run = server_run(2, num_rounds=4, on_round=store.on_round, start=store.load())
    result_of(serve(run, Script(eval_loss=lambda params: losses[float(params["b"][0])])))


JOBS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "recipe": _recipe,
    "scripted": _scripted,
}


@contextmanager
def _counted(kill_at: int | None, report: int) -> Iterator[None]:
    """Kill this process before its `kill_at`-th durable operation; report how many there were."""
    count = 0

    def before(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return counted

    for name in DURABLE:
        setattr(os, name, before(getattr(os, name)))
    # The kernel outlives a killed process: waiting for the disk would only cost time.
    os.fsync = before(lambda descriptor: None)
    yield
    os.write(report, str(count).encode())


def _child(request: dict[str, Any], report: int) -> None:
    directory = Path(request["directory"])
    log = os.open(
        directory.parent / f"{directory.name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with stoppable(), _counted(request["kill_at"], report):
            JOBS[request["job"]](directory, request["settings"])
    except (KeyboardInterrupt, Stopped) as stop:
        os._exit(stop.code if isinstance(stop, Stopped) else 130)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reader)
        _child(request, writer)
    os.close(writer)
    limit, when = request["kill_after_s"], request["kill_when"]
    awaited = None if when is None else Path(request["directory"]) / when
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - started
        if done:
            break
        if awaited is not None and awaited.exists():
            awaited, limit = None, seconds
        if seconds >= (60 if limit is None else limit):
            os.kill(child, signal.SIGKILL if seconds > 60 else request["kill_by"])
            limit = 61
        time.sleep(0.002)
    operations = os.read(reader, 20)
    os.close(reader)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "operations": int(operations or 0),
    }


def main() -> None:
    """Import what runs need, then serve jobs until stdin ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever is printed is no answer
    import matplotlib.pyplot  # noqa: F401

    import fedtune.run.seeds  # noqa: F401
    import tests.federation.scripted
    import tests.federation.small  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        os.write(answers, json.dumps(_serve(json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    main()
