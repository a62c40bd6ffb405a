"""LayerNorm-LSTM as a module with its input projection, in training and, on a GPU, forward alone.

`compile` compiles the step: the loop unrolled takes minutes. `nn.LSTM` has no norm: another
function, shown as what the machine's vendor makes of the same products; on a GPU also in float16
and padded to the sizes that cuDNN is fastest at. `graph` is a CUDA graph of the reference. Where
FlashRNN (no norm, sizes padded too) and Haste (which normalizes W x, W h and c one by one) can be
imported they have a line on a GPU: other functions again, checked for shape and finiteness alone.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import _C
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_cell
from fastvae.testing import assert_accurate, gradients

INPUTS = 200
SHAPES = [(48, 64, 500), (60, 128, 1000), (128, 32, 1000)]
LINES = "fastvae", "fastvae bf16", "eager", "eager bf16", "compile", "compile bf16"
LINES += "nn.LSTM", "nn.LSTM bf16", "rival"
LINES += "fastvae persistent bf16", "fastvae persistent fp16"
LINES += "graph", "nn.LSTM fp16", "FlashRNN (no norm) bf16", "Haste (other norms)"
WORKS = "LayerNorm-LSTM training", "LayerNorm-LSTM forward"


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


class FlashRNN(nn.Module):
    """https://github.com/NX-AI/flashrnn: an LSTM in bfloat16, weights kept on the chip."""

    def __init__(self, inputs: int, H: int) -> None:
        super().__init__()
        self.hidden_size = H
        self.op = pytest.importorskip("flashrnn", exc_type=ImportError).flashrnn
        self.project = nn.Linear(inputs, 4 * H, bias=False, dtype=torch.bfloat16)
        weight = torch.randn(4, 1, H, H, dtype=torch.bfloat16) / H**0.5
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(weight.new_zeros(4, 1, H))

    def forward(self, x: Tensor):
        """x [T, B, I] -> h [T, B, H], (h_n, c_n) [B, H]."""
        x = self.project(x).unflatten(-1, (4, 1, -1)).transpose(0, 1)  # [B, T, gates, heads, H]
        states, _ = self.op(x, self.weight, self.bias, function="lstm", backend="cuda_fused")
        h, c = states[..., 0, :].transpose(1, 2)
        return h, (h[-1], c[-1])


def haste(inputs: int, H: int) -> nn.Module:
    """https://github.com/lmnt-com/haste: its LayerNormLSTM, in float32."""
    return pytest.importorskip("haste_pytorch", exc_type=ImportError).LayerNormLSTM(inputs, H)


MODULES = {
    "fastvae": fastvae.nn.LayerNormLSTM,
    "eager": fastvae.reference.LayerNormLSTM,
    "graph": fastvae.reference.LayerNormLSTM,
    "compile": CompiledStep,
    "nn.LSTM": nn.LSTM,
    "nn.LSTM bf16": partial(nn.LSTM, dtype=torch.bfloat16),
    "nn.LSTM fp16": partial(nn.LSTM, dtype=torch.float16),
    "FlashRNN": FlashRNN,
    "Haste": haste,
}
PADDED = "nn.LSTM fp16", "FlashRNN (no norm) bf16"


def autocast(low: torch.dtype | None) -> torch.autocast:
    """Where `low` is a dtype, products in it."""
    device = torch.get_default_device().type
    return torch.autocast(device, low or torch.bfloat16, enabled=low is not None)


def low_of(line: str) -> torch.dtype | None:
    """What the line's module runs in under autocast; None where it is not under it."""
    if line.endswith("bf16") and not line.startswith("nn."):
        return torch.bfloat16
    return torch.float16 if line == "fastvae persistent fp16" else None


def check(module: nn.Module, B: int, low: torch.dtype | None) -> None:
    """The module's output and gradient for x by the accuracy rule, in `low` if it is a dtype."""
    reference_modules = {}
    for dtype in (torch.float64, low or torch.float32):
        reference_modules[dtype] = fastvae.reference.LayerNormLSTM(
            INPUTS, module.hidden_size, dtype=dtype
        )
        reference_modules[dtype].load_state_dict(module.state_dict())
    wide, plain = reference_modules.values()

    def ours(x: Tensor) -> Tensor:
        with autocast(low):
            y = module(x)[0]
            return y if low is None else y.to(low)  # autocast leaves some of a step in float32

    def reference(x: Tensor) -> Tensor:
        reference_model = wide if x.dtype == torch.float64 else plain
        return reference_model(x.to(reference_model.bias.dtype))[0]

    x = torch.randn(3, B, INPUTS)
    assert_accurate(ours, reference, x)
    assert_accurate(gradients(ours), gradients(reference), x)


