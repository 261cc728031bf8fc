"""Set-up of every test: no network, one thread, a fixed seed."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

# Before the imports that read them: torch, transformers, flwr, ray.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
}.items():
    os.environ.setdefault(_name, _value)

# A shell that starts the tests in the background ignores these, and programs would inherit that.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real model that lie beside the repository; a test without them skips."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data and models in {SHARED.name}/ beside the repository")
    return SHARED
