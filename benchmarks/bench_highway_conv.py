"""A highway masked convolution in training, batch norm included, forward and backward."""

import pytest
import torch

import fastvae
from fastvae.ops import highway_conv
from fastvae.ops.highway_conv import highway_conv_reference
from fastvae.testing import assert_accurate

SHAPES = [(56, 64, 256)]


def compiled(channels: int, layers: int):
    return torch.compile(fastvae.reference.HighwayConvStack(channels, layers))


RIVALS = {
    "fastvae": fastvae.nn.HighwayConvStack,
    "eager": fastvae.reference.HighwayConvStack,
    "compile": compiled,
}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_highway_conv(time, rival, shape):
    T, B, C = shape
    module = RIVALS[rival](C, 1)
    x = torch.randn(T, B, C, requires_grad=True)
    if rival == "fastvae":
        weight, bias = torch.randn(3 * C, C, 2) / C**0.5, torch.randn(3 * C)
        assert_accurate(highway_conv, highway_conv_reference, x.detach(), weight, bias)

    def step() -> None:
        module(x).sum().backward()
        module.zero_grad()
        x.grad = None

    time(f"highway convolution forward and backward T={T} B={B} C={C}", step, 36 * T * B * C * C)