def check_other(line: str, module: nn.Module, x: Tensor) -> None:
    """What another package computes is its own affair; a line that it refuses is left out."""
    x = x.to(next(module.parameters()).dtype).requires_grad_()
    try:
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    except (OSError, RuntimeError, ValueError) as error:
        pytest.skip(f"{line}: {error}")
    assert y.shape == (*x.shape[:2], module.hidden_size) and y.isfinite().all()
    assert dx.shape == x.shape and dx.isfinite().all()


def module_of(line: str, H: int, compiled, rival=None) -> nn.Module:
    """The line's module for INPUTS and H, or the sizes next to them that it needs."""
    if line == "rival":
        return rival("layer_norm_lstm")(INPUTS, H)
    make = MODULES[line if line in MODULES else line.split()[0]]
    module = make(padded(INPUTS), padded(H)) if line in PADDED else make(INPUTS, H)
    if line.startswith("compile"):
        module.step = compiled(layer_norm_lstm_cell)
    return module


def sequence(line: str, T: int, B: int) -> Tensor:
    """What the line's module reads: x [T, B, I]."""
    return torch.randn(T, B, padded(INPUTS) if line in PADDED else INPUTS)


def padded(size: int) -> int:
    """The next multiple of 128: cuDNN keeps weights in registers for such sizes alone."""
    return -(-size // 128) * 128


def running(work: str, module: nn.Module, x: Tensor, low: torch.dtype | None):
    """The work once, in `low` if it is a dtype."""
    x = x.to(next(module.parameters()).dtype)

    def forward() -> Tensor:
        with autocast(low):
            return module(x)[0]

    def step() -> None:
        forward().sum().backward()
        module.zero_grad()
        x.grad = None

    if work.endswith("forward"):
        return torch.no_grad()(forward)
    x.requires_grad_()
    return step


def payloads(H: int, plan, sequences: int) -> list[int]:
    """Bytes of moments and of h."""
    return [sequences * -(-H // plan.units) * 8, sequences * H * 2]


@pytest.mark.parametrize("line", ["fastvae", "fastvae bf16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gates(timer, line, direction, device):
    """The step without its product: norm, gates and state, on one thread and a step's data.

    Nanoseconds a gate value are the row's milliseconds / 16.384.
    """
    if device == "cuda":
        pytest.skip("of the CPU kernels")
    H, B, steps = 1000, 64, 64
    time = timer(f"LayerNorm-LSTM gates {direction}, 1 thread, T={steps} B={B} H={H}", line)
    kind = "bf16" if line.endswith("bf16") else "fp32"

    def gates(kind: str = kind) -> None:
        _C.layer_norm_lstm_gates(kind, H, B, steps, direction == "backward")

    beside = None if kind == "fp32" else partial(gates, "fp32")
    time(gates, beside, tokens=steps * B, flops=0)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("work", WORKS)
def test_layer_norm_lstm(timer, compiled, graphed, serving, steps, rival, work, line, shape):
    T, B, H = shape
    time = timer(f"{work}, T={T} B={B} H={H}", line)
    served, module, low = (
        serving(line, "layer_norm_lstm"),
        module_of(line, H, compiled, rival),
        low_of(line),
    )
    if line.startswith(("fastvae", "compile")):
        served(check)(module, B, low)
    elif line.startswith(("FlashRNN", "Haste", "rival")):
        check_other(line, module, sequence(line, 3, B))
    run = served(running(work, module, sequence(line, steps(T), B), low))
    beside = None
    if line != "fastvae":
        ours = module_of("fastvae", H, compiled)
        beside = running(work, ours, sequence("fastvae", steps(T), B), None)
    training = work.endswith("training")
    time(
        graphed(run) if line == "graph" else run,
        beside,
        tokens=T * B,
        flops=(3 if training else 1) * 8 * T * B * H * (H + INPUTS),
        weights=0 if training else 4 * H * H,
        passes=T,
        exchanges=served.exchanges(B, partial(payloads, H)),
        rounds=5 if H == 500 else 3,
    )
