"""Gumbel noise on a GPU. Equations: fastvae/ops/gumbel_noise.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.ops.checks import check_gumbel_noise

BLOCKS = 256  # of four values, a program's own


@triton.jit
def noise_kernel(seed, noise, temperature, COUNT, BLOCKS: tl.constexpr):
    # seed [1]; noise [COUNT]
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    words = tl.philox(tl.load(seed), low, high, low * 0, low * 0)
    for word in tl.static_range(4):
        value = gumbel(words[word]) * temperature
        tl.store(noise + block * 4 + word, value, block * 4 + word < COUNT)


@triton.jit
def gumbel(x):
    """−log(−log(1 − u)), u = (x + ½) / 2³²: the smaller one of u and 1 − u is exact."""
    signed = x.to(tl.int32, bitcast=True)
    upper = signed < 0
    smaller = (tl.where(upper, ~signed, signed).to(tl.float32) + 0.5) * (1 / 4294967296.0)
    rest = 1 - smaller
    lost = (1 - rest - smaller) / rest  # what rounding took from rest
    exponential = tl.where(upper, -tl.log(smaller), -tl.log(rest) - lost)
    return -tl.log(exponential)


def gumbel_noise(
    seed: Tensor, steps: int, batch: int, vocab_size: int, temperature: float
) -> Tensor:
    check_gumbel_noise(seed, steps, batch, vocab_size)
    noise = torch.empty(steps, batch, vocab_size, device=seed.device)
    if count := noise.numel():
        grid = (triton.cdiv(count, 4 * BLOCKS),)
        noise_kernel[grid](seed, noise, temperature, count, BLOCKS)
    return noise
