"""What a codec costs in loss and saves in bytes: final eval loss against fp32 transport, by seed.

python benchmarks/codec_loss.py                     # one task, three codecs, cut short, two minutes
python benchmarks/codec_loss.py --full --jobs 2     # docs/results.md, about an hour
python benchmarks/codec_loss.py --full --read --markdown  # the table of the cases that are there

Each case, a task and a codec over all seeds, is one recipe command, which is printed. One that is
already there is only read. All cases of a task differ in their transport alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tables import aligned, as_markdown, spread

from fedtune.report import Series, load_summary

COMMON = (
    "--num_clients 4 --num_rounds 10 --steps_per_round 10 --per_device_train_batch_size 8 "
    "--lr_scheduler_type constant --warmup_steps 0 --eval_fraction 0.06 "
    "--per_device_eval_batch_size 32 --max_length 64"
)
LORA = "--lora_r 8 --lora_target_modules all-linear --learning_rate 5e-3"
WHOLE = "--peft_method none --learning_rate 5e-4"
PHRASEBANK, SHAKESPEARE = "financial_phrasebank.jsonl", "tiny_shakespeare.jsonl"
BY_SPEAKER = "--partition column --partition_column speaker"
SHORT = "--num_rounds 3 --steps_per_round 5 --max_rows 800"
TASKS = {
    "phrasebank-lora": (PHRASEBANK, f"{LORA} --partition iid"),
    "shakespeare-lora": (SHAKESPEARE, f"{LORA} {BY_SPEAKER}"),
    "phrasebank-full": (PHRASEBANK, f"{WHOLE} --partition iid"),
    "shakespeare-full": (SHAKESPEARE, f"{WHOLE} {BY_SPEAKER}"),
}
CODECS = {
    "none": "",
    "bf16": "--codec bf16",
    "int8": "--codec int8",
    "nf4": "--codec nf4",
    "fp4": "--codec fp4",
    "int8, weights": "--codec int8 --codec_on weights",
    "nf4, no feedback": "--codec nf4 --error_feedback false",
    "nf4, weights": "--codec nf4 --codec_on weights",
}
FEW = ("none", "int8", "nf4")
HEADS = ("codec", "final loss", "vs none %", "MB up", "MB down", "of raw %", "codec s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data/ and models/")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/codec_loss"))
    parser.add_argument("--full", action="store_true", help="all cases, whole runs, three seeds")
    parser.add_argument("--tasks", help="comma-separated, of " + ", ".join(TASKS))
    parser.add_argument("--seeds", help="default: 1,2,3 with --full, else 1")
    parser.add_argument("--jobs", type=int, default=1, help="cases side by side")
    parser.add_argument("--read", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--markdown", action="store_true", help="the table as in docs/results.md")
    parser.add_argument("--extra", default="", help="more flags for every run, which win")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if not (args.shared / "models" / "stories260k").is_dir():
        print(f"skipped: no models/stories260k in {args.shared}; point --shared at it")
        return
    tasks = args.tasks.split(",") if args.tasks else list(TASKS)[: None if args.full else 1]
    if unknown := set(tasks) - TASKS.keys():
        parser.error(f"--tasks: no task is called {', '.join(sorted(unknown))}")
    codecs = list(CODECS) if args.full else list(FEW)
    directory = args.output_dir / ("full" if args.full else "short")
    failed = [] if args.read else run_all(tasks, codecs, directory, args)
    rows = [row for task in tasks for row in rows_of(task, codecs, directory)]
    print_tables(rows, args.markdown)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if failed:
        sys.exit("failed: " + ", ".join(failed))


def place_of(directory: Path, task: str, codec: str) -> Path:
    return directory / task / codec.replace(", ", "-").replace(" ", "_")


def run_all(
    tasks: Sequence[str], codecs: Sequence[str], directory: Path, args: argparse.Namespace
) -> list[str]:
    """Run what is missing; returns what failed."""
    cases = [(task, codec) for task in tasks for codec in codecs]
    todo = [case for case in cases if not (place_of(directory, *case) / "summary.json").is_file()]
    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        ends = list(pool.map(lambda case: run(*case, directory, args), todo))
    return [f"{task}/{codec}" for (task, codec), end in zip(todo, ends, strict=True) if end]


def run(task: str, codec: str, directory: Path, args: argparse.Namespace) -> int:
    """One recipe command; its output goes to a log beside its directory."""
    recipe = Path(__file__).parents[1] / "recipes" / "lora_sft.py"
    (data, flags), place = TASKS[task], place_of(directory, task, codec)
    seeds = args.seeds or ("1,2,3" if args.full else "1")
    words = shlex.split(
        f"{COMMON} {flags} {'' if args.full else SHORT} {CODECS[codec]} --seeds {seeds} "
        f"--model_name_or_path {args.shared}/models/stories260k "
        f"--train_file {args.shared}/data/{data} --output_dir {place} "
        f"{'--resume' if place.exists() else ''} {args.extra}"
    )
    print(shlex.join(["python", "recipes/lora_sft.py", *words]), flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{place}.log").open("w") as log:
        command = [sys.executable, str(recipe), *words]
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode


def rows_of(task: str, codecs: Sequence[str], directory: Path) -> list[dict[str, object]]:
    """A row per codec that has been run."""
    runs = {
        codec: load_summary(place_of(directory, task, codec)).arms["federated"].runs
        for codec in codecs
        if (place_of(directory, task, codec) / "summary.json").is_file()
    }
    plain = runs.get("none", ())
    return [row(task, codec, series, plain, directory) for codec, series in runs.items()]


def row(
    task: str, codec: str, runs: Sequence[Series], plain: Sequence[Series], directory: Path
) -> dict[str, object]:
    """Final losses and their changes seed by seed; bytes and seconds of all clients, per round."""
    finals = [run.eval_loss[-1] for run in runs]
    sent = {key: statistics.fmean(sum(getattr(run, key)[1:]) for run in runs) for key in BYTES}
    rounds = len(runs[0].eval_loss) - 1
    return {
        "task": task,
        "codec": codec,
        "final_loss": finals,
        "vs_none_pct": [
            100 * (ours / other.eval_loss[-1] - 1)
            for ours, other in zip(finals, plain, strict=False)
        ],
        **{key: total / rounds / 1e6 for key, total in sent.items()},
        "codec_s": codec_seconds(place_of(directory, task, codec)) / rounds,
    }


BYTES = ("bytes_up", "bytes_down", "bytes_up_raw", "bytes_down_raw")


def codec_seconds(place: Path) -> float:
    """Of the first seed, server and clients together."""
    file = sorted(place.rglob("rounds.jsonl"))[0]
    return sum(json.loads(line)["time"]["codec"] for line in file.read_text().splitlines())


def print_tables(rows: Sequence[dict[str, object]], markdown: bool) -> None:
    for task in dict.fromkeys(row["task"] for row in rows):
        lines = [HEADS, *(cells(row) for row in rows if row["task"] == task)]
        print(f"\n{task}\n")
        print("\n".join(as_markdown(lines) if markdown else aligned(lines)))


def cells(row: dict[str, object]) -> tuple[str, ...]:
    raw = row["bytes_up_raw"] + row["bytes_down_raw"]
    share = 100 * (row["bytes_up"] + row["bytes_down"]) / raw
    return (
        row["codec"],
        spread(row["final_loss"], ".4f", ".4f"),
        "-" if row["codec"] == "none" else spread(row["vs_none_pct"], "+.3f", ".3f"),
        f"{row['bytes_up']:.3f}",
        f"{row['bytes_down']:.3f}",
        f"{share:.1f}",
        f"{row['codec_s']:.3f}",
    )


if __name__ == "__main__":
    main()
