"""layer_norm_lstm: forward and backward, on every path, against its references."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastvae import reference as reference_modules
from fastvae.ops.layer_norm_lstm import layer_norm_lstm, layer_norm_lstm_reference
from fastvae.testing import assert_accurate, assert_same_non_finite, gradients

NAMES = ("x", "weight_hh", "norm_weight", "norm_bias", "h0", "c0")
DTYPES = [torch.float32, torch.bfloat16]
# (T, B, H): ones, primes, lanes and their neighbors
SHAPES = [(1, 1, 1), (1, 1, 16), (5, 1, 7), (1, 7, 3), (3, 5, 15), (4, 2, 16), (7, 3, 17)]
SHAPES += [(3, 4, 47), (5, 6, 48), (2, 13, 49)]
PAPER = pytest.param((8, 32, 1000), marks=pytest.mark.slow)
WRONG_SHAPES = {
    "x": lambda t: t[0],
    "weight_hh": lambda t: t[:-1],
    "norm_weight": lambda t: t[:-1],
    "norm_bias": lambda t: t.new_ones(len(t) + 1),
    "h0": lambda t: t[:-1],
    "c0": lambda t: t[:, :-1],
}
OP, BACKWARD = torch.ops.fastvae.layer_norm_lstm, torch.ops.fastvae.layer_norm_lstm_backward


def make(shape=(4, 3, 5), dtype=torch.float32, grad=False):
    T, B, H = shape
    tensors = (
        torch.randn(T, B, 4 * H),
        torch.randn(4 * H, H) / H**0.5,
        1 + 0.1 * torch.randn(4 * H),
        0.1 * torch.randn(4 * H),
        torch.randn(B, H).tanh(),
        torch.randn(B, H),
    )
    return [t.to(dtype).requires_grad_(grad) for t in tensors]


def both(*inputs):
    """Forward and backward of the op at once."""
    return *layer_norm_lstm(*inputs), *gradients(layer_norm_lstm)(*inputs)


def both_reference(*inputs):
    return *layer_norm_lstm_reference(*inputs), *gradients(layer_norm_lstm_reference)(*inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, PAPER], ids=str)
def test_forward(shape, dtype):
    assert_accurate(layer_norm_lstm, layer_norm_lstm_reference, *make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, PAPER], ids=str)
def test_backward(shape, dtype):
    fn, reference = gradients(layer_norm_lstm), gradients(layer_norm_lstm_reference)
    assert_accurate(fn, reference, *make(shape, dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 15), (2, 2, 16), (2, 1, 17)], ids=str)
def test_triton(shape):
    """The GPU's kernels, in the interpreter where there is none."""
    kernels = pytest.importorskip("fastvae.kernels.layer_norm_lstm")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def both_triton(*inputs):
        inputs = [t.to(device) for t in inputs]
        h, c_n, *saved = kernels.layer_norm_lstm(*inputs, 1e-4, True)
        assert torch.equal(kernels.layer_norm_lstm(*inputs, 1e-4, False)[0], h)
        cotangents = [torch.linspace(-1, 1, y.numel()).to(y).view_as(y) for y in (h, c_n)]
        grads = kernels.layer_norm_lstm_backward(*cotangents, *inputs[1:], h, *saved)
        return tuple(t.cpu() for t in (h, c_n, *grads))

    assert_accurate(both_triton, both_reference, *make(shape))


def test_triton_sums_over_many_rows():
    """More rows than one program, or one product, adds up: gradients over a whole sequence."""
    kernels = pytest.importorskip("fastvae.kernels.layer_norm_lstm")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def triton(dz, normalized):
        dz, normalized = dz.to(device), normalized.to(device)
        sums = *kernels.norm_sums(dz, normalized), kernels.summed_products(dz, normalized)
        return tuple(t.cpu() for t in sums)

    def plain(dz, normalized):
        return (dz * normalized).sum(0), dz.sum(0), dz.T @ normalized

    assert_accurate(triton, plain, torch.randn(600, 90), torch.randn(600, 90))


