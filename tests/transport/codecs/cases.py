"""Tensors for the laws of codecs: blocks of any magnitude, zeros among them, ragged at the end."""

import torch
from hypothesis import strategies as st

from fedtune.transport.codecs import CODECS
from fedtune.transport.codecs.zstd import ZstdCodec

EVERY = {**CODECS, "zstd": ZstdCodec()}
NAMES = list(EVERY)
LOSSY_BLOCKS = {"int8": 256, "nf4": 64, "fp4": 64}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Exponents of two at which every codec works, products and sums of the checks included.
RANGES = {torch.float16: (-4, 14)}
ANY_RANGE = (-100, 100)  # 7.9e-31 to 1.3e30


@st.composite
def spread(draw, dtypes=FLOATS):
    """Normal values, (n,); each run of 64 has a magnitude of its own, or is zero."""
    dtype = draw(st.sampled_from(dtypes))
    low, high = RANGES.get(dtype, ANY_RANGE)
    count = draw(st.integers(0, 700) | st.sampled_from([16384, 16385, 40000]))
    few = draw(st.lists(st.integers(low, high), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    runs = -(-count // 64)
    exponents = torch.tensor(few)[torch.randint(len(few), (runs,), generator=generator)]
    keep = torch.rand(runs, generator=generator) > 0.1
    scale = keep * torch.exp2(exponents.double())
    # Within [-3.9, 3.9], so that 2^14 times it is a number of fp16.
    values = torch.randn(runs, 64, generator=generator).double().clamp(-3.9, 3.9)
    return (values * scale.unsqueeze(1)).view(-1)[:count].to(dtype)


def block_maxima(x, block):
    """max|x| of every value's block, (n,), fp64."""
    padded = torch.nn.functional.pad(x.double().abs(), (0, -len(x) % block))
    return padded.view(-1, block).amax(1).repeat_interleave(block)[: len(x)]


def relative_l2(x, y):
    return float((x.double() - y.double()).norm() / x.double().norm())
