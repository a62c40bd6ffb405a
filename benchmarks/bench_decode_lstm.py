"""Greedy decoding of whole sequences with the LSTM decoder, in one call or step by step.

Ours has its weights packed, as generation keeps them. `compile` compiles the step: the loop
unrolled takes minutes. `nn.LSTM` has no norm: another function, shown as what PyTorch makes of
nearly the same products; `nn.LSTM deprecated int8` is its
dynamic quantization, which torch has deprecated. `graph`, on a GPU, is a CUDA
graph of the reference.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.ops import decode_lstm, decode_lstm_pack
from fastvae.ops.decode_lstm import decode_lstm_reference, decode_steps, lstm_step
from fastvae.ops.decode_lstm import teacher_forced as by_symbols
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_cell
from fastvae.testing import assert_best

LENGTH, D, V, H = 128, 200, 259, 1000
EPS = 1e-4
LINES = "fastvae", "fastvae bf16", "fastvae int8", "eager", "eager bf16", "compile"
LINES += "nn.LSTM", "nn.LSTM deprecated int8", "graph", "graph bf16"
LINES += "fastvae persistent", "fastvae persistent bf16"


def inputs(B: int, T: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).mul_(0.2).sub_(0.1).to(dtype)

    features, state = uniform(T, B, D) * 10, torch.zeros(B, H, dtype=dtype)
    weights = uniform(4 * H, D), uniform(V + 1, 4 * H), uniform(4 * H, H)
    norm = torch.ones(4 * H, dtype=dtype), torch.zeros(4 * H, dtype=dtype)
    return [features, *weights, *norm, uniform(V, H), uniform(V), state, state]


def dtype_of(line: str) -> torch.dtype:
    return torch.bfloat16 if line.endswith("bf16") else torch.float32


def cell(d, rows, feature_weight, weight_hh, gain, bias, weight, logit_bias, h, c):
    a = F.linear(d, feature_weight) + rows + h @ weight_hh.T
    h, c = layer_norm_lstm_cell(a, c, gain, bias, EPS)
    return F.linear(h, weight, logit_bias), h, c


def by_step(step):
    """The whole sequence with `step`, for the tokens it chooses."""

    def decode(features, feature_weight, token_embeddings, *rest):
        run = running(step, feature_weight, *rest)
        return decode_steps(run, features, token_embeddings, None, -1, -1)

    return decode


def running(step, feature_weight, *rest):
    """`step` with its weights, keeping its state: d [B, D], rows [B, 4H] -> logits [B, V]."""
    *weights, h, c = rest

    def run(d: Tensor, rows: Tensor) -> Tensor:
        nonlocal h, c
        logits, h, c = step(d, rows, feature_weight, *weights, h, c)
        return logits

    return run


def teacher_forced(tokens: Tensor, int8: bool):
    """The logits [T, B, V] of every step, given the tokens before it, as a function of inputs."""

    def logits(features, feature_weight, token_embeddings, *rest) -> Tensor:
        step = lstm_step(feature_weight, *rest, EPS, int8=int8)
        start = torch.full_like(tokens[:, :1], V)
        previous = torch.cat([start, tokens[:, :-1]], 1).T
        return by_symbols(step, features, token_embeddings, previous)

    return logits


class PlainLSTM(nn.Module):
    """nn.LSTM and a classifier over [features, one-hot(previous token)]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.classifier = nn.LSTM(D + V + 1, H), nn.Linear(H, V)

    def forward(self, features: Tensor) -> Tensor:
        """features [T, B, D] -> tokens [B, T]."""
        state = None

        def step(d: Tensor, one_hot: Tensor) -> Tensor:
            nonlocal state
            y, state = self.lstm(torch.cat([d, one_hot], -1).unsqueeze(0), state)
            return self.classifier(y[0])

        return decode_steps(step, features, torch.eye(V + 1), None, -1, -1)

    def teacher_forced(self, tokens: Tensor, features: Tensor) -> Tensor:
        """The logits [T, B, V] of every step, given the tokens before it."""
        start = torch.full_like(tokens[:, :1], V)
        one_hot = F.one_hot(torch.cat([start, tokens[:, :-1]], 1).T, V + 1)
        return self.classifier(self.lstm(torch.cat([features, one_hot], -1))[0])


def plain_lstm(line: str) -> nn.Module:
    """The line's module, once it has been checked on a few steps."""
    plain, (features, *_) = PlainLSTM(), inputs(64, 3)
    models = {torch.float32: plain, torch.float64: copy.deepcopy(plain).double()}
    tokens = plain(features)
    assert_best(tokens, lambda x: models[x.dtype].teacher_forced(tokens, x), features)
    if line == "nn.LSTM":
        return plain
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        pytest.skip("this torch no longer has dynamic quantization of its own")
    module = torch.ao.quantization.quantize_dynamic(plain, {nn.LSTM, nn.Linear}, torch.qint8)
    assert (module(features) == tokens).float().mean() > 0.5  # int8 rounds; most choices stay
    return module


def decoder(line: str, B: int, compiled, served):
    """The line's function of `inputs`, once it has been checked on a few steps."""
    few, int8 = inputs(B, 3, dtype_of(line)), line.endswith("int8")
    if line.startswith("fastvae"):
        packed = decode_lstm_pack(few[1], few[3], few[6], few[2], int8=int8)
        function = served(partial(decode_lstm, packed=packed, int8=int8))
    elif line.startswith("graph"):
        function = unstopped
    else:
        function = decode_lstm_reference if "eager" in line else by_step(compiled(cell))
    tokens = function(*few)
    assert_best(tokens, teacher_forced(tokens, int8), *few)
    return function


def unstopped(features, feature_weight, token_embeddings, *rest) -> Tensor:
    """The reference without its early stop, for which the host would have to wait."""
    run, tokens = running(cell, feature_weight, *rest), []
    token = torch.full(features.shape[1:2], V)
    for d in features:
        token = run(d, token_embeddings[token]).argmax(-1)
        tokens.append(token)
    return torch.stack(tokens, 1)


def payloads(dtype: torch.dtype, plan, sequences: int) -> list[int]:
    """Bytes of what blocks offer for the choice and the norm, and of h."""
    return [sequences * -(-H // plan.units) * 32, sequences * H * dtype.itemsize]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("B", [1, 16, 128, 1024])
@torch.no_grad()
def test_decode_lstm(timer, compiled, graphed, serving, steps, line, B):
    time = timer(f"greedy decoding, LSTM {H}, B={B}", line)
    T, served = steps(LENGTH), serving(line, "decode_lstm")
    arguments = inputs(B, T, dtype_of(line))
    if line.startswith("nn.LSTM"):
        function = partial(plain_lstm(line), arguments[0])
    else:
        function = partial(decoder(line, B, compiled, served), *arguments)
    if line.startswith("graph"):
        function = graphed(function)
    beside = None
    if line != "fastvae":
        ours = decoder("fastvae", B, compiled, serving("fastvae", "decode_lstm"))
        beside = partial(ours, *inputs(B, T))
    time(
        function,
        beside,
        tokens=T * B,
        flops=2 * T * B * (4 * H * (H + D) + V * H),
        weights=4 * H * H + V * H,
        passes=T,
        exchanges=served.exchanges(B, partial(payloads, dtype_of(line))),
        rounds={1: 9, 16: 5}.get(B, 3),
    )
