"""A site's script as a program of its own: a small trainer, patched, that may be killed on the way.

It leaves `steps-RANK.log` (step, LR and a digest of the parameters before each step), and
`final-RANK.safetensors`, or `error-RANK.txt`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

import fedtune
from fedtune.adapters import collect
from fedtune.errors import FedtuneError
from fedtune.files import append_line
from tests.client.trainers import small_model, small_trainer


class Steps(TrainerCallback):
    """Writes down every step, and kills the process after one of them."""

    def __init__(self, log: Path, kill_at: int, raise_at: int) -> None:
        self._log, self._kill_at, self._raise_at = log, kill_at, raise_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        rate = given["lr_scheduler"].get_last_lr()[0]
        row = (state.global_step, f"{rate:.6g}", digest(collect(given["model"])))
        append_line(self._log, " ".join(map(str, row)))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self._raise_at:
            raise ValueError("cannot tokenize Jane Roe")


def digest(params: dict[str, Tensor]) -> str:
    data = b"".join(params[name].numpy().tobytes() for name in sorted(params))
    return hashlib.sha256(data).hexdigest()[:12]


def spread_out() -> None:
    """FSDP2: gather what is spread over the processes, and load into it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fedtune.adapters import describe, load
    from fedtune.adapters.sharded import is_sharded

    model = small_model(0.0)
    manifest, before = describe(model), collect(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_sharded(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    same(collect(model), before)
    other = {name: value + 1 for name, value in before.items()}
    load(model, other, manifest)
    same(collect(model), other)
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    after = collect(model)
    assert any(not torch.equal(after[name], other[name]) for name in after)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill_at", type=int, default=-1)
    parser.add_argument("--raise_at", type=int, default=-1, help="in the last rank")
    parser.add_argument("--save_steps", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--spread_out", action="store_true")
    given = parser.parse_args()
    rank = os.environ.get("RANK", "0")
    training: dict[str, Any] = {}
    if given.save_steps:
        training |= {"save_strategy": "steps", "save_steps": given.save_steps}
    if "RANK" in os.environ:
        training |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    torch.set_num_threads(1)
    raise_at = given.raise_at if rank == str(int(os.environ.get("WORLD_SIZE", 1)) - 1) else -1
    log = given.directory / f"steps-{rank}.log"
    trainer = small_trainer(
        given.directory / "output", callbacks=[Steps(log, given.kill_at, raise_at)], **training
    )
    try:
        if not given.plain:
            fedtune.patch(trainer)
        trainer.train()
    except FedtuneError as error:
        (given.directory / f"error-{rank}.txt").write_text(str(error))
        raise SystemExit(3) from None
    assert trainer.model is not None
    save_file(collect(trainer.model), given.directory / f"final-{rank}.safetensors")
    if given.spread_out:
        spread_out()
        (given.directory / f"spread-{rank}.txt").write_text("ok")


if __name__ == "__main__":
    main()
