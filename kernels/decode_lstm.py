"""Decoding with a LayerNorm-LSTM on a GPU. Equations: fastvae/ops/decode_lstm.py.

A step is one product and one kernel. The product of hₜ₋₁ with the recurrent weights and the
classifier's, one above the other, gives u = W hₜ₋₁ and the logits of step t − 1; the kernel, whose
programs own a row of the batch each, chooses the token, adds its row to u, and makes hₜ. Steps run
by the chunk (decode.py).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import persistent
from fastvae.kernels.decode import decode_chunks, kernel_ids
from fastvae.kernels.gates import normalize, rank, ranked, row_launch, update
from fastvae.kernels.products import aligned, joined, padded, parted
from fastvae.ops.checks import check_decode_lstm, check_decode_lstm_pack, check_packed
from fastvae.ops.decode_lstm import decode_lstm_reference, pack_reference
from fastvae.ops.precision import accumulate_dtype

LARGEST = 2048  # H whose four gates, and V whose logits, fit the registers of one program
ALIGNED = 16  # rows of the product's weights are a multiple, as the matrix units like them


@triton.jit(do_not_specialize=("now", "chosen", "end_id", "pad_id"))
def step_kernel(
    u,
    projected,
    rows,
    gain,
    bias,
    classifier_bias,
    noise,
    c,
    h,
    token,
    ended,
    tokens,
    now,
    chosen,
    end_id,
    pad_id,
    H: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    CHOOSE: tl.constexpr,
    NOISE: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # u [B, N]: W h [4H], then logits [V]; rows [V + 1, 4H]; c [B, H]; h [B, STRIDE]; token, ended
    # [B] are read and rewritten. Rows of all steps: projected [., 4H], of features, from `now` on;
    # noise [., V] and tokens [.] from `chosen` on
    b = tl.program_id(0).to(tl.int64)
    u = u + N * b
    if CHOOSE:
        over = tl.load(ended + b)
        v = tl.arange(0, BLOCK_V)
        mv = v < V
        logits = tl.load(u + 4 * H + v, mv, 0.0).to(tl.float32)
        logits += tl.load(classifier_bias + v, mv, 0.0).to(tl.float32)
        if NOISE:
            logits += tl.load(noise + V * (chosen + b) + v, mv, 0.0)
        s = ranked(tl.max(rank(logits, v, mv), 0))
        tl.store(token + b, s)
        tl.store(ended + b, over | (s == end_id))
        tl.store(tokens + chosen + b, tl.where(over != 0, pad_id, s).to(tl.int64))
    else:
        s = tl.load(token + b)
    if ADVANCE:
        k = tl.arange(0, BLOCK)
        m = k < H
        acc_dtype = c.dtype.element_ty
        u, d, row = u + k, projected + 4 * H * (now + b) + k, rows + 4 * H * s.to(tl.int64) + k
        i = tl.load(u, m, 0.0).to(acc_dtype) + tl.load(d, m, 0.0).to(acc_dtype)
        f = tl.load(u + H, m, 0.0).to(acc_dtype) + tl.load(d + H, m, 0.0).to(acc_dtype)
        g = tl.load(u + 2 * H, m, 0.0).to(acc_dtype) + tl.load(d + 2 * H, m, 0.0).to(acc_dtype)
        o = tl.load(u + 3 * H, m, 0.0).to(acc_dtype) + tl.load(d + 3 * H, m, 0.0).to(acc_dtype)
        i += tl.load(row, m, 0.0).to(acc_dtype)
        f += tl.load(row + H, m, 0.0).to(acc_dtype)
        g += tl.load(row + 2 * H, m, 0.0).to(acc_dtype)
        o += tl.load(row + 3 * H, m, 0.0).to(acc_dtype)
        i, f, g, o, _ = normalize(i, f, g, o, m, H, EPS)
        before = tl.load(c + H * b + k, m, 0.0)
        cell, out = update(i, f, g, o, gain, bias, before, k, m, H)
        tl.store(c + H * b + k, cell, m)
        tl.store(h + STRIDE * b + k, out.to(h.dtype.element_ty), m)


def launch(H: int, V: int, hip: bool = bool(torch.version.hip)) -> dict[str, int]:
    """What a program takes at once, and its options."""
    state, choice = row_launch(H, hip), row_launch(V, hip)
    warps = max(state["num_warps"], choice["num_warps"])
    return {"BLOCK": state["BLOCK"], "BLOCK_V": choice["BLOCK"], "num_warps": warps}


def _compiled(H: int, V: int, dtype: torch.dtype, int8: bool) -> bool:
    """Whether kernels decode, not plain PyTorch."""
    return not int8 and dtype != torch.float64 and max(H, V) <= LARGEST


def stack(weight_hh: Tensor, classifier_weight: Tensor) -> Tensor:
    """The recurrent weights above the classifier's, [N, aligned(H)]."""
    unused = -(len(weight_hh) + len(classifier_weight)) % ALIGNED
    zeros = weight_hh.new_zeros(unused, weight_hh.shape[1])
    return padded(torch.cat([weight_hh, classifier_weight, zeros]))


