"""Every instruction set that this machine has computes every op within the accuracy rule."""

import pytest
import torch

import fastvae
from fastvae import _C, ops
from fastvae.ops.decode_bytenet import decode_bytenet_reference
from fastvae.ops.decode_lstm import decode_lstm_reference
from fastvae.ops.highway_conv import (
    highway_conv_gate_reference,
    highway_conv_project_reference,
    highway_conv_reference,
)
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference
from fastvae.ops.linear import linear_reference
from fastvae.testing import assert_accurate, gradients

T, B, C, D, V = 3, 5, 17, 6, 11


def lstm_inputs(dtype):
    shapes = (T, B, 4 * C), (4 * C, C), (4 * C,), (4 * C,), (B, C), (B, C)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def test_level_is_told(isa):
    assert fastvae.cpu_capability() == isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_lstm(isa, dtype):
    inputs = lstm_inputs(dtype)
    assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    assert_accurate(gradients(ops.layer_norm_lstm), gradients(layer_norm_lstm_reference), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_highway_conv(isa, dtype):
    x, weight = torch.randn(T, B, C, dtype=dtype), torch.randn(3 * C, C, 2, dtype=dtype)
    a, bias = torch.randn(T, B, 3 * C, dtype=dtype), torch.randn(3 * C, dtype=dtype)
    norm = torch.randn(3, 3 * C).unbind()
    for op, reference, inputs in (
        (ops.highway_conv_project, highway_conv_project_reference, (x, weight, bias)),
        (ops.highway_conv_gate, highway_conv_gate_reference, (a, x, *norm)),
        (ops.highway_conv, highway_conv_reference, (x, weight, bias)),
    ):
        assert_accurate(op, reference, *inputs)
        assert_accurate(gradients(op), gradients(reference), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(isa, dtype):
    shapes = (40, C), (3 * C, C + V), (3 * C,)
    inputs = *(torch.randn(shape, dtype=dtype) for shape in shapes), torch.randint(V, (40,))
    assert_accurate(ops.linear, linear_reference, *inputs)
    assert_accurate(gradients(ops.linear), gradients(linear_reference), *inputs)


def test_decode(isa):
    """In float64, where no rounding can change a choice."""

    def uniform(*shape):
        return torch.rand(shape, dtype=torch.float64) * 2 - 1

    state, classifier = (uniform(B, C), uniform(B, C)), (3 * uniform(V, C), uniform(V))
    inputs = uniform(T, B, D), uniform(4 * C, D), uniform(V + 1, 4 * C)
    inputs = *inputs, uniform(4 * C, C), uniform(4 * C), uniform(4 * C), *classifier, *state
    assert torch.equal(ops.decode_lstm(*inputs), decode_lstm_reference(*inputs))
    inputs = uniform(T, B, D), uniform(2 * C, D), uniform(V + 1, 2 * C), uniform(2, 3 * C, C, 2)
    inputs = *inputs, uniform(2, 3 * C), *classifier
    assert torch.equal(ops.decode_bytenet(*inputs), decode_bytenet_reference(*inputs))


def test_unknown_level_is_a_clear_error():
    best = _C.cpu_capabilities()[-1]
    with pytest.raises(ValueError, match=f"no CPU capability 'sse9'; its best is '{best}'"):
        _C.set_cpu_capability("sse9")
