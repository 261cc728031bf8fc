"""Seconds and memory of every LoRA rule on the shapes of a 7B Llama, and the speed of a plain mean.

python benchmarks/aggregate.py                        # 2 of 32 layers, a minute
python benchmarks/aggregate.py --layers 32 --peers    # all of it: needs 6 GB
python benchmarks/aggregate.py --only mean --peers

rules  8 clients; r = 16, or ranks 4, 8, 12 and 16 twice where it says mixed. `rule` is what a round
       needs, `aggregate` is `fedtune.aggregate`: checks and the residual's certificate besides. MB
       are beyond the clients' updates, at the highest point, results included.
mean   GB/s of client updates, records decoded, folded and encoded, against the speed of reading
       memory, and with --peers against Flower's own aggregation of the same records; medians of
       RUNS. `moved_gb_s` counts what the fold has to move: of every update 4 B a parameter read and
       two fp64 sums read and written (the first only writes them), and of the mean the sums read, 4
       B written, read and written again as a record. `floor_gb_s` is one fp64 sum in place of two,
       without decoding and encoding: fast, and not free of the order

Each row is a process of its own with one thread (--threads). Seconds are wall clock, `cpu_s` those
of the processor: on a busy machine only the latter mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

CLIENTS = 8
RUNS = 5
RANKS = {"r=16": [16] * CLIENTS, "mixed": [4, 8, 12, 16] * 2}
RULES = [
    ("fedit", "r=16"),
    ("ffa_lora", "r=16"),
    ("flora", "r=16"),
    ("flora", "mixed"),
    ("fedex_lora", "r=16"),
    ("flexlora", "r=16"),
    ("flexlora", "mixed"),
    ("hetlora", "mixed"),
    ("raflora", "mixed"),
]
# Llama 7B, (out, in).
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}
WEIGHTS = [float(1 + k) for k in range(CLIENTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="of 32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="rules,mean", help="comma-separated parts")
    parser.add_argument("--peers", action="store_true", help="mean: also Flower's own aggregation")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        part, *names = args.row.split("/")
        measure = {"rules": measure_rule, "mean": measure_mean, "flower": measure_flower}
        print(json.dumps(measure[part](args.layers, *names)))
        return
    parts = args.only.split(",")
    rows = [f"rules/{rule}/{ranks}" for rule, ranks in RULES] if "rules" in parts else []
    rows += ["mean"] if "mean" in parts else []
    rows += ["flower"] if "mean" in parts and args.peers else []
    results = {}
    for row in rows:
        results[row] = in_own_process(row, args)
        print(f"{row:<24}" + "  ".join(f"{k} {v}" for k, v in results[row].items()), flush=True)
    if args.json:
        about = {"layers": args.layers, "threads": args.threads, "clients": CLIENTS}
        args.json.write_text(json.dumps({**about, "rows": results}, indent=1))


def in_own_process(row: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--layers", str(args.layers), "--row", row]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def updates_of(layers: int, ranks: list[int]):
    """Random factors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [
        {
            f"layers.{layer}.{name}.{factor}.weight": torch.randn(shape, generator=generator)
            for layer in range(layers)
            for name, (out_dim, in_dim) in SHAPES.items()
            for factor, shape in (("lora_A", (rank, in_dim)), ("lora_B", (out_dim, rank)))
        }
        for rank in ranks
    ]


def measure_rule(layers: int, name: str, ranks: str) -> dict[str, float]:
    """Seconds of one rule, alone and with everything that `aggregate` adds, and megabytes."""
    import fedtune
    from fedtune.strategies.base import Round
    from fedtune.strategies.lora import LORA_RULES
    from fedtune.strategies.lora.names import lora_modules

    updates = updates_of(layers, RANKS[ranks])
    if name == "ffa_lora":  # its A is the same everywhere
        updates = [{k: (updates[0] if "lora_A" in k else u)[k] for k in u} for u in updates]
    scaling = dict.fromkeys(lora_modules(updates[0]), 2.0)
    before = resident_mb()
    started, cpu = time.perf_counter(), time.process_time()
    fold = LORA_RULES[name]().fold(Round(scaling=scaling))
    for update, weight in zip(updates, WEIGHTS, strict=True):
        fold.add(update, weight)
    fold.result()
    rule_s, rule_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    rule_mb = peak_mb() - before
    del fold
    started, cpu = time.perf_counter(), time.process_time()
    out = fedtune.aggregate(name, updates, WEIGHTS, scaling=scaling)
    return {
        "rule_s": round(rule_s, 2),
        "rule_cpu_s": round(rule_cpu_s, 2),
        "aggregate_s": round(time.perf_counter() - started, 2),
        "aggregate_cpu_s": round(time.process_time() - cpu, 2),
        "rule_mb": round(rule_mb),
        "aggregate_mb": round(peak_mb() - before),
        "updates_mb": round(megabytes(updates)),
        "residual": float(f"{out.residual:.2g}"),
        "residual_fedavg": float(f"{out.residual_fedavg:.2g}"),
    }


