"""Server scalars of each round to TensorBoard, MLflow or W&B, through accelerate's trackers.

All of it stays in `directory/logs` unless the user's own environment says otherwise
(MLFLOW_TRACKING_URI, WANDB_MODE). A tracker that fails in the middle of a run is dropped with a
warning: a full disk of logs is no reason to lose a federation.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedtune.config import TRACKERS
from fedtune.errors import ConfigError
from fedtune.report import figures
from fedtune.results.values import number

__all__ = ["RoundTracker", "open_trackers", "round_scalars"]

MAX_PARAM = 500  # characters of one setting; MLflow refuses more than 6000

log = logging.getLogger(__name__)


class RoundTracker:
    """The open trackers of one run; `close` ends them, as does leaving the `with` block."""

    def __init__(self) -> None:
        self._trackers: dict[str, Any] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> RoundTracker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """Trackers that are still open."""
        return list(self._trackers)

    def log(self, round: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of one round; what is no finite number is left out."""
        values = {_key(k): n for k, v in scalars.items() if (n := number(v)) is not None}
        if not values:
            return
        for name, tracker in list(self._trackers.items()):
            # MLflow's active run belongs to a thread; by its id a round may come from any.
            where = {"run_id": tracker.tracker.info.run_id} if name == "mlflow" else {}
            try:
                with _plain_logger():
                    tracker.log(values, step=round, **where)
            except Exception as error:
                log.warning("tracker %s failed in round %d and is off: %s", name, round, error)
                del self._trackers[name]

    def close(self) -> None:
        """Flush and end every tracker; a second call does nothing."""
        for name, tracker in self._trackers.items():
            try:
                with _plain_logger():
                    tracker.finish()
            except Exception as error:
                log.warning("tracker %s did not close: %s", name, error)
        self._trackers = {}
        self._cleanup.close()

    def _open(self, name: str, logs: Path, run_name: str, settings: dict[str, str]) -> None:
        tracker = _BUILD[name](logs, run_name, settings, self._cleanup)
        # One server process: asking accelerate for its rank would set up torch.distributed.
        tracker.main_process_only = False
        with _plain_logger():
            tracker.start()
            self._trackers[name] = tracker
            if name != "wandb":  # has its settings from `_wandb`
                tracker.store_init_configuration(settings)


def open_trackers(
    names: Sequence[str], directory: Path, run_name: str, config: Mapping[str, Any]
) -> RoundTracker:
    """Start the named trackers under `directory/logs` and store `config` with them."""
    for name in names:
        _check(name)
    logs = Path(directory).resolve() / "logs"
    settings = {_key(name): value[:MAX_PARAM] for name, value in figures.flat(config)}
    tracker = RoundTracker()
    try:
        for name in dict.fromkeys(names):
            logs.mkdir(parents=True, exist_ok=True)
            tracker._open(name, logs, run_name, settings)
    except BaseException:
        tracker.close()
        raise
    return tracker


def _check(name: str) -> None:
    if name not in TRACKERS:
        raise ConfigError(f"--track: expected {', '.join(TRACKERS)}, received {name!r}.")
    if find_spec(name) is None:
        raise ConfigError(
            f"--track {name}: the package {name} is not installed. "
            'Run: pip install "fedtune[tracking]"'
        )


def _key(name: object) -> str:
    """A name that all three accept."""
    return re.sub(r"[^\w\-./ ]", "_", str(name))


@contextmanager
def _plain_logger() -> Iterator[None]:
    """Swap accelerate's logger, which raises until PartialState exists (a device and a rank)."""
    from accelerate import tracking

    before = tracking.logger
    tracking.logger = logging.getLogger(tracking.__name__)
    try:
        yield
    finally:
        tracking.logger = before


def _tensorboard(logs: Path, run_name: str, _: dict[str, str], __: ExitStack) -> Any:
    from accelerate.tracking import TensorBoardTracker

    folder = re.sub(r"[^\w\-.]", "_", run_name).lstrip(".") or "run"
    return TensorBoardTracker(folder, logs / "tensorboard")


def _mlflow(logs: Path, run_name: str, _: dict[str, str], cleanup: ExitStack) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{logs / 'mlflow.db'}")
        set_uri: Any = mlflow.set_tracking_uri
        cleanup.callback(set_uri, None)  # unsets the environment variable that it sets, too
    return MLflowTracker(
        experiment_name="fedtune",
        logging_dir=(logs / "mlruns").as_uri(),
        run_name=run_name,
        nested_run=True,
    )


def _wandb(logs: Path, run_name: str, settings: dict[str, str], _: ExitStack) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    mode = {} if "WANDB_MODE" in os.environ else {"mode": "offline"}
    return WandBTracker(
        "fedtune",
        name=run_name,
        dir=str(logs),
        config=settings,
        # A run of the user's own Trainer stays as it is; the terminal is left alone.
        settings=wandb.Settings(console="off", reinit="create_new", silent=bool(mode)),
        **mode,
    )


_BUILD = {"mlflow": _mlflow, "tensorboard": _tensorboard, "wandb": _wandb}


def round_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round's record, flat."""
    timing = {f"time_{key}_s": value for key, value in record["time"].items()}
    flat = {**record, **record["eval_metrics"], **timing, "replies": len(record.get("replies", []))}
    return {
        key: float(value)
        for key, value in flat.items()
        if key != "round" and isinstance(value, int | float)
    }
