"""LayerNorm-LSTM as a module with its input projection, forward and backward.

`compile` compiles the step: the loop unrolled takes minutes. `nn.LSTM` has no norm: another
function, shown as what the machine's vendor makes of the same products; on a GPU also in float16
and padded to the sizes that cuDNN is fastest at. `graph` is a CUDA graph of the reference.
"""

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_cell
from fastvae.testing import assert_accurate, gradients

INPUTS = 200
SHAPES = [(48, 64, 500), (60, 128, 1000), (128, 32, 1000)]
LINES = "fastvae", "fastvae bf16", "eager", "eager bf16", "compile", "nn.LSTM"
LINES += "graph", "nn.LSTM fp16"
PADDED = 1024  # cuDNN keeps weights in registers for such sizes alone


class CompiledStep(fastvae.reference.LayerNormLSTM):
    """The reference with its step compiled."""

    step = staticmethod(layer_norm_lstm_cell)

    def forward(self, x: Tensor):
        h = c = x.new_zeros(x.shape[1], self.hidden_size)
        outputs = []
        for x_t in nn.functional.linear(x, self.weight_ih, self.bias):
            a = x_t + h @ self.weight_hh.T
            h, c = self.step(a, c, self.norm_weight, self.norm_bias, self.eps)
            outputs.append(h)
        return torch.stack(outputs), (h, c)


MODULES = {
    "fastvae": fastvae.nn.LayerNormLSTM,
    "eager": fastvae.reference.LayerNormLSTM,
    "graph": fastvae.reference.LayerNormLSTM,
    "compile": CompiledStep,
    "nn.LSTM": nn.LSTM,
}


def check(module: nn.Module, B: int, low: bool) -> None:
    """The module's output and gradient for x by the accuracy rule, under autocast where `low`."""
    twins = {}
    for dtype in (torch.float64, torch.bfloat16 if low else torch.float32):
        twins[dtype] = fastvae.reference.LayerNormLSTM(INPUTS, module.hidden_size, dtype=dtype)
        twins[dtype].load_state_dict(module.state_dict())
    wide, plain = twins.values()

    def ours(x: Tensor) -> Tensor:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=low):
            return module(x)[0]

    def reference(x: Tensor) -> Tensor:
        twin = wide if x.dtype == torch.float64 else plain
        return twin(x.to(twin.bias.dtype))[0]

    x = torch.randn(3, B, INPUTS)
    assert_accurate(ours, reference, x)
    assert_accurate(gradients(ours), gradients(reference), x)


def module_of(line: str, H: int, compiled) -> nn.Module:
    if line == "nn.LSTM fp16":
        return nn.LSTM(256, PADDED, dtype=torch.float16)
    module = MODULES[line.split()[0]](INPUTS, H)
    if line == "compile":
        module.step = compiled(layer_norm_lstm_cell)
    return module


def training(module: nn.Module, T: int, B: int, low: bool):
    """One step of the module, under autocast where `low`."""
    half = next(module.parameters()).dtype == torch.float16
    x = torch.randn(T, B, 256 if half else INPUTS).to(next(module.parameters()).dtype)
    x.requires_grad_()

    def step() -> None:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=low):
            y, _ = module(x)
        y.sum().backward()
        module.zero_grad()
        x.grad = None

    return step


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_lstm(time, compiled, graphed, steps, line, shape):
    T, B, H = shape
    module, low = module_of(line, H, compiled), line.endswith("bf16")
    if line.startswith("fastvae") or line == "compile":
        check(module, B, low)
    beside = None if line == "fastvae" else module_of("fastvae", H, compiled)
    run = training(module, steps(T), B, low)
    time(
        f"LayerNorm-LSTM training, T={T} B={B} H={H}",
        line,
        graphed(run) if line == "graph" else run,
        beside and training(beside, steps(T), B, False),
        symbols=T * B,
        flops=3 * 8 * T * B * H * (H + INPUTS),
        rounds=5 if H == 500 else 3,
    )
