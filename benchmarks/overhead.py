"""What federation costs beyond training, in one process.

python benchmarks/overhead.py                      # all three tables, about 10 minutes
python benchmarks/overhead.py --only round,fold    # about 2 minutes

trainer  one federated client against the plain Trainer, the same steps, alternating: time ratio
round    seconds a client and round beyond its optimizer steps, 5 MB adapter, inline engine
fold     peak memory of the server while it folds 10 and 100 clients of 5 MB
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("trainer", "round", "fold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--steps", type=int, default=1800, help="trainer: optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=10, help="trainer: rounds of a federated run")
    parser.add_argument("--pairs", type=int, default=3, help="how often both are timed")
    parser.add_argument("--short", type=int, default=20, help="round: rounds of one step")
    parser.add_argument("--clients", default="10,100", help="fold: numbers of clients")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--fold-clients", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fold_clients is not None:
        print(fold_peak_mb(args.fold_clients))
        return
    measure = {"trainer": measure_trainer, "round": measure_round, "fold": measure_fold}
    results = {}
    for part in args.only.split(","):
        results[part] = measure[part](args)
        print(f"{part:<8} " + "  ".join(f"{key} {value}" for key, value in results[part].items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure_trainer(args: argparse.Namespace) -> dict[str, object]:
    """Alternate plain and federated runs of the same steps on the embedded model."""
    plain_s, federated_s = [], []
    with tempfile.TemporaryDirectory() as scratch:
        per_round = args.steps // args.rounds
        flags = f"--num_rounds {args.rounds} --steps_per_round {per_round} --eval_fraction 0.006"
        arguments, worker = one_client(Path(scratch), flags.split())
        for pair in range(args.pairs):
            plain_s.append(time_plain(arguments, worker, args.rounds * per_round))
            federated_s.append(time_federated(arguments, worker, Path(scratch) / f"run{pair}"))
    ratios = [ours / theirs for ours, theirs in zip(federated_s, plain_s, strict=True)]
    return {
        "plain_s": round(statistics.median(plain_s), 2),
        "federated_s": round(statistics.median(federated_s), 2),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def one_client(scratch: Path, flags: list[str]):
    """Settings and worker of the main recipe with a single client."""
    from trl import SFTConfig

    from fedtune.run.launch import quiet_libraries
    from fedtune.run.prepare import load_silos, prepare
    from fedtune.settings import parse_arguments

    quiet_libraries()
    recipes = Path(__file__).parents[1] / "recipes"
    sys.path.insert(0, str(recipes))
    import lora_sft

    base = ["--num_clients", "1", "--partition", "iid", "--output_dir", str(scratch / "out")]
    arguments = parse_arguments(SFTConfig, [*base, *flags], recipe_file=recipes / "lora_sft.py")
    prepared = prepare(
        arguments,
        42,
        load_silos(arguments),
        scratch / "clients",
        lora_sft.build_model,
        lora_sft.build_trainer,
    )
    return arguments, prepared.worker


def time_plain(arguments, worker, steps: int) -> float:
    """Seconds of a plain `trainer.train()`."""
    (name,) = worker.train
    trainer = worker.fork(work_dir=worker.work_dir / "plain").new_trainer(
        worker.train[name], None, name
    )
    trainer.args.max_steps = steps
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def time_federated(arguments, worker, directory: Path) -> float:
    """Seconds of the federated run, its evaluations left out and its files included."""
    from fedtune.run.federate import federate

    directory.mkdir()
    alone = worker.fork(work_dir=directory / "clients")
    for name in alone.train:  # the plain Trainer is built outside its time too
        alone.trainer(name)
    started = time.perf_counter()
    _, last = federate(alone.args, alone, directory)
    evaluate_s = sum(record["time"]["evaluate"] for record in last.history)
    return time.perf_counter() - started - evaluate_s


def measure_round(args: argparse.Namespace) -> dict[str, object]:
    """Rounds of one step against the same steps in one plain run, LoRA of 5 MB in 224 tensors."""
    rounds = args.short
    with tempfile.TemporaryDirectory() as scratch:
        flags = (
            f"--model_name_or_path {wide_model(Path(scratch))} --lora_r 22 --num_rounds {rounds} "
            "--steps_per_round 1 --eval_fraction 0.006"
        )
        arguments, worker = one_client(Path(scratch), flags.split())
        params, _ = worker.initial()
        megabytes = sum(value.numel() * value.element_size() for value in params.values()) / 1e6
        plain, federated = [], []
        for pair in range(args.pairs):
            plain.append(time_plain(arguments, worker, rounds))
            federated.append(time_federated(arguments, worker, Path(scratch) / f"run{pair}"))
    overhead = [(ours - theirs) / rounds for ours, theirs in zip(federated, plain, strict=True)]
    return {
        "adapter_mb": round(megabytes, 2),
        "tensors": len(params),
        "seconds_per_client_round": round(statistics.median(overhead), 3),
        "all": [round(value, 3) for value in overhead],
    }


def wide_model(scratch: Path) -> Path:
    """A random Llama of 16 layers, wide enough for the ranks, with the embedded tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedtune.assets import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(scratch / "model")
    return scratch / "model"


def measure_fold(args: argparse.Namespace) -> dict[str, object]:
    """Peak resident memory (VmHWM) of a process that folds scripted 5 MB replies."""
    peaks = {}
    for clients in map(int, args.clients.split(",")):
        words = [sys.executable, __file__, "--fold-clients", str(clients)]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        peaks[f"peak_mb_{clients}_clients"] = float(out.split()[-1])
    return peaks


def fold_peak_mb(clients: int) -> float:
    """Fold `clients` replies of 5 MB in this process; VmHWM in MB."""
    import torch
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    from fedtune._flower.task_message import task_identity
    from fedtune.adapters import Entry, Manifest
    from fedtune.engines.inline import InlineGrid
    from fedtune.server.checkpoint import ServerState
    from fedtune.server.plan import Plan
    from fedtune.server.rounds.central import CentralRounds
    from fedtune.server.rounds.exchange import DirectExchange
    from fedtune.server.rounds.workflow import Setting
    from fedtune.strategies import Method
    from fedtune.transport.grid import EagerGrid
    from fedtune.transport.messages import Member, pack

    params = {f"layer{i}.lora_A.weight": torch.randn(125, 1000) for i in range(10)}
    entries = {name: Entry.of(value) for name, value in params.items()}
    manifest = Manifest("LORA", "base", {}, entries)
    app = ClientApp()

    @app.train()
    def train(message, context):
        metrics = {"num-examples": 8, "num-tokens": 100, "num-steps": 1}
        metrics |= {"train-loss": 1.0, "train-s": 0.0}
        name = f"client-{message.metadata.dst_node_id}"
        config = {"client": name, "round": 1, "manifest": manifest.hash}
        update = {name: value + 1 for name, value in params.items()}
        return Message(pack(arrays=update, metrics=metrics, config=config), reply_to=message)

    with task_identity(1, 1):
        inline = InlineGrid(app, clients)
        members = [Member(node, f"client-{node}") for node in inline.get_node_ids()]
        plan = Plan(run="run", num_rounds=1, steps=1, epochs=0.0, carry=True, seed=42)
        exchange = DirectExchange(EagerGrid(inline))
        state = ServerState(0, params, {}, manifest)
        CentralRounds(Setting(exchange, Method(), plan)).play(1, 1, members, state)
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1e3


if __name__ == "__main__":
    main()
