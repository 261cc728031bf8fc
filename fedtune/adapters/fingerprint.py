"""The fingerprint of a site's frozen weights: whether two sites put their adapters on one base.

    sha256   of a tensor's values, in the narrowest of bf16, fp16 and fp32 that holds them all
    sketch   of each block of rows W_R:  s_k = sum_r,c  a_kr g_kc W_rc,  k = 1..8, and ||W_R||,
             with fixed signs a, g = +-1 drawn from SHAKE-256

Tensors of one kind (dtype, quantization, device that quantized) agree when their hashes do: one
changed value is found. Tensors of different kinds agree when q, the mean over k of
(s_k - s'_k)^2 / t^2, is at most 16 in each block and at most 4 over a tensor. t^2 is what rounding
is expected to leave: (noise^2 + noise'^2 + 2^-20) ||W_R||^2, the last for the sketch's own fp16. A
block counts at least as an average one of its tensor does, since 4-bit values share scales.

What that finds. With an error E of independent signs, s - s' has the variance ||E||^2, so q is
chi^2_8 / 8 times ||E||^2 / t^2: above 16 with probability 1e-23 for equal bases. noise is 2^-9 for
bf16 and 2^-11 for fp16 (upper bounds of the rms of rounding), and read from codes and scales for 4
and 8 bits (0.09 to 0.12 and 0.01). A tensor is found that differs by more than 2 t: 0.4 % of its
norm for bf16, 20 % for nf4; one drawn anew differs by 141 %. A row is found that differs by more
than 4 t sqrt(rows of a block): one drawn anew in blocks of up to 10^4 rows for bf16, but for nf4
only where blocks have a row or two, so in models of up to 2,048 rows (99.9 % and 97 %). Embeddings,
heads and norms are not quantized by bitsandbytes: there the first bound holds. What is smaller
cannot be known, which `unseen` says.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ManifestError

__all__ = ["PROJECTIONS", "BaseTensor", "Fingerprint", "block_rows", "disagreement", "unseen"]

PROJECTIONS = 8
MOST_BLOCKS = 2048  # 46 kB, where there are fewer tensors than that
BLOCK_LIMIT, TENSOR_LIMIT = 16.0, 4.0
ENCODING = 2.0**-20  # two sketches in fp16: 2 (2^-11)^2 / 2
# What a site may send; a model of 10^5 tensors is larger than any.
MOST_TENSORS, MOST_CHARS, MOST_NAME, MOST_ROWS = 100_000, 64_000_000, 1000, 2**40
VERSION = 1

Sketch = NDArray[np.float32]


@dataclass(frozen=True)
class BaseTensor:
    """One frozen tensor.

    Attributes:
        shape: of the values, not of what they are packed into.
        kind: dtype and quantization; tensors of equal kind are compared by `sha`.
        sha: hash of the values; empty where equal bases may differ in the last bits.
        noise: rms of what the values are off by, relative to their own; None where they could not
            be read.
        sketch: (blocks, 9): projections and norm of each block of rows; empty for integers.
    """

    shape: tuple[int, ...]
    kind: str
    sha: str
    noise: float | None
    sketch: Sketch

    @property
    def rows(self) -> int:
        """Of the values as a matrix."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Fingerprint:
    """All frozen tensors of a base by canonical name; none where everything travels.

    Attributes:
        block: rows of a block of the sketches.
    """

    block: int
    tensors: Mapping[str, BaseTensor]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the tensors, by name: what decides which of them can be compared by hash."""
        return tuple(self.tensors[name].kind for name in sorted(self.tensors))

    def to_json(self) -> str:
        """JSON text; sketches as fp16 of a tensor's largest number, in base64."""
        rows, parts = {}, []
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            scale = float(np.abs(tensor.sketch).max(initial=0.0))
            parts.append((tensor.sketch / (scale or 1.0)).astype("<f2").tobytes())
            noise = None if tensor.noise is None else float(f"{tensor.noise:.4g}")
            rows[name] = [tensor.shape, tensor.kind, tensor.sha, noise, float(f"{scale:.8g}")]
        text = base64.b64encode(b"".join(parts)).decode()
        plain = {"version": VERSION, "block": self.block, "tensors": rows, "sketches": text}
        return json.dumps(plain, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Inverse of `to_json`, up to the rounding of sketches.

        Raises:
            ManifestError: something else, or more than a model can have.
        """
        try:
            if len(text) > MOST_CHARS:
                raise ValueError(f"{len(text)} characters")
            plain = json.loads(text)
            if plain["version"] != VERSION:
                raise ValueError(f"version {plain['version']!r}")
            return cls(plain["block"], _tensors(plain))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ManifestError(
                "fingerprint of the base: expected what fedtune computes, received something else "
                f"({str(error)[:200]}). Use the same fedtune release everywhere."
            ) from None


def block_rows(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of a block for a base with tensors of these shapes: a power of 2."""
    rows = [math.prod(shape[:-1]) for shape in shapes.values()]
    most, block = max(MOST_BLOCKS, 2 * len(rows)), 1
    while sum(-(-count // block) for count in rows) > most:
        block *= 2
    return block


def disagreement(expected: Fingerprint, found: Fingerprint) -> str:
    """Where two bases differ, tensors by name; empty where no difference can be seen."""
    names = sorted({*expected.tensors, *found.tensors})
    wrong = {name: words for name in names if (words := _differs(name, expected, found))}
    if not wrong:
        return ""
    first = next(iter(wrong))
    more = f" and {len(wrong) - 1} more of {len(names)} tensors" if len(wrong) > 1 else ""
    return f"`{first}` {wrong[first]}{more}"


def unseen(expected: Fingerprint, found: Fingerprint) -> str:
    """What cannot be known of two bases without a visible difference; empty if they are equal."""
    tensors = [(expected.tensors[name], found.tensors[name]) for name in sorted(found.tensors)]
    unread = sum(a.noise is None or b.noise is None for a, b in tensors)
    by_sketch = [pair for pair in tensors if not _same_bits(*pair) and None not in _noises(*pair)]
    words = []
    if by_sketch:
        worst = max(by_sketch, key=lambda pair: _tolerance(*pair))
        share = 100 * math.sqrt(TENSOR_LIMIT) * _tolerance(*worst)
        row = 100 * math.sqrt(BLOCK_LIMIT * min(found.block, worst[0].rows)) * _tolerance(*worst)
        kinds = " and ".join(sorted({worst[0].kind, worst[1].kind}))
        words.append(
            f"{len(by_sketch)} tensors are of other kinds ({kinds}): changes of a tensor by less "
            f"than {share:.2g} % of its norm, or of a row by less than {row:.2g} %, cannot be seen"
        )
    if unread:
        words.append(f"{unread} tensors could not be read")
    return "; ".join(words)


def _differs(name: str, expected: Fingerprint, found: Fingerprint) -> str:
    mine, theirs = expected.tensors.get(name), found.tensors.get(name)
    if mine is None or theirs is None:
        return "is not in the run's base" if mine is None else "is missing"
    if mine.shape != theirs.shape:
        return f"has the shape {list(theirs.shape)}, not {list(mine.shape)}"
    if None in _noises(mine, theirs) or _same_bits(mine, theirs):
        return ""
    kinds = f"{theirs.kind} here, {mine.kind} there"
    if mine.kind == theirs.kind and mine.sha and theirs.sha:
        return f"has other values ({mine.kind})"
    if not len(mine.sketch) or len(mine.sketch) != len(theirs.sketch):
        return f"cannot be compared ({kinds})"
    excess = _excess(mine, theirs, found.block)
    if excess.max() > BLOCK_LIMIT:
        first = int(excess.argmax()) * found.block
        last = min(first + found.block, theirs.rows) - 1
        rows = f" in row {first}" if first == last else f" in rows {first} to {last}"
        return f"has other values{rows} ({kinds})"
    return f"has other values ({kinds})" if excess.mean() > TENSOR_LIMIT else ""


def _excess(mine: BaseTensor, theirs: BaseTensor, block: int) -> NDArray[np.float64]:
    """Of each block: squared difference over what rounding may leave."""
    a, b = mine.sketch.astype(np.float64), theirs.sketch.astype(np.float64)
    energy = np.maximum(a[:, -1], b[:, -1]) ** 2
    counts = np.minimum(block, mine.rows - block * np.arange(len(a)))
    average = counts * energy.sum() / max(mine.rows, 1)
    allowed = _tolerance(mine, theirs) ** 2 * np.maximum(energy, average)
    squares = np.square(a[:, :-1] - b[:, :-1]).mean(axis=1)
    ratio: NDArray[np.float64] = squares / np.maximum(allowed, 1e-60)
    return ratio


def _tolerance(mine: BaseTensor, theirs: BaseTensor) -> float:
    """How far apart equal tensors may be: t of the module's docstring, relative."""
    noises = [noise or 0.0 for noise in _noises(mine, theirs)]
    return math.sqrt(sum(noise**2 for noise in noises) + ENCODING)


def _noises(mine: BaseTensor, theirs: BaseTensor) -> tuple[float | None, float | None]:
    return mine.noise, theirs.noise


def _same_bits(mine: BaseTensor, theirs: BaseTensor) -> bool:
    return bool(mine.sha) and mine.sha == theirs.sha


def _tensors(plain: dict[str, Any]) -> dict[str, BaseTensor]:
    """Checked: nothing here is bounded but by the text's own length."""
    rows, block = plain["tensors"], plain["block"]
    if type(block) is not int or not 0 < block < MOST_ROWS or len(rows) > MOST_TENSORS:
        raise ValueError(f"{len(rows)} tensors in blocks of {block!r} rows")
    values = np.frombuffer(base64.b64decode(plain["sketches"], validate=True), "<f2")
    if not np.isfinite(values).all():
        raise ValueError("a sketch is not finite")
    tensors, start = {}, 0
    for name in sorted(rows):
        shape, kind, sha, noise, scale = rows[name]
        _check_row(name, shape, kind, sha, noise, scale)
        blocks = -(-math.prod(shape[:-1]) // block) if noise else 0
        size = blocks * (PROJECTIONS + 1)
        part = values[start : start + size]
        if len(part) != size:
            raise ValueError(f"{name}: half a sketch")
        start += size
        sketch = part.astype(np.float32).reshape(blocks, PROJECTIONS + 1) * np.float32(scale)
        tensors[name] = BaseTensor(tuple(shape), kind, sha, noise, sketch)
    if start != len(values):
        raise ValueError("more sketches than tensors")
    return tensors


def _check_row(name: Any, shape: Any, kind: Any, sha: Any, noise: Any, scale: Any) -> None:
    sizes = isinstance(shape, list) and all(
        type(size) is int and 0 <= size < MOST_ROWS for size in shape
    )
    texts = all(isinstance(text, str) and len(text) <= MOST_NAME for text in (name, kind, sha))
    numbers = all(
        isinstance(number, int | float) and math.isfinite(number) and 0 <= number < 1e30
        for number in (noise or 0, scale)
    )
    if not (sizes and len(shape) < 10 and texts and numbers):
        raise ValueError(f"{str(name)[:100]}: not a tensor")
