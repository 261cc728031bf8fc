"""The ray engine: Flower's simulation; actors keep the base model, clients wander between them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedtune._flower.simulation import run_simulation
from fedtune.client.app import client_app
from fedtune.client.worker import Worker

__all__ = ["run_ray"]

SPEC = "worker.pkl"


def run_ray(
    server: ServerApp, worker: Worker, *, cpus_per_client: float, gpus_per_client: float
) -> None:
    """Run a ServerApp against a worker's clients as simulated nodes.

    As many clients train at once as their CPUs and GPUs fit on this machine. The worker reaches the
    actors through a file, once, instead of with every message.
    """
    from ray import cloudpickle

    worker.work_dir.mkdir(parents=True, exist_ok=True)
    spec = worker.work_dir / SPEC
    spec.write_bytes(cloudpickle.dumps(worker.blank()))  # type: ignore[no-untyped-call]
    resources = {"num_cpus": cpus_per_client, "num_gpus": gpus_per_client}
    backend = {"client_resources": resources, "init_args": {"log_to_driver": False}}
    try:
        run_simulation(server, _client_app(spec, cpus_per_client), len(worker.train), backend)
    finally:
        spec.unlink(missing_ok=True)


def _client_app(spec: Path, cpus: float) -> ClientApp:
    return client_app(lambda: _worker_of_process(spec, cpus))


@cache
def _worker_of_process(spec: Path, cpus: float) -> Worker:
    """The worker of this actor; its model is built on first use and kept."""
    import torch
    from ray import cloudpickle

    torch.set_num_threads(max(1, int(cpus)))
    worker: Worker = cloudpickle.loads(spec.read_bytes())
    return worker
