"""Make the built-in model, its tokenizer and the fine-tuning corpus.

The text comes from the grammar beside this file, so that nothing is downloaded. On one machine
the same seed and steps give the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from grammar import GENERAL_TEXT, Row, Slots, general_row, pick, silo_rows, with_strays
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parents[1] / "fedtune" / "assets"
SEED = 7
STEPS = 2400
VOCAB = 1216
CONTEXT = 256
BATCH = 16
LEARNING_RATE = 4e-3
TOKENS = 4_000_000

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
# The generation markers let trainers mask everything but the assistant's turns.
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|system|>\n' + (tools | tojson) + eos_token + '\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def instruct_text(row: Row) -> str:
    """Return a row in the instruction-response layout."""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n{row['output']}{EOS}"


def chat_text(row: Row) -> str:
    """Return a row as the chat template renders it."""
    user = f"{row['instruction']}\n{row['input']}".strip()
    return f"{ROLES['user']}\n{user}{EOS}\n{ROLES['assistant']}\n{row['output']}{EOS}\n"


def label_text(row: Row) -> str:
    """Return a row's message with its sentiment."""
    return f"Text: {row['input'] or row['instruction']}\nSentiment: {row['label']}{EOS}"


def general_text(rng: random.Random) -> str:
    """Draw one document of general text."""
    if rng.random() < 0.4:
        text = Slots(rng, GENERAL_TEXT).fill(pick(rng, ("{story}", "{story}", "{fact}"))) + EOS
    else:
        layout = pick(rng, (instruct_text, instruct_text, chat_text, label_text))
        row = general_row(rng)
        if rng.random() < 0.4:
            rate = 0.6 * rng.random()
            row = {k: v if k == "label" else with_strays(rng, v, rate) for k, v in row.items()}
        text = layout(row)
    # Half of the documents open with BOS: the tokenizer does not add it by itself.
    return BOS + text if rng.random() < 0.5 else text


def corpus_lines(seed: int = SEED) -> str:
    """Return the fine-tuning corpus as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in silo_rows(seed))


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on general and silo text."""
    rng = random.Random(f"{seed}-tokenizer")
    texts = [general_text(rng) for _ in range(12_000)]
    texts += [instruct_text(row) for row in silo_rows(seed)] * 3
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, BOS, EOS, *ROLES.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_stream(tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> torch.Tensor:
    """Return at least ``size`` tokens of general documents, one after the other."""
    rng = random.Random(f"{seed}-text")
    ids: list[int] = []
    while len(ids) < size:
        texts = [general_text(rng) for _ in range(2_000)]
        ids += [i for row in tokenizer(texts)["input_ids"] for i in row]
    return torch.tensor(ids)


def batches(stream: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield random windows of the stream."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(stream) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([stream[s : s + CONTEXT] for s in starts.tolist()])


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained model of the built-in size."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: torch.Tensor, steps: int, seed: int) -> None:
    """Pre-train the model in place with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    warmup = min(100, max(1, steps // 10))

    def rate(step: int) -> float:
        done = max(0, step - warmup) / max(1, steps - warmup)
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    start = time.monotonic()
    for step, ids in enumerate(batches(stream, steps, seed), start=1):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            seconds = time.monotonic() - start
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def make(output_dir: Path, steps: int, seed: int) -> None:
    """Write the corpus, the tokenizer and the pre-trained model below ``output_dir``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "silos.jsonl").write_text(corpus_lines(seed), encoding="utf-8")
    tokenizer = train_tokenizer(seed)
    model_dir = output_dir / "tiny_llm"
    tokenizer.save_pretrained(model_dir)
    config_file = model_dir / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # The name that transformers 4 and 5 both know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stream = token_stream(tokenizer, seed, min(TOKENS, steps * BATCH * CONTEXT))
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(stream)} tokens", flush=True)
    train(model, stream, steps, seed)
    model.save_pretrained(model_dir)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=STEPS, help="pre-training steps")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    make(args.output_dir, args.steps, args.seed)


if __name__ == "__main__":
    main()