@pytest.mark.parametrize("name", NAMES)
def test_triton_rejects_wrong_shape(name):
    kernels = pytest.importorskip("fastvae.kernels.layer_norm_lstm")
    inputs = make()
    n = NAMES.index(name)
    inputs[n] = WRONG_SHAPES[name](inputs[n])
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        kernels.layer_norm_lstm(*inputs, 1e-4, False)


def test_equals_the_reference_model():
    def reference_model(x, weight_hh, norm_weight, norm_bias, h0, c0):
        lstm = reference_modules.LayerNormLSTM(x.shape[-1], h0.shape[-1], dtype=x.dtype)
        weights = {"weight_hh": weight_hh, "norm_weight": norm_weight, "norm_bias": norm_bias}
        weights |= {"weight_ih": torch.eye(x.shape[-1]).to(x), "bias": torch.zeros_like(norm_bias)}
        h, (h_n, c_n) = torch.func.functional_call(lstm, weights, (x, (h0, c0)))
        assert torch.equal(h[-1], h_n)
        return h, c_n

    inputs = make((6, 3, 11))
    assert_accurate(layer_norm_lstm, reference_model, *inputs)
    assert_accurate(gradients(layer_norm_lstm), gradients(reference_model), *inputs)


def test_eps_is_used():
    inputs = make()
    assert_accurate(
        lambda *t: layer_norm_lstm(*t, eps=0.5),
        lambda *t: layer_norm_lstm_reference(*t, eps=0.5),
        *inputs,
    )
    assert not torch.equal(layer_norm_lstm(*inputs, eps=0.5)[0], layer_norm_lstm(*inputs)[0])


@pytest.mark.parametrize("shape", [(3, 2, 3), (1, 1, 2)], ids=str)
def test_gradcheck(shape):
    assert torch.autograd.gradcheck(layer_norm_lstm, make(shape, torch.float64, grad=True))


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone(name, output):
    """One output used, one input wanted: the others must not be needed."""
    n = NAMES.index(name)

    def vjp(fn):
        def run(*inputs):
            wanted = inputs[n].detach().requires_grad_()
            result = fn(*inputs[:n], wanted, *inputs[n + 1 :])[output]
            return torch.autograd.grad(result.square().sum(), wanted)

        return run

    assert_accurate(vjp(layer_norm_lstm), vjp(layer_norm_lstm_reference), *make((4, 3, 17)))


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, save):
    torch.library.opcheck(OP, (*make(dtype=dtype, grad=save), 1e-4, save))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backward(dtype):
    inputs = make(dtype=dtype)
    h, c_n, *saved = OP(*inputs, 1e-4, True)
    cotangents = torch.randn_like(h), torch.randn_like(c_n)
    torch.library.opcheck(BACKWARD, (*cotangents, *inputs[1:], h, *saved))


def test_saves_nothing_unless_asked():
    inputs = make()
    h, c_n, *saved = OP(*inputs, 1e-4, False)
    assert [t.numel() for t in saved] == [0, 0, 0]
    kept = OP(*inputs, 1e-4, True)
    assert torch.equal(kept[0], h) and torch.equal(kept[1], c_n)
    assert kept[2].dtype == torch.float32 and kept[4].shape == inputs[0].shape[:2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype):
    def strided(*inputs):
        return both(*(torch.stack([t, t.neg()], -1)[..., 0] for t in inputs))

    assert not torch.stack([torch.ones(3)] * 2, -1)[..., 0].is_contiguous()
    assert_accurate(strided, both_reference, *make((4, 3, 17), dtype))


