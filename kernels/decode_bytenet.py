"""Decoding with highway masked convolutions on a GPU. Equations: fastvae/ops/decode_bytenet.py.

Where a program can read every weight at each token, one kernel makes whole sequences: a program
owns some rows of the batch, and nothing passes between programs. Elsewhere the products are
torch's, over the whole device, and steps run by the chunk (decode.py).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import persistent
from fastvae.kernels.decode import decode_chunks, kernel_ids
from fastvae.kernels.gates import highway, rank, ranked, sigmoid, tanh
from fastvae.kernels.highway_conv import gate
from fastvae.kernels.products import precision
from fastvae.ops.checks import check_decode_bytenet
from fastvae.ops.decode_bytenet import decode_bytenet_reference

LARGEST = {2: 256, 4: 64}  # C by bytes of an element: matrix units serve the short ones alone


@triton.jit
def sequence_kernel(
    projected,
    rows,
    weight,
    bias,
    classifier_weight,
    classifier_bias,
    noise,
    state,
    tokens,
    T,
    B,
    C,
    V,
    N,
    end_id,
    pad_id,
    CARRY: tl.constexpr,
    NOISE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # projected [T, B, 2C]: features; rows [V + 1, 2C]; weight [N, 3C, 2, C]; bias [N, 3C];
    # classifier_weight [V, C]; noise [T, B, V]; tokens [B, T], pad_id so far.
    # state [2, N + 1, B, C]: what each layer and the classifier read at even and odd steps.
    EXACT: tl.constexpr = rows.dtype.element_ty == tl.float32
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = b < B
    token = tl.zeros((ROWS,), tl.int64) + V
    running = here.to(tl.int32)
    t = tl.full((), 0, tl.int64)
    layer, depth = tl.cast(B, tl.int64) * C, tl.cdiv(C, DEPTH)
    slot = (N + 1) * layer
    while (t < T) & (tl.max(running, 0) > 0):
        now = state + (t % 2) * slot
        for j in range(0, C, COLS):
            c = j + tl.arange(0, COLS)
            m = here[:, None] & (c < C)[None, :]
            row = rows + token[:, None] * 2 * C + c[None, :]
            d = projected + (t * B + b)[:, None] * 2 * C + c[None, :]
            p = tl.load(d, m, 0.0).to(tl.float32) + tl.load(row, m, 0.0).to(tl.float32)
            q = tl.load(d + C, m, 0.0).to(tl.float32) + tl.load(row + C, m, 0.0).to(tl.float32)
            x = (tanh(p, EXACT) * sigmoid(q, EXACT)).to(now.dtype.element_ty)
            tl.store(now + b[:, None] * C + c[None, :], x, m)
        # Vectors pass between threads in memory.
        tl.debug_barrier()
        w_layer, b_layer = weight, bias
        for _ in range(N):
            for j in range(0, C, COLS):
                c = j + tl.arange(0, COLS)
                zeros = tl.zeros((ROWS, COLS), tl.float32)
                i = zeros + tl.load(b_layer + c, c < C, 0.0).to(tl.float32)[None, :]
                f = zeros + tl.load(b_layer + C + c, c < C, 0.0).to(tl.float32)[None, :]
                g = zeros + tl.load(b_layer + 2 * C + c, c < C, 0.0).to(tl.float32)[None, :]
                for s in range(2 * depth):
                    tap = s // depth
                    k = (s - tap * depth) * DEPTH + tl.arange(0, DEPTH)
                    x = now + ((t + tap + 1) % 2 - t % 2) * slot + b[:, None] * C + k[None, :]
                    x = tl.load(x, here[:, None] & (k < C)[None, :], 0.0)
                    w = w_layer + c[None, :] * 2 * C + tap * C + k[:, None]
                    inside = (k < C)[:, None] & (c < C)[None, :]
                    i = tl.dot(x, tl.load(w, inside, 0.0), i, input_precision=PRECISION)
                    w += 2 * C * C
                    f = tl.dot(x, tl.load(w, inside, 0.0), f, input_precision=PRECISION)
                    w += 2 * C * C
                    g = tl.dot(x, tl.load(w, inside, 0.0), g, input_precision=PRECISION)
                m = here[:, None] & (c < C)[None, :]
                x = now + b[:, None] * C + c[None, :]
                y = highway(i, f, g, tl.load(x, m, 0.0).to(tl.float32), CARRY, EXACT)
                tl.store(x + layer, y.to(now.dtype.element_ty), m)
            tl.debug_barrier()
            now += layer
            w_layer += 6 * C * C
            b_layer += 3 * C
        best = tl.full((ROWS,), -0x8000000000000000, tl.int64)
        for j in range(0, V, COLS):
            v = j + tl.arange(0, COLS)
            logits = tl.zeros((ROWS, COLS), tl.float32)
            for s in range(0, C, DEPTH):
                k = s + tl.arange(0, DEPTH)
                x = now + b[:, None] * C + k[None, :]
                x = tl.load(x, here[:, None] & (k < C)[None, :], 0.0)
                w = classifier_weight + v[None, :] * C + k[:, None]
                w = tl.load(w, (k < C)[:, None] & (v < V)[None, :], 0.0)
                logits = tl.dot(x, w, logits, input_precision=PRECISION)
            logits += tl.load(classifier_bias + v, v < V, 0.0).to(tl.float32)[None, :]
            if NOISE:
                extra = noise + (t * B + b)[:, None] * V + v[None, :]
                logits += tl.load(extra, here[:, None] & (v < V)[None, :], 0.0)
            best = tl.maximum(best, tl.max(rank(logits, v[None, :], (v < V)[None, :]), 1))
        token = ranked(best).to(tl.int64)
        tl.store(tokens + b * T + t, tl.where(running > 0, token, pad_id), here)
        running = tl.where(token == end_id, 0, running)
        t += 1


def launch(
    B: int, C: int, dtype: torch.dtype, hip: bool = bool(torch.version.hip)
) -> dict[str, int] | None:
    """What a program takes at once, rows of the batch and columns of a product, and its options.

    None where one program is too little, for wide layers and for large batches, which fill the
    device; and on AMD, where Triton's barrier does not wait for what was stored in global memory.
    """
    if hip or LARGEST[dtype.itemsize] < C or B > 2048:
        return None
    cols = triton.next_power_of_2(padded(C))
    return {
        "ROWS": 16,
        "COLS": cols,
        "DEPTH": 64 // dtype.itemsize,
        "num_warps": 8 if cols * dtype.itemsize >= 256 else 4,
        "num_stages": 2 if dtype == torch.float32 else 3,
        # Without a limit ptxas saves registers for programs that share a processor: there are none.
        "maxnreg": 255,
    }


def padded(C: int) -> int:
    """C up to a multiple of 16, so that every row of a matrix is aligned. Channels past C are 0."""
    return -(-C // 16) * 16


def decode_bytenet(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    noise: Tensor | None,
    carry: bool,
    end_id: int | None,
    pad_id: int | None,
    packed: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """The op on a GPU. float64 runs as plain PyTorch, and so does int8."""
    weights = {
        "feature_weight": feature_weight,
        "token_embeddings": token_embeddings,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "classifier_weight": classifier_weight,
        "classifier_bias": classifier_bias,
    }
    T, B, V = check_decode_bytenet(features, **weights, noise=noise, end_id=end_id, pad_id=pad_id)
    N, _, C, _ = conv_weight.shape
    if int8 or features.dtype == torch.float64:
        rest = noise, carry, end_id, pad_id, packed, int8
        return decode_bytenet_reference(features, *weights.values(), *rest)
    if machine := persistent.serving("decode_bytenet", features, B, C):
        itemsize = features.dtype.itemsize
        below = persistent.rival("decode_bytenet", itemsize, B, layers=N)
        plan = persistent.plan_bytenet(C, N, V, B, itemsize, machine, below)
        if plan:
            rest = noise, carry, end_id, pad_id, plan
            return persistent.decode_bytenet(features, *weights.values(), *rest)
    ids = kernel_ids(end_id, pad_id)
    options = launch(B, C, features.dtype)
    if options is None:
        state = (features.new_zeros(N, B, C),)
        weights["conv_weight"] = conv_weight.transpose(2, 3).contiguous()
        fixed = tuple(weights.values())
        return decode_chunks(steps, features, noise, state, fixed, carry, **ids)
    more = padded(C) - C
    rows = F.pad(token_embeddings.unflatten(1, (2, C)), (0, more)).flatten(1)
    project = F.pad(feature_weight.unflatten(0, (2, C)), (0, 0, 0, more)).flatten(0, 1)
    # For each output its weights of xₜ₋₁, then those of xₜ.
    taps = conv_weight.unflatten(1, (3, C)).transpose(3, 4)
    tokens = features.new_full((B, T), ids["pad_id"], dtype=torch.int64)
    sequence_kernel[(triton.cdiv(B, options["ROWS"]),)](
        F.linear(features, project),
        rows.contiguous(),
        F.pad(taps, (0, more, 0, 0, 0, more)).contiguous(),
        F.pad(conv_bias.unflatten(1, (3, C)), (0, more)).contiguous(),
        F.pad(classifier_weight, (0, more)).contiguous(),
        classifier_bias.contiguous(),
        noise if noise is None else noise.contiguous(),
        features.new_zeros(2, N + 1, B, C + more),
        tokens,
        T,
        B,
        C + more,
        V,
        N,
        *ids.values(),
        CARRY=carry,
        NOISE=noise is not None,
        PRECISION=precision(),
        **options,
    )
    return tokens


def steps(
    features, noise, token, ended, before, feature_weight, rows, conv_weight, conv_bias,
    classifier_weight, classifier_bias, carry, end_id, pad_id,
) -> tuple[Tensor]:  # fmt: skip
    """A chunk, as decode.py tells; its state is what each layer read before, [N, B, C]."""
    layers = list(zip(conv_weight.flatten(2), conv_bias, strict=True))
    kept, tokens = list(before), token.new_empty(features.shape[:2], dtype=torch.int64)
    for t, projected in enumerate(F.linear(features, feature_weight)):
        p, q = (projected + rows.index_select(0, token)).chunk(2, -1)
        x = p.tanh() * q.sigmoid()
        for n, (weight, bias) in enumerate(layers):
            a = F.linear(torch.cat([kept[n], x], -1), weight, bias)
            kept[n] = x
            x = gate(a, x, None, None, None, carry)
        logits = F.linear(x, classifier_weight, classifier_bias)
        chosen = (logits + noise[t] if len(noise) else logits).argmax(-1)
        tokens[t] = torch.where(ended != 0, pad_id, chosen)
        token.copy_(chosen)
        ended |= chosen == end_id
    if kept:
        torch.stack(kept, out=before)
    return (tokens,)
