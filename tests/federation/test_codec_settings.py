"""Which federations get the codec of the flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.client.worker import Worker
from fedtune.config import FederationArguments, TransportArguments
from fedtune.errors import RoundError
from fedtune.run import federate
from fedtune.server.app import ServerRun
from fedtune.server.checkpoint import ServerState
from fedtune.strategies import build_method
from fedtune.transport.settings import CodecSettings
from tests.federation.small import PLAN, nothing, server_run, small_worker

NF4 = TransportArguments(codec="nf4")


@pytest.mark.parametrize(("method", "feedback"), [("fedavg", True), ("flora", False)])
def test_feedback_is_off_where_the_next_factors_are_others(method: str, feedback: bool) -> None:
    run = ServerRun.of(
        FederationArguments(),
        PLAN,
        build_method(method, weight_by="tokens"),
        on_round=nothing,
        min_clients=1,
        init_adapter=None,
        transport=NF4,
    )
    assert run.codec == CodecSettings(codec="nf4", feedback=feedback)
    assert server_run(1).codec == CodecSettings()


def test_only_the_federated_arm_has_the_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop(run: ServerRun, worker: Worker) -> None:
        seen.append(run.codec)
        run.error = RoundError("seen")

    monkeypatch.setattr(federate, "_run_inline", stop)
    worker = small_worker(tmp_path)
    worker.args.transport = NF4
    start = ServerState(0, {}, {}, worker.manifest)
    with pytest.raises(RoundError, match="seen"):
        federate.federate(worker.args, worker, tmp_path / "run")
    for control in ("fixed_global", "fedavg"):
        with pytest.raises(RoundError, match="seen"):
            federate.federate_control(worker.args, worker, control, start, "control")
    assert seen == [CodecSettings(codec="nf4", feedback=True), CodecSettings(), CodecSettings()]
