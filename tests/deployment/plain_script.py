"""Somebody's own training script: transformers and PEFT as ever, and one line for the federation.

python plain_script.py ROWS.jsonl OUTPUT_DIR [--max_steps N]
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fedtune
from fedtune.assets import MODEL_DIR

parser = argparse.ArgumentParser()
parser.add_argument("rows")
parser.add_argument("output_dir")
parser.add_argument("--max_steps", type=int, default=12)
given = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
tokenizer.pad_token = tokenizer.eos_token
rows = load_dataset("json", data_files=given.rows, split="train")
rows = rows.map(
    lambda row: tokenizer(f"{row['input']}\n{row['output']}", truncation=True, max_length=128),
    remove_columns=rows.column_names,
)
halves = rows.train_test_split(test_size=8, seed=1)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(MODEL_DIR),
    LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM"),
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=given.output_dir,
        max_steps=given.max_steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=halves["train"],
    eval_dataset=halves["test"],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
fedtune.patch(trainer)
trainer.train()
trainer.save_model()
trainer.save_state()
