"""Decoding with a LayerNorm-LSTM on a GPU. Equations: fastvae/ops/decode_lstm.py.

A step is one product and one kernel. The product of hₜ₋₁ with the recurrent weights and the
classifier's, one above the other, gives u = W hₜ₋₁ and the logits of step t − 1; the kernel, whose
programs own a row of the batch each, chooses the symbol, adds its row to u, and makes hₜ. Steps are
replayed in chunks as a graph (graphs.py), between which the host may see that all texts have ended.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels.checks import check_decode, check_shapes
from fastvae.kernels.gates import choose, normalise, row_launch, update
from fastvae.kernels.graphs import capturing, held
from fastvae.ops.decode_lstm import decode_lstm_reference
from fastvae.ops.precision import accumulate_dtype

LARGEST = 2048  # H whose four gates, and V whose logits, fit the registers of one program
STEPS = 32  # of a chunk: what is decoded in vain when all texts have ended
PROJECTED = 1 << 26  # most elements of a chunk's projected features
ALIGNED = 16  # rows of the product's weights are a multiple, as the matrix units like them


@triton.jit
def step_kernel(
    u,
    x,
    rows,
    gain,
    bias,
    classifier_bias,
    noise,
    c,
    h,
    symbol,
    ended,
    tokens,
    H,
    V,
    N,
    end_id,
    pad_id,
    EPS: tl.constexpr,
    CHOOSE: tl.constexpr,
    NOISE: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # u [B, N]: W h [4H], then logits [V]; x [B, 4H]; rows [V + 1, 4H]; noise [B, V]; c, h [B, H];
    # symbol, ended [B] are read and rewritten; tokens [B]
    b = tl.program_id(0).to(tl.int64)
    u = u + b * N
    if CHOOSE:
        over = tl.load(ended + b)
        v = tl.arange(0, BLOCK_V)
        mv = v < V
        logits = tl.load(u + 4 * H + v, mv, 0.0).to(tl.float32)
        logits += tl.load(classifier_bias + v, mv, 0.0).to(tl.float32)
        if NOISE:
            logits += tl.load(noise + b * V + v, mv, 0.0)
        s = choose(logits, v, mv)
        tl.store(symbol + b, s)
        tl.store(ended + b, over | (s == end_id))
        tl.store(tokens + b, tl.where(over != 0, pad_id, s).to(tl.int64))
    else:
        s = tl.load(symbol + b)
    if ADVANCE:
        k = tl.arange(0, BLOCK)
        m = k < H
        wide = c.dtype.element_ty
        u, x, row = u + k, x + 4 * b * H + k, rows + 4 * s.to(tl.int64) * H + k
        i = tl.load(u, m, 0.0).to(wide) + tl.load(x, m, 0.0).to(wide)
        f = tl.load(u + H, m, 0.0).to(wide) + tl.load(x + H, m, 0.0).to(wide)
        g = tl.load(u + 2 * H, m, 0.0).to(wide) + tl.load(x + 2 * H, m, 0.0).to(wide)
        o = tl.load(u + 3 * H, m, 0.0).to(wide) + tl.load(x + 3 * H, m, 0.0).to(wide)
        i += tl.load(row, m, 0.0).to(wide)
        f += tl.load(row + H, m, 0.0).to(wide)
        g += tl.load(row + 2 * H, m, 0.0).to(wide)
        o += tl.load(row + 3 * H, m, 0.0).to(wide)
        i, f, g, o, _ = normalise(i, f, g, o, m, H, EPS)
        before = tl.load(c + b * H + k, m, 0.0)
        cell, out = update(i, f, g, o, gain, bias, before, k, m, H)
        tl.store(c + b * H + k, cell, m)
        tl.store(h + b * H + k, out.to(h.dtype.element_ty), m)


def launch(H: int, V: int) -> dict[str, int]:
    """The kernel's sizes."""
    state, choice = row_launch(H), row_launch(V)
    warps = max(state["num_warps"], choice["num_warps"])
    return {"BLOCK": state["BLOCK"], "BLOCK_V": choice["BLOCK"], "num_warps": warps}


