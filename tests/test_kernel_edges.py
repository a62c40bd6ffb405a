"""Values and sizes that ordinary inputs do not reach, for every kernel that they may break."""

import itertools
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import test_decode_bytenet as bytenet
import test_decode_lstm as lstm
import test_highway_conv as highway
import test_layer_norm_lstm as training
import test_linear as dense
import torch

from fastvae import nn, ops
from fastvae import reference as reference_modules
from fastvae.ops.decode_bytenet import decode_bytenet, decode_bytenet_reference
from fastvae.ops.decode_lstm import decode_lstm, decode_lstm_reference
from fastvae.ops.highway_conv import highway_conv_gate_reference
from fastvae.ops.layer_norm_lstm import layer_norm_lstm, layer_norm_lstm_reference
from fastvae.ops.linear import linear, linear_reference
from fastvae.testing import assert_accurate, assert_same_non_finite, gradients

EPS = 0.5  # beside variances of about one: outside of the root, or left out, it would show
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_of(name):
    return pytest.importorskip(f"fastvae.kernels.{name}")


# Sizes of nothing

NOTHING = "{} must have no empty dimension, got {}"
EMPTY = {
    "layer_norm_lstm": (training.make, (1e-4, False), [
        ((0, 3, 5), NOTHING.format("x", [0, 3, 20])),
        ((4, 0, 5), NOTHING.format("x", [4, 0, 20])),
        ((4, 3, 0), NOTHING.format("x", [4, 3, 0])),
    ]),
    "highway_conv": (partial(highway.make, "project"), (True,), [
        ((0, 3, 5), NOTHING.format("x", [0, 3, 5])),
        ((4, 3, 0), NOTHING.format("x", [4, 3, 0])),
    ]),
    "highway_conv_project": (partial(highway.make, "project"), (), [
        ((4, 0, 5), NOTHING.format("x", [4, 0, 5])),
    ]),
    "highway_conv_gate": (partial(highway.make, "gate"), (True,), [
        ((0, 3, 5), NOTHING.format("x", [0, 3, 5])),
    ]),
    "decode_lstm": (lstm.make, (None, 1e-4, None, None), [
        ((0, 3, 4, 5, 7), "features must have at least one step and one sequence"),
        ((6, 3, 4, 5, 0), NOTHING.format("classifier_weight", [0, 5])),
    ]),
    "decode_bytenet": (bytenet.make, (None, True, None, None), [
        ((0, 3, 4, 5, 7, 2), "features must have at least one step and one sequence"),
        ((6, 3, 4, 5, 0, 2), NOTHING.format("classifier_weight", [0, 5])),
    ]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "op, shape, message", [(op, *case) for op, (*_, cases) in EMPTY.items() for case in cases]
)
def test_empty_tensors_are_refused_in_the_same_words(op, shape, message):
    """By the C++ kernel, by what torch.compile traces, and by Triton's kernel."""
    make, options, _ = EMPTY[op]
    run, kernels = getattr(torch.ops.fastvae, op), pytest.importorskip("fastvae.kernels")
    inputs = [torch.zeros_like(t) for t in make(shape=shape)]
    for function, device in ((run, "cpu"), (run, "meta"), (kernels.kernel(op), DEVICE)):
        with pytest.raises(RuntimeError, match=re.escape(message) + r"($|\n)"):
            function(*(t.to(device) for t in inputs), *options)


# Eps


def small_inputs():
    inputs = training.make((4, 3, 19))
    return [inputs[0] * 0.5, inputs[1] * 0.5, *inputs[2:]]


def test_eps_in_training(isa):
    ours, plain = (partial(f, eps=EPS) for f in (layer_norm_lstm, layer_norm_lstm_reference))
    assert_accurate(ours, plain, *small_inputs())
    assert_accurate(gradients(ours), gradients(plain), *small_inputs())


def test_eps_in_triton():
    kernels = triton_of("layer_norm_lstm")

    def triton(*inputs):
        return kernels.layer_norm_lstm(*(t.to(DEVICE) for t in inputs), EPS, False)[0].cpu()

    plain = partial(layer_norm_lstm_reference, eps=EPS)
    assert_accurate(triton, lambda *t: plain(*t)[0], *small_inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eps_in_decoding(isa, dtype):
    inputs, noise = lstm.make((12, 9, 4, 33, 17), dtype), lstm.gumbel((12, 9, 4, 33, 17), dtype)
    inputs[2] *= 0.5
    expected = decode_lstm_reference(*inputs, noise, EPS)
    assert torch.equal(decode_lstm(*inputs, noise, EPS), expected)
    assert not torch.equal(decode_lstm_reference(*inputs, noise, 1e-4), expected)


def test_eps_in_triton_decoding():
    kernels = triton_of("decode_lstm")
    inputs, noise = lstm.make((6, 3, 4, 7, 9)), lstm.gumbel((6, 3, 4, 7, 9))
    inputs[2] *= 0.5
    tensors = [t.to(DEVICE) for t in (*inputs, noise)]
    found = kernels.decode_lstm(*tensors, EPS, None, None).cpu()
    assert torch.equal(found, decode_lstm_reference(*inputs, noise, EPS))


# One sequence that goes on alone


def of_cpu(make, end_id=2, pad_id=1):
    if make is lstm:
        return lambda inputs, noise: decode_lstm(*inputs, noise, 1e-4, end_id, pad_id)
    return lambda inputs, noise: decode_bytenet(*inputs, noise, True, end_id, pad_id)


def of_triton(make, end_id=2, pad_id=1):
    kernels = triton_of("decode_lstm" if make is lstm else "decode_bytenet")
    decode = kernels.decode_lstm if make is lstm else kernels.decode_bytenet
    setting = 1e-4 if make is lstm else True

    def run(inputs, noise):
        return decode(*(t.to(DEVICE) for t in (*inputs, noise)), setting, end_id, pad_id).cpu()

    return run


REFERENCES = {lstm: decode_lstm_reference, bytenet: decode_bytenet_reference}


@pytest.mark.parametrize("path", [of_cpu, of_triton])
@pytest.mark.parametrize("B", [1, 17])
@pytest.mark.parametrize("make", [lstm, bytenet], ids=["lstm", "bytenet"])
def test_the_last_sequence_goes_on(make, B, path, threads):
    shape = (40, B, 4, 33, 5, *[2][: make is bytenet])
    inputs, noise = make.make(shape), make.gumbel(shape)
    noise[..., 2] = -1e4
    noise[1, : B - 1, 2] = 1e4  # all others end at their second token
    tokens = path(make)(inputs, noise)
    free = REFERENCES[make](*inputs, noise)
    assert torch.equal(tokens[-1], free[-1]) and (tokens[-1] != 2).all()
    assert torch.equal(tokens[:-1, :2], free[:-1, :2])
    assert (tokens[:-1, 1] == 2).all() and (tokens[:-1, 2:] == 1).all()


@pytest.mark.parametrize(
    "ids, message",
    [
        ((5, 0), "end_id must be from 0 to 4, got 5"),
        ((-1, 0), "end_id must be from 0 to 4, got -1"),
        ((2, None), "pad_id must be 0 or more where end_id is given, got None"),
        ((2, -1), "pad_id must be 0 or more where end_id is given, got -1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [lstm, bytenet], ids=["lstm", "bytenet"])
def test_ids_out_of_range_are_refused(make, ids, message):
    decode = decode_lstm if make is lstm else decode_bytenet
    inputs = make.make((3, 2, 4, 9, 5, *[2][: make is bytenet]))
    with pytest.raises(RuntimeError, match=rf"^{message}$"):
        decode(*inputs, end_id=ids[0], pad_id=ids[1])


@pytest.mark.parametrize("path", [of_cpu, of_triton])
@pytest.mark.parametrize("end", [0, 4])
@pytest.mark.parametrize("make", [lstm, bytenet], ids=["lstm", "bytenet"])
def test_the_first_and_the_last_token_may_end(make, end, path):
    """And what fills a sequence need not be in the vocabulary."""
    shape = (4, 3, 4, 9, 5, *[2][: make is bytenet])
    inputs, noise = make.make(shape), make.gumbel(shape)
    noise[..., end] = -1e4
    noise[1, :2, end] = 1e4
    tokens, free = path(make, end, 7)(inputs, noise), REFERENCES[make](*inputs, noise)
    assert torch.equal(tokens[:, :2], free[:, :2]) and torch.equal(tokens[2], free[2])
    assert (tokens[:2, 1] == end).all() and (tokens[:2, 2:] == 7).all()


# Choice


@pytest.mark.parametrize("make", [lstm, bytenet], ids=["lstm", "bytenet"])
@pytest.mark.parametrize("first, second", [(10, 290), (149, 150), (0, 299), (47, 48)])
def test_ties_between_panels_and_threads(make, first, second, threads, isa):
    """The first of the largest, wherever the second one is looked at."""
    shape = (3, 5, 4, 49, 300, *[1][: make is bytenet])
    inputs = make.make(shape)
    weight, bias = inputs[-4:-2] if make is lstm else inputs[-2:]
    weight.zero_()
    bias.fill_(-1.0)
    bias[[first, second]] = 1.0
    decode = decode_lstm if make is lstm else decode_bytenet
    assert (decode(*inputs) == first).all()


@pytest.mark.parametrize("make", [lstm, bytenet], ids=["lstm", "bytenet"])
@pytest.mark.parametrize("place", [0, 17, 48, 150, 299])
def test_nan_is_chosen_wherever_it_is(make, place, threads, isa):
    shape = (3, 5, 4, 49, 300, *[1][: make is bytenet])
    inputs, noise = make.make(shape), make.gumbel(shape)
    noise[1, 3, place] = float("nan")
    tokens = (decode_lstm if make is lstm else decode_bytenet)(*inputs, noise)
    assert tokens[3, 1] == place and torch.equal(tokens, REFERENCES[make](*inputs, noise))


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(40, 2100, 0, 51), (33, 257, 5, 51), (33, 1030, 0, 97), (70, 63, 3, 17)], ids=str
)
def test_linear_over_several_slices(shape, dtype, isa, threads):
    dense.check(linear, linear_reference, dense.make(shape, dtype))


@pytest.mark.parametrize("N", [8, 16, 32])
def test_linear_of_whole_vectors_that_are_no_whole_panel(N, isa):
    """What lies behind the last rows of a product, few of them, is what tokens add up to."""
    dense.check(linear, linear_reference, dense.make((19, 13, 5, N)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lstm, bytenet], ids=["lstm", "bytenet"])
def test_decoding_over_several_slices(make, dtype, isa):
    """More features than one slice of a product takes."""
    inputs = make.make((4, 3, 2100, 5, 7, *[2][: make is bytenet]), dtype)
    if make is lstm:
        lstm.assert_best(decode_lstm(*inputs), None, inputs)
    else:
        bytenet.assert_best(decode_bytenet(*inputs), None, inputs, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 257), (2, 70, 33)], ids=str)
def test_training_at_odd_sizes(shape, dtype, isa, threads):
    inputs = training.make(shape, dtype)
    assert_accurate(training.both, training.both_reference, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 7), (5, 33, 17), (3, 66, 5)], ids=str)
