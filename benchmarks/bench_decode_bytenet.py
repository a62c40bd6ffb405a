"""Greedy decoding of whole sequences with the ByteNet decoder, in one call or step by step.

Ours has its weights packed, as generation keeps them. `eager` and `compile`, which compiles the
step, keep each layer's last vector, as the op does; `naive` runs the whole prefix again for every
token. A long sequence shows that a token costs the op the same at every position.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops import decode_bytenet, decode_bytenet_pack
from fastvae.ops.decode_bytenet import bytenet_step
from fastvae.ops.decode_lstm import decode_steps
from fastvae.ops.decode_lstm import teacher_forced as by_symbols
from fastvae.ops.highway_conv import highway_conv_reference
from fastvae.testing import assert_best

LENGTH, LONG, D, V, C, N = 56, 448, 200, 51, 256, 10
LINES = "fastvae", "fastvae bf16", "fastvae int8", "eager", "eager bf16", "compile", "naive"
LINES += "fastvae persistent", "fastvae persistent bf16"
CASES = [(LENGTH, B, line) for B in (1, 128) for line in LINES if B == 1 or line != "naive"]
CASES += [(LONG, 1, line) for line in LINES if line.startswith("fastvae") and "int8" not in line]


def inputs(B: int, T: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).mul_(0.2).sub_(0.1).to(dtype)

    weights = uniform(2 * C, D), uniform(V + 1, 2 * C), uniform(N, 3 * C, C, 2), uniform(N, 3 * C)
    return [uniform(T, B, D) * 10, *weights, uniform(V, C) * 5, uniform(V)]


def dtype_of(line: str) -> torch.dtype:
    return torch.bfloat16 if line.endswith("bf16") else torch.float32


def whole(
    previous, features, feature_weight, token_embeddings, conv_weight, conv_bias, weight, bias
):
    """The logits [T, B, V] of every step, given the tokens `previous` [T, B] before it."""
    p, q = (F.linear(features, feature_weight) + token_embeddings[previous]).chunk(2, -1)
    x = p.tanh() * q.sigmoid()
    for layer_weight, layer_bias in zip(conv_weight, conv_bias, strict=True):
        x = highway_conv_reference(x, layer_weight, layer_bias)
    return F.linear(x, weight, bias)


def whole_int8(previous, features, feature_weight, token_embeddings, *rest):
    step = bytenet_step(feature_weight, *rest, carry=True, int8=True)
    return by_symbols(step, features, token_embeddings, previous)


def naive(features, *weights):
    steps, B = features.shape[:2]
    previous = torch.full((steps + 1, B), V)
    for t in range(steps):
        previous[t + 1] = whole(previous[: t + 1], features[: t + 1], *weights)[-1].argmax(-1)
    return previous[1:].T


def cell(d, rows, before, feature_weight, taps, conv_bias, weight, bias):
    """Logits [B, V] of one step, and each layer's vector for the next, [N, B, C]."""
    p, q = (F.linear(d, feature_weight) + rows).chunk(2, -1)
    x, after = p.tanh() * q.sigmoid(), []
    for n in range(N):
        a = F.linear(before[n], taps[0, n]) + F.linear(x, taps[1, n], conv_bias[n])
        i, f, g = a.chunk(3, -1)
        after.append(x)
        x = f.sigmoid() * x + i.sigmoid() * g.tanh()
    return F.linear(x, weight, bias), torch.stack(after)


def by_step(step):
    """The whole sequence with `step`; each tap's weights are laid out for it once a call."""

    def decode(features, feature_weight, token_embeddings, conv_weight, *rest):
        before = features.new_zeros(N, features.shape[1], C)
        taps = conv_weight.movedim(-1, 0).contiguous()

        def run(d: Tensor, rows: Tensor) -> Tensor:
            nonlocal before
            logits, before = step(d, rows, before, feature_weight, taps, *rest)
            return logits

        return decode_steps(run, features, token_embeddings, None, -1, -1)

    return decode


def decoder(line: str, B: int, compiled, served):
    """The line's function of `inputs`, once it has been checked on a few steps."""
    few, int8 = inputs(B, 3, dtype_of(line)), line.endswith("int8")
    if line.startswith("fastvae"):
        packed = decode_bytenet_pack(few[1], few[3], few[5], int8=int8)
        function = served(partial(decode_bytenet, packed=packed, int8=int8))
    else:
        function = (
            naive if line == "naive" else by_step(cell if "eager" in line else compiled(cell))
        )
    tokens = function(*few)
    previous = torch.cat([torch.full_like(tokens[:, :1], V), tokens[:, :-1]], 1).T
    assert_best(tokens, partial(whole_int8 if int8 else whole, previous), *few)
    return function


def payloads(dtype: torch.dtype, plan, sequences: int) -> list[int]:
    """Bytes of each layer's vectors, and of what classifier_blocks offer for the choice."""
    return [sequences * C * dtype.itemsize] * N + [sequences * plan.classifier_blocks * 8]


@pytest.mark.parametrize("length, B, line", CASES)
@torch.no_grad()
def test_decode_bytenet(timer, compiled, serving, steps, length, B, line):
    time = timer(f"greedy decoding, ByteNet {N}, L={length} B={B}", line)
    T, served, ours = (
        steps(length),
        *(serving(name, "decode_bytenet") for name in (line, "fastvae")),
    )
    function = partial(decoder(line, B, compiled, served), *inputs(B, T, dtype_of(line)))
    beside = None
    if line != "fastvae":
        ours = decoder("fastvae", B, compiled, serving("fastvae", "decode_bytenet"))
        beside = partial(ours, *inputs(B, T))
    time(
        function,
        beside,
        tokens=T * B,
        flops=2 * T * B * (2 * C * D + N * 6 * C * C + V * C),
        weights=N * 6 * C * C + V * C,
        passes=T,
        exchanges=served.exchanges(B, partial(payloads, dtype_of(line))),
        rounds=3 if B > 1 else 5,
    )
