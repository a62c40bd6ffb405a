"""The projection of dense inputs and one-hot tokens before an LSTM, forward and backward."""

import pytest
import torch

from fastvae.ops import linear
from fastvae.ops.linear import linear_reference
from fastvae.testing import assert_accurate, gradients

T, B, K, S, N = 128, 32, 200, 261, 4000
LINES = "fastvae", "fastvae bf16", "eager", "eager bf16", "compile"


def inputs(dtype: torch.dtype, T: int) -> list[torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).mul_(0.2).sub_(0.1).to(dtype)

    tokens = torch.randint(S, (T, B), generator=generator)
    return [uniform(T, B, K) * 10, uniform(N, K + S), uniform(N), tokens]


def training(function, dtype: torch.dtype, T: int):
    """One step of the function, for the gradients of x, weight and bias."""
    *dense, tokens = inputs(dtype, T)
    for tensor in dense:
        tensor.requires_grad_()

    def step() -> None:
        function(*dense, tokens).sum().backward()
        for tensor in dense:
            tensor.grad = None

    return step


@pytest.mark.parametrize("line", LINES)
def test_linear(timer, compiled, steps, line):
    time = timer(f"input projection training, T={T} B={B}, {K} + {S} tokens to {N}", line)
    dtype = torch.bfloat16 if line.endswith("bf16") else torch.float32
    functions = {"fastvae": linear, "eager": linear_reference}
    function = functions.get(line.split()[0]) or compiled(linear_reference)
    few = inputs(dtype, 4)
    assert_accurate(function, linear_reference, *few)
    assert_accurate(gradients(function), gradients(linear_reference), *few)
    time(
        training(function, dtype, steps(T)),
        None if line == "fastvae" else training(linear, torch.float32, steps(T)),
        tokens=T * B,
        flops=3 * 2 * T * B * K * N,
        rounds=9,
    )