def test_transposed_and_expanded():
    x, weight_hh, norm_weight, norm_bias, h0, c0 = make((4, 3, 17))
    batch_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    column_major = weight_hh.T.contiguous().T
    inputs = (batch_first, column_major, norm_weight, norm_bias, h0, c0)
    assert_accurate(both, both_reference, *inputs)
    inputs = (x[:, :1].expand_as(x), weight_hh, norm_weight[:1].expand_as(norm_weight), norm_bias)
    inputs += (h0[:1].expand_as(h0), c0[:, :1].expand_as(c0))
    assert_accurate(layer_norm_lstm, layer_norm_lstm_reference, *inputs)


def test_expanded_cotangents():
    def vjp(fn):
        def run(*inputs):
            inputs = [t.detach().requires_grad_() for t in inputs]
            h, c_n = fn(*inputs)  # the cotangents of sums are one number, expanded
            return torch.autograd.grad((h.mT.contiguous().sum(), c_n.sum()), inputs)

        return run

    assert_accurate(vjp(layer_norm_lstm), vjp(layer_norm_lstm_reference), *make((4, 3, 17)))


@pytest.mark.parametrize("name", NAMES)
def test_rejects_wrong_shape(name):
    inputs = make()
    n = NAMES.index(name)
    inputs[n] = WRONG_SHAPES[name](inputs[n])
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        layer_norm_lstm(*inputs)


