"""linear: forward and backward, on every path, against its reference and a one-hot product."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from fastvae.ops.linear import linear, linear_reference
from fastvae.testing import assert_accurate, assert_same_non_finite, gradients

DTYPES = [torch.float32, torch.bfloat16]
# (rows, K, S, N): dense and tokens, each alone, ones, primes, lanes and their neighbors
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 0, 2),
    (5, 0, 4, 7),
    (7, 13, 5, 17),
    (33, 16, 3, 48),
    (32, 15, 9, 47),
]
SHAPES += [(65, 31, 2, 49), (130, 0, 3, 16), (67, 300, 0, 33), (1100, 20, 3, 50), (1100, 40, 0, 17)]
PAPER = pytest.param((512, 200, 261, 4000), marks=pytest.mark.slow)
CLASSIFIER = pytest.param((512, 1000, 0, 259), marks=pytest.mark.slow)
OP, BACKWARD = torch.ops.fastvae.linear, torch.ops.fastvae.linear_backward


def make(shape=(10, 5, 4, 17), dtype=torch.float32, grad=False):
    """x, weight, bias, tokens; what the shape leaves out is None."""
    rows, K, S, N = shape
    x = torch.randn(rows, K).to(dtype).requires_grad_(grad) if K else None
    weight = (torch.randn(N, K + S) / max(K, 1) ** 0.5).to(dtype).requires_grad_(grad)
    bias = torch.randn(N).to(dtype).requires_grad_(grad)
    return x, weight, bias, torch.randint(S, (rows,)) if S else None


def without_none(fn, inputs):
    """fn of the inputs that are there, and these."""
    present = [t is not None for t in inputs]

    def run(*tensors):
        given = iter(tensors)
        return fn(*(next(given) if there else None for there in present))

    return run, [t for t in inputs if t is not None]


def check(fn, reference, inputs):
    run, tensors = without_none(fn, inputs)
    plain, _ = without_none(reference, inputs)
    assert_accurate(run, plain, *tensors)
    assert_accurate(gradients(run), gradients(plain), *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, PAPER, CLASSIFIER], ids=str)
def test_forward_and_backward(shape, dtype):
    check(linear, linear_reference, make(shape, dtype))


def test_equals_a_one_hot_product():
    def product(x, weight, bias, tokens):
        one_hot = F.one_hot(tokens, weight.shape[1] - x.shape[-1]).to(x.dtype)
        return F.linear(torch.cat([x, one_hot], -1), weight, bias)

    check(linear, product, make((20, 7, 5, 33)))


def test_leading_dimensions():
    x, weight, bias, tokens = make((24, 5, 4, 17))
    whole = linear(x, weight, bias, tokens)
    shaped = linear(x.view(2, 3, 4, 5), weight, bias, tokens.view(2, 3, 4))
    assert torch.equal(shaped, whole.view(2, 3, 4, 17))
    check(linear, linear_reference, (x[0], weight, bias, tokens[0]))
    assert linear(None, weight[:, 5:], bias, tokens.view(4, 6)).shape == (4, 6, 17)


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 0, 4, 5), (6, 3, 0, 5)], ids=str)
def test_gradcheck(shape):
    run, tensors = without_none(linear, make(shape, torch.float64, grad=True))
    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 0, 4, 5), (6, 3, 0, 5)], ids=str)
def test_opcheck(shape, dtype):
    inputs = make(shape, dtype)
    torch.library.opcheck(OP, make(shape, dtype, grad=True))
    x, weight, _, tokens = inputs
    torch.library.opcheck(BACKWARD, (torch.randn(6, 5).to(dtype), x, weight, tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype):
    def strided(x, weight, bias, tokens):
        inputs = (torch.stack([t, t.neg()], -1)[..., 0] for t in (x, weight, bias, tokens))
        return linear(*inputs)

    assert not torch.stack([torch.ones(3)] * 2, -1)[..., 0].is_contiguous()
    check(strided, linear_reference, make((20, 7, 5, 33), dtype))


def test_expanded_cotangent():
    def vjp(fn):
        return lambda *inputs: gradients(lambda *t: fn(*t).sum())(*inputs)

    assert_accurate(vjp(linear), vjp(linear_reference), *make())


def test_a_frequent_symbol_keeps_its_accuracy():
    """Half of all rows are one token: a running sum of them would lose several bits."""
    x, weight, bias, tokens = make((4096, 3, 5, 16))
    tokens[::2] = 2
    check(linear, linear_reference, (x, weight, bias, tokens))


@pytest.mark.parametrize("rows", [40, 40_000])
def test_sums_over_rows_keep_their_accuracy(rows):
    """The cotangent rises from −1 to 1, so that a running sum grows long before it cancels."""
    check(linear, linear_reference, make((rows, 8, 0, 29)))


def test_sums_over_tokens_keep_their_accuracy():
    """The same where every row has a token of its own."""
    _, weight, bias, _ = make((1, 0, 8192, 3))
    check(linear, linear_reference, (None, weight, bias, torch.arange(8192)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "name, wrong",
    [
        ("x", lambda x, w, b, s: (x[0, 0], w, b, s)),
        ("weight", lambda x, w, b, s: (x, w[0], b, s)),
        ("weight", lambda x, w, b, s: (x, w[:, :5], b, s)),
        ("weight", lambda x, w, b, s: (x, w, b, None)),
        ("bias", lambda x, w, b, s: (x, w, b[:-1], s)),
        ("tokens", lambda x, w, b, s: (x, w, b, s[:-1])),
        ("tokens", lambda x, w, b, s: (x, w, b, s[None])),
        ("x or tokens", lambda x, w, b, s: (None, w, b, None)),
    ],
)
def test_rejects_wrong_shape(name, wrong, device):
    inputs = [t.to(device) for t in make()]
    with pytest.raises(RuntimeError, match=rf"\b{name} must"):
        linear(*wrong(*inputs))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("n, name", [(0, "x"), (2, "bias"), (3, "tokens")])
def test_rejects_wrong_dtype(n, name, device):
    inputs = [t.to(device) for t in make()]
    inputs[n] = inputs[n].double()
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        linear(*inputs)


def test_rejects_another_device():
    x, weight, bias, tokens = make()
    with pytest.raises(
        RuntimeError, match=r"^bias must be on the device of weight, cpu, got meta$"
    ):
        linear(x, weight, bias.to("meta"), tokens)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_symbol_out_of_range_is_a_clear_error(wrong):
    x, weight, bias, tokens = make()
    tokens[3] = wrong
    with pytest.raises(RuntimeError, match=rf"tokens hold the id {wrong}; ids are 0 to 3"):
        linear(x, weight, bias, tokens)
    with pytest.raises(RuntimeError, match=rf"tokens hold the id {wrong}; ids are 0 to 3"):
        BACKWARD(torch.randn(10, 17), x, weight, tokens)


def test_symbol_out_of_range_gives_nan_without_a_kernel():
    """Where raising would wait for the device: no lookup leaves its table, and nobody is misled."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    x, weight, bias, tokens = make()
    want, da = linear(x, weight, bias, tokens), torch.randn(10, 17)
    _, *gradients = BACKWARD(da.index_fill(0, torch.tensor([3, 5]), 0), x, weight, tokens)
    tokens[3], tokens[5] = -1, 4
    got = OP.default.redispatch(key, x, weight, bias, tokens)
    assert got[[3, 5]].isnan().all()
    torch.testing.assert_close(got[[0, 1, 2, 4, 6, 7, 8, 9]], want[[0, 1, 2, 4, 6, 7, 8, 9]])
    _, dweight, _ = BACKWARD.default.redispatch(key, da, x, weight, tokens)
    torch.testing.assert_close(dweight[:, 5:], gradients[0][:, 5:])


