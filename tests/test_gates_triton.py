"""What the GPU kernels share, in Triton's interpreter where there is no GPU."""

import pytest
import test_decode_lstm as decode
import test_layer_norm_lstm as lstm
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastvae.kernels import decode_lstm, layer_norm_lstm
from fastvae.kernels.gates import exp, sigmoid, tanh, tanh_slope
from fastvae.kernels.products import aligned, padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def exponential_kernel(x, y, WHICH: tl.constexpr, EXACT: tl.constexpr, COUNT: tl.constexpr):
    k = tl.arange(0, COUNT)
    v = tl.load(x + k)
    if WHICH == 0:
        v = exp(v)
    if WHICH == 1:
        v = sigmoid(v, EXACT)
    if WHICH == 2:
        v = tanh(v, EXACT)
    if WHICH == 3:
        v = tanh_slope(v, EXACT)
    tl.store(y + k, v)


def computed(which, x, exact=True):
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    exponential_kernel[(1,)](x, y, which, exact, len(x))
    return y.cpu()


def test_triton_exp_is_within_an_ulp_or_so():
    x = torch.linspace(-87, 88, 1 << 14)
    error = (computed(0, x).double() / x.double().exp() - 1).abs().max()
    assert error < 2**-23


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of NaN as an integer
def test_triton_exp_of_what_is_large_or_not_finite():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -1e30, -100, 0, 100, 1e30, inf, nan])
    assert (
        computed(0, x)[:-1].tolist() == [0, 0, 0, 1, inf, inf, inf] and computed(0, x)[-1].isnan()
    )
    assert computed(1, x)[:-1].tolist() == [0, 0, 0, 0.5, 1, 1, 1] and computed(1, x)[-1].isnan()
    assert computed(2, x)[:-1].tolist() == [-1, -1, -1, 0, 1, 1, 1] and computed(2, x)[-1].isnan()
    assert computed(3, x)[:-1].tolist() == [0, 0, 0, 1, 0, 0, 0] and computed(3, x)[-1].isnan()


@pytest.mark.parametrize("exact", [True, False])
def test_triton_gates(exact):
    """Within two ulps of 1, the functions' largest value, as 1 − tanh² is in PyTorch."""
    x = torch.linspace(-30, 30, 1 << 14)
    functions = torch.sigmoid, torch.tanh, lambda x: 1 - x.tanh() ** 2
    for which, function in enumerate(functions, 1):
        error = (computed(which, x, exact).double() - function(x.double())).abs().max()
        assert error <= 2 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 4, 8, 17, 500])
def test_operands_are_padded_to_words_of_16_bytes(columns, dtype):
    t = torch.randn(3, columns).to(dtype)
    more = padded(t)
    assert more.shape[1] == aligned(columns, dtype) and more.shape[1] * dtype.itemsize % 16 == 0
    assert torch.equal(more[:, :columns], t) and not more[:, columns:].any()
    assert more.shape[1] - columns < 16 // dtype.itemsize


class Recorder:
    """A kernel, and what Triton would compile for its launches: the kinds of their arguments."""

    def __init__(self, monkeypatch, module, name: str) -> None:
        self.kernel, self.found = getattr(module, name), set()
        options = getattr(self.kernel, "kwargs", None) or vars(self.kernel)  # the interpreter's
        self.free = set(options["do_not_specialize"])
        monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            kinds = []
            for name, value in zip(self.kernel.arg_names, arguments, strict=False):
                if isinstance(value, torch.Tensor):
                    kinds.append((value.dtype, value.data_ptr() % 16 == 0))
                elif value is not None and name not in self.free:
                    kinds.append((value == 1, value % 16 == 0))
            self.found.add((*kinds, *sorted(constants.items())))
            self.kernel[grid](*arguments, **constants)

        return launch


@pytest.mark.parametrize("B", [1, 3])
def test_an_odd_size_is_compiled_once(monkeypatch, B):
    """At whatever step of a sequence, whose rows begin anywhere."""
    H, V = 257, 5
    forward = Recorder(monkeypatch, layer_norm_lstm, "forward_kernel")
    backward = Recorder(monkeypatch, layer_norm_lstm, "backward_kernel")
    step = Recorder(monkeypatch, decode_lstm, "step_kernel")
    inputs = [t.to(DEVICE) for t in lstm.make((4, B, H), torch.bfloat16)]
    h, c_n, *saved = layer_norm_lstm._forward(*inputs, 1e-4, True)
    layer_norm_lstm._backward(h, c_n, *inputs[1:], h, *saved)
    monkeypatch.setattr(decode_lstm.persistent, "serving", lambda *_: None)
    decode_lstm.decode_lstm(
        *[t.to(DEVICE) for t in decode.make((4, B, 2, H, V), torch.bfloat16)], None, 1e-4, 2, 0
    )
    assert len(forward.found) == len(backward.found) == 1
    assert len(step.found) == 3  # the first step, which chooses nothing, the others, and the last
