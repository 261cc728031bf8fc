"""Clients that train nothing, under a codec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.client.replies import LocalResult, Sent
from fedtune.client.worker import Worker
from fedtune.transport.messages import RoundTask
from tests.federation.test_codecs import coded, workers


class Echo(Worker):
    """Clients that train nothing: they return what they were sent."""

    def train_round(self, client: str, task: RoundTask, sent: Sent) -> LocalResult:
        return LocalResult(dict(sent.params), 1, 1, 4, 0.0, 0.0)

    def own(self, client: str) -> dict[str, Tensor]:
        """None, so that the first message goes down in 16 bits."""
        return {}


@pytest.mark.parametrize("direction", ["both", "up", "down"])
def test_what_is_lost_on_the_way_down_stays_out_of_the_global(
    tmp_path: Path, direction: str
) -> None:
    """Clients that change nothing leave the global as it is, to the rounding of a sum in fp32."""
    made = workers(tmp_path)
    worker = Echo(
        made.build_model, made.build_trainer, made.args, made.train, made.evaluation, tmp_path
    )
    first = {name: tensor.clone() for name, tensor in worker.initial()[0].items()}
    state = coded(worker, "nf4", direction=direction)
    for name, tensor in first.items():
        torch.testing.assert_close(state.params[name], tensor, rtol=1e-6, atol=1e-7)
