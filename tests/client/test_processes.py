"""Trainers in processes of their own: killed and started again, or several to one site."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedtune.client.per_token import PerToken
from fedtune.relay.folder import RunFolder
from fedtune.relay.frames import encode
from fedtune.relay.link import ask
from fedtune.transport import decode as decoded
from fedtune.transport import encode as encoded
from fedtune.transport.coded_records import OLD, VERSION, as_record, bytes_in, wrap
from fedtune.transport.differences import code, form_of, undo
from fedtune.transport.messages import ARRAYS, CONTROL, TRAIN, arrays_of, pack
from fedtune.transport.settings import CodecSettings
from fedtune.transport.versions import Version
from tests.client.driver import Params, Server, planned, send, trained
from tests.client.script import digest
from tests.client.trainers import small_trainer, train
from tests.federation.small import same_tensors

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
LIMIT_S = 120.0
patiently = partial(ask, start_timeout_s=60.0, timeout_s=120.0)


def script(*arguments: object, ranks: int = 1) -> int:
    """Exit status of the script; it is killed when it takes too long."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    process = subprocess.Popen(
        [sys.executable, *(launcher if ranks > 1 else []), "-m", "tests.client.script"]
        + [str(argument) for argument in arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        return process.wait(LIMIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def steps(directory: Path, rank: int = 0) -> list[tuple[int, str, str]]:
    lines = (directory / f"steps-{rank}.log").read_text().splitlines()
    rows = [line.split() for line in lines]
    return [(int(step), rate, digest) for step, rate, digest in rows]


@pytest.mark.parametrize("save_steps", [0, 4])
def test_a_killed_trainer_goes_on(run: RunFolder, tmp_path: Path, save_steps: int) -> None:
    """Killed in round 2: from its own checkpoint the run is the one that was never killed."""
    plain = train(small_trainer(tmp_path / "plain"))
    server = Server(run, send=patiently)
    with server:
        assert script(tmp_path, "--kill_at=6", f"--save_steps={save_steps}") == -signal.SIGKILL
        assert script(tmp_path, f"--save_steps={save_steps}") == 0
    done = steps(tmp_path)
    assert [step for step, _, _ in done] == [*range(6), *range(4, 12)]
    rates = [rate for _, rate, _ in done]
    assert rates[4:6] == rates[6:8]
    # What round 2 starts from is what it started from before.
    assert done[4][2] == done[6][2]
    assert [trained(frame)["num-steps"] for frame in server.updates] == [4, 4, 4]
    final = load_file(tmp_path / "final-0.safetensors")
    assert same_tensors(final, arrays_of(server.updates[-1].content))
    assert same_tensors(final, plain.params) == (save_steps == 4)


def test_ranks_of_one_site_train_the_same(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert script(tmp_path / "plain", "--plain", ranks=2) == 0
    with Server(run, send=patiently) as server:
        assert script(tmp_path, "--spread_out", ranks=2) == 0
    assert steps(tmp_path, 0) == steps(tmp_path, 1) == steps(tmp_path / "plain", 0)
    finals = [load_file(tmp_path / f"final-{rank}.safetensors") for rank in range(2)]
    assert same_tensors(*finals)
    assert same_tensors(finals[0], load_file(tmp_path / "plain" / "final-0.safetensors"))
    # 2 rows on each rank; 13 rows make 4 batches on each, the last of them filled up.
    assert trained(server.updates[0])["num-examples"] == 16
    assert len(server.scores) == 4
    alone = small_trainer(tmp_path / "alone")
    with PerToken(alone) as scored:
        assert alone.model is not None
        initial = scored.score(alone.evaluate()).metrics["eval_loss"]
    assert server.scores[0]["eval_loss"] == pytest.approx(initial, rel=1e-6)
    assert [(score["num-examples"], score["num-tokens"]) for score in server.scores] == [
        (6, 66)
    ] * 4
    assert [(tmp_path / f"spread-{rank}.txt").read_text() for rank in range(2)] == ["ok", "ok"]


def test_ranks_leave_the_same_factors_still(run: RunFolder, tmp_path: Path) -> None:
    """RoLoRA with SCAFFOLD: DDP, made before the round, waits for the gradients of all factors."""

    def script_of_rolora(server: Server) -> None:
        params, last = server.begin(), 0
        for number in range(1, 4):
            still = [name for name in params if ("lora_A" in name) == (number % 2 == 1)]
            update = server.train(
                number, params, frozen=still, correction="scaffold", resume_round=last
            )
            assert update.keys() == params.keys() - set(still)
            change = arrays_of(server.updates[-1].content, CONTROL)
            assert change.keys() == update.keys()
            assert any(bool(tensor.any()) for tensor in change.values())
            assert any(not torch.equal(update[name], params[name]) for name in update)
            params, last = {name: update.get(name, old) for name, old in params.items()}, number
            sent.append(params)
        server.finish(params, 3)

    sent: list[Params] = []
    with Server(run, script_of_rolora, send=patiently):
        assert script(tmp_path, ranks=2) == 0
    assert steps(tmp_path, 0) == steps(tmp_path, 1)
    for rank in range(2):
        assert same_tensors(load_file(tmp_path / f"final-{rank}.safetensors"), sent[-1])


def test_when_rank_0_fails_all_end(run: RunFolder, tmp_path: Path) -> None:
    planned(run, idle_timeout_s=1.0)

    def one_round(server: Server) -> None:
        server.train(1, server.begin())

    with Server(run, one_round, send=patiently):
        assert script(tmp_path, ranks=2) != 0
    errors = [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "within 1 s" in errors[0]


def test_why_another_rank_failed_is_found(run: RunFolder, tmp_path: Path) -> None:
    """Rank 0, which talks, is ended by the launcher and can say nothing."""

    def one_round(server: Server) -> None:
        frame = server.train_frame(1, server.begin())
        with suppress(EOFError, OSError):
            send(run, frame)

    with Server(run, one_round):
        assert script(tmp_path, "--raise_at=2", ranks=2) == 1
    assert run.failure is not None
    assert run.failure.outside == f"ValueError (id {run.failure.id})"


@dataclass
class CodedServer(Server):
    """Trains with int8 differences both ways.

    Attributes:
        versions: what the client has in each round.
    """

    versions: list[Version] = field(default_factory=list)

    def train(self, number: int, params: Params, **given: Any) -> Params:
        settings = CodecSettings("int8", min_size=1)
        held = self.versions[-1] if self.versions else Version("", {})
        meant = {f"{ARRAYS}/{name}": tensor for name, tensor in params.items()}
        forms = {
            name: form_of(name, tensor, held.received.get(name), "int8", settings)
            for name, tensor in meant.items()
        }
        coded = code(meant, forms, held.received)
        self.versions.append(Version.of(coded.received, meant))
        facts = {**settings.record(), OLD: held.name, VERSION: self.versions[-1].name}
        content = wrap(pack(config=self.task(number).record()), as_record(coded.data), facts)
        self.updates.append(self.send(self.folder, encode(TRAIN, content)))
        data = bytes_in(self.good(self.updates[-1]))
        assert data is not None
        return bare(undo(data, meant))


def bare(tensors: Mapping[str, Tensor]) -> Params:
    return {name.removeprefix(f"{ARRAYS}/"): tensor for name, tensor in tensors.items()}


def test_ranks_load_what_the_first_of_them_decodes(run: RunFolder, tmp_path: Path) -> None:
    """The first update is that of a run without a codec, its difference through int8 once."""

    def one_round(server: Server) -> None:
        server.finish(server.train(1, sixteen_bits(server.begin())), 1, "stopped")

    def three_rounds(server: Server) -> None:
        params = sixteen_bits(server.begin())
        for number in range(1, 4):
            sent.append(params)
            params = server.train(number, params)
        sent.append(params)
        server.finish(params, 3)

    sent: list[Params] = []
    with Server(run, one_round, send=patiently) as plain:
        (tmp_path / "plain").mkdir()
        assert script(tmp_path / "plain", ranks=2) == 0
    with CodedServer(run, three_rounds, send=patiently) as server:
        assert script(tmp_path, ranks=2) == 0
    update = arrays_of(plain.updates[0].content)
    for name, first in sent[0].items():
        difference = decoded(encoded(update[name] - first, "int8"))
        assert torch.equal(sent[1][name], first + difference)
    assert steps(tmp_path, 0) == steps(tmp_path, 1)
    begins = [steps(tmp_path)[4 * number][2] for number in range(3)]
    assert begins == [digest(bare(version.received)) for version in server.versions]
    for rank in range(2):
        assert same_tensors(load_file(tmp_path / f"final-{rank}.safetensors"), sent[-1])


def sixteen_bits(params: Params) -> Params:
    """What the whole first message, in 16 bits, brings without any loss."""
    return {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in params.items()}
