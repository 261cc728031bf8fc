"""The private directory of one run at one site: `fedtune join`, the relay and the trainer share it.

authkey         32 random bytes, 0600 in a 0700 folder: who may talk on the socket
plan.json       what the server asked for; the trainer starts once it is there
trainer.sock    bound by the trainer
trainer.lock    held by the trainer that owns the socket
replies/        the last replies, by request key
status.json     what the trainer is doing, for people
progress.json   what the relay has handed on: the last round, and whether the run is over
flower.json     which of Flower's runs goes on here
started         touched when the script is started
over.json       that the run is over at the server, where the trainer has not heard it
refused.json    why the script would fail again if it was started again
failure.json    why the script failed, in its own words
ended.json      the script's exit status, once it will not be started again
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError
from fedtune.failures import Failure, how_ended
from fedtune.files import read_json, write_json

__all__ = ["ENVIRONMENT", "Over", "Progress", "RunFolder", "SitePlan"]

ENVIRONMENT = "FEDTUNE_SESSION"  # names the folder to a trainer that `fedtune join` starts
SHORT_BYTES = 4096  # of a reply without tensors
MAX_SOCKET_PATH = 107  # bytes of a Unix socket's path on Linux, without the closing zero


@dataclass(frozen=True)
class SitePlan:
    """What the server asks of a site for a whole run.

    Attributes:
        run: id of the run.
        client: name of this site.
        steps: optimizer steps per round, or 0 when `epochs` counts.
        epochs: passes over the site's rows per round, or 0.
        carry: whether optimizer, scheduler, RNG and data position continue over rounds.
        idle_timeout_s: how long the trainer waits without a word from the server.
        max_steps: the site's own limit on the steps of the whole run, or 0; the trainer holds it
            where only the trainer knows the steps.
    """

    run: str
    client: str
    num_rounds: int
    steps: int
    epochs: float
    carry: bool
    seed: int
    idle_timeout_s: float = 3600.0
    max_steps: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a run has come at this site.

    Attributes:
        round: the last round that was handed to the trainer; 0 before the first.
        finished: whether the trainer has confirmed the end of the run.
        reason: why it ended, in the server's words.
    """

    round: int = 0
    finished: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Over:
    """A run that is over at the server.

    Attributes:
        flower_run: Flower's id of it.
        reason: in words.
        at_once: whether the script is ended; else it is kept, for a run that continues this one.
    """

    flower_run: str
    reason: str
    at_once: bool


