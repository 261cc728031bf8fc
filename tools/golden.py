"""A record of short runs, for comparing what two commits compute on one machine.

python tools/golden.py --out before.json --at HEAD~10   # of a commit, in a git worktree of its own
python tools/golden.py --out after.json                 # of the tree as it is
python tools/golden.py --compare before.json after.json

Every run is made twice; one that differs from itself is left out by name. What is recorded: sha256
of the last adapter's (or model's) tensors, and every loss of every arm and round. Runs go through
the recipes' command lines alone, so that inner modules may move in between.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
SHORT = "--num_rounds 2 --steps_per_round 2 --compare none"
DEMO = f"recipes/lora_sft.py --config recipes/demo.yaml {SHORT}"
PASSES = (
    "recipes/lora_sft.py --config recipes/demo.yaml --num_rounds 2 --compare none --partition size "
    "--num_clients 3 --epochs_per_round 0.1"
)
PROMPTS = f"recipes/ptuning_sentiment.py --config recipes/demo_ptuning_sentiment.yaml {SHORT}"
RUNS = {
    "fedavg": DEMO,
    "fedavg, arms": DEMO.replace("--compare none", "--compare centralized_large_batch,local"),
    "scaffold": f"{DEMO} --strategy scaffold",
    "scaffold+fedavgm": f"{DEMO} --strategy scaffold+fedavgm --strategy_args lr=0.5",
    "fedprox+ffa_lora+fedadam": f"{DEMO} --strategy fedprox+ffa_lora+fedadam",
    "fednova": f"{PASSES} --strategy fednova",
    "flora": f"{DEMO} --strategy flora",
    "fedex_lora": f"{DEMO} --strategy fedex_lora",
    "rolora": f"{DEMO} --strategy rolora",
    "hetlora": f"{DEMO} --strategy hetlora --client_ranks 2,4,6,8",
    "flexlora, mixed ranks": f"{DEMO} --strategy flexlora --client_ranks 2,4,6,8",
    "krum": f"{DEMO} --strategy krum --partition iid --num_clients 5",
    "median+fedyogi": f"{DEMO} --strategy median+fedyogi",
    "fedbuff": f"{DEMO} --strategy fedbuff --client_delays 0,1,2,1 --num_rounds 4",
    "fedsa_lora": f"{DEMO} --strategy fedsa_lora",
    "flwr:FedAdam": f"{DEMO} --strategy flwr:FedAdam",
    "int8": f"{DEMO} --codec int8",
    "nf4": f"{DEMO} --codec nf4",
    "scaffold, nf4": f"{DEMO} --strategy scaffold --codec nf4",
    "p-tuning": PROMPTS,
    "full": f"{DEMO} --peft_method none",
    "full, int8": f"{DEMO} --peft_method none --codec int8",
    "ray": f"{DEMO} --engine ray",
    "ray, flora": f"{DEMO} --engine ray --strategy flora",
    "flower": f"{DEMO} --engine flower --partition iid --num_clients 2",
    "flower, scaffold": f"{DEMO} --engine flower --partition iid --num_clients 2 "
    "--strategy scaffold",
}
OFF = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    """Record, or compare two records; 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the record")
    parser.add_argument("--at", metavar="COMMIT", help="record a commit instead of this tree")
    parser.add_argument("--only", action="append", choices=RUNS, metavar="NAME", help="these runs")
    parser.add_argument("--once", action="store_true", help="trust that runs repeat themselves")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="two records")
    args = parser.parse_args()
    if args.compare:
        return compare(*(json.loads(path.read_text()) for path in args.compare))
    if args.out is None:
        parser.error("--out: expected a file for the record, received none")
    if args.at is None:
        record = recorded(REPOSITORY, args.only or list(RUNS), once=args.once)
    else:
        record = recorded_at(args.at, args.only or list(RUNS), once=args.once)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def recorded_at(commit: str, names: list[str], *, once: bool) -> dict[str, Any]:
    """The record of a commit."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory(prefix="golden-") as directory:
        tree = Path(directory) / "tree"
        subprocess.run([*git, "add", "--detach", "--quiet", tree, commit], check=True)
        try:
            return recorded(tree, names, once=once)
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def recorded(tree: Path, names: list[str], *, once: bool) -> dict[str, Any]:
    """What the runs of a tree come to, and on what machine."""
    runs: dict[str, Any] = {}
    for name in names:
        first = result_of(tree, RUNS[name])
        same = once or result_of(tree, RUNS[name]) == first
        runs[name] = first if same else {"left out": "two runs of it differ"}
        word = "failed" if "failed" in first else "recorded" if same else "differs from itself"
        print(f"{name}: {word}", flush=True)
    packages = ("torch", "transformers", "peft", "flwr", "trl", "numpy")
    return {
        "processor": processor(),
        "versions": {name: version(name) for name in packages},
        "runs": runs,
    }


def processor() -> list[str]:
    """The model, and which kernels torch takes."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return [model, torch.backends.cpu.get_cpu_capability()]


def result_of(tree: Path, words: str) -> dict[str, Any]:
    """Hash of the last tensors and all losses of one run."""
    env = {**os.environ, **OFF, **THREADS, "PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory(prefix="golden-") as directory:
        output = Path(directory) / "run"
        command = [sys.executable, *words.split(), "--output_dir", str(output)]
        ended = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if ended.returncode:
            return {"failed": ended.stderr.strip().splitlines()[-1:]}
        summary = json.loads((output / "summary.json").read_text())
        return {"tensors": digest_of(output), "losses": losses_in(summary["arms"])}


def digest_of(output: Path) -> str:
    """sha256 over names, dtypes, shapes and values of the delivered tensors."""
    files = sorted(
        path for kind in ("adapter", "model") for path in output.glob(f"{kind}/**/*.safetensors")
    )
    if not files:
        raise SystemExit(f"{output}: expected an adapter or a model, found none")
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(output).parent).encode())
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def losses_in(value: Any) -> Any:
    """The losses of a summary, in its nesting; nothing that depends on the clock."""
    if isinstance(value, list):
        return [losses_in(item) for item in value]
    if not isinstance(value, dict):
        return None
    kept = {key: item for key, item in value.items() if key.endswith("_loss")}
    return kept | {
        key: losses_in(item)
        for key, item in value.items()
        if isinstance(item, dict | list) and not key.endswith("_loss")
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print a line for each run; 1 where one differs or is in one record only."""
    if before["processor"] != after["processor"]:
        print(f"not comparable: {before['processor']} and {after['processor']}")
        return 1
    differ = False
    for name in dict.fromkeys([*before["runs"], *after["runs"]]):
        one, other = before["runs"].get(name), after["runs"].get(name)
        equal = one == other and "failed" not in (one or {})
        differ |= not equal
        word = "DIFFERENT" if not equal else "left out" if "left out" in one else "equal"
        print(f"{name:<28}{word}")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
