"""Highway masked convolution on a GPU. Equations: fastvae/ops/highway_conv.py.

Products are torch's; all that stands beside them is one pass over the pre-activations, in tiles.
Columns are summed tile by tile and then over programs, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.gates import highway, sigmoid, tanh, tanh_slope
from fastvae.ops.checks import (
    check_highway_conv,
    check_highway_conv_gate,
    check_highway_conv_project_backward,
)
from fastvae.ops.highway_conv import (
    highway_conv_gate_backward_reference,
    highway_conv_gate_reference,
    highway_conv_project_backward_reference,
    highway_conv_project_reference,
    highway_conv_reference,
)

ROWS = 16  # of a tile
STEPS = 8  # tiles of a program that sums up columns
COMBINE = {"PARTS": 64, "COLS": 16, "num_warps": 4}


@triton.jit
def columns(W: tl.constexpr, COLS: tl.constexpr):
    """This program's columns [COLS] of W, and which there are."""
    k = tl.program_id(1) * COLS + tl.arange(0, COLS)
    return k, k < W


@triton.jit
def rows(tile, R, inside, ROWS: tl.constexpr):
    """The rows [ROWS, 1] of the tile of that number, and what there is of them."""
    r = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return r, (r < R) & inside[None, :]


@triton.jit(do_not_specialize=("R",))
def statistics_kernel(
    a,
    means,
    m2s,
    R,
    W: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # a [R, W]; means, m2s [R / (ROWS STEPS), W]: of the columns of each program's rows
    k, inside = columns(W, COLS)
    total = tl.zeros((ROWS, COLS), means.dtype.element_ty)
    for step in range(STEPS):
        r, m = rows(tl.program_id(0) * STEPS + step, R, inside, ROWS)
        total += tl.load(a + r * W + k[None, :], m, 0.0).to(total.dtype)
    count = tl.minimum(R - tl.program_id(0) * (ROWS * STEPS), ROWS * STEPS)
    mean = tl.sum(total, 0) / count
    # Once more about the first mean, whose rounding counts where the offset is large.
    total, squares = tl.zeros_like(total), tl.zeros_like(total)
    for step in range(STEPS):
        r, m = rows(tl.program_id(0) * STEPS + step, R, inside, ROWS)
        v = tl.load(a + r * W + k[None, :], m, 0.0).to(total.dtype)
        d = tl.where(m, v - mean[None, :], 0.0)
        total += d
        squares += d * d
    left = tl.sum(total, 0)
    part = tl.program_id(0).to(tl.int64) * W + k
    tl.store(means + part, mean + left / count, inside)
    tl.store(m2s + part, tl.sum(squares, 0) - left * left / count, inside)


@triton.jit(do_not_specialize=("R",))
def combine_kernel(
    means,
    m2s,
    mean,
    m2,
    R,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    # means, m2s [R / ROWS, W], of ROWS each -> mean, m2 [W]; sums are of deviations alone
    k = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = k < W
    first = tl.load(means + k, inside, 0.0)
    total = tl.zeros((PARTS, COLS), means.dtype.element_ty)
    for p in range(0, tl.cdiv(R, ROWS), PARTS):
        part = p + tl.arange(0, PARTS).to(tl.int64)
        count = tl.minimum(tl.maximum(R - part * ROWS, 0), ROWS).to(total.dtype)[:, None]
        m = (count > 0) & inside[None, :]
        v = tl.load(means + part[:, None] * W + k[None, :], m, 0.0)
        total += tl.where(m, count * (v - first[None, :]), 0.0)
    center = first + tl.sum(total, 0) / R
    total = tl.zeros((PARTS, COLS), means.dtype.element_ty)
    for p in range(0, tl.cdiv(R, ROWS), PARTS):
        part = p + tl.arange(0, PARTS).to(tl.int64)
        count = tl.minimum(tl.maximum(R - part * ROWS, 0), ROWS).to(total.dtype)[:, None]
        m = (count > 0) & inside[None, :]
        d = tl.load(means + part[:, None] * W + k[None, :], m, 0.0) - center[None, :]
        within = tl.load(m2s + part[:, None] * W + k[None, :], m, 0.0)
        total += tl.where(m, within + count * d * d, 0.0)
    tl.store(mean + k, center, inside)
    tl.store(m2 + k, tl.sum(total, 0), inside)


@triton.jit
def gate_input(a, mean, scale, shift, k, inside, m, NORM: tl.constexpr):
    """One gate's pre-activations, normalized, and their deviations from the mean."""
    d = tl.load(a, m, 0.0).to(tl.float32)
    if NORM:
        d -= tl.load(mean + k, inside, 0.0)[None, :]
        z = d * tl.load(scale + k, inside, 0.0)[None, :]
        return z + tl.load(shift + k, inside, 0.0)[None, :], d
    return d, d


@triton.jit(do_not_specialize=("R",))
def gate_kernel(
    a,
    x,
    mean,
    scale,
    shift,
    y,
    R,
    C: tl.constexpr,
    NORM: tl.constexpr,
    CARRY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # a [R, 3C]; x, y [R, C]; mean, scale, shift [3C]: not read unless NORM
    EXACT: tl.constexpr = a.dtype.element_ty == tl.float32
    k, inside = columns(C, COLS)
    r, m = rows(tl.program_id(0), R, inside, ROWS)
    row, here = a + r * 3 * C + k[None, :], r * C + k[None, :]
    i, _ = gate_input(row, mean, scale, shift, k, inside, m, NORM)
    f, _ = gate_input(row + C, mean, scale, shift, C + k, inside, m, NORM)
    g, _ = gate_input(row + 2 * C, mean, scale, shift, 2 * C + k, inside, m, NORM)
    v = highway(i, f, g, tl.load(x + here, m, 0.0).to(tl.float32), CARRY, EXACT)
    tl.store(y + here, v.to(y.dtype.element_ty), m)


@triton.jit
def store_gate(dz, d, scale, da, k, inside, m):
    """da of one gate from that of its normalized z -> dz, and dz · d, for the columns' sums."""
    dz = tl.where(m, dz, 0.0)
    v = dz * tl.load(scale + k, inside, 0.0)[None, :]
    tl.store(da, v.to(da.dtype.element_ty), m)
    return dz, tl.where(m, dz * d, 0.0)


@triton.jit
def store_sums(shift, scale, shifts, scales, k, inside):
    tl.store(shifts + k, tl.sum(shift, 0), inside)
    tl.store(scales + k, tl.sum(scale, 0), inside)


@triton.jit(do_not_specialize=("R",))
def gate_backward_kernel(
    dy,
    a,
    x,
    mean,
    scale,
    shift,
    da,
    dx,
    shifts,
    scales,
    R,
    C: tl.constexpr,
    CARRY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # dy, x, dx [R, C]; a, da [R, 3C]; shifts, scales [programs, 3C]: sums of rows that lie far
    # apart, so that what grows and shrinks along the sequence is not added up to large numbers
    EXACT: tl.constexpr = a.dtype.element_ty == tl.float32
    k, inside = columns(C, COLS)
    shift_i, scale_i = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    shift_f, scale_f = tl.zeros_like(shift_i), tl.zeros_like(shift_i)
    shift_g, scale_g = tl.zeros_like(shift_i), tl.zeros_like(shift_i)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        r, m = rows(tile, R, inside, ROWS)
        row, here = r * 3 * C + k[None, :], r * C + k[None, :]
        i, di = gate_input(a + row, mean, scale, shift, k, inside, m, True)
        f, df = gate_input(a + row + C, mean, scale, shift, C + k, inside, m, True)
        g, dg = gate_input(a + row + 2 * C, mean, scale, shift, 2 * C + k, inside, m, True)
        d = tl.load(dy + here, m, 0.0).to(tl.float32)
        open = sigmoid(i, EXACT)
        dz = d * tanh(g, EXACT) * open * sigmoid(-i, EXACT)
        dz, along = store_gate(dz, di, scale, da + row, k, inside, m)
        shift_i += dz
        scale_i += along
        dz = d * open * tanh_slope(g, EXACT)
        dz, along = store_gate(dz, dg, scale, da + row + 2 * C, 2 * C + k, inside, m)
        shift_g += dz
        scale_g += along
        dz = tl.zeros_like(d)
        through = tl.zeros_like(d)
        if CARRY:
            through = d * sigmoid(f, EXACT)
            dz = through * sigmoid(-f, EXACT) * tl.load(x + here, m, 0.0).to(tl.float32)
        dz, along = store_gate(dz, df, scale, da + row + C, C + k, inside, m)
        shift_f += dz
        scale_f += along
        tl.store(dx + here, through.to(dx.dtype.element_ty), m)
    part = tl.program_id(0).to(tl.int64) * 3 * C
    shifts, scales = shifts + part, scales + part
    store_sums(shift_i, scale_i, shifts, scales, k, inside)
    store_sums(shift_f, scale_f, shifts, scales, C + k, inside)
    store_sums(shift_g, scale_g, shifts, scales, 2 * C + k, inside)


@triton.jit(do_not_specialize=("R",))
def project_backward_kernel(
    da,
    dmean,
    dm2,
    a,
    mean,
    total,
    sums,
    R,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # da, a, total [R, W]: all that reaches a; sums [programs, W]: of da
    k, inside = columns(W, COLS)
    center = tl.load(mean + k, inside, 0.0)[None, :]
    same = (tl.load(dmean + k, inside, 0.0) / R)[None, :]
    along = 2.0 * tl.load(dm2 + k, inside, 0.0)[None, :]
    added = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        r, m = rows(tile, R, inside, ROWS)
        here = r * W + k[None, :]
        d = tl.load(da + here, m, 0.0).to(tl.float32)
        added += d
        v = tl.load(a + here, m, 0.0).to(tl.float32) - center
        tl.store(total + here, (d + same + along * v).to(total.dtype.element_ty), m)
    part = tl.program_id(0).to(tl.int64) * W + k
    tl.store(sums + part, tl.sum(added, 0), inside)


def tiles(R: int, W: int, steps: int = 1) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid over [R, W], and the options of its programs, of `steps` tiles each."""
    cols = min(64, triton.next_power_of_2(W))
    grid = triton.cdiv(R, ROWS * steps), triton.cdiv(W, cols)
    return grid, {"ROWS": ROWS, "COLS": cols, "num_warps": 8 if cols == 64 else 1}


def highway_conv_project(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The op on a GPU: two products and two kernels for the statistics."""
    check_highway_conv(x, weight, bias)
    if x.dtype == torch.float64:
        return highway_conv_project_reference(x, weight, bias)
    a = _project(x, weight, bias)
    R, W = a.shape[0] * a.shape[1], a.shape[2]
    grid, launch = tiles(R, W, STEPS)
    means, m2s = a.new_empty(2, grid[0], W, dtype=torch.float32)
    mean, m2 = (a.new_empty(W, dtype=torch.float32) for _ in range(2))
    statistics_kernel[grid](a, means, m2s, R, W=W, STEPS=STEPS, **launch)
    combine_kernel[(triton.cdiv(W, COMBINE["COLS"]),)](
        means, m2s, mean, m2, R, W=W, ROWS=ROWS * STEPS, **COMBINE
    )
    return a, mean, m2


def highway_conv_project_backward(
    da: Tensor, dmean: Tensor, dm2: Tensor, x: Tensor, weight: Tensor, a: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward: one kernel for what reaches a, four products."""
    T, B, C = check_highway_conv_project_backward(da, dmean, dm2, x, weight, a, mean)
    if x.dtype == torch.float64:
        return highway_conv_project_backward_reference(da, dmean, dm2, x, weight, a, mean)
    da, dmean, dm2, a, mean = (t.contiguous() for t in (da, dmean, dm2, a, mean))
    R, W = T * B, 3 * C
    grid, launch = tiles(R, W, STEPS)
    total = da.new_empty(R, W)
    sums = mean.new_empty(grid[0], W)
    tensors = da, dmean, dm2, a, mean, total, sums
    project_backward_kernel[grid](*tensors, R, W=W, **launch)
    rows, (before, now) = x.reshape(R, C), weight.permute(2, 0, 1).contiguous()
    dx = total @ now
    dx[: R - B].addmm_(total[B:], before)
    dweight = torch.stack([total[B:].T @ rows[: R - B], total.T @ rows], -1)
    return dx.view(T, B, C), dweight, (sums.sum(0) + dmean).to(x.dtype)


def highway_conv_gate(
    a: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, carry: bool
) -> Tensor:
    """The op on a GPU: one kernel."""
    check_highway_conv_gate(a, x, mean, scale, shift)
    if x.dtype == torch.float64:
        return highway_conv_gate_reference(a, x, mean, scale, shift, carry)
    return gate(a, x, mean, scale, shift, carry)


def highway_conv_gate_backward(
    dy: Tensor, a: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, carry: bool
) -> tuple[Tensor, ...]:
    """Its backward: one kernel, and the sums over its tiles."""
    check_highway_conv_gate(a, x, mean, scale, shift, dy)
    if x.dtype == torch.float64:
        return highway_conv_gate_backward_reference(dy, a, x, mean, scale, shift, carry)
    dy, a, x, mean, scale, shift = (t.contiguous() for t in (dy, a, x, mean, scale, shift))
    R, C = x.shape[0] * x.shape[1], x.shape[2]
    grid, launch = tiles(R, C, STEPS)
    da, dx = torch.empty_like(a), torch.empty_like(x)
    shifts, scales = mean.new_empty(2, grid[0], 3 * C)
    tensors = dy, a, x, mean, scale, shift, da, dx, shifts, scales
    gate_backward_kernel[grid](*tensors, R, C=C, CARRY=carry, **launch)
    dshift = shifts.sum(0)
    return da, dx, -scale * dshift, scales.sum(0), dshift


def highway_conv(x: Tensor, weight: Tensor, bias: Tensor, carry: bool) -> Tensor:
    """The folded layer on a GPU: two products and one kernel."""
    check_highway_conv(x, weight, bias)
    if x.dtype == torch.float64:
        return highway_conv_reference(x, weight, bias, carry)
    return gate(_project(x, weight, bias), x, None, None, None, carry)


def gate(
    a: Tensor,
    x: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    carry: bool,
) -> Tensor:
    """a [..., 3C], x [..., C] -> y [..., C]; mean, scale, shift [3C], or None: no norm."""
    a, x = a.contiguous(), x.contiguous()
    norm = [t if t is None else t.contiguous() for t in (mean, scale, shift)]
    y, C = torch.empty_like(x), x.shape[-1]
    R = x.numel() // C
    grid, launch = tiles(R, C)
    gate_kernel[grid](a, x, *norm, y, R, C=C, NORM=mean is not None, CARRY=carry, **launch)
    return y


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """a [T, B, 3C]: one product a tap, the second on top of the first."""
    T, B, C = x.shape
    rows, (before, now) = x.reshape(T * B, C), weight.permute(2, 0, 1).contiguous()
    a = torch.addmm(bias, rows, now.T)
    a[B:].addmm_(rows[: (T - 1) * B], before.T)
    return a.view(T, B, 3 * C)
