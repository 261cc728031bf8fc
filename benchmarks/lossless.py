"""Lossless differences of a fully trained bf16 model between rounds: bytes, ways and speed.

python benchmarks/lossless.py --shared ../shared       # two minutes

CLIENTS clients train all of stories260k for STEPS steps a round on phrasebank, AdamW, fp32 weights
that begin as the global bf16 ones; their mean becomes the next bf16 global. All tensors of a model
are measured as one.

ways    compressed bytes a value between the globals of a round and the one before: `entropy` of
        the differences, then zstd on whole values and on planes of 65536 bytes, level 1; `ours`
        is `encode(bit_difference(new, old), "zstd")`
speed   GB/s of bf16 values, the median of RUNS, one thread: `difference` and `sum` alone, `encode`
        with the first and `decode` with the second
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import zstandard
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.transport import decode, encode
from fedtune.transport.bits import bit_difference, bit_sum

CLIENTS, STEPS, BATCH, TOKENS = 2, 20, 8, 64
PLANE, RUNS = 1 << 16, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="data/ and models/")
    parser.add_argument("--mb", type=int, default=64, help="of bf16 values, for the speed")
    parser.add_argument("--rounds", type=int, default=4, help="of 20 steps on two clients")
    parser.add_argument("--rates", default="1e-5,1e-4,1e-3", help="learning rates")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if not (args.shared / "models" / "stories260k").is_dir():
        print(f"skipped: no models/stories260k in {args.shared}; point --shared at it")
        return
    rows = []
    for rate in map(float, args.rates.split(",")):
        models = globals_of_rounds(args.shared, rate, args.rounds)
        for number in sorted({1, args.rounds}):
            new, old = models[number], models[number - 1]
            row = {"lr": rate, "round": number, **ways(new, old), **speed(new, old, args.mb)}
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def globals_of_rounds(shared: Path, rate: float, rounds: int) -> list[torch.Tensor]:
    """The values of the global model before round 1 and after each round, bf16."""
    torch.manual_seed(0)
    path = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    params = list(model.parameters())
    lines = (shared / "data" / "financial_phrasebank.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    states: list[dict] = [{} for _ in range(CLIENTS)]
    models = [torch.nn.utils.parameters_to_vector(params).detach().bfloat16()]
    for number in range(rounds):
        ends = []
        for client in range(CLIENTS):
            torch.nn.utils.vector_to_parameters(models[-1].float(), params)
            optimizer = torch.optim.AdamW(params, lr=rate)
            if states[client]:
                optimizer.load_state_dict(states[client])
            for step in range(number * STEPS, (number + 1) * STEPS):
                rows = texts[client::CLIENTS][step * BATCH : (step + 1) * BATCH]
                ids = [torch.tensor([tokenizer(text).input_ids[:TOKENS]]) for text in rows]
                (sum(model(x, labels=x).loss for x in ids) / BATCH).backward()
                optimizer.step()
                optimizer.zero_grad()
            states[client] = optimizer.state_dict()
            ends.append(torch.nn.utils.parameters_to_vector(params).detach().double())
        models.append(torch.stack(ends).mean(0).bfloat16())
    return models


def ways(new: torch.Tensor, old: torch.Tensor) -> dict[str, float]:
    """Bytes a value of each way."""
    n, o = (x.view(torch.int16).numpy() for x in (new, old))
    folded = bit_difference(new, old)
    found = {
        "unchanged": float((n == o).mean()),
        "entropy": entropy(n - o),
        "values": on_planes(n),
        "rounded_delta": on_planes((new.float() - old.float()).bfloat16().view(torch.int16)),
        "xor": on_planes(n ^ o),
        "subtract": on_planes(n - o),
        "folded": on_planes(folded),
        "folded_whole": len(compressor().compress(folded.numpy().tobytes())) / len(n),
        "folded_level3": on_planes(folded, level=3),
        "ours": len(encode(folded, "zstd")) / len(n),
    }
    return {key: round(value, 3) for key, value in found.items()}


def compressor(level: int = 1) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=level)


def on_planes(values, level: int = 1) -> float:
    pairs = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 2)
    parts = [pairs[i : i + PLANE, k] for i in range(0, len(pairs), PLANE) for k in (0, 1)]
    return sum(len(compressor(level).compress(part.tobytes())) for part in parts) / len(pairs)


def entropy(values) -> float:
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) / 8


def speed(new: torch.Tensor, old: torch.Tensor, mb: int) -> dict[str, float]:
    """A frame sees 65536 values, so repeating the 260032 of the model makes nothing smaller."""
    times = -(-mb * 500_000 // len(new))
    new, old = new.repeat(times), old.repeat(times)
    difference = bit_difference(new, old)
    payload = encode(difference, "zstd")
    assert torch.equal(bit_sum(old, decode(payload)).view(torch.int16), new.view(torch.int16))
    calls = {
        "difference": lambda: bit_difference(new, old),
        "encode": lambda: encode(bit_difference(new, old), "zstd"),
        "decode": lambda: bit_sum(old, decode(payload)),
        "sum": lambda: bit_sum(old, difference),
    }
    return {
        f"{key}_gb_s": round(new.nbytes / 1e9 / median_s(call), 2) for key, call in calls.items()
    }


def median_s(call) -> float:
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
