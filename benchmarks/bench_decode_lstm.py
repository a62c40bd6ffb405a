"""Greedy decoding of whole sequences with the LSTM decoder, against plain PyTorch step by step."""

import pytest
import torch
import torch.nn.functional as F

from fastvae.ops import decode_lstm
from fastvae.ops.decode_lstm import decode_lstm_reference, decode_steps
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_cell

T, D, V, H = 128, 200, 259, 1000
EPS = 1e-4


def inputs(B: int, steps: int = T, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).mul_(0.2).sub_(0.1).to(dtype)

    features, state = uniform(steps, B, D) * 10, torch.zeros(B, H, dtype=dtype)
    weights = uniform(4 * H, D), uniform(V + 1, 4 * H), uniform(4 * H, H)
    norm = torch.ones(4 * H, dtype=dtype), torch.zeros(4 * H, dtype=dtype)
    return [features, *weights, *norm, uniform(V, H), uniform(V), state, state]


@torch.compile
def compiled_step(d, rows, feature_weight, weight_hh, gain, bias, weight, logit_bias, h, c):
    a = F.linear(d, feature_weight) + rows + h @ weight_hh.T
    h, c = layer_norm_lstm_cell(a, c, gain, bias, EPS)
    return F.linear(h, weight, logit_bias), h, c


def compiled(features, feature_weight, symbol_rows, *rest):
    *weights, h, c = rest

    def step(d_t, rows):
        nonlocal h, c
        logits, h, c = compiled_step(d_t, rows, feature_weight, *weights, h, c)
        return logits

    return decode_steps(step, features, symbol_rows, None, -1, -1)


RIVALS = {"fastvae": decode_lstm, "eager": decode_lstm_reference, "compile": compiled}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("B", [1, 16, 128])
def test_decode_lstm(time, rival, B):
    if rival != "eager":  # in float64 no rounding can change a choice, in a few steps of float32
        dtype = torch.float64 if rival == "fastvae" else torch.float32
        few = inputs(B, 3, dtype)
        assert torch.equal(RIVALS[rival](*few), decode_lstm_reference(*few))
    arguments = inputs(B)

    @torch.no_grad()
    def decode() -> None:
        RIVALS[rival](*arguments)

    flops = 2 * T * B * (4 * H * (H + D) + V * H)
    rounds = 3 if B > 16 else 5
    time(f"greedy decoding, LSTM H={H} V={V} L={T} B={B}", decode, flops, rounds)
