"""Size, error, speed and memory of every codec, on normal values and on a real LoRA delta.

python benchmarks/codecs.py                            # a minute
python benchmarks/codecs.py --peers --peer_python PY   # also bitsandbytes, and NVFlare in PY

normal  --mb of fp32 values N(0, 0.001): `bytes` a value, headers included, `share` of fp32, `l2` =
        |x - x'| / |x|, GB/s of fp32 in and out, by the clock and by the processor (`cpu`), at 1 and
        2 threads. Each number is the best of RUNS calls, and of --sittings of all rows the median.
        `enc_mb` and `dec_mb`: VmHWM beyond what lay there before, so payload and output included;
        `payload_mb` is the payload alone
delta   what 30 steps of AdamW at 5e-3 change in rank-8 LoRA factors of the built-in model; one
        payload a tensor, `l2` over all of them
peers   bitsandbytes' functions on the CPU, `+` with quantized scales; NVFlare's filters as they are
        shipped, with this environment's bitsandbytes where PY has none (it imports it for any;
        those below 16 bits but adaquant need CUDA). Bytes are those of codes and scales

Each row is a process of its own. On a busy machine only `cpu` means something, and a thread that
waits for the other one is busy there too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
STD = 1e-3
FEDTUNE = ("none", "bf16", "fp16", "int8", "nf4", "fp4")
BITSANDBYTES = ("blockwise8", "nf4", "nf4+", "fp4", "fp4+")
NVFLARE = ("float16", "adaquant", "normfloat4")
LORA_RANK, STEPS, LEARNING_RATE, ROWS = 8, 30, 5e-3, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=32, help="of fp32 values")
    parser.add_argument("--sittings", type=int, default=1, help="take medians of so many")
    parser.add_argument("--only", help="comma-separated codecs")
    parser.add_argument("--peers", action="store_true", help="also bitsandbytes' CPU functions")
    parser.add_argument("--peer_python", type=Path, help="also NVFlare, with this interpreter")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--delta", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        maker, name = args.row.split("/")
        print(json.dumps(train(args.delta) if maker == "train" else measure(maker, name, args)))
        return
    rows = [f"fedtune/{name}" for name in FEDTUNE]
    rows += [f"bitsandbytes/{name}" for name in BITSANDBYTES if args.peers]
    rows += [f"nvflare/{name}" for name in NVFLARE if args.peers and args.peer_python]
    if args.only:
        rows = [row for row in rows if row.split("/")[1] in args.only.split(",")]
    sittings, loads = [], []
    with tempfile.TemporaryDirectory() as folder:
        args.delta, args.lent = str(Path(folder, "delta.safetensors")), folder
        lend(folder, "bitsandbytes", "packaging")
        trained = in_own_process("train/lora", args, 1)
        print(f"trained: {trained}")
        for _ in range(args.sittings):
            loads.append(os.getloadavg()[0])
            sittings.append({row: at_1_and_2_threads(row, args) for row in rows})
    results = {row: medians([sitting[row] for sitting in sittings]) for row in rows}
    for row, numbers in results.items():
        print(f"{row:<24}" + "  ".join(f"{k} {v}" for k, v in numbers.items()))
    print(f"load before each sitting: {loads}")
    if args.json:
        everything = {"mb": args.mb, "load": loads, "trained": trained, "rows": results}
        args.json.write_text(json.dumps({**everything, "sittings": sittings}, indent=1))


def at_1_and_2_threads(row: str, args: argparse.Namespace) -> dict[str, object]:
    one, two = (in_own_process(row, args, threads) for threads in (1, 2))
    return {**one, **{f"{key}_2": two[key] for key in two if "gb_s" in key}}


def medians(rows: list[dict[str, object]]) -> dict[str, object]:
    if "error" in rows[0]:
        return rows[0]
    return {key: round(statistics.median(row[key] for row in rows), 5) for key in rows[0]}


def lend(folder: str, *packages: str) -> None:
    """Links for an interpreter that lacks them; torch is its own."""
    for package in packages:
        found = importlib.util.find_spec(package)
        if found and found.origin:
            Path(folder, package).symlink_to(Path(found.origin).parent)


def in_own_process(row: str, args: argparse.Namespace, threads: int) -> dict[str, object]:
    python = str(args.peer_python) if row.startswith("nvflare") else sys.executable
    command = [python, __file__, "--mb", str(args.mb), "--delta", args.delta, "--row", row]
    # NVFlare's tools log to stdout.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if row.startswith("nvflare"):
        environment["PYTHONPATH"] = args.lent
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def train(path: str) -> dict[str, float]:
    """A client's round: what it would send."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedtune.assets import CORPUS_FILE, MODEL_DIR

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_DIR), lora)
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in factors.items()}
    optimizer = torch.optim.AdamW(factors.values(), lr=LEARNING_RATE)
    corpus = [json.loads(line) for line in CORPUS_FILE.read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in corpus]
    for step in range(STEPS):
        ids = [tokenizer(text).input_ids[:96] for text in texts[step * ROWS : (step + 1) * ROWS]]
        loss = sum(model(torch.tensor([i]), labels=torch.tensor([i])).loss for i in ids) / ROWS
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = {name: p.detach() - before[name] for name, p in factors.items()}
    save_file(delta, path)
    values = sum(x.numel() for x in delta.values())
    return {"values": values, "tensors": len(delta), "loss": round(loss.item(), 3)}


