"""What the kernels share on the device: gates with their slopes, and launch sizes."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_slope(x):
    """1 − tanh²(x), which must not cancel where tanh is near 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def highway(i, f, g, x, CARRY: tl.constexpr):
    """σ(i) tanh(g), and σ(f) x beside it where the highway carries."""
    y = sigmoid(i) * tanh(g)
    if CARRY:
        y += sigmoid(f) * x
    return y


def row_launch(size: int) -> dict[str, int]:
    """One program per row of `size` elements: BLOCK is a power of two, some elements a thread."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 128, 1), 8) if block < 2048 else 32}