def measure_mean(layers: int) -> dict[str, float]:
    """GB/s of updates through the running mean, from records to a record."""
    from fedtune.strategies import RunningMean
    from fedtune.transport.records import params_of, to_arrays

    records, size = records_of(layers)

    def aggregate():
        mean = RunningMean()
        for record, weight in zip(records, WEIGHTS, strict=True):
            mean.add(params_of(record["arrays"], shared=True), weight)
        return to_arrays(mean.result())

    moved = (4 + 32) * CLIENTS - 16 + 16 + 4 + 8  # bytes of a parameter
    speed = speed_of(aggregate, size)
    bandwidth = read_gb_s()
    return {
        **speed,
        "memory_read_gb_s": round(bandwidth, 2),
        "share": round(speed["gb_cpu_s"] / bandwidth, 3),
        "moved_gb_s": round(speed["gb_cpu_s"] * moved / (4 * CLIENTS), 2),
        "floor_gb_s": round(floor_gb_s(), 2),
    }


def measure_flower(layers: int) -> dict[str, float]:
    """The same records through the function that Flower's FedAvg calls (fp32 sums)."""
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records, size = records_of(layers)
    return speed_of(lambda: aggregate_arrayrecords(records, "num-examples"), size)


def speed_of(aggregate, size: float) -> dict[str, float]:
    """GB/s by the clock and by the processor, for `size` megabytes."""
    seconds, cpu_s = [], []
    for _ in range(RUNS):
        started, cpu = time.perf_counter(), time.process_time()
        aggregate()
        seconds.append(time.perf_counter() - started)
        cpu_s.append(time.process_time() - cpu)
    return {
        "gb_s": round(size / 1e3 / statistics.median(seconds), 2),
        "gb_cpu_s": round(size / 1e3 / statistics.median(cpu_s), 2),
    }


def records_of(layers: int):
    """Replies as they arrive, and their megabytes."""
    from flwr.app import MetricRecord, RecordDict

    from fedtune.transport.records import to_arrays

    updates = updates_of(layers, RANKS["r=16"])
    size = megabytes(updates)
    records = []
    for weight in WEIGHTS:
        metrics = MetricRecord({"num-examples": int(weight)})
        records.append(RecordDict({"arrays": to_arrays(updates.pop(0)), "metrics": metrics}))
    return records, size


def read_gb_s() -> float:
    """The best of five passes over 400 MB, in time of the processor."""
    import torch

    data = torch.ones(100_000_000)
    seconds = []
    for _ in range(5):
        cpu = time.process_time()
        data.max()
        seconds.append(time.process_time() - cpu)
    return 0.4 / min(seconds)


def floor_gb_s() -> float:
    """GB/s of fp32 added, one after the other, to one fp64 sum."""
    import numpy as np

    block, size = 1 << 15, 10_000_000
    update, total, term = np.ones(size, np.float32), np.zeros(size), np.empty(block)
    cpu_s = []
    for _ in range(RUNS):
        cpu = time.process_time()
        for start in range(0, size - block, block):
            value, part = update[start : start + block], total[start : start + block]
            np.multiply(value, 3.0, out=term, dtype=np.float64)
            np.add(part, term, out=part)
        cpu_s.append(time.process_time() - cpu)
    return size * 4 / 1e9 / statistics.median(cpu_s)


def megabytes(updates) -> float:
    return sum(t.numel() * t.element_size() for update in updates for t in update.values()) / 1e6


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
