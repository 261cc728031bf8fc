"""What it costs a site to say which base weights it has: once a run, before the first round.

python benchmarks/base_weights.py                  # 1 GB of weights in each kind, a minute
python benchmarks/base_weights.py --gb 0.01        # the smallest

Each kind is a stack of layers of 4096 x 4096 in a process of its own, as fp32, bf16 and (4 bits, 8
bits) as bitsandbytes packs them on the CPU. `cpu_s`: processor seconds of reading them; `s_per_gb`:
of a GB as it lies in memory; `extra_mb`: VmHWM beyond what lay there; `sent_kb`: what goes to the
server.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = ("fp32", "fp32 of bf16", "bf16", "nf4", "int8")
WIDTH = 4096
BYTES = {"fp32": 4.0, "fp32 of bf16": 4.0, "bf16": 2.0, "nf4": 0.5, "int8": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="of weights as they lie in memory")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args.kind, args.gb)))
        return
    rows = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, "--gb", str(args.gb)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[kind] = json.loads(run.stdout.splitlines()[-1])
        print(f"{kind:<14}" + "  ".join(f"{key} {value}" for key, value in rows[kind].items()))
    if args.json:
        args.json.write_text(json.dumps({"gb": args.gb, "rows": rows}, indent=1))


def measure(kind: str, gb: float) -> dict[str, Any]:
    """Of one kind, in this process."""
    import torch

    from fedtune.adapters.base_weights import read_base

    torch.set_num_threads(1)
    model = stack(kind, max(1, round(gb * 1e9 / (WIDTH * WIDTH * BYTES[kind]))))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    held, before = resident_mb("VmRSS"), time.process_time()
    found = read_base(model)
    spent, size = time.process_time() - before, bytes_of(model) / 1e9
    return {
        "gb": round(size, 2),
        "cpu_s": round(spent, 2),
        "s_per_gb": round(spent / size, 2),
        "extra_mb": round(resident_mb("VmHWM") - held),
        "sent_kb": round(len(found.to_json()) / 1000, 1),
    }


def stack(kind: str, layers: int) -> Any:
    """Layers of one kind, and one more with an adapter."""
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    class Stack(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.layers = nn.ModuleList(layer(kind) for _ in range(layers))
            self.adapted = nn.Linear(8, 8)

    return get_peft_model(Stack(), LoraConfig(r=1, target_modules=["adapted"]))


def layer(kind: str) -> Any:
    """One matrix of normal values."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    plain = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    nn.init.normal_(plain.weight, std=0.02)
    if kind == "nf4":
        packed = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
        return packed.to("cpu")
    if kind == "int8":
        packed = bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
        packed.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False)
        return packed.to("cpu")
    if kind == "fp32":
        return plain
    half = plain.to(torch.bfloat16)
    return half.float() if kind == "fp32 of bf16" else half


def bytes_of(model: Any) -> int:
    """Of all weights as they lie in memory, without scales."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def resident_mb(key: str) -> float:
    """From the kernel's own book of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1000


if __name__ == "__main__":
    main()
