"""A highway masked convolution in training, batch norm included, forward and backward."""

import pytest
import torch

import fastvae
from fastvae.ops import highway_conv
from fastvae.ops.highway_conv import highway_conv_reference
from fastvae.testing import assert_accurate, gradients

T, B, C = 56, 64, 256
LINES = "fastvae", "fastvae bf16", "eager", "compile"


def check(dtype: torch.dtype) -> None:
    few = torch.randn(4, B, C), torch.randn(3 * C, C, 2) / C**0.5, torch.randn(3 * C)
    few = [t.to(dtype) for t in few]
    assert_accurate(highway_conv, highway_conv_reference, *few)
    assert_accurate(gradients(highway_conv), gradients(highway_conv_reference), *few)


def training(line: str, compiled):
    """One step of the line's module."""
    name, low = line.split()[0], line.endswith("bf16")
    modules = fastvae.nn if name == "fastvae" else fastvae.reference
    module = modules.HighwayConvStack(C, 1)
    x = torch.randn(T, B, C, requires_grad=True)
    run = compiled(module) if name == "compile" else module
    if name == "compile":
        torch.testing.assert_close(run(x), module(x))

    def step() -> None:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=low):
            y = run(x)
        y.sum().backward()
        module.zero_grad()
        x.grad = None

    return step


@pytest.mark.parametrize("line", LINES)
def test_highway_conv(timer, compiled, line):
    time = timer(f"highway convolution training, T={T} B={B} C={C}", line)
    if line.startswith("fastvae"):
        check(torch.bfloat16 if line.endswith("bf16") else torch.float32)
    time(
        training(line, compiled),
        None if line == "fastvae" else training("fastvae", compiled),
        tokens=T * B,
        flops=3 * 12 * T * B * C * C,
        rounds=9,
    )
