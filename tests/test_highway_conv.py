"""highway_conv: project, gate and the folded layer, on every path, against the reference."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastvae import reference as reference_modules
from fastvae.ops.highway_conv import (
    highway_conv,
    highway_conv_gate,
    highway_conv_gate_reference,
    highway_conv_project,
    highway_conv_project_reference,
    highway_conv_reference,
)
from fastvae.testing import assert_accurate, assert_same_non_finite, gradients

DTYPES = [torch.float32, torch.bfloat16]
# (T, B, C): ones, primes, lanes and their neighbors
SHAPES = [(1, 1, 1), (1, 1, 16), (5, 1, 7), (1, 7, 3), (3, 5, 15), (4, 2, 16), (7, 3, 17)]
SHAPES += [(3, 4, 47), (5, 6, 48), (2, 13, 49)]
PAPER = pytest.param((56, 16, 256), marks=pytest.mark.slow)
NAMES = {
    "project": ("x", "weight", "bias"),
    "gate": ("a", "x", "mean", "scale", "shift"),
    "folded": ("x", "weight", "bias"),
}
OPS = {
    "project": (highway_conv_project, highway_conv_project_reference),
    "gate": (highway_conv_gate, highway_conv_gate_reference),
    "gate-no-carry": (
        lambda *t: highway_conv_gate(*t, carry=False),
        lambda *t: highway_conv_gate_reference(*t, carry=False),
    ),
    "folded": (highway_conv, highway_conv_reference),
    "folded-no-carry": (
        lambda *t: highway_conv(*t, carry=False),
        lambda *t: highway_conv_reference(*t, carry=False),
    ),
}
EVERY_ARGUMENT = [(op, name) for op, names in NAMES.items() for name in names]


def make(op, shape=(4, 3, 5), dtype=torch.float32, grad=False):
    T, B, C = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(T, B, C, dtype=dtype)
    if op.startswith("gate"):
        tensors = (
            torch.randn(T, B, 3 * C, dtype=dtype),
            x,
            torch.randn(3 * C, dtype=wide),
            0.5 + torch.rand(3 * C, dtype=wide),
            torch.randn(3 * C, dtype=wide),
        )
    else:
        weight = torch.randn(3 * C, C, 2, dtype=dtype) / C**0.5
        tensors = (x, weight, torch.randn(3 * C, dtype=dtype))
    return [t.requires_grad_(grad) for t in tensors]


def both(fn):
    """Forward and backward at once."""

    def run(*inputs):
        outputs = fn(*inputs)
        return (*(outputs if isinstance(outputs, tuple) else (outputs,)), *gradients(fn)(*inputs))

    return run


def check_both(op, inputs):
    fn, reference = OPS[op]
    assert_accurate(both(fn), both(reference), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, PAPER], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_forward(op, shape, dtype):
    assert_accurate(*OPS[op], *make(op, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, PAPER], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_backward(op, shape, dtype):
    fn, reference = OPS[op]
    assert_accurate(gradients(fn), gradients(reference), *make(op, shape, dtype))


def reference_model(carry, training, gain, shift):
    """The layer as plain PyTorch has it, from x [T, B, C], weight and bias."""

    def run(x, weight, bias):
        bias = bias.to(x)
        layer = reference_modules.HighwayConv(x.shape[-1], carry=carry, dtype=x.dtype).train(
            training
        )
        statistics = 0.3 * gain.to(x), 0.5 + gain.to(x).square()
        state = {"weight": weight, "bias": bias, "norm.weight": gain.to(x)}
        state |= {"norm.bias": shift.to(x), "norm.running_mean": statistics[0].clone()}
        state |= {"norm.running_var": statistics[1].clone()}
        x = x.permute(1, 2, 0)
        y = torch.func.functional_call(layer, state, (x, torch.zeros_like(x[..., :1])))
        return y.permute(2, 0, 1)

    return run


@pytest.mark.parametrize("carry", [True, False])
def test_training_layer_equals_the_reference_model(carry):
    gain, shift = 1 + 0.1 * torch.randn(33), torch.randn(33)
    x, weight, bias = make("project", (5, 3, 11))

    def layer(x, weight):
        a, mean, m2 = highway_conv_project(x, weight, bias)
        scale = gain * (m2 / (x.shape[0] * x.shape[1]) + 1e-4).rsqrt()
        return highway_conv_gate(a, x, mean, scale, shift, carry)

    def reference(x, weight):  # the bias, gone in the norm, has only rounding for a gradient
        return reference_model(carry, True, gain, shift)(x, weight, bias)

    assert_accurate(both(layer), both(reference), x, weight)


@pytest.mark.parametrize("carry", [True, False])
def test_folded_layer_equals_the_reference_model(carry):
    gain, shift = 1 + 0.1 * torch.randn(33), torch.randn(33)
    mean, scale = 0.3 * gain, gain * (0.5 + gain.square() + 1e-4).rsqrt()

    def layer(x, weight, bias):
        return highway_conv(x, weight * scale[:, None, None], (bias - mean) * scale + shift, carry)

    inputs = make("folded", (5, 3, 11))
    assert_accurate(both(layer), both(reference_model(carry, False, gain, shift)), *inputs)


def test_causal():
    """What comes later changes nothing; the taps reach one step back and no further."""
    x, weight, bias = make("folded", (5, 1, 3))
    y = highway_conv(x, weight, bias)
    x[3] += 1
    changed = (highway_conv(x, weight, bias) != y).any(-1).view(-1)
    assert changed.tolist() == [False, False, False, True, True]


def test_carry_is_the_part_of_x():
    """Gates that are wide open: y = x with carry, 0 without, where i is shut and f is open."""
    x = torch.randn(2, 3, 4)
    a = torch.cat([torch.full_like(x, -1e3), torch.full_like(x, 1e3), torch.ones_like(x)], -1)
    norm = torch.zeros(12), torch.ones(12), torch.zeros(12)
    assert torch.equal(highway_conv_gate(a, x, *norm, carry=True), x)
    shut = highway_conv_gate(a, x, *norm, carry=False)
    assert (shut.abs() < torch.finfo(shut.dtype).tiny).all()


@pytest.mark.parametrize("shape", [(3, 2, 3), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, shape):
    assert torch.autograd.gradcheck(OPS[op][0], make(op, shape, torch.float64, grad=True))


@pytest.mark.parametrize("op, name", EVERY_ARGUMENT)
def test_one_gradient_alone(op, name):
    """One input wanted: the gradients of the others must not be needed."""
    n = NAMES[op].index(name)

    def vjp(fn):
        def run(*inputs):
            wanted = inputs[n].detach().requires_grad_()
            result = fn(*inputs[:n], wanted, *inputs[n + 1 :])
            result = result[-1] if isinstance(result, tuple) else result
            return torch.autograd.grad(result.square().sum(), wanted)

        return run

    fn, reference = OPS[op]
    assert_accurate(vjp(fn), vjp(reference), *make(op, (4, 3, 17)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op, dtype, grad):
    ops = {"project": "highway_conv_project", "gate": "highway_conv_gate", "folded": "highway_conv"}
    flags = () if op == "project" else (True,)
    op_packet = getattr(torch.ops.fastvae, ops[op])
    torch.library.opcheck(op_packet, (*make(op, dtype=dtype, grad=grad), *flags))


def project_backward_arguments(dtype=torch.float32, shape=(4, 3, 5)):
    x, weight, bias = make("project", shape, dtype)
    a, mean, m2 = highway_conv_project(x, weight, bias)
    return [*map(torch.randn_like, (a, mean, m2)), x, weight, a, mean]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backward(dtype):
    ops = torch.ops.fastvae
    torch.library.opcheck(ops.highway_conv_project_backward, project_backward_arguments(dtype))
    a, x, *norm = make("gate", dtype=dtype)
    arguments = (torch.randn_like(x), a, x, *norm, True)
    torch.library.opcheck(ops.highway_conv_gate_backward, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_noncontiguous(op, dtype):
    fn, reference = OPS[op]

    def strided(*inputs):  # inside `both`, whose gradients are of contiguous copies
        return fn(*(torch.stack([t, t.neg()], -1)[..., 0] for t in inputs))

    assert_accurate(both(strided), both(reference), *make(op, (4, 3, 17), dtype))


@pytest.mark.parametrize("op", OPS)
def test_transposed_and_expanded(op):
    inputs = make(op, (4, 3, 17))
    inputs = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t for t in inputs]
    assert not inputs[0].is_contiguous()
    check_both(op, inputs)
    inputs = [t[:, :1].expand_as(t) if t.dim() == 3 else t[:1].expand_as(t) for t in inputs]
    assert_accurate(*OPS[op], *inputs)


@pytest.mark.parametrize("op", OPS)
def test_expanded_cotangents(op):
    def vjp(fn):
        def run(*inputs):
            inputs = [t.detach().requires_grad_() for t in inputs]
            outputs = fn(*inputs)  # the cotangents of sums are one number, expanded
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sums = [y.sum() for y in outputs]
            return torch.autograd.grad(sums, inputs, allow_unused=True, materialize_grads=True)

        return run

    fn, reference = OPS[op]
    assert_accurate(vjp(fn), vjp(reference), *make(op, (4, 3, 17)))


WRONG_SHAPES = {
    "a": lambda t: t[..., :-1],
    "x": lambda t: t[0],
    "weight": lambda t: t[..., :1],
    "bias": lambda t: t[:-1],
    "mean": lambda t: t[:-1],
    "scale": lambda t: t.new_ones(len(t) + 1),
    "shift": lambda t: t[None],
}


@pytest.mark.parametrize("op, name", EVERY_ARGUMENT)
def test_rejects_wrong_shape(op, name):
    inputs, n = make(op), NAMES[op].index(name)
    inputs[n] = WRONG_SHAPES[name](inputs[n]).contiguous()
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        OPS[op][0](*inputs)


def test_rejects_more_elements_than_any_memory_has():
    """A repeated element takes none; each size alone would do."""
    _, weight, bias = make("project")
    x = torch.zeros(()).expand(2**20, 2**20, 5)
    with pytest.raises(RuntimeError, match=r"^x must have at most 2\^40 elements, got \["):
        highway_conv_project(x, weight, bias)


def test_refuses_copies_larger_than_memory():
    """Of a repeated element, which would have to be written out: 1.4 TB."""
    _, weight, bias = make("project")
    x = torch.zeros(()).expand(2**18, 2**18, 5)
    for op in (highway_conv_project, highway_conv):
        with pytest.raises(RuntimeError, match=r"^sizes too large: \d+ GB are needed at once"):
            op(x, weight, bias)


@pytest.mark.parametrize("op", ["project", "gate"])
def test_sums_over_rows_keep_their_accuracy(op):
    """The cotangent rises from −1 to 1, so that a running sum grows long before it cancels."""
    fn, reference = OPS[op]
    assert_accurate(gradients(fn), gradients(reference), *make(op, (5000, 8, 2)))


@pytest.mark.parametrize("op, name", [pair for pair in EVERY_ARGUMENT if pair[1] != "x"])
def test_rejects_wrong_dtype(op, name):
    inputs, n = make(op), NAMES[op].index(name)
    inputs[n] = inputs[n].double()
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        OPS[op][0](*inputs)


def test_gate_takes_its_norm_in_float32():
    inputs = make("gate", dtype=torch.bfloat16)
    for n in (2, 3, 4):
        wrong = [t.bfloat16() if n == m else t for m, t in enumerate(inputs)]
        with pytest.raises(RuntimeError, match=rf"\b{NAMES['gate'][n]} must have"):
            highway_conv_gate(*wrong)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
def test_rejects_unknown_dtype(op, dtype):
    got = f"got {str(dtype).removeprefix('torch.')}"
    message = f"mean must have dtype float32.*{got}" if op == "gate" else f"on a CPU, {got}"
    with pytest.raises(RuntimeError, match=message):
        OPS[op][0](*(t.to(dtype) for t in make(op)))


@pytest.mark.parametrize("n", range(7))
def test_project_backward_rejects_wrong_shape(n):
    arguments = project_backward_arguments()
    arguments[n] = arguments[n][:-1]
    # x says what T is.
    name = ("da", "dmean", "dm2", "da", "weight", "a", "mean")[n]
    with pytest.raises(RuntimeError, match=rf"^{name} must have shape \[.*\] = \[.*\], got \["):
        torch.ops.fastvae.highway_conv_project_backward(*arguments)


@pytest.mark.parametrize("n", range(6))
def test_gate_backward_rejects_wrong_shape(n):
    a, x, *norm = make("gate")
    arguments = [torch.randn_like(x), a, x, *norm]
    arguments[n] = arguments[n][:-1]
    # x says what T is.
    name = ("dy", "a", "a", "mean", "scale", "shift")[n]
    with pytest.raises(RuntimeError, match=rf"^{name} must have shape"):
        torch.ops.fastvae.highway_conv_gate_backward(*arguments, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_serves_devices_without_a_kernel(dtype):
    ops, key = torch.ops.fastvae, torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)

    def project(da, dmean, dm2, x, weight, bias):
        outputs = ops.highway_conv_project.default.redispatch(key, x, weight, bias)
        saved = x, weight, *outputs[:2]
        backward = ops.highway_conv_project_backward.default
        return *outputs, *backward.redispatch(key, da, dmean, dm2, *saved)

    def gate(dy, *inputs):
        y = ops.highway_conv_gate.default.redispatch(key, *inputs, True)
        backward = ops.highway_conv_gate_backward.default
        return y, *backward.redispatch(key, dy, *inputs, True)

    def autograd(fn, count):
        def run(*args):
            inputs = [t.detach().requires_grad_() for t in args[count:]]
            outputs = fn(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = torch.autograd.grad(outputs, inputs, args[:count])
            return *(y.detach() for y in outputs), *grads

        return run

    inputs = make("project", (5, 3, 17), dtype)
    cotangents = map(torch.randn_like, highway_conv_project_reference(*inputs))
    assert_accurate(project, autograd(highway_conv_project_reference, 3), *cotangents, *inputs)
    inputs = make("gate", (5, 3, 17), dtype)
    dy = torch.randn_like(inputs[1])
    assert_accurate(gate, autograd(highway_conv_gate_reference, 1), dy, *inputs)
    inputs = make("folded", (5, 3, 17), dtype)
    folded = ops.highway_conv.default
    assert_accurate(lambda *t: folded.redispatch(key, *t, True), highway_conv_reference, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value, place", [(float("nan"), -1), (float("inf"), 1), (-float("inf"), -1)]
)
@pytest.mark.parametrize("op, name", EVERY_ARGUMENT)
def test_non_finite_values_stay(op, name, value, place, dtype):
    """Forward in the same places; backward, where 0 · NaN may differ, never lost altogether."""
    (fn, reference), inputs = OPS[op], make(op, (4, 3, 17), dtype)
    inputs[NAMES[op].index(name)].view(-1)[place] = value
    assert_same_non_finite(fn, reference, *inputs)
    assert_accurate(fn, reference, *inputs)
    got, want = (torch.cat([g.flatten() for g in gradients(f)(*inputs)]) for f in OPS[op])
    assert want.isfinite().all() or not got.isfinite().all()


def test_nan_stays_in_its_place():
    x, weight, bias = make("folded", (4, 3, 17))
    x[1, 2, 5] = float("nan")
    y = highway_conv(x, weight, bias)
    assert y[1:3, 2].isnan().all()
    assert y[[0, 3]].isfinite().all() and y[:, :2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 1e4 / 3])
def test_constant_columns(step, dtype):
    """Columns without variance: mean exact, m2 zero, and a finite gradient."""
    weight, bias = torch.zeros(9, 3, 2, dtype=dtype), (step * torch.arange(9)).to(dtype)
    inputs = [torch.randn(4, 2, 3, dtype=dtype), weight, bias]
    _, mean, m2 = highway_conv_project(*inputs)
    assert torch.equal(mean, bias.float()) and torch.equal(m2, torch.zeros(9))
    check_both("project", inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, offset", [(1e4, 0), (1e-3, 0), (1, 1e3), (1, 1e4)])
@pytest.mark.parametrize("op", OPS)
def test_magnitudes(op, scale, offset, dtype):
    """Squared deviations as E[a²] − E[a]² would be lost at the offset."""
    inputs = make(op, (4, 3, 17), dtype)
    inputs[0].mul_(scale)
    inputs[-1].add_(offset)
    assert_accurate(*OPS[op], *inputs)
    if op.startswith("folded"):  # gates that saturate have no gradient to compare
        inputs[1].div_(scale)
        inputs[-1].sub_(offset)
    check_both(op, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_inputs_are_never_written(op, dtype):
    inputs = make(op, (4, 3, 17), dtype, grad=True)
    before = [(t.detach().clone(), t._version) for t in inputs]
    outputs = OPS[op][0](*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    kept = [y.detach().clone() for y in outputs]
    cotangents = [torch.randn_like(y) for y in outputs]
    given = [t.clone() for t in cotangents]
    torch.autograd.grad(outputs, inputs, cotangents)
    assert all(map(torch.equal, cotangents, given)) and all(map(torch.equal, outputs, kept))
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version


@pytest.mark.parametrize("beside_a_loss", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_a_clear_error(op, beside_a_loss):
    """Beside a loss of its own, a penalty on the gradient must not be dropped in silence."""
    inputs = make(op, grad=True)
    outputs = OPS[op][0](*inputs)
    loss = (outputs[0] if isinstance(outputs, tuple) else outputs).sum()
    with pytest.raises(RuntimeError, match=r"highway_conv|differentiate twice"):
        (dx,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
        (dx.square().sum() + (loss if beside_a_loss else 0)).backward()


def test_compile():
    def layer(project, gate, folded):
        def run(x, weight, bias):
            a, mean, m2 = project(x, weight, bias)
            y = gate(a, x, mean, torch.rsqrt(m2 + 1), mean.square())
            return y, folded(y, weight, bias)

        return run

    compiled = torch.compile(
        layer(highway_conv_project, highway_conv_gate, highway_conv), fullgraph=True
    )
    reference = layer(
        highway_conv_project_reference, highway_conv_gate_reference, highway_conv_reference
    )
    assert_accurate(gradients(compiled), gradients(reference), *make("project"))


@pytest.mark.parametrize("op", OPS)
def test_python_threads(op):
    """Calls at once, each with a team of its own, give bit for bit what they give alone."""
    cases, run = [make(op, (4, n, 64)) for n in range(3, 11)], both(OPS[op][0])
    alone = [run(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: run(*case), cases * 4))
    for got, want in zip(results, alone * 4, strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 13, 49), (1, 1, 160), (13, 25, 41)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_thread_counts(op, threads, shape, dtype):
    """The last shape is large enough for five threads at the gates too."""
    check_both(op, make(op, shape, dtype))
