"""Greedy decoding of whole sequences with the ByteNet decoder.

`eager` and `compile` keep each layer's last vector, as the op does; `naive` runs the whole prefix
again for every symbol.
"""

import pytest
import torch
import torch.nn.functional as F

from fastvae.ops import decode_bytenet
from fastvae.ops.decode_bytenet import decode_bytenet_reference
from fastvae.ops.highway_conv import highway_conv_reference

T, D, V, C, N = 56, 200, 51, 256, 10


def inputs(B: int, steps: int = T, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).mul_(0.2).sub_(0.1).to(dtype)

    weights = uniform(2 * C, D), uniform(V + 1, 2 * C), uniform(N, 3 * C, C, 2), uniform(N, 3 * C)
    return [uniform(steps, B, D) * 10, *weights, uniform(V, C) * 5, uniform(V)]


def naive(features, feature_weight, symbol_rows, conv_weight, conv_bias, weight, bias):
    steps, B = features.shape[:2]
    previous = torch.full((steps, B), V)
    tokens = torch.empty(B, steps, dtype=torch.int64)
    for t in range(steps):
        a = F.linear(features[: t + 1], feature_weight) + symbol_rows[previous[: t + 1]]
        p, q = a.chunk(2, -1)
        x = p.tanh() * q.sigmoid()
        for layer_weight, layer_bias in zip(conv_weight, conv_bias, strict=True):
            x = highway_conv_reference(x, layer_weight, layer_bias)
        tokens[:, t] = F.linear(x[-1], weight, bias).argmax(-1)
        if t + 1 < steps:
            previous[t + 1] = tokens[:, t]
    return tokens


RIVALS = {
    "fastvae": decode_bytenet,
    "eager": decode_bytenet_reference,
    "naive": naive,
}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("B", [1, 128])
def test_decode_bytenet(time, rival, B):
    if rival == "naive" and B > 1:
        pytest.skip("minutes for one call")
    few = inputs(B, 6, torch.float64)  # no rounding can change a choice
    assert torch.equal(RIVALS[rival](*few), decode_bytenet_reference(*few))
    arguments = inputs(B)

    @torch.no_grad()
    def decode() -> None:
        RIVALS[rival](*arguments)

    flops = 2 * T * B * (2 * C * D + N * 6 * C * C + V * C)
    time(f"greedy decoding, ByteNet N={N} C={C} V={V} L={T} B={B}", decode, flops, 3)
