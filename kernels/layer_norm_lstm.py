"""LayerNorm-LSTM on a GPU. Equations: fastvae/ops/layer_norm_lstm.py.

A step is one product and one kernel, whose programs own a row of the batch each; the whole loop is
replayed as a graph (graphs.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import persistent
from fastvae.kernels.gates import (
    normalize,
    row_launch,
    sigmoid,
    tanh,
    tanh_slope,
    update,
)
from fastvae.kernels.graphs import replayed
from fastvae.kernels.products import padded
from fastvae.ops.checks import check_layer_norm_lstm
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_backward_loop, layer_norm_lstm_loop
from fastvae.ops.precision import accumulate_dtype

LARGEST = 2048  # H whose four gates fit the registers of one program
SLICE = 512  # rows whose products a float32 weight's gradient adds up at once
SUMS = {"ROWS": 16, "COLS": 64, "num_warps": 4}
TILES = 16  # of a program that sums up columns


@triton.jit(do_not_specialize=("row", "kept", "before", "t"))
def forward_kernel(
    x,
    a,
    gain,
    bias,
    c_before,
    h,
    c,
    normalized,
    rstd,
    lengths,
    row,
    kept,
    before,
    t,
    H: tl.constexpr,
    STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    SAVE: tl.constexpr,
    LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Rows of all steps: x [., 4H] and h [., STRIDE] from `row` on; c, normalized, rstd from `kept`
    # on; c_before from `before` on. a [B, 4H]: W h. lengths [B]: past a row's the state stays
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    m = k < H
    acc_dtype = c.dtype.element_ty
    x, a = x + 4 * H * (row + b) + k, a + 4 * H * b + k
    real = (t < tl.load(lengths + b)) if LENGTHS else True
    in_x = m & real
    i = tl.load(x, in_x, 0.0).to(acc_dtype) + tl.load(a, in_x, 0.0).to(acc_dtype)
    f = tl.load(x + H, in_x, 0.0).to(acc_dtype) + tl.load(a + H, in_x, 0.0).to(acc_dtype)
    g = tl.load(x + 2 * H, in_x, 0.0).to(acc_dtype) + tl.load(a + 2 * H, in_x, 0.0).to(acc_dtype)
    o = tl.load(x + 3 * H, in_x, 0.0).to(acc_dtype) + tl.load(a + 3 * H, in_x, 0.0).to(acc_dtype)
    i, f, g, o, r = normalize(i, f, g, o, m, H, EPS)
    if LENGTHS:  # zeros, whatever eps is
        i, f, g = tl.where(real, i, 0.0), tl.where(real, f, 0.0), tl.where(real, g, 0.0)
        o, r = tl.where(real, o, 0.0), tl.where(real, r, 0.0)
    if SAVE:
        tl.store(rstd + kept + b, r)
        n = normalized + 4 * H * (kept + b) + k
        tl.store(n, i.to(normalized.dtype.element_ty), m)
        tl.store(n + H, f.to(normalized.dtype.element_ty), m)
        tl.store(n + 2 * H, g.to(normalized.dtype.element_ty), m)
        tl.store(n + 3 * H, o.to(normalized.dtype.element_ty), m)
    cell_before = tl.load(c_before + H * (before + b) + k, m, 0.0).to(acc_dtype)
    cell, out = update(i, f, g, o, gain, bias, cell_before, k, m, H)
    if LENGTHS:
        cell, out = tl.where(real, cell, cell_before), tl.where(real, out, 0.0)
    tl.store(c + H * (kept + b) + k, cell, m)
    tl.store(h + STRIDE * (row + b) + k, out.to(h.dtype.element_ty), m)


@triton.jit
def gate_backward(d, normalized, gain, dz, m, acc_dtype):
    """Gradient of one gate's z to that of its normalized value; dz is kept for gain and bias."""
    tl.store(dz, d.to(dz.dtype.element_ty), m)
    dn = d * tl.load(gain, m, 0.0).to(acc_dtype)
    return dn, dn * tl.load(normalized, m, 0.0).to(acc_dtype)


@triton.jit
def norm_backward(dn, mean, along, normalized, r, da, m, acc_dtype):
    v = tl.load(normalized, m, 0.0).to(acc_dtype)
    tl.store(da, (r * (dn - mean - v * along)).to(da.dtype.element_ty), m)


