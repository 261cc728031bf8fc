"""Read the frozen weights of a live model into a fingerprint, tensor by tensor, without a copy.

    model.layers.0.self_attn.q_proj.base_layer.weight  ->  model.layers.0.self_attn.q_proj.weight

Names are the base's own, with or without an adapter. What is trained or belongs to an adapter
travels, so it is left out, and so is what an adapter has taken the place of: originals of
`modules_to_save`, rows of `trainable_token_indices`. Buffers count where a checkpoint has them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from fedtune.adapters.fingerprint import PROJECTIONS, BaseTensor, Fingerprint, block_rows
from fedtune.adapters.names import active_adapter, base_model, has_adapter, owned_tensors
from fedtune.adapters.quantized import Quantized, quantized
from fedtune.adapters.sharded import is_sharded
from fedtune.adapters.starts import rewrites_base

__all__ = ["read_base"]

CHUNK = 2**22  # values at a time
WRAPPERS = ("base_layer", "token_adapter")  # what PEFT puts between a module and its weight
REPLACED = "original_module"
# Bounds of the rms of rounding, relative.
NOISE = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
EIGHT_BITS = 2.0**-4
NARROWER = (torch.bfloat16, torch.float16, torch.float32)
EMPTY = np.empty((0, PROJECTIONS + 1), np.float32)


class _Frozen(NamedTuple):
    """A tensor where it lies; `hidden`: rows that an adapter has taken the place of."""

    module: nn.Module
    key: str
    hidden: list[int]
    rewritten: bool


def read_base(model: nn.Module, adapter_name: str | None = None) -> Fingerprint:
    """The fingerprint of what lies under the adapter; of no tensors without one.

    A model without an adapter sends all it has. Reads on the CPU, a chunk at a time; a quantized
    tensor is written out alone.
    """
    if not has_adapter(model) or is_sharded(model):
        return Fingerprint(1, {})
    found = _frozen(model, adapter_name or active_adapter(model))
    shapes = {name: _shape(frozen) for name, frozen in found.items()}
    block = block_rows(shapes)
    with torch.no_grad():
        tensors = {name: _read(found[name], shapes[name], block) for name in sorted(found)}
    return Fingerprint(block, tensors)


def _frozen(model: nn.Module, adapter_name: str) -> dict[str, _Frozen]:
    base: nn.Module = base_model(model)
    adapters: Any = model.peft_config
    owned = {id(t) for name in adapters for t in owned_tensors(model, name).values()}
    config = vars(adapters[adapter_name])
    rewrites = bool(rewrites_base(config) or config.get("kasa_config"))
    hidden: dict[int, list[int]] = {}
    rewritten: set[int] = set()
    for module in base.modules():
        if isinstance(module, TrainableTokensLayer) and adapter_name in module.token_indices:
            hidden[id(module.base_layer)] = sorted(module.token_indices[adapter_name])
        if rewrites and isinstance(module, LoraLayer):
            rewritten.add(id(module.get_base_layer()))
    seen: dict[int, str] = {}
    found: dict[str, _Frozen] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        parts = path.split(".")
        if REPLACED in parts:
            continue
        prefix = [part for part in parts if part and part not in WRAPPERS]
        for key, tensor in _tensors(module):
            name = ".".join([*prefix, key])
            if id(tensor) in owned or tensor.requires_grad or seen.get(id(tensor), name) < name:
                continue
            found.pop(seen.get(id(tensor), ""), None)  # tied: under the first of its names
            seen[id(tensor)] = name
            rows = hidden.get(id(module), [])
            found[name] = _Frozen(module, key, rows, id(module) in rewritten and key == "weight")
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((key, p) for key, p in module._parameters.items() if p is not None)
    saved = module._buffers.keys() - module._non_persistent_buffers_set
    yield from ((key, b) for key in sorted(saved) if (b := module._buffers[key]) is not None)


def _tensor(frozen: _Frozen) -> Tensor:
    tensor = frozen.module._parameters.get(frozen.key)
    found = frozen.module._buffers[frozen.key] if tensor is None else tensor
    assert found is not None
    return found


def _shape(frozen: _Frozen) -> tuple[int, ...]:
    tensor = _tensor(frozen)
    state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape) or (1,)


def _read(frozen: _Frozen, shape: tuple[int, ...], block: int) -> BaseTensor:
    with _in_memory(frozen.module):
        tensor = _tensor(frozen)
        packed = quantized(frozen.module, tensor)
        plain = type(tensor.data) is Tensor and not tensor.is_meta and tensor.numel() > 0
        if packed is None and not plain:
            return BaseTensor(shape, f"unread {type(tensor.data).__name__}", "", None, EMPTY)
        if packed is None and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            return BaseTensor(shape, kind, _sha(tensor.detach(), tensor.dtype, []), 0.0, EMPTY)
        read = packed or _plain(tensor.detach(), frozen.hidden)
        values = read.values().reshape(-1, shape[-1])
        kind, sha = read.kind, read.sha
        if frozen.rewritten:  # the last bits of a decomposition are the machine's
            kind, sha = f"{kind} without its first adapter", ""
        sketch = _sketch(values, block, frozen.hidden)
        size = max(float(np.linalg.norm(sketch[:, -1])), 1e-30)
        noise = math.hypot(math.sqrt(read.squares) / size, read.relative)
        return BaseTensor(shape, kind, sha, noise, sketch)


def _in_memory(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, weights that Accelerate keeps on disk or in another memory are there."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    there: AbstractContextManager[None] = align_module_device(module, torch.device("cpu"))
    return there


def _plain(tensor: Tensor, hidden: list[int]) -> Quantized:
    """A tensor in a dtype of torch. What came from a narrower one counts as that."""
    stored, first = tensor.dtype, tensor.reshape(-1)[:65536]
    kind = held = str(stored).removeprefix("torch.")
    noise = NOISE.get(stored, EIGHT_BITS if stored.itemsize == 1 else 0.0)
    form = stored
    narrower = NARROWER if stored.itemsize > 2 else NARROWER[:1] if stored is torch.float16 else ()
    for dtype in narrower:
        if dtype is stored:
            break
        if 2 * int((first.to(dtype).to(stored) == first).sum()) > first.numel():
            kind, noise = f"{held} of {dtype}".replace("torch.", ""), NOISE[dtype]
            form = dtype if _holds(tensor, dtype) else stored
            break
    noise = max(noise, 2.0**-24)
    return Quantized(kind, _sha(tensor, form, hidden), 0.0, noise, lambda: tensor)


def _holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    parts = (part for _, part in _chunks(tensor.reshape(-1, 1)))
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in parts)


def _sha(tensor: Tensor, form: torch.dtype, hidden: list[int]) -> str:
    digest = hashlib.sha256(f"{form} {tuple(tensor.shape)}".encode())
    matrix = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    for start, part in _chunks(matrix):
        values = _shown(part, start, hidden).to(form).contiguous()
        digest.update(values.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _sketch(matrix: Tensor, block: int, hidden: list[int]) -> Any:
    """(blocks, 9) of a matrix (rows, columns); see `fingerprint.py`."""
    rows, columns = matrix.shape
    signs = _signs("columns", columns)
    projected, energy = torch.empty(rows, PROJECTIONS), torch.empty(rows)
    for start, part in _chunks(matrix):
        values = _shown(part, start, hidden).to("cpu", torch.float32)
        projected[start : start + len(values)] = values @ signs
        energy[start : start + len(values)] = values.square().sum(1)
    whole = torch.cat([projected * _signs("rows", rows), energy[:, None]], 1).double()
    blocks = -(-rows // block)
    padded = torch.cat([whole, whole.new_zeros(blocks * block - rows, PROJECTIONS + 1)])
    summed = padded.reshape(blocks, block, PROJECTIONS + 1).sum(1)
    summed[:, -1] = summed[:, -1].sqrt()
    return summed.float().numpy()


def _chunks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    length = max(1, CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), length):
        yield start, matrix[start : start + length]


def _shown(part: Tensor, start: int, hidden: list[int]) -> Tensor:
    """Without the rows that are hidden."""
    rows = [row - start for row in hidden if 0 <= row - start < len(part)]
    return part.index_fill(0, torch.tensor(rows, device=part.device), 0) if rows else part


@lru_cache(maxsize=8)
def _signs(what: str, count: int) -> Tensor:
    """(count, 8) of +-1, the same everywhere."""
    drawn = hashlib.shake_256(what.encode()).digest(math.ceil(count * PROJECTIONS / 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=count * PROJECTIONS)
    return torch.from_numpy(bits.reshape(count, PROJECTIONS).astype(np.float32) * 2 - 1)