def test_convolution_at_odd_sizes(shape, dtype, isa, threads):
    """Two rows make a variance too; odd batches are padded where operands are packed by pairs."""
    ours, plain = highway.OPS["project"]
    inputs = highway.make("project", shape, dtype)
    assert_accurate(highway.both(ours), highway.both(plain), *inputs)


def test_running_variance_of_two_rows():
    layers = [nn.HighwayConvStack(3, 1), reference_modules.HighwayConvStack(3, 1)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 1, 3)
    for layer in layers:
        layer.train()(x)
    one, two = (layer.state_dict() for layer in layers)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key])


# Statistics


def test_outliers_where_the_mean_is_guessed(isa):
    """A row's mean is guessed from eight of its values: here these lie far from the others."""
    H = 1024
    inputs = training.make((1, 2, H))
    inputs[0][..., :: 4 * H // 8] += 50
    assert_accurate(layer_norm_lstm, layer_norm_lstm_reference, *inputs)


def test_channels_of_unequal_means(threads):
    """Threads divide the channels unequally: their moments combine to those of the whole row."""
    shape = (5, 13, 13, 49, 31)
    inputs, noise = lstm.make(shape), lstm.gumbel(shape)
    inputs[2].view(32, 4, 49)[..., :32] += 10
    assert torch.equal(decode_lstm(*inputs, noise), decode_lstm_reference(*inputs, noise))


def test_triton_statistics_at_a_large_offset():
    kernels = triton_of("highway_conv")
    x, weight, bias = highway.make("project", (5, 13, 6), torch.float32)
    a, mean, m2 = (
        t.cpu()
        for t in kernels.highway_conv_project(*(t.to(DEVICE) for t in (x, weight, bias + 3000.0)))
    )
    gold = a.double().flatten(0, 1)
    nearest = 0.55 * torch.finfo(torch.float32).eps  # of a mean that is rounded once
    torch.testing.assert_close(mean.double(), gold.mean(0), rtol=nearest, atol=0)
    expected = (gold - gold.mean(0)).square().sum(0)
    torch.testing.assert_close(m2.double(), expected, rtol=1e-3, atol=0)


# Small values


def gates_in_pytorch(gate, *inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = gate(*inputs, True)
    return y, *torch.autograd.grad(y.sum(), inputs[:2])


def gates_in_triton(*inputs):
    kernels, inputs = triton_of("highway_conv"), [t.to(DEVICE) for t in inputs]
    y = kernels.highway_conv_gate(*inputs, True)
    da, dx, *_ = kernels.highway_conv_gate_backward(torch.ones_like(y), *inputs, True)
    return y.cpu(), da.cpu(), dx.cpu()


def test_gates_keep_their_digits_where_they_are_small(isa):
    check_small_gates(partial(gates_in_pytorch, ops.highway_conv_gate))


def test_triton_gates_keep_their_digits_where_they_are_small():
    check_small_gates(gates_in_triton)


def check_small_gates(run):
    """Relative to each value: a rule of absolute errors does not see it. Inputs are exact."""
    C = 61
    a = torch.linspace(-30, 30, 3 * C * 7).view(1, 7, 3 * C)
    x, one, zero = torch.ones(1, 7, C), torch.ones(3 * C), torch.zeros(3 * C)
    inputs = a, x, zero, one, zero
    found = run(*inputs)
    gold = gates_in_pytorch(highway_conv_gate_reference, *(t.double() for t in inputs))
    for got, want in zip(found, gold, strict=True):
        shown = want.abs() > 1e-36  # below it float32 has fewer digits
        relative = ((got.double() - want) / want)[shown].abs()
        # A value is a product of at most two exponentials, and rounding x changes e^x by x eps; the
        # reference's slopes in float64 cancel below 1e-9.
        bound = 2 * a.max() * torch.finfo(torch.float32).eps
        assert relative[want[shown].abs() > 1e-9].max() < bound
        assert (got[shown] != 0).all()


@pytest.mark.parametrize("gate, low, high", [(0, -86, 10), (2, -10, 10), (2, -1e-3, 1e-3)])
def test_gates_are_within_a_few_ulps(isa, gate, low, high):
    """Of their own value: the other gate is 1, and no input is rounded on its way."""
    C = 4096
    a = torch.full((1, 1, 3 * C), 100.0)
    values = torch.linspace(low, high, C)
    a[0, 0, gate * C : (gate + 1) * C] = values
    a.requires_grad_()
    norm = torch.zeros(3 * C), torch.ones(3 * C), torch.zeros(3 * C)
    y = ops.highway_conv_gate(a, torch.ones(1, 1, C), *norm, carry=False)
    (slopes,) = torch.autograd.grad(y.sum(), a)
    exact = values.double()
    wanted = exact.tanh() if gate else exact.sigmoid()
    slope = 1 / exact.cosh().square() if gate else wanted * (-exact).sigmoid()
    found = y.detach().flatten(), slopes.flatten()[gate * C : (gate + 1) * C]
    for got, want in zip(found, (wanted, slope), strict=True):
        shown = want.abs() > 1e-37  # below it float32 has fewer digits
        error = ((got.double() - want) / want)[shown].abs().max()
        assert error < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("large", [80.0, 90.0, 1e4, 1e30, torch.inf])
def test_gates_far_from_zero(isa, large):
    """σ(±large) is 1 or 0, tanh(±large) is 1 or −1."""
    C = 61
    a = torch.full((1, 8, 3, C), large)
    for n, sign in enumerate(itertools.product((1.0, -1.0), repeat=3)):
        a[0, n] *= torch.tensor(sign)[:, None]
    x, one, zero = torch.randn(1, 8, C), torch.ones(3 * C), torch.zeros(3 * C)
    y = ops.highway_conv_gate(a.flatten(2), x, zero, one, zero)
    i, f, g = a.sign().unbind(2)
    torch.testing.assert_close(y, (i + 1) / 2 * g + (f + 1) / 2 * x, rtol=0, atol=1e-30)


def test_gates_at_a_large_mean():
    """What is left of the mean is exact: nothing of the mean's size is rounded after it."""
    a, x, mean, scale, shift = highway.make("gate")
    a, mean = (a + 3000).round(decimals=2), torch.full_like(mean, 3000)
    y = ops.highway_conv_gate(a, x, mean, scale, shift)
    exact = highway_conv_gate_reference(*(t.double() for t in (a, x, mean, scale, shift)), True)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)


def of_triton_project(*inputs):
    kernels = triton_of("highway_conv")
    return [t.cpu() for t in kernels.highway_conv_project(*(t.to(DEVICE) for t in inputs))]


@pytest.mark.parametrize(
    "project", [ops.highway_conv_project, of_triton_project], ids=["cpu", "triton"]
)
def test_moments_of_neighboring_numbers(project):
    """Half of a column is one number, half the next one: between them no number is their mean."""
    x = torch.tensor([0.0, 1.0]).repeat(50).view(-1, 1, 1)
    weight = torch.zeros(3, 1, 2)
    weight[..., 1] = 0.125  # the distance of float32's numbers from 2²⁰ on
    _, _, m2 = project(x, weight, torch.full((3,), 2.0**20))
    assert torch.equal(m2, torch.full((3,), 100 * 0.0625**2))


@pytest.mark.parametrize("N", [3, 16, 50])
def test_bf16_is_rounded_to_nearest_even(isa, N):
    """Sums of two numbers are exact in float32, so that each bit of the result is known."""
    weight = torch.randn(N, 400).bfloat16()
    bias = torch.randn(N).bfloat16()
    weight[:, :200] = (bias[:, None].float() * 2.0 ** torch.randint(-9, 2, (N, 200))).bfloat16()
    tokens = torch.arange(400)
    expected = (weight.T.float() + bias.float()).bfloat16()
    found = linear(None, weight, bias, tokens)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_bf16_keeps_numbers_below_the_normal_ones(isa):
    """A weight's rows are copied where the bias is zero."""
    bits = torch.randint(-(2**15), 2**15, (37, 400)).short() & -32641  # signs and fractions alone
    weight, bias = bits.view(torch.bfloat16), torch.zeros(37, dtype=torch.bfloat16)
    assert weight.any() and (weight.abs() < torch.finfo(torch.bfloat16).tiny).all()
    assert torch.equal(linear(None, weight, bias, torch.arange(400)), weight.T)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7FFF8000])
