"""unfold and fold: against their references, each other, and convolutions of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from fastvae.nn import StridedConv, StridedConvTranspose
from fastvae.ops.linear import linear
from fastvae.ops.unfold import fold, fold_reference, unfold, unfold_reference
from fastvae.testing import assert_accurate, gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# (T, B, C) of the windows: ones, primes, lanes and their neighbors, enough for two threads
SHAPES = [(1, 1, 1), (1, 3, 5), (2, 1, 7), (3, 5, 16), (4, 3, 15), (5, 7, 17), (7, 33, 131)]
OPS = {
    "unfold": (unfold, unfold_reference, torch.ops.fastvae.unfold),
    "fold": (fold, fold_reference, torch.ops.fastvae.fold),
}


def make(name, shape=(4, 3, 5), dtype=torch.float32):
    """x, or windows and bias."""
    T, B, C = shape
    shapes = [(2 * T, B, C)] if name == "unfold" else [(T, B, C, 3), (C,)]
    return [torch.randn(sizes).to(dtype) for sizes in shapes]


def conv(x, weight, bias):
    return F.conv1d(x.permute(1, 2, 0), weight, bias, 2, 1).permute(2, 0, 1)


def conv_transpose(x, weight, bias):
    return F.conv_transpose1d(x.permute(1, 2, 0), weight, bias, 2, 1, 1).permute(2, 0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_forward_and_backward(isa, name, shape, dtype):
    fn, reference, _ = OPS[name]
    inputs = make(name, shape, dtype)
    assert_accurate(fn, reference, *inputs)
    assert_accurate(gradients(fn), gradients(reference), *inputs)
    # Bit for bit where values are moved, and at most two are added.
    assert torch.equal(fn(inputs[0]), reference(inputs[0]))


def test_windows_by_hand():
    windows = unfold(torch.arange(1.0, 7).view(6, 1, 1))
    assert windows.view(3, 3).tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert fold(windows).flatten().tolist() == [1, 4, 3, 8, 5, 6]
    assert fold(windows, torch.tensor([10.0])).flatten().tolist() == [11, 14, 13, 18, 15, 16]


@pytest.mark.parametrize("rows", [40, 40_000])
def test_sums_over_rows_keep_their_accuracy(rows):
    """The cotangent rises from −1 to 1, so that a running sum grows long before it cancels."""
    inputs = make("fold", (rows // 8, 8, 7))
    assert_accurate(gradients(fold), gradients(fold_reference), *inputs)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    inputs = [t.requires_grad_() for t in make(name, dtype=torch.float64)]
    assert torch.autograd.gradcheck(OPS[name][0], inputs)
    assert torch.autograd.gradgradcheck(OPS[name][0], inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype):
    inputs = [t.requires_grad_() for t in make(name, dtype=dtype)]
    torch.library.opcheck(OPS[name][2], inputs)
    torch.library.opcheck(OPS[name][2], inputs[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_noncontiguous(name, dtype):
    fn, reference, _ = OPS[name]
    inputs = [torch.stack([t] * 2, -1)[..., 0] for t in make(name, dtype=dtype)]
    assert not inputs[0].is_contiguous()
    assert_accurate(fn, reference, *inputs)
    assert_accurate(gradients(fn), gradients(reference), *inputs)


@pytest.mark.parametrize("name", OPS)
def test_empty_batch(name):
    fn, reference, _ = OPS[name]
    inputs = [t.requires_grad_() for t in make(name, (4, 0, 5))]
    assert torch.equal(fn(*inputs), reference(*inputs))
    fn(*inputs).sum().backward()
    assert inputs[0].grad.shape == inputs[0].shape


def test_no_steps():
    assert unfold(torch.ones(0, 2, 5)).shape == (0, 2, 5, 3)
    assert fold(torch.ones(0, 2, 5, 3), torch.ones(5)).shape == (0, 2, 5)
    assert StridedConv(5, 7)(torch.ones(0, 2, 5)).shape == (0, 2, 7)
    assert StridedConvTranspose(5, 7)(torch.ones(0, 2, 5)).shape == (0, 2, 7)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "fn, shapes, message",
    [
        (unfold, [(4, 3)], "x must have"),
        (unfold, [(5, 3, 2)], r"x must have an even number of steps, got \[5, 3, 2\]"),
        (unfold, [(5, 0, 2)], r"x must have an even number of steps, got \[5, 0, 2\]"),
        (fold, [(4, 3, 5)], "windows must have"),
        (fold, [(0, 3, 5)], "windows must have"),
        (fold, [(4, 0, 5, 3), (4,)], r"bias must have shape .*\[5\], got \[4\]"),
        (fold, [(4, 3, 5, 2)], r"windows must have shape \[T, B, C, 3\], got \[4, 3, 5, 2\]"),
        (fold, [(4, 3, 5, 3), (4,)], r"bias must have shape .*\[5\], got \[4\]"),
        (fold, [(4, 3, 5, 3), (1, 5)], r"bias must have shape .*\[5\], got \[1, 5\]"),
    ],
)
def test_rejects_wrong_shape(fn, shapes, message, device):
    with pytest.raises(RuntimeError, match=message):
        fn(*(torch.ones(shape, device=device) for shape in shapes))


@pytest.mark.parametrize("name", OPS)
def test_rejects_wrong_dtype(name):
    with pytest.raises(RuntimeError, match=f"^{name} takes float32, bfloat16 or float64 on a CPU"):
        OPS[name][0](make(name)[0].half())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects_another_dtype_or_device(device):
    windows, bias = (t.to(device) for t in make("fold"))
    with pytest.raises(RuntimeError, match=r"^bias must have the dtype of windows"):
        fold(windows, bias.double())
    other = "meta" if device == "cpu" else "cpu"
    with pytest.raises(RuntimeError, match=r"^bias must be on the device of windows"):
        fold(windows, torch.ones(5, device=other))


@pytest.mark.parametrize("name", OPS)
def test_reference_serves_devices_without_a_kernel(name):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    _, reference, op = OPS[name]
    inputs = make(name)
    assert torch.equal(op.default.redispatch(key, *inputs), reference(*inputs))


@pytest.mark.parametrize("name", OPS)
def test_compile(name):
    fn, reference, _ = OPS[name]
    inputs = make(name)
    assert_accurate(torch.compile(fn, fullgraph=True), reference, *inputs)


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_never_written(name):
    inputs = [t.requires_grad_() for t in make(name)]
    before = [(t.detach().clone(), t._version) for t in inputs]
    y = OPS[name][0](*inputs)
    torch.autograd.grad(y, inputs, torch.randn_like(y))
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version


@pytest.mark.parametrize("shape", [(7, 33, 131), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_thread_counts(threads, name, shape):
    fn, reference, _ = OPS[name]
    assert_accurate(fn, reference, *make(name, shape))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 17, 31), (8, 33, 48, 20)], ids=str)
def test_convolution(shape, dtype):
    """With `linear` they are the convolutions of torch.nn.Conv1d and ConvTranspose1d."""
    T, B, C, N = shape

    def ours(x, weight, bias):
        return linear(unfold(x).flatten(2), weight.flatten(1), bias)

    x, weight, bias = (torch.randn(sizes).to(dtype) for sizes in ((2 * T, B, C), (N, C, 3), (N,)))
    assert_accurate(ours, conv, x, weight, bias)
    assert_accurate(gradients(ours), gradients(conv), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("steps, B, C, N", [(1, 1, 1, 1), (4, 5, 17, 31), (16, 33, 48, 20)])
@pytest.mark.parametrize(
    "kind, plain", [(StridedConv, conv), (StridedConvTranspose, conv_transpose)]
)
def test_modules(kind, plain, steps, B, C, N, dtype):
    if kind is StridedConv:
        steps *= 2
    module = kind(C, N)

    def ours(x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, x)

    inputs = torch.randn(steps, B, C), module.weight.detach() * 3, module.bias.detach() * 3
    inputs = [t.to(dtype) for t in inputs]
    assert_accurate(ours, plain, *inputs)
    assert_accurate(gradients(ours), gradients(plain), *inputs)


@pytest.mark.parametrize(
    "kind, plain", [(StridedConv, conv), (StridedConvTranspose, conv_transpose)]
)
def test_modules_elsewhere(kind, plain):
    """On devices without a kernel the modules are PyTorch's own, of the same shapes."""
    module = kind(5, 7, device="meta")
    x = torch.empty(6, 2, 5, device="meta")
    assert module(x).shape == plain(x, module.weight, module.bias).shape


@pytest.mark.parametrize(
    "kind, shape", [(StridedConv, r"\[2T, B, 5\]"), (StridedConvTranspose, r"\[T, B, 5\]")]
)
@pytest.mark.parametrize("wrong", [(6, 5), (6, 2, 4), (5, 2, 5), (5, 0, 5)], ids=str)
def test_modules_reject_another_shape(kind, shape, wrong):
    if kind is StridedConvTranspose and wrong[-1] == 5 and len(wrong) == 3:
        wrong = (*wrong, 1)  # any number of steps is right
    with pytest.raises(ValueError, match=f"^x must have shape {shape}, got "):
        kind(5, 7)(torch.ones(wrong))


@pytest.mark.parametrize("kind", [StridedConv, StridedConvTranspose])
def test_autocast(kind):
    module, x = kind(5, 7), torch.randn(6, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module.bfloat16()(x.bfloat16()))
