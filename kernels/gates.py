"""What the kernels share on the device: gates, norm, choice of tokens, and launch sizes."""

import torch
import triton
import triton.language as tl


@triton.jit
def exp(x):
    """eˣ of float32 within an ulp or so, which tl.exp is not: EXACT, where outputs are float32.

    x = n ln 2 + r; Taylor's polynomial of e^r, whose error is 5e−9, times 2ⁿ. ∞ from 88.4 on, 0
    up to −87.7.
    """
    x = tl.where(x > 89.0, 89.0, x)  # NaN stays
    x = tl.where(x < -88.0, -88.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693145751953125 - n * 1.4286068203094172e-06  # ln 2, whose first part is exact
    p = 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    return 1.0 / (1.0 + (exp(-x) if EXACT else tl.exp(-x)))


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    e = -2.0 * tl.abs(x)
    e = exp(e) if EXACT else tl.exp(e)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_slope(x, EXACT: tl.constexpr):
    """1 − tanh²(x), which must not cancel where tanh is near 1."""
    e = -2.0 * tl.abs(x)
    e = exp(e) if EXACT else tl.exp(e)
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def highway(i, f, g, x, CARRY: tl.constexpr, EXACT: tl.constexpr):
    """σ(i) tanh(g), and σ(f) x beside it where the highway carries."""
    y = sigmoid(i, EXACT) * tanh(g, EXACT)
    if CARRY:
        y += sigmoid(f, EXACT) * x
    return y


def row_launch(size: int, hip: bool = bool(torch.version.hip)) -> dict[str, int]:
    """One program per row of `size` elements: BLOCK is a power of two, some elements a thread."""
    block, lanes = triton.next_power_of_2(size), 64 if hip else 32
    warps = min(max(block // (4 * lanes), 1), 8) if block < 2048 else 1024 // lanes
    return {"BLOCK": block, "num_warps": warps}


@triton.jit
def normalize(i, f, g, o, m, H, EPS: tl.constexpr):
    """A row of four gates [BLOCK], m where k < H -> the same normalized together, and 1 / σ."""
    i, f, g, o = tl.where(m, i, 0.0), tl.where(m, f, 0.0), tl.where(m, g, 0.0), tl.where(m, o, 0.0)
    mean = tl.sum(i + f + g + o, 0) / (4 * H)
    i, f = tl.where(m, i - mean, 0.0), tl.where(m, f - mean, 0.0)
    g, o = tl.where(m, g - mean, 0.0), tl.where(m, o - mean, 0.0)
    variance = tl.sum(i * i + f * f + g * g + o * o, 0) / (4 * H)
    r = tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))
    r = tl.where(variance < float("inf"), r, float("nan"))  # zeros would hide the overflow
    return i * r, f * r, g * r, o * r, r


@triton.jit
def update(i, f, g, o, gain, bias, before, k, m, H):
    """Normalized gates [BLOCK] and the cell before; pointers gain, bias [4H] -> c, h."""
    acc_dtype = before.dtype
    EXACT: tl.constexpr = gain.dtype.element_ty == tl.float32
    i = i * tl.load(gain + k, m, 0.0).to(acc_dtype) + tl.load(bias + k, m, 0.0).to(acc_dtype)
    f = f * tl.load(gain + H + k, m, 0.0).to(acc_dtype) + tl.load(bias + H + k, m, 0.0).to(
        acc_dtype
    )
    g = g * tl.load(gain + 2 * H + k, m, 0.0).to(acc_dtype) + tl.load(bias + 2 * H + k, m, 0.0).to(
        acc_dtype
    )
    o = o * tl.load(gain + 3 * H + k, m, 0.0).to(acc_dtype) + tl.load(bias + 3 * H + k, m, 0.0).to(
        acc_dtype
    )
    c = sigmoid(f, EXACT) * before + sigmoid(i, EXACT) * tanh(g, EXACT)
    return c, sigmoid(o, EXACT) * tanh(c, EXACT)


@triton.jit
def rank(logits, v, m):
    """float32 logits of tokens v where m -> int64 keys, the largest of which is torch.argmax's.

    Of equals the first is largest, and NaN above all: the logit's bits in their order, then the
    token backwards.
    """
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # −0 equals 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(logits != logits, 0x7FFFFFFF, bits)
    bits = tl.where(m, bits, -0x80000000)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - v).to(tl.int64)


@triton.jit
def ranked(key):
    """The token of a key of `rank`."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