@triton.jit(do_not_specialize=("row", "before", "t"))
def backward_kernel(
    dh,
    through,
    dc,
    gain,
    bias,
    c_before,
    c,
    normalized,
    rstd,
    da,
    dz,
    lengths,
    row,
    before,
    t,
    H: tl.constexpr,
    STRIDE: tl.constexpr,
    LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Rows of all steps: dh [., H], c, normalized, rstd, da, dz from `row` on; c_before from
    # `before` on. through [B, STRIDE]: from the next step; dc [B, H] is rewritten. lengths [B]:
    # past a row's dc stays, da and dz are zero
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    m = k < H
    acc_dtype = c.dtype.element_ty
    EXACT: tl.constexpr = gain.dtype.element_ty == tl.float32
    now = row + b
    n = normalized + 4 * H * now + k
    da, dz = da + 4 * H * now + k, dz + 4 * H * now + k
    gain, bias = gain + k, bias + k
    zi = tl.load(n, m, 0.0).to(acc_dtype) * tl.load(gain, m, 0.0) + tl.load(bias, m, 0.0)
    zf = tl.load(n + H, m, 0.0).to(acc_dtype) * tl.load(gain + H, m, 0.0) + tl.load(
        bias + H, m, 0.0
    )
    zg = tl.load(n + 2 * H, m, 0.0).to(acc_dtype) * tl.load(gain + 2 * H, m, 0.0)
    zg += tl.load(bias + 2 * H, m, 0.0)
    zo = tl.load(n + 3 * H, m, 0.0).to(acc_dtype) * tl.load(gain + 3 * H, m, 0.0)
    zo += tl.load(bias + 3 * H, m, 0.0)
    i, f, g, o = sigmoid(zi, EXACT), sigmoid(zf, EXACT), tanh(zg, EXACT), sigmoid(zo, EXACT)
    cell = tl.load(c + H * now + k, m, 0.0)
    real = (t < tl.load(lengths + b)) if LENGTHS else True
    d = tl.load(dh + H * now + k, m & real, 0.0).to(acc_dtype)
    d += tl.load(through + STRIDE * b + k, m & real, 0.0).to(acc_dtype)
    dcell = tl.load(dc + H * b + k, m & real, 0.0) + d * o * tanh_slope(cell, EXACT)
    cell_before = tl.load(c_before + H * (before + b) + k, m, 0.0).to(acc_dtype)
    tl.store(dc + H * b + k, dcell * f, m & real)
    # Lanes past H are zero: c and dh read as zero there.
    do, along_o = gate_backward(
        d * tanh(cell, EXACT) * o * sigmoid(-zo, EXACT),
        n + 3 * H,
        gain + 3 * H,
        dz + 3 * H,
        m,
        acc_dtype,
    )
    di, along_i = gate_backward(dcell * g * i * sigmoid(-zi, EXACT), n, gain, dz, m, acc_dtype)
    df, along_f = gate_backward(
        dcell * cell_before * f * sigmoid(-zf, EXACT), n + H, gain + H, dz + H, m, acc_dtype
    )
    dg, along_g = gate_backward(
        dcell * i * tanh_slope(zg, EXACT), n + 2 * H, gain + 2 * H, dz + 2 * H, m, acc_dtype
    )
    mean = tl.sum(di + df + dg + do, 0) / (4 * H)
    along = tl.sum(along_i + along_f + along_g + along_o, 0) / (4 * H)
    r = tl.load(rstd + now)
    norm_backward(di, mean, along, n, r, da, m, acc_dtype)
    norm_backward(df, mean, along, n + H, r, da + H, m, acc_dtype)
    norm_backward(dg, mean, along, n + 2 * H, r, da + 2 * H, m, acc_dtype)
    norm_backward(do, mean, along, n + 3 * H, r, da + 3 * H, m, acc_dtype)


@triton.jit(do_not_specialize=("R",))
def sums_kernel(
    dz,
    normalized,
    shifts,
    scales,
    R,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # dz, normalized [R, W]; shifts, scales [programs, W]: sums of dz, of dz normalized, of rows
    # that lie far apart, as in highway_conv.py
    acc_dtype = shifts.dtype.element_ty
    k = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = k < W
    shift, scale = tl.zeros((ROWS, COLS), acc_dtype), tl.zeros((ROWS, COLS), acc_dtype)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        r = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        here, m = r[:, None] * W + k[None, :], (r < R)[:, None] & inside[None, :]
        d = tl.load(dz + here, m, 0.0).to(acc_dtype)
        shift += d
        scale += d * tl.load(normalized + here, m, 0.0).to(acc_dtype)
    part = tl.program_id(0).to(tl.int64) * W + k
    tl.store(shifts + part, tl.sum(shift, 0), inside)
    tl.store(scales + part, tl.sum(scale, 0), inside)


def layer_norm_lstm(
    x: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    eps: float,
    save: bool,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The op on a GPU. What one program cannot hold, packed x and float64 run as plain PyTorch."""
    tensors = x, weight_hh, norm_weight, norm_bias, h0, c0
    _, B, H = check_layer_norm_lstm(*tensors, lengths)
    if x.dtype == torch.float64 or H > LARGEST or x.dim() == 2:
        return layer_norm_lstm_loop(*tensors, eps, save, lengths)
    if lengths is not None:
        return replayed(_forward_lengths, (*tensors, lengths), eps, save)
    if machine := persistent.serving("layer_norm_lstm", x, B, H):
        below = persistent.rival("layer_norm_lstm", x.dtype.itemsize, B)
        plan = persistent.plan_lstm(H, B, x.dtype.itemsize, machine, below=below)
        if plan:
            return persistent.layer_norm_lstm(*tensors, eps, save, plan=plan)
    return replayed(_forward, tensors, eps, save)


def layer_norm_lstm_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Its backward: dh, dc_n, weights, h0, c0, what forward gave and kept, lengths."""
    dh = tensors[0]
    if dh.dtype == torch.float64 or dh.shape[-1] > LARGEST or dh.dim() == 2:
        return layer_norm_lstm_backward_loop(*tensors)
    return replayed(_backward, tuple(t for t in tensors if t is not None))


def _forward_lengths(x, weight_hh, norm_weight, norm_bias, h0, c0, lengths, eps, save):
    return _forward(x, weight_hh, norm_weight, norm_bias, h0, c0, eps, save, lengths)


def _forward(x, weight_hh, norm_weight, norm_bias, h0, c0, eps, save, lengths=None):
    T, B, H = len(x), *h0.shape
    acc_dtype, kept = accumulate_dtype(x.dtype), T if save else 1
    weight, before = padded(weight_hh), padded(h0)
    h, a = x.new_empty(T, *before.shape), x.new_empty(B, 4 * H)
    h[..., H:] = 0
    c, rstd = x.new_empty(kept, B, H, dtype=acc_dtype), x.new_empty(kept, B, dtype=acc_dtype)
    normalized = x.new_empty(kept, B, 4 * H) if save else a
    c0 = c0.to(acc_dtype)
    for t in range(T):
        s = t if save else 0
        torch.mm(before, weight.T, out=a)
        forward_kernel[(B,)](
            x,
            a,
            norm_weight,
            norm_bias,
            c if t else c0,
            h,
            c,
            normalized,
            rstd,
            lengths,
            t * B,
            s * B,
            max(s - 1, 0) * B,
            t,
            H=H,
            STRIDE=h.shape[2],
            EPS=eps,
            SAVE=save,
            LENGTHS=lengths is not None,
            **row_launch(H),
        )
        before = h[t]
    h = h[..., :H].contiguous()
    c_n = c[-1].to(x.dtype, copy=True)  # an output of its own, aligned as one
    if save:
        return h, c_n, c, normalized, rstd
    return h, c_n, x.new_empty(0, dtype=acc_dtype), x.new_empty(0), x.new_empty(0, dtype=acc_dtype)


def _backward(
    dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalized, rstd, lengths=None
):
    T, B, H = h.shape
    dx, dz = torch.empty_like(normalized), torch.empty_like(normalized)
    weight, through = padded(weight_hh), torch.zeros_like(padded(h0))
    if h.dtype.itemsize == 2:  # the product that is read along its sums is the faster one
        weight = weight.T.contiguous().T
    dc, start = dc_n.to(c.dtype, copy=True), c0.to(c.dtype)
    for t in reversed(range(T)):
        backward_kernel[(B,)](
            dh,
            through,
            dc,
            norm_weight,
            norm_bias,
            c if t else start,
            c,
            normalized,
            rstd,
            dx,
            dz,
            lengths,
            t * B,
            max(t - 1, 0) * B,
            t,
            H=H,
            STRIDE=through.shape[1],
            LENGTHS=lengths is not None,
            **row_launch(H),
        )
        torch.mm(dx[t], weight, out=through)
    before = padded(torch.cat([h0.unsqueeze(0), h[:-1]])).flatten(0, 1)
    dweight = summed_products(dx.flatten(0, 1), before)[:, :H].contiguous()
    dgain, dbias = norm_sums(dz.flatten(0, 1), normalized.flatten(0, 1))
    return dx, dweight, dgain, dbias, through[:, :H].contiguous(), dc.to(c0.dtype)


def summed_products(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of a [R, M], b [R, N]; in float32 by slices of rows, as one long sum loses too much."""
    if a.dtype != torch.float32:
        return a.T @ b
    total = a.new_zeros(a.shape[1], b.shape[1])
    for first, second in zip(a.split(SLICE), b.split(SLICE), strict=True):
        total.addmm_(first.T, second)
    return total


def norm_sums(dz: Tensor, normalized: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gain and bias [W] from dz and normalized [R, W]."""
    R, W = dz.shape
    parts = triton.cdiv(R, SUMS["ROWS"] * TILES)
    shifts, scales = dz.new_empty(2, parts, W, dtype=accumulate_dtype(dz.dtype))
    grid = parts, triton.cdiv(W, SUMS["COLS"])
    sums_kernel[grid](dz, normalized, shifts, scales, R, W=W, **SUMS)
    return scales.sum(0).to(dz.dtype), shifts.sum(0).to(dz.dtype)