@pytest.mark.parametrize("name", NAMES[1:])
def test_rejects_wrong_dtype(name):
    inputs = make()
    n = NAMES.index(name)
    inputs[n] = inputs[n].double()
    with pytest.raises(RuntimeError, match=rf"\b{name} must have the dtype of x"):
        layer_norm_lstm(*inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
def test_rejects_unknown_dtype(dtype):
    message = (
        f"takes float32, bfloat16 or float64 on a CPU, got {str(dtype).removeprefix('torch.')}"
    )
    with pytest.raises(RuntimeError, match=message):
        layer_norm_lstm(*(t.to(dtype) for t in make()))


BACKWARD_NAMES = ("dh", "dc_n", *NAMES[1:], "h", "c", "normalized", "rstd")


@pytest.mark.parametrize("name", BACKWARD_NAMES)
def test_backward_rejects_wrong_shape(name):
    inputs = make()
    h, c_n, *saved = OP(*inputs, 1e-4, True)
    args = [torch.randn_like(h), torch.randn_like(c_n), *inputs[1:], h, *saved]
    n = BACKWARD_NAMES.index(name)
    args[n] = args[n][..., :-1].contiguous()
    told = "weight_hh" if name == "h" else name  # h says what H is
    with pytest.raises(RuntimeError, match=rf"^{told} must have shape \[.*\] = \[.*\], got \["):
        BACKWARD(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_serves_devices_without_a_kernel(dtype):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)

    def elsewhere(dh, dc_n, *inputs):
        h, c_n, *saved = OP.default.redispatch(key, *inputs, 1e-4, True)
        grads = BACKWARD.default.redispatch(key, dh, dc_n, *inputs[1:], h, *saved)
        return h, c_n, *grads

    def reference(dh, dc_n, *inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        h, c_n = layer_norm_lstm_reference(*inputs)
        grads = torch.autograd.grad((h, c_n), inputs, (dh, dc_n))
        return h.detach(), c_n.detach(), *grads

    inputs = make((5, 3, 17), dtype)
    cotangents = torch.randn(5, 3, 17, dtype=dtype), torch.randn(3, 17, dtype=dtype)
    assert_accurate(elsewhere, reference, *cotangents, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value, place", [(float("nan"), -1), (float("inf"), 1), (-float("inf"), -1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_values_stay(name, value, place, dtype):
    inputs = make((4, 3, 17), dtype)
    inputs[NAMES.index(name)].view(-1)[place] = value
    assert_same_non_finite(layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    assert_accurate(both, both_reference, *inputs)


def test_nan_stays_in_its_sequence():
    inputs = make((4, 3, 17))
    inputs[0][1, 2, 5] = float("nan")
    h, c_n = layer_norm_lstm(*inputs)
    assert h[1:, 2].isnan().all() and c_n[2].isnan().all()
    assert h[:, :2].isfinite().all() and h[0].isfinite().all() and c_n[:2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [(3.0, -7.0, 0.0), (1e4 / 3, -1e4, 0.1)], ids=str)
def test_constant_rows(values, dtype):
    """No variance: the norm gives its bias alone, and the gradient is finite."""

    def bias_alone(x, weight_hh, norm_weight, norm_bias, h0, c0):
        (i, f, g, o), c, outputs = norm_bias.chunk(4), c0, []
        for _ in x:
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            outputs.append(o.sigmoid() * c.tanh())
        return torch.stack(outputs), c

    inputs = make((3, 2, 16), dtype)
    inputs[0][:] = torch.tensor(values)[:, None, None]
    inputs[1].zero_()
    assert_accurate(layer_norm_lstm, bias_alone, *inputs)
    assert_accurate(both, both_reference, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, offset", [(1e4, 0), (1e-3, 0), (1, 1e3), (1, 1e4)])
def test_magnitudes(scale, offset, dtype):
    """A variance of E[a²] − E[a]² would be lost at the offset; eps counts at the small scale."""
    inputs = make((4, 3, 17), dtype)
    inputs[0].mul_(scale).add_(offset)
    assert_accurate(both, both_reference, *inputs)


def test_saturated_gates():
    """One step: over several, gains this large multiply every rounding."""
    inputs = make((1, 13, 17))
    inputs[2].mul_(10)
    inputs[5].mul_(1e4)
    assert_accurate(both, both_reference, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_never_written(dtype):
    inputs = make((4, 3, 17), dtype, grad=True)
    before = [(t.detach().clone(), t._version) for t in inputs]
    h, c_n = layer_norm_lstm(*inputs)
    dh, dc_n = torch.randn_like(h), torch.randn_like(c_n)
    cotangents = dh.clone(), dc_n.clone()
    torch.autograd.grad((h, c_n), inputs, (dh, dc_n))
    assert torch.equal(dh, cotangents[0]) and torch.equal(dc_n, cotangents[1])
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version


def test_outputs_share_no_memory_with_inputs():
    inputs = make((1, 3, 17))
    for output in OP(*inputs, 1e-4, True):
        assert output.data_ptr() not in {t.data_ptr() for t in inputs}


@pytest.mark.parametrize("penalty_alone", [True, False])
def test_double_backward_is_a_clear_error(penalty_alone):
    """Beside a loss of its own, a penalty on the gradient must not be dropped in silence."""
    inputs = make(grad=True)
    loss = layer_norm_lstm(*inputs)[0].sum()
    with pytest.raises(RuntimeError, match=r"layer_norm_lstm|differentiate twice"):
        (dx,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
        (dx.square().sum() + (0 if penalty_alone else loss)).backward()


def test_backward_without_saving_is_a_clear_error():
    h, *_ = OP(*make(grad=True), 1e-4, False)
    with pytest.raises(RuntimeError, match="save=False"):
        h.sum().backward()


def test_compile():
    compiled = torch.compile(layer_norm_lstm, fullgraph=True)
    assert_accurate(gradients(compiled), gradients(layer_norm_lstm_reference), *make())
    with torch.no_grad():
        assert_accurate(compiled, layer_norm_lstm_reference, *make())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_python_threads(dtype):
    """Calls at once, each with a team of its own, give bit for bit what they give alone."""
    cases = [make((4, n, 128), dtype) for n in range(3, 11)]
    alone = [both(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: both(*case), cases * 4))
    for got, want in zip(results, alone * 4, strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 13, 49), (1, 1, 160)], ids=str)
def test_thread_counts(threads, shape, dtype):
    assert_accurate(both, both_reference, *make(shape, dtype))
