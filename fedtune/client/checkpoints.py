"""Which of the Trainer's checkpoints belong to this run, so that a killed script can go on.

The mark is written last, so a checkpoint that has it is whole. Weights are not taken from it: the
server sends the global parameters again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.files import read_json, write_json

__all__ = ["Mark", "find_checkpoint", "mark_checkpoint"]

MARK = "fedtune_state.json"


@dataclass(frozen=True)
class Mark:
    """What makes a checkpoint one of a certain run at a certain site.

    Attributes:
        round: the round that was being trained, or trained last.
        step: optimizer steps done.
    """

    run: str
    client: str
    num_rounds: int
    steps_per_round: int
    round: int = 0
    step: int = 0


def mark_checkpoint(directory: Path, mark: Mark) -> None:
    """Note in a checkpoint's directory whose it is."""
    write_json(directory / MARK, asdict(mark))


def find_checkpoint(output_dir: Path, mark: Mark) -> Path | None:
    """The newest checkpoint of this run; those at the end of a round first, they continue exactly.

    Only the fields of `mark` that name the run count.
    """
    found = []
    for path in output_dir.glob(f"checkpoint-*/{MARK}"):
        try:
            read = Mark(**read_json(path))
        except (ValueError, TypeError):
            continue
        if _run_of(read) == _run_of(mark):
            found.append((read.step % read.steps_per_round == 0, read.step, path.parent))
    return max(found)[2] if found else None


def _run_of(mark: Mark) -> tuple[str, str, int, int]:
    return mark.run, mark.client, mark.num_rounds, mark.steps_per_round
