"""What the decoders share on a GPU: a chunk of steps at a time, replayed as a graph (graphs.py).

Between chunks the host may see that all sequences have ended; within one it waits for nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.kernels.graphs import capturing, held

STEPS = 32  # most of a chunk: what is decoded in vain when all sequences have ended
PROJECTED = 1 << 26  # most elements of a chunk's projected features


def kernel_ids(end_id: int | None, pad_id: int | None) -> dict[str, int]:
    """The ids as kernels take them: -1 for none."""
    return {
        "end_id": -1 if end_id is None else end_id,
        "pad_id": -1 if pad_id is None else pad_id,
    }


def chunk_steps(T: int, B: int, width: int) -> int:
    """How many steps a chunk has: chunks are alike, and few steps of the last one are in vain."""
    most = max(1, min(STEPS, PROJECTED // (B * width)))
    return -(-T // -(-T // most))


def decode_chunks(
    steps: Callable,
    features: Tensor,
    noise: Tensor | None,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    *options,
    end_id: int,
    pad_id: int,
) -> Tensor:
    """features [T, B, D] -> tokens [B, T], by chunks, until all sequences have ended.

    weights are feature_weight, token_embeddings and more. A chunk is steps(features, noise, token,
    ended, *state, *weights, *options, end_id, pad_id) -> tokens [T, B]; it writes token and ended
    [B], int32, and the state anew, which go on to the next chunk. noise is empty where none is
    given.
    """
    (T, B, D), (rows, width) = features.shape, weights[1].shape
    count = chunk_steps(T, B, width)
    chunk = features.new_zeros(count, B, D)
    drawn = features.new_zeros(0 if noise is None else count, B, rows - 1, dtype=torch.float32)
    token = torch.full((B,), rows - 1, dtype=torch.int32, device=features.device)
    tensors = chunk, drawn, token, torch.zeros_like(token), *state, *weights
    tokens = torch.full((B, T), pad_id, dtype=torch.int64, device=features.device)
    watched = end_id >= 0 and not capturing(features.device)
    with held(steps, tensors, *options, end_id, pad_id) as (own, run):
        for first in range(0, T, count):
            now = slice(first, min(first + count, T))
            done = now.stop - first
            own[0][:done] = features[now]
            if noise is not None:
                own[1][:done] = noise[now]
            (chosen,) = run()
            tokens[:, now] = chosen[:done].T
            if watched and now.stop < T and own[3].all():
                break
    return tokens
