"""Federated against centralized and local-only on real text, several seeds, all arms.

python benchmarks/real_input.py                     # one short case, about two minutes
python benchmarks/real_input.py --full              # docs/results.md, some hours
python benchmarks/real_input.py --full --only iid-lora --json real.json

Each case is one recipe command, which is printed. A case that is already there is only read.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from fedtune.report import load_summary

COMMON = (
    "--num_clients 4 --num_rounds 10 --per_device_train_batch_size 8 --learning_rate 5e-3 "
    "--lr_scheduler_type constant --warmup_steps 0 --eval_fraction 0.06 "
    "--per_device_eval_batch_size 16 --compare all"
)
LORA = "--steps_per_round 20 --lora_r 8 --lora_target_modules all-linear --max_length 160"
PROMPT = "--steps_per_round 20 --peft_method p_tuning --learning_rate 2e-2 --max_length 128"
SHORT = " --num_rounds 3 --steps_per_round 5 --max_rows 800"
DIRICHLET = "--partition dirichlet --partition_alpha 0.3"
PHRASEBANK, SHAKESPEARE = "financial_phrasebank.jsonl", "tiny_shakespeare.jsonl"
CASES = {
    "iid-lora": (PHRASEBANK, f"{LORA} --partition iid"),
    "dirichlet-lora": (PHRASEBANK, f"{LORA} {DIRICHLET}"),
    "speaker-lora": (SHAKESPEARE, f"{LORA} --partition column --partition_column speaker"),
    "iid-p_tuning": (PHRASEBANK, f"{PROMPT} --partition iid"),
    # Skewed clients pull the prompt encoder apart: half the rate lets the mean keep its gain.
    "dirichlet-p_tuning": (PHRASEBANK, f"{PROMPT} {DIRICHLET} --learning_rate 1e-2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data/ and models/")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real"))
    parser.add_argument("--full", action="store_true", help="all cases, whole runs, three seeds")
    parser.add_argument("--only", help="comma-separated cases: " + ", ".join(CASES))
    parser.add_argument("--seeds", help="default: 1,2,3 with --full, else 1")
    parser.add_argument("--extra", default="", help="more flags for every run, which win")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if not (args.shared / "models" / "stories260k").is_dir():
        print(f"skipped: no models/stories260k in {args.shared}; point --shared at it")
        return
    names = args.only.split(",") if args.only else list(CASES) if args.full else ["iid-lora"]
    seeds = args.seeds or ("1,2,3" if args.full else "1")
    rows = []
    for name in names:
        directory = args.output_dir / (name if args.full else f"{name}-short")
        if not (directory / "summary.json").is_file():
            run(
                name,
                args.shared,
                directory,
                f"--seeds {seeds}{'' if args.full else SHORT} {args.extra}",
            )
        rows.append(row(name, directory))
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def command(name: str, shared: Path, directory: Path, extra: str) -> list[str]:
    data, flags = CASES[name]
    recipe = Path(__file__).parents[1] / "recipes" / "lora_sft.py"
    places = (
        f"--model_name_or_path {shared}/models/stories260k --train_file {shared}/data/{data} "
        f"--output_dir {directory} {extra}"
    )
    return [sys.executable, str(recipe), *shlex.split(f"{COMMON} {flags} {places}")]


def run(name: str, shared: Path, directory: Path, extra: str) -> None:
    words = command(name, shared, directory, extra)
    if directory.exists():
        words.append("--resume")
    print(shlex.join(["python", "recipes/lora_sft.py", *words[2:]]), flush=True)
    subprocess.run(words, check=True)


def row(name: str, directory: Path) -> dict[str, object]:
    """Final losses by arm and seed, and the verdict of one case."""
    summary = load_summary(directory)
    final = {
        arm: [run.eval_loss[-1] for run in summary.arms[arm].runs]
        for arm in ("federated", "centralized", "centralized_large_batch", "local")
    }
    fixed = summary.arms["fixed_global"].runs
    verdict = summary.verdict
    return {
        "case": name,
        "base": summary.base_loss,
        "final": final,
        "gap_pct": vars(verdict.gap_centralized_pct),
        "gap_large_pct": vars(verdict.gap_large_batch_pct),
        "gain_local_pct": vars(verdict.gain_over_local_pct),
        "parity": verdict.parity.identical,
        "fixed_flat": all(len(set(run.eval_loss)) == 1 for run in fixed),
    }


def print_table(rows: list[dict[str, object]]) -> None:
    """One line a seed, then the spread of the case."""
    print("case                seed     base  federated  central  large b.  local   gap %  large %")
    for item in rows:
        final = item["final"]
        arms = zip(*(final[arm] for arm in final), strict=True)
        for index, (ours, central, large, local) in enumerate(arms):
            print(
                f"{item['case']:<18} {index + 1:>5} {item['base']:>8.3f} {ours:>10.4f} "
                f"{central:>8.4f} {large:>9.4f} {local:>6.4f} {100 * (ours / central - 1):>+7.2f} "
                f"{100 * (ours / large - 1):>+8.2f}"
            )
        print(
            f"{item['case']:<18}  mean gap "
            f"{spread(item['gap_pct'])}, large batch {spread(item['gap_large_pct'])}, gain over "
            f"local {spread(item['gain_local_pct'])}, parity {item['parity']}, fixed global flat "
            f"{item['fixed_flat']}"
        )


def spread(value: dict[str, float | None]) -> str:
    """Mean in percent, and the standard deviation where there are several seeds."""
    std = "" if value["std"] is None else f" (std {value['std']:.2f})"
    return f"{value['mean']:+.2f} %{std}"


if __name__ == "__main__":
    main()