def test_backward_rejects_wrong_shape():
    x, weight, _, tokens = make()
    with pytest.raises(RuntimeError, match="da must have"):
        BACKWARD(torch.randn(10, 16), x, weight, tokens)


@pytest.mark.parametrize("shape", [(6, 3, 4, 17), (6, 0, 4, 17), (6, 3, 0, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_serves_devices_without_a_kernel(shape, dtype):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    x, weight, bias, tokens = make(shape, dtype)

    def elsewhere(da, *tensors):
        x, weight, bias, tokens = tensors
        a = OP.default.redispatch(key, x, weight, bias, tokens)
        dx, *grads = BACKWARD.default.redispatch(key, da, x, weight, tokens)
        return a, *([] if x is None else [dx]), *grads

    def reference(da, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors[:3] if t is not None]
        given = [None, *leaves] if tensors[0] is None else leaves
        a = linear_reference(*given, tensors[3])
        return a.detach(), *torch.autograd.grad(a, leaves, da)

    inputs = (torch.randn(6, 17).to(dtype), x, weight, bias, tokens)
    run, tensors = without_none(elsewhere, inputs)
    plain, _ = without_none(reference, inputs)
    assert_accurate(run, plain, *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value, place", [(float("nan"), -1), (float("inf"), 1), (-float("inf"), -1)]
)
@pytest.mark.parametrize("n", range(3), ids=["x", "weight", "bias"])
def test_non_finite_values_are_those_of_the_reference(n, value, place, dtype):
    inputs = make(dtype=dtype)
    inputs[n].view(-1)[place] = value
    assert_same_non_finite(linear, linear_reference, *inputs)
    check(linear, linear_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, offset", [(1e4, 0), (1, 1e4)])
def test_magnitudes(scale, offset, dtype):
    x, weight, bias, tokens = make((20, 7, 5, 33), dtype)
    check(linear, linear_reference, (x.mul_(scale).add_(offset), weight, bias, tokens))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay(value):
    """A token's column reaches only the rows of that token."""
    x, weight, bias, tokens = make()
    weight[3, 5 + tokens[0]] = value
    a = linear(x, weight, bias, tokens)
    assert torch.equal(~a[:, 3].isfinite(), tokens == tokens[0])
    assert a[:, :3].isfinite().all() and a[:, 4:].isfinite().all()
    x[2, 1] = value
    assert not linear(x, weight, bias, tokens)[2].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_never_written(dtype):
    inputs = make(dtype=dtype, grad=True)
    before = [(t.detach().clone(), t._version) for t in inputs]
    a = linear(*inputs)
    torch.autograd.grad(a, inputs[:3], torch.randn_like(a))
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version


def test_double_backward_is_a_clear_error():
    x, weight, bias, tokens = make(grad=True)
    (dx,) = torch.autograd.grad(linear(x, weight, bias, tokens).sum(), x, retain_graph=True)
    assert torch.isfinite(dx).all()
    with pytest.raises(RuntimeError, match=r"linear|differentiate twice"):
        (dx,) = torch.autograd.grad(linear(x, weight, bias, tokens).sum(), x, create_graph=True)
        dx.square().sum().backward()


def test_compile():
    compiled = torch.compile(linear, fullgraph=True)
    check(compiled, linear_reference, make())


def test_python_threads():
    """Calls at once, each with a team of its own, give bit for bit what they give alone."""
    cases = [make((n, 40, 6, 97)) for n in range(131, 139)]

    def both(x, weight, bias, tokens):
        grads = gradients(lambda *t: linear(*t, tokens))(x, weight, bias)
        return linear(x, weight, bias, tokens), *grads

    alone = [both(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: both(*case), cases * 4))
    for got, want in zip(results, alone * 4, strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(131, 40, 6, 97), (1, 300, 0, 160)], ids=str)
def test_thread_counts(threads, shape, dtype):
    check(linear, linear_reference, make(shape, dtype))