def chunk_steps(T: int, B: int, H: int) -> int:
    """How many steps a chunk has: chunks are alike, and few steps of the last one are in vain."""
    most = max(1, min(STEPS, PROJECTED // (4 * B * H)))
    return -(-T // -(-T // most))


def decode_lstm(
    features: Tensor,
    feature_weight: Tensor,
    symbol_rows: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    noise: Tensor | None,
    eps: float,
    end_id: int,
    pad_id: int,
    packed: Tensor | None = None,
) -> Tensor:
    """The op on a GPU. What one program cannot hold, float64, and int8 run as plain PyTorch."""
    ((_, H),) = check_shapes(h0=(h0, 2))
    T, B, V, _ = check_decode(
        features,
        feature_weight,
        symbol_rows,
        classifier_weight=classifier_weight,
        classifier_bias=classifier_bias,
        noise=noise,
        end_id=end_id,
        pad_id=pad_id,
        weight_hh=weight_hh,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        h0=h0,
        c0=c0,
    )
    check_shapes(
        classifier_weight=(classifier_weight, (V, H)),
        symbol_rows=(symbol_rows, (V + 1, 4 * H)),
        weight_hh=(weight_hh, (4 * H, H)),
        norm_weight=(norm_weight, (4 * H,)),
        norm_bias=(norm_bias, (4 * H,)),
        h0=(h0, (B, H)),
        c0=(c0, (B, H)),
    )
    weights = feature_weight, symbol_rows, weight_hh, norm_weight, norm_bias
    int8 = packed is not None and packed.numel() > 1
    if int8 or features.dtype == torch.float64 or max(H, V) > LARGEST:
        rest = classifier_weight, classifier_bias, h0, c0, noise, eps, end_id, pad_id, packed
        return decode_lstm_reference(features, *weights, *rest)
    wide, count = accumulate_dtype(features.dtype), chunk_steps(T, B, H)
    # The recurrent weights above the classifier's, [N, H].
    unused = -(4 * H + V) % ALIGNED
    stacked = torch.cat([weight_hh, classifier_weight, weight_hh.new_zeros(unused, H)])
    state = (
        h0 @ stacked.T,
        c0.to(wide, copy=True),
        torch.full((B,), V, dtype=torch.int32, device=h0.device),
        torch.zeros(B, dtype=torch.int32, device=h0.device),
    )
    chunk = features.new_zeros(count, B, features.shape[2])
    chunk_noise = chunk.new_zeros(0 if noise is None else count, B, V, dtype=torch.float32)
    watched = end_id >= 0 and not capturing(features.device)
    tokens = torch.full((B, T), pad_id, dtype=torch.int64, device=features.device)
    fixed = feature_weight, symbol_rows, stacked, norm_weight, norm_bias, classifier_bias
    with held(steps, (chunk, chunk_noise, *state, *fixed), eps, end_id, pad_id) as (own, run):
        for first in range(0, T, count):
            now = slice(first, min(first + count, T))
            done = now.stop - first
            own[0][:done] = features[now]
            if noise is not None:
                own[1][:done] = noise[now]
            (chosen,) = run()
            tokens[:, now] = chosen[:done].T
            if watched and now.stop < T and own[5].all():
                break
    return tokens


def steps(
    features, noise, u, c, symbol, ended, feature_weight, rows, stacked, gain, bias, logit_bias,
    eps, end_id, pad_id,
) -> tuple[Tensor]:  # fmt: skip
    """A chunk; u [B, N], c [B, H], symbol and ended [B] go on from run to run -> tokens [T, B]."""
    T, B, _ = features.shape
    H, V, N = c.shape[1], len(logit_bias), len(stacked)
    x = (features.flatten(0, 1) @ feature_weight.T).view(T, B, 4 * H)
    h, tokens = features.new_empty(B, H), symbol.new_empty(T, B, dtype=torch.int64)

    def step(t: int, **parts) -> None:
        """The choice of step t − 1, and the state after step t."""
        before, now = max(t - 1, 0), min(t, T - 1)
        step_kernel[(B,)](
            u,
            x[now],
            rows,
            gain,
            bias,
            logit_bias,
            noise[before] if len(noise) else u,
            c,
            h,
            symbol,
            ended,
            tokens[before],
            H,
            V,
            N,
            end_id,
            pad_id,
            EPS=eps,
            NOISE=len(noise) > 0,
            **parts,
            **launch(H, V),
        )

    for t in range(T):
        step(t, CHOOSE=t > 0, ADVANCE=True)
        torch.mm(h, stacked.T, out=u)
    step(T, CHOOSE=True, ADVANCE=False)
    return (tokens,)