def decode_lstm_pack(
    feature_weight: Tensor,
    weight_hh: Tensor,
    classifier_weight: Tensor,
    token_embeddings: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """What the op makes of weights alone: `stack`, and the tables of the kernel of one launch."""
    weights = feature_weight, weight_hh, classifier_weight, token_embeddings
    check_decode_lstm_pack(*weights)
    V, H = classifier_weight.shape
    if not _compiled(H, V, weight_hh.dtype, int8):
        return pack_reference(weight_hh)
    parts = [stack(weight_hh, classifier_weight)]
    if token_embeddings is not None and persistent.serving("decode_lstm", weight_hh, 1, H):
        parts += persistent.lstm_tables(feature_weight, token_embeddings, weight_hh)
    return joined(parts)


def _unpack(packed: Tensor | None, D: int, H: int, V: int, like: Tensor) -> list[Tensor | None]:
    """What `decode_lstm_pack` joined; [None] where it joined nothing."""
    check_packed(packed, like)
    if packed is None or not packed.numel():
        return [None]
    layout = _layout(D, H, V, like.dtype)
    alone = aligned(layout[0].nbytes, torch.uint8) == len(packed)
    return parted(packed, layout[:1] if alone else layout)


@lru_cache(256)
def _layout(D: int, H: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    """Meta tensors like those that `decode_lstm_pack` joins."""
    with torch.device("meta"):
        sizes = (4 * H, D), (V + 1, 4 * H), (4 * H, H), (V, H)
        feature_weight, rows, weight_hh, classifier_weight = (
            torch.empty(size, dtype=dtype) for size in sizes
        )
        tables = persistent.lstm_tables(feature_weight, rows, weight_hh)
        return [stack(weight_hh, classifier_weight), *tables]


def decode_lstm(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    noise: Tensor | None,
    eps: float,
    end_id: int | None,
    pad_id: int | None,
    packed: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """The op on a GPU. What one program cannot hold, float64, and int8 run as plain PyTorch."""
    weights = {
        "feature_weight": feature_weight,
        "token_embeddings": token_embeddings,
        "weight_hh": weight_hh,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "classifier_weight": classifier_weight,
        "classifier_bias": classifier_bias,
        "h0": h0,
        "c0": c0,
    }
    _, B, V = check_decode_lstm(features, **weights, noise=noise, end_id=end_id, pad_id=pad_id)
    H = h0.shape[1]
    if not _compiled(H, V, features.dtype, int8):
        rest = noise, eps, end_id, pad_id, packed, int8
        return decode_lstm_reference(features, *weights.values(), *rest)
    stacked, *tables = _unpack(packed, feature_weight.shape[1], H, V, features)
    if machine := persistent.serving("decode_lstm", features, B, H):
        below = persistent.rival("decode_lstm", features.dtype.itemsize, B)
        plan = persistent.plan_lstm(H, B, features.dtype.itemsize, machine, V, below)
        if plan:
            tables = persistent.Tables(*tables) if tables else None
            rest = noise, eps, end_id, pad_id, plan, tables
            return persistent.decode_lstm(features, *weights.values(), *rest)
    if stacked is None:
        stacked = stack(weight_hh, classifier_weight)
    state = padded(h0) @ stacked.T, c0.to(accumulate_dtype(c0.dtype), copy=True)
    fixed = feature_weight, token_embeddings, stacked, norm_weight, norm_bias, classifier_bias
    return decode_chunks(steps, features, noise, state, fixed, eps, **kernel_ids(end_id, pad_id))


def steps(
    features, noise, token, ended, u, c, feature_weight, rows, stacked, gain, bias, logit_bias,
    eps, end_id, pad_id,
) -> tuple[Tensor]:  # fmt: skip
    """A chunk, as decode.py tells; its state is u [B, N] and c [B, H]."""
    T, B, _ = features.shape
    H, V, N = c.shape[1], len(logit_bias), len(stacked)
    projected = F.linear(features, feature_weight)
    h, tokens = features.new_zeros(B, stacked.shape[1]), token.new_empty(T, B, dtype=torch.int64)

    def step(t: int, **parts) -> None:
        """The choice of step t − 1, and the state after step t."""
        step_kernel[(B,)](
            u,
            projected,
            rows,
            gain,
            bias,
            logit_bias,
            noise if len(noise) else u,
            c,
            h,
            token,
            ended,
            tokens,
            min(t, T - 1) * B,
            max(t - 1, 0) * B,
            end_id,
            pad_id,
            H=H,
            STRIDE=stacked.shape[1],
            V=V,
            N=N,
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