class RunFolder:
    """Paths and small files of the folder. `create` makes it, anyone else opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder with a new key; raises ConfigError when its socket's path is too long."""
        folder = cls(path)
        folder.check_length()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        if not folder.authkey_file.exists():
            descriptor = os.open(folder.authkey_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(secrets.token_bytes(32))
        folder.replies.mkdir(mode=0o700, exist_ok=True)
        return folder

    def check_length(self) -> None:
        """Raises ConfigError when no socket can be bound in this folder."""
        length = len(os.fsencode(self.socket))
        if length > MAX_SOCKET_PATH:
            raise ConfigError(
                f"session folder {self.path}: expected a socket path of at most {MAX_SOCKET_PATH} "
                f"bytes, received {length}. Set TMPDIR to a shorter directory."
            )

    @classmethod
    def of_environment(cls) -> RunFolder | None:
        """The folder that `fedtune join` named, or None when this process runs alone."""
        path = os.environ.get(ENVIRONMENT)
        return cls(Path(path)) if path else None

    @property
    def socket(self) -> Path:
        """The trainer's socket."""
        return self.path / "trainer.sock"

    @property
    def lock(self) -> Path:
        """Locked by the trainer that owns the socket."""
        return self.path / "trainer.lock"

    @property
    def authkey_file(self) -> Path:
        """Holds the key."""
        return self.path / "authkey"

    @property
    def replies(self) -> Path:
        """Directory of cached replies."""
        return self.path / "replies"

    @property
    def authkey(self) -> bytes:
        """The key of this folder."""
        return self.authkey_file.read_bytes()

    @property
    def plan(self) -> SitePlan | None:
        """The server's plan, once it has been written."""
        plain = self._read("plan.json")
        return None if plain is None else SitePlan(**plain)

    def write_plan(self, plan: SitePlan) -> None:
        """Write the plan whole; this starts the trainer."""
        write_json(self.path / "plan.json", asdict(plan))

    @property
    def flower_run(self) -> str:
        """Flower's id of the run that last asked for this one; a continued run has another."""
        return str((self._read("flower.json") or {}).get("run", ""))

    def write_flower_run(self, run_id: str) -> None:
        """Note which of Flower's runs goes on here."""
        write_json(self.path / "flower.json", {"run": run_id})

    @property
    def is_over(self) -> bool:
        """Whether the trainer has heard of the end, or its script has ended."""
        return self.exit_status is not None or self.progress.finished

    @property
    def over(self) -> Over | None:
        """That the run which goes on here is over at the server, or None."""
        plain = self._read("over.json")
        over = None if plain is None else Over(**plain)
        return over if over and over.flower_run == self.flower_run else None

    def write_over(self, over: Over) -> None:
        """Note that the run is over at the server."""
        write_json(self.path / "over.json", asdict(over))

    @property
    def starting_s(self) -> float:
        """Seconds since the script was started; since the plan came, where it was not yet."""
        for name in ("started", "plan.json"):
            with contextlib.suppress(FileNotFoundError):
                return max(0.0, time.time() - (self.path / name).stat().st_mtime)
        return 0.0

    def note_start(self) -> None:
        """The script is started, perhaps again."""
        (self.path / "started").touch()

    @property
    def status(self) -> dict[str, Any]:
        """What the trainer last said of itself; empty before that."""
        return self._read("status.json") or {}

    def write_status(self, **status: Any) -> None:
        """Say what the trainer is doing."""
        write_json(self.path / "status.json", status)

    @property
    def refusal(self) -> str:
        """Why the script's settings do not fit the run, or nothing."""
        return str((self._read("refused.json") or {}).get("reason", ""))

    def write_refusal(self, reason: str) -> None:
        """Say that starting the script again would not help."""
        write_json(self.path / "refused.json", {"reason": reason})

    @property
    def exit_status(self) -> int | None:
        """Status of the script that has ended for good, or None while it runs or may restart."""
        plain = self._read("ended.json")
        return None if plain is None else int(plain["status"])

    @property
    def end(self) -> str:
        """How the script ended and why it will not be started again; nothing before."""
        plain = self._read("ended.json")
        if plain is None:
            return ""
        reason = f" ({plain['reason']})" if plain.get("reason") else ""
        return f"the site's script {how_ended(int(plain['status']))}{reason}"

    @property
    def failure(self) -> Failure | None:
        """Why the script failed, where it could tell."""
        plain = self._read("failure.json")
        return None if plain is None else Failure(**plain)

    def write_failure(self, failure: Failure) -> None:
        """Say why the script fails; what was said first stays."""
        if self.failure is None:
            write_json(self.path / "failure.json", asdict(failure))

    def forget_failure(self) -> None:
        """The script is started again."""
        (self.path / "failure.json").unlink(missing_ok=True)

    def write_exit_status(self, status: int, reason: str = "") -> None:
        """Say that the script will not be started again, and why."""
        write_json(self.path / "ended.json", {"status": status, "reason": reason})

    @property
    def ended_s(self) -> float | None:
        """Seconds since the script has ended for good, or None while it runs or may restart."""
        with contextlib.suppress(FileNotFoundError):
            return max(0.0, time.time() - (self.path / "ended.json").stat().st_mtime)
        return None

    def clean(self) -> None:
        """Remove what a script that has ended leaves; what answers a late goodbye stays."""
        self.drop_replies()
        for path in list(self.path.rglob("*")):
            kept = path.suffix == ".json" or path == self.authkey_file
            if not path.is_dir() and not kept and path.parent != self.replies:
                path.unlink(missing_ok=True)

    def drop_replies(self) -> None:
        """Remove all replies but that to the goodbye, which is short, as it holds no tensors."""
        for path in list(self.replies.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size > SHORT_BYTES:
                    path.unlink()

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return Progress(**(self._read("progress.json") or {}))

    def write_progress(self, progress: Progress) -> None:
        """Note how far the run has come."""
        write_json(self.path / "progress.json", asdict(progress))

    def _read(self, name: str) -> Any:
        try:
            return read_json(self.path / name)
        except (FileNotFoundError, ValueError):
            return None
