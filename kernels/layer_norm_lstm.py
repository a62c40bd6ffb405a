"""LayerNorm-LSTM on a GPU. Equations: fastvae/ops/layer_norm_lstm.py.

A step is one product and one kernel, whose programs own a row of the batch each; the whole loop is
replayed as a graph (graphs.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import persistent
from fastvae.kernels.gates import normalise, row_launch, sigmoid, tanh, tanh_slope, update
from fastvae.kernels.graphs import replayed
from fastvae.ops.checks import check_layer_norm_lstm
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_backward_loop, layer_norm_lstm_loop
from fastvae.ops.precision import accumulate_dtype

LARGEST = 2048  # H whose four gates fit the registers of one program


@triton.jit
def forward_kernel(
    x,
    a,
    gain,
    bias,
    c_before,
    h,
    c,
    normalised,
    rstd,
    H,
    EPS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # x, a [B, 4H]: inputs and W h; normalised [B, 4H]; c_before, h, c [B, H]; rstd [B]
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    m = k < H
    wide = c.dtype.element_ty
    x, a = x + 4 * b * H + k, a + 4 * b * H + k
    i = tl.load(x, m, 0.0).to(wide) + tl.load(a, m, 0.0).to(wide)
    f = tl.load(x + H, m, 0.0).to(wide) + tl.load(a + H, m, 0.0).to(wide)
    g = tl.load(x + 2 * H, m, 0.0).to(wide) + tl.load(a + 2 * H, m, 0.0).to(wide)
    o = tl.load(x + 3 * H, m, 0.0).to(wide) + tl.load(a + 3 * H, m, 0.0).to(wide)
    i, f, g, o, r = normalise(i, f, g, o, m, H, EPS)
    if SAVE:
        tl.store(rstd + b, r)
        kept = normalised + 4 * b * H + k
        tl.store(kept, i.to(normalised.dtype.element_ty), m)
        tl.store(kept + H, f.to(normalised.dtype.element_ty), m)
        tl.store(kept + 2 * H, g.to(normalised.dtype.element_ty), m)
        tl.store(kept + 3 * H, o.to(normalised.dtype.element_ty), m)
    before = tl.load(c_before + b * H + k, m, 0.0).to(wide)
    cell, out = update(i, f, g, o, gain, bias, before, k, m, H)
    tl.store(c + b * H + k, cell, m)
    tl.store(h + b * H + k, out.to(h.dtype.element_ty), m)


@triton.jit
def gate_backward(d, normalised, gain, dz, m, wide):
    """Gradient of one gate's z to that of its normalised value; dz is kept for gain and bias."""
    tl.store(dz, d.to(dz.dtype.element_ty), m)
    dn = d * tl.load(gain, m, 0.0).to(wide)
    return dn, dn * tl.load(normalised, m, 0.0).to(wide)


@triton.jit
def norm_backward(dn, mean, along, normalised, r, da, m, wide):
    v = tl.load(normalised, m, 0.0).to(wide)
    tl.store(da, (r * (dn - mean - v * along)).to(da.dtype.element_ty), m)


@triton.jit
def backward_kernel(
    dh, through, dc, gain, bias, c_before, c, normalised, rstd, da, dz, H, BLOCK: tl.constexpr
):
    # dh, through [B, H]: from this step's output and from the next step; dc [B, H] is rewritten
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    m = k < H
    wide = c.dtype.element_ty
    n = normalised + 4 * b * H + k
    da, dz = da + 4 * b * H + k, dz + 4 * b * H + k
    gain, bias = gain + k, bias + k
    zi = tl.load(n, m, 0.0).to(wide) * tl.load(gain, m, 0.0) + tl.load(bias, m, 0.0)
    zf = tl.load(n + H, m, 0.0).to(wide) * tl.load(gain + H, m, 0.0) + tl.load(bias + H, m, 0.0)
    zg = tl.load(n + 2 * H, m, 0.0).to(wide) * tl.load(gain + 2 * H, m, 0.0)
    zg += tl.load(bias + 2 * H, m, 0.0)
    zo = tl.load(n + 3 * H, m, 0.0).to(wide) * tl.load(gain + 3 * H, m, 0.0)
    zo += tl.load(bias + 3 * H, m, 0.0)
    i, f, g, o = sigmoid(zi), sigmoid(zf), tanh(zg), sigmoid(zo)
    cell = tl.load(c + b * H + k, m, 0.0)
    d = tl.load(dh + b * H + k, m, 0.0).to(wide) + tl.load(through + b * H + k, m, 0.0).to(wide)
    dcell = tl.load(dc + b * H + k, m, 0.0) + d * o * tanh_slope(cell)
    before = tl.load(c_before + b * H + k, m, 0.0).to(wide)
    tl.store(dc + b * H + k, dcell * f, m)
    # Lanes past H are zero: c and dh read as zero there.
    di, along_i = gate_backward(dcell * g * i * sigmoid(-zi), n, gain, dz, m, wide)
    df, along_f = gate_backward(dcell * before * f * sigmoid(-zf), n + H, gain + H, dz + H, m, wide)
    dg, along_g = gate_backward(
        dcell * i * tanh_slope(zg), n + 2 * H, gain + 2 * H, dz + 2 * H, m, wide
    )
    do, along_o = gate_backward(
        d * tanh(cell) * o * sigmoid(-zo), n + 3 * H, gain + 3 * H, dz + 3 * H, m, wide
    )
    mean = tl.sum(di + df + dg + do, 0) / (4 * H)
    along = tl.sum(along_i + along_f + along_g + along_o, 0) / (4 * H)
    r = tl.load(rstd + b)
    norm_backward(di, mean, along, n, r, da, m, wide)
    norm_backward(df, mean, along, n + H, r, da + H, m, wide)
    norm_backward(dg, mean, along, n + 2 * H, r, da + 2 * H, m, wide)
    norm_backward(do, mean, along, n + 3 * H, r, da + 3 * H, m, wide)