def test_bf16_keeps_nan_of_any_bits(isa, bits):
    """Rounding as if it were a number would carry into the exponent, or the sign."""
    C = 19
    a, x = torch.randn(2, 3, 3 * C).bfloat16(), torch.randn(2, 3, C).bfloat16()
    shift = torch.zeros(3 * C)
    shift.view(torch.int32)[5] = bits
    y = ops.highway_conv_gate(a, x, torch.zeros(3 * C), torch.ones(3 * C), shift)
    assert torch.equal(y.isnan(), torch.arange(C).expand(2, 3, C) == 5)


@pytest.mark.parametrize("op", [linear, linear_reference])
def test_gradients_of_one_symbol_add_up(op):
    """A thousand ones: in bfloat16 alone the sum would stop at 256."""
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    op(None, weight, bias, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert (weight.grad[:, 0] == 1000).all() and (weight.grad[:, 1] == 0).all()
    assert (bias.grad == 1000).all()


# Non-finite values


@pytest.mark.parametrize("place", [0, 16, 37, 48])
def test_nan_of_any_lane_stays(place, isa):
    inputs = training.make((2, 3, 49))
    inputs[0][1, 2, place] = float("nan")
    assert_same_non_finite(layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    inputs = training.make((2, 3, 49))
    inputs[5][1, place] = float("inf")
    assert_same_non_finite(layer_norm_lstm, layer_norm_lstm_reference, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [7, 33])
def test_nan_stays_in_its_row(K, dtype, isa):
    """Where it begins the row after one that ends within a step of the product."""
    x, weight, bias, _ = dense.make((24, K, 0, 70), dtype)
    want = linear(x, weight, bias)
    for operand, rows in ((x, want), (weight, want.T)):
        wrong = operand.clone()
        wrong[5, 0] = float("nan")
        found = linear(wrong, weight, bias) if operand is x else linear(x, wrong, bias).T
        assert found[5].isnan().all()
        assert torch.equal(torch.cat([found[:5], found[6:]]), torch.cat([rows[:5], rows[6:]]))


LIMITED = """
import torch
from fastvae import ops
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference

torch.manual_seed(0)
torch.set_num_threads(4)
T, B, H = 5, 33, 64
shapes = (T, B, 4 * H), (4 * H, H), (4 * H,), (4 * H,), (B, H), (B, H)
inputs = [torch.randn(shape) / 4 for shape in shapes]
want = layer_norm_lstm_reference(*inputs)
for _ in range(50):
    for got, right in zip(ops.layer_norm_lstm(*inputs), want, strict=True):
        torch.testing.assert_close(got, right)
print("right")
"""


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_team_smaller_than_asked_for(limit, tmp_path):
    """OpenMP may give fewer threads than PyTorch was told: nobody waits for those that are not."""
    environment = os.environ | {"OMP_THREAD_LIMIT": str(limit)}
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "right\n", done.stderr
