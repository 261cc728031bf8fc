"""`fedtune doctor`: versions, device, memory, the built-in model and settings that bite."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.request import getproxies

from packaging.requirements import Requirement

from fedtune.aligned import aligned
from fedtune.proxies import shown

__all__ = ["Row", "examine", "render"]

SHOWN = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "trl"),
    *("bitsandbytes", "safetensors", "numpy", "flwr"),
)
OPTIONAL = {"ray": "ray", "tensorboard": "tracking", "mlflow": "tracking", "wandb": "tracking"}
LOW_MEMORY_GB = 2.0
LOW_DISK_GB = 2.0

Status = Literal["ok", "warn", "FAIL"]


class Row(NamedTuple):
    """One line of the table."""

    status: Status
    name: str
    value: str
    note: str = ""


def examine() -> list[Row]:
    """All rows; a check that crashes is a FAIL row, not a traceback."""
    return [row for check in CHECKS for row in _guarded(check)]


def render(rows: list[Row]) -> str:
    """The rows as an aligned table and a last line that counts faults."""
    faults = sum(row.status == "FAIL" for row in rows)
    warnings = sum(row.status == "warn" for row in rows)
    return "\n".join([*aligned(rows, right=()), f"{faults} faults, {warnings} warnings"])


def _guarded(check: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from check()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        yield Row("FAIL", check.__name__.strip("_").replace("_", " "), "", text)


def _python() -> Iterator[Row]:
    note = "" if sys.version_info >= (3, 11) else "needs >=3.11"
    yield Row("FAIL" if note else "ok", "python", platform.python_version(), note)


def _packages() -> Iterator[Row]:
    ranges = {r.name: r for r in map(Requirement, requires("fedtune") or ()) if r.marker is None}
    for name in SHOWN:
        yield _package(name, ranges.get(name))
    for name, extra in OPTIONAL.items():
        try:
            yield Row("ok", name, version(name))
        except PackageNotFoundError:
            yield Row("ok", name, "-", f"optional: pip install 'fedtune[{extra}]'")


def _package(name: str, wanted: Requirement | None) -> Row:
    accepted = str(wanted.specifier) if wanted else ""
    try:
        found = version(name)
    except PackageNotFoundError:
        return Row("FAIL", name, "-", f"not installed; needs {name}{accepted}")
    if wanted and not wanted.specifier.contains(found, prereleases=True):
        return Row("FAIL", name, found, f"outside {accepted}: pip install '{name}{accepted}'")
    return Row("ok", name, found)


def _device() -> Iterator[Row]:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        note = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        yield Row("ok", "device", torch.cuda.get_device_name(), note)
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        found = torch.accelerator.is_available()
        kind = torch.accelerator.current_accelerator() if found else "cpu"
        yield Row("ok", "device", str(kind), built)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = torch.get_num_threads()
    note = f"more threads than cores ({cores}): set OMP_NUM_THREADS" if threads > cores else ""
    yield Row("warn" if note else "ok", "threads", f"{threads} on {cores} cores", note)


def _memory() -> Iterator[Row]:
    free = _available_gb()
    if free is None:
        yield Row("ok", "memory", "unknown")
        return
    low = free < LOW_MEMORY_GB
    yield Row("warn" if low else "ok", "memory", f"{free:.1f} GB free", "little" if low else "")


def _available_gb() -> float | None:
    """MemAvailable, cut to what the cgroup (a container's limit) leaves; None off Linux."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(line.split()[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free / 1e9


def _disk() -> Iterator[Row]:
    free = shutil.disk_usage(".").free / 1e9
    low = free < LOW_DISK_GB
    note = "little here, where outputs/ goes" if low else ""
    yield Row("warn" if low else "ok", "disk", f"{free:.1f} GB free", note)


def _built_in_model() -> Iterator[Row]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from fedtune.assets import MODEL_DIR

    disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True)
    inputs = tokenizer("The", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    made = int(tokens.shape[1] - inputs["input_ids"].shape[1])
    yield Row("ok", "built-in model", f"{model.num_parameters():,} weights", f"made {made} tokens")


def _environment() -> Iterator[Row]:
    for name, value in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1")):
        good = os.environ.get(name) == value
        note = "" if good else f"set it to {value}: Flower calls out to the internet"
        yield Row("ok" if good else "warn", name, os.environ.get(name, "unset"), note)
    if importlib.util.find_spec("ray") and "OMP_NUM_THREADS" not in os.environ:
        yield Row("warn", "OMP_NUM_THREADS", "unset", "ray's actors would share cores; set it to 1")
    for part in ("MIXED_PRECISION", "USE_DEEPSPEED", "USE_FSDP"):
        if (name := f"ACCELERATE_{part}") in os.environ:
            yield Row("warn", name, os.environ[name], "overrides the Trainer's settings")


def _proxies() -> Iterator[Row]:
    """What fedtune join, Flower and the hub's downloads go through."""
    proxies = getproxies()
    around = proxies.pop("no", "")
    for scheme, url in sorted(proxies.items()):
        note = "with a user name, which is not shown" if "@" in url else ""
        yield Row("ok", f"{scheme}_proxy", shown(url), note)
    if proxies:
        yield Row("ok", "no_proxy", around or "unset", "reached without a proxy")
    else:
        yield Row("ok", "proxy", "none")


CHECKS: tuple[Callable[[], Iterator[Row]], ...] = (
    _python,
    _packages,
    _device,
    _memory,
    _disk,
    _built_in_model,
    _environment,
    _proxies,
)