def layer_norm_lstm(
    x: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    eps: float,
    save: bool,
) -> tuple[Tensor, ...]:
    """The op on a GPU. What one program cannot hold, and float64, runs as plain PyTorch."""
    tensors = x, weight_hh, norm_weight, norm_bias, h0, c0
    _, B, H = check_layer_norm_lstm(*tensors)
    if x.dtype == torch.float64 or H > LARGEST:
        return layer_norm_lstm_loop(*tensors, eps, save)
    if machine := persistent.serving("layer_norm_lstm", x):
        plan = persistent.plan_lstm(H, B, x.dtype.itemsize, machine)
        if plan:
            return persistent.layer_norm_lstm(*tensors, eps, save, plan=plan)
    return replayed(_forward, tensors, eps, save)


def layer_norm_lstm_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Its backward: dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0 and what forward kept."""
    if tensors[0].dtype == torch.float64 or tensors[0].shape[-1] > LARGEST:
        return layer_norm_lstm_backward_loop(*tensors)
    return replayed(_backward, tensors)


def _forward(x, weight_hh, norm_weight, norm_bias, h0, c0, eps, save):
    T, B, H = len(x), *h0.shape
    wide, kept = accumulate_dtype(x.dtype), T if save else 1
    h, a = x.new_empty(T, B, H), x.new_empty(B, 4 * H)
    c, rstd = x.new_empty(kept, B, H, dtype=wide), x.new_empty(kept, B, dtype=wide)
    normalised = x.new_empty(kept, B, 4 * H) if save else a.unsqueeze(0)
    before, c_before = h0, c0.to(wide)
    for t in range(T):
        s = t if save else 0
        torch.mm(before, weight_hh.T, out=a)
        forward_kernel[(B,)](
            x[t],
            a,
            norm_weight,
            norm_bias,
            c_before,
            h[t],
            c[s],
            normalised[s],
            rstd[s],
            H,
            EPS=eps,
            SAVE=save,
            **row_launch(H),
        )
        before, c_before = h[t], c[s]
    c_n = c[-1].to(x.dtype)
    if save:
        return h, c_n, c, normalised, rstd
    return h, c_n, x.new_empty(0, dtype=wide), x.new_empty(0), x.new_empty(0, dtype=wide)


def _backward(dh, dc_n, weight_hh, norm_weight, norm_bias, h0, c0, h, c, normalised, rstd):
    T, B, H = h.shape
    dx, dz = torch.empty_like(normalised), torch.empty_like(normalised)
    dc, through, c0_wide = dc_n.to(c.dtype, copy=True), torch.zeros_like(h0), c0.to(c.dtype)
    for t in reversed(range(T)):
        backward_kernel[(B,)](
            dh[t],
            through,
            dc,
            norm_weight,
            norm_bias,
            c[t - 1] if t else c0_wide,
            c[t],
            normalised[t],
            rstd[t],
            dx[t],
            dz[t],
            H,
            **row_launch(H),
        )
        torch.mm(dx[t], weight_hh, out=through)
    before = torch.cat([h0.unsqueeze(0), h[:-1]]).flatten(0, 1)
    dweight = dx.flatten(0, 1).T @ before
    wide = dz.to(c.dtype).flatten(0, 1)
    dgain = (wide * normalised.flatten(0, 1)).sum(0).to(h.dtype)
    return dx, dweight, dgain, wide.sum(0).to(h.dtype), through, dc.to(c0.dtype)
