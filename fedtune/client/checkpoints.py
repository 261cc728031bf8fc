"""Which of the Trainer's checkpoints belong to this run, so that a killed script can go on.

The mark is written last, so a checkpoint that has it is whole. Weights are not taken from it: the
server sends the global parameters again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from fedtune.files import read_json, write_json

__all__ = ["Mark", "another", "find_checkpoint", "mark_checkpoint"]

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


def another(asked: str | bool | None, ours: str | None, output_dir: str | None) -> str:
    """What a script is told that asks for a checkpoint other than the newest of this run.

    Args:
        asked: as `Trainer.train` takes it; True stands for the last one in `output_dir`.
    """
    if asked is True:
        there = output_dir and Path(output_dir).is_dir()
        last = get_last_checkpoint(output_dir) if there else None  # type: ignore[no-untyped-call]
        asked = last or False
    if not asked or (ours and Path(str(asked)).absolute() == Path(ours).absolute()):
        return ""
    begins = f"goes on from {ours}" if ours else "begins with fresh moments"
    return (
        f"{asked} is not its newest checkpoint, so that it {begins}; weights come from the server. "
        "To continue an earlier run: fedtune submit --init_adapter."
    )


def _run_of(mark: Mark) -> tuple[str, str, int, int]:
    return mark.run, mark.client, mark.num_rounds, mark.steps_per_round