def measure(maker: str, name: str, args: argparse.Namespace) -> dict[str, object]:
    """One row, at the number of threads that the environment says."""
    import torch
    from safetensors.torch import load_file

    make = {"fedtune": fedtune_codec, "bitsandbytes": bitsandbytes_codec, "nvflare": nvflare_filter}
    x = torch.empty(args.mb * 250_000).normal_(0, STD, generator=torch.Generator().manual_seed(0))
    try:
        encode, decode, size_of = make[maker](name)
        decode(encode(x[:1000].clone()))  # tables, imports
    except (AssertionError, ImportError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    before = reset_peak()
    payload = encode(x)
    enc_mb, payload_bytes = status_mb("VmHWM") - before, size_of(payload)
    before = reset_peak()
    y = decode(payload)
    dec_mb, l2 = status_mb("VmHWM") - before, relative_l2([x], [y])
    del y
    delta = list(load_file(args.delta).values())
    payloads = [encode(part.clone()) for part in delta]
    return {
        "bytes": round(payload_bytes / x.numel(), 5),
        "share": round(payload_bytes / x.nbytes, 5),
        "l2": figure(l2),
        "delta_bytes": round(sum(map(size_of, payloads)) / sum(p.numel() for p in delta), 5),
        "delta_l2": figure(relative_l2(delta, list(map(decode, payloads)))),
        **speed("enc", lambda: encode(x), x.nbytes),
        **speed("dec", lambda: decode(payload), x.nbytes),
        "enc_mb": round(enc_mb, 1),
        "payload_mb": round(payload_bytes / 1e6, 1),
        "dec_mb": round(dec_mb, 1),
    }


def fedtune_codec(name: str):
    from fedtune.transport import decode, encode

    return lambda x: encode(x, name), decode, len


def bitsandbytes_codec(name: str):
    """4-bit codes are decoded as one row: the CPU kernel begins each row with a new scale."""
    import bitsandbytes.functional as bnb

    def size_of(pair) -> int:
        codes, state = pair
        parts = [codes, state.absmax]
        parts += [state.state2.absmax] if state.nested else []
        return sum(part.nbytes for part in parts)

    if name == "blockwise8":
        return bnb.quantize_blockwise, lambda pair: bnb.dequantize_blockwise(*pair), size_of
    kind, nested = name.removesuffix("+"), name.endswith("+")

    def encode(x):
        row = x.reshape(1, -1)
        return bnb.quantize_4bit(row, blocksize=64, compress_statistics=nested, quant_type=kind)

    return encode, lambda pair: bnb.dequantize_4bit(*pair).view(-1), size_of


def nvflare_filter(name: str):
    import logging

    import torch
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    logging.disable(logging.CRITICAL)
    context = FLContext()
    quantizer, dequantizer = ModelQuantizer(quantization_type=name), ModelDequantizer()

    def bytes_of(value) -> int:
        if isinstance(value, dict):
            return sum(map(bytes_of, value.values()))
        return getattr(value, "nbytes", 0)

    def encode(x):
        share = DXO(DataKind.WEIGHT_DIFF, data={"x": x}).to_shareable()
        return from_shareable(quantizer.process(share, context))

    def decode(dxo):
        # The filter writes into the dictionary that it is given.
        copy = DXO(dxo.data_kind, data=dict(dxo.data), meta=dict(dxo.meta))
        out = from_shareable(dequantizer.process(copy.to_shareable(), context))
        return torch.as_tensor(out.data["x"])

    return encode, decode, lambda dxo: bytes_of(dxo.data) + bytes_of(dxo.meta)


def speed(what: str, call, size: int) -> dict[str, float]:
    """GB/s by the clock and by the processor."""
    seconds, cpu_s, began = [], [], time.perf_counter()
    while len(seconds) < RUNS and (not seconds or time.perf_counter() - began < 30):
        started, cpu = time.perf_counter(), time.process_time()
        call()
        cpu_s.append(time.process_time() - cpu)
        seconds.append(time.perf_counter() - started)
    return {
        f"{what}_gb_s": round(size / 1e9 / min(seconds), 2),
        f"{what}_cpu_gb_s": round(size / 1e9 / min(cpu_s), 2),
    }


def relative_l2(ones, others) -> float:
    wrong = sum(
        float((x - y.reshape(x.shape)).float().square().sum())
        for x, y in zip(ones, others, strict=True)
    )
    return math.sqrt(wrong / sum(float(x.square().sum()) for x in ones))


def figure(value: float) -> float:
    return float(f"{value:.3g}")


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def reset_peak() -> float:
    """Megabytes that are resident now; VmHWM starts again from there."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mb("VmRSS")


if __name__ == "__main__":
    main()
