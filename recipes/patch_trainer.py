"""The smallest federated client: an ordinary SFTTrainer script and one line.

python recipes/patch_trainer.py --silo clinic                        # trains alone, as ever
fedtune join --superlink HOST:PORT -- python recipes/patch_trainer.py --silo clinic

Under `fedtune join` the same `trainer.train()` is one whole federated run: the server plans the
rounds, the adapter alone travels. docs/deploy.md starts a server and two such sites.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import fedtune
from fedtune.assets import CORPUS_FILE, MODEL_DIR

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default=str(MODEL_DIR), help="directory or hub id")
parser.add_argument("--train_file", default=str(CORPUS_FILE), help="jsonl: input, output")
parser.add_argument("--silo", help="only rows of this silo (clinic, bank, lawfirm, helpdesk)")
parser.add_argument("--output_dir", default="outputs/patch_trainer")
parser.add_argument("--max_steps", type=int, default=100, help="when it trains alone")
parser.add_argument("--seed", type=int, default=42)
args = parser.parse_args()

rows = load_dataset("json", data_files=args.train_file, split="train")
if args.silo:
    rows = rows.filter(lambda row: row["silo"] == args.silo)
rows = rows.map(
    lambda row: {"prompt": f"{row['input']}\n", "completion": row["output"]},
    remove_columns=rows.column_names,
)
held_out = rows.train_test_split(test_size=0.1, seed=args.seed)

trainer = SFTTrainer(
    model=args.model,
    args=SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=5,
        report_to=[],
        bf16=torch.cuda.is_available(),
        seed=args.seed,
        data_seed=args.seed,
    ),
    train_dataset=held_out["train"],
    eval_dataset=held_out["test"],
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
fedtune.patch(trainer)  # the one line
trainer.train()
trainer.save_model(f"{args.output_dir}/adapter")
