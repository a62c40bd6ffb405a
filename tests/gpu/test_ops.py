"""Every op on the GPU, against its reference there by the accuracy rule, in every dtype.

Sizes are the paper's, and the small ones of the CPU's tests in float32.
"""

import pytest
import test_decode_bytenet as decode_bytenet
import test_decode_lstm as decode_lstm
import test_highway_conv as highway
import test_layer_norm_lstm as lstm
import test_linear as linear
import torch
import torch.nn.functional as F

from fastvae import ops
from fastvae.ops.decode_bytenet import decode_bytenet_reference
from fastvae.ops.decode_lstm import decode_lstm_reference
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference
from fastvae.ops.linear import linear_reference
from fastvae.testing import assert_accurate, gradients

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LSTM = [(128, 32, 1000), (60, 128, 1000), (48, 64, 500)]
HIGHWAY = (56, 64, 256)
LINEAR = [(4096, 200, 261, 4000), (4096, 0, 51, 2000), (4096, 1000, 0, 259)]
DECODE_LSTM = [(128, 1, 200, 1000, 259), (128, 16, 200, 1000, 259), (60, 128, 200, 500, 51)]
DECODE_BYTENET = [(56, 1, 200, 256, 51, 10), (56, 128, 200, 256, 51, 3)]


def paper(shapes):
    return [(shape, dtype) for shape in shapes for dtype in DTYPES]


def small(shapes):
    return [(shape, torch.float32) for shape in shapes]


def there(tensors):
    return [t if t is None else t.cuda() for t in tensors]


@pytest.mark.parametrize("shape, dtype", [*small(lstm.SHAPES), *paper(LSTM)], ids=str)
def test_layer_norm_lstm(shape, dtype):
    inputs = there(lstm.make(shape, dtype))
    assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    assert_accurate(gradients(ops.layer_norm_lstm), gradients(layer_norm_lstm_reference), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 17), (60, 128, 500)], ids=str)
def test_layer_norm_lstm_with_lengths(shape, dtype):
    """Every sequence gives what it gives alone, from a recorded loop and from one's own graph."""
    T, B, _ = shape
    lengths = torch.arange(B, device="cuda") * 7 % (T + 1)
    inputs = there(lstm.make(shape, dtype))
    inputs[0][torch.arange(T, device="cuda").unsqueeze(1) >= lengths] = float("nan")
    fn, expected = lstm.of_lengths(lengths)
    assert_accurate(fn, expected, *inputs)
    assert_accurate(gradients(fn), gradients(expected), *inputs)
    want, graph = fn(*inputs), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which would fail if lengths were waited for
        got = fn(*inputs)
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(got, want, equal_nan=True)


def test_packed_rows_run_as_the_reference():
    lengths = torch.tensor([5, 3, 3, 1], device="cuda")
    fn, expected = lstm.of_lengths(lengths, packed=True)
    inputs = there(lstm.make_packed(lengths, 17))
    assert_accurate(fn, expected, *inputs)
    assert_accurate(gradients(fn), gradients(expected), *inputs)


@pytest.mark.parametrize("op", highway.OPS)
@pytest.mark.parametrize("shape, dtype", [*small(highway.SHAPES), *paper([HIGHWAY])], ids=str)
def test_highway_conv(op, shape, dtype):
    highway.check_both(op, there(highway.make(op, shape, dtype)))


@pytest.mark.parametrize("shape, dtype", [*small(linear.SHAPES), *paper(LINEAR)], ids=str)
def test_linear(shape, dtype):
    linear.check(ops.linear, linear_reference, there(linear.make(shape, dtype)))


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("shape, dtype", [*small(decode_lstm.SHAPES), *paper(DECODE_LSTM)], ids=str)
def test_decode_lstm(shape, dtype, noisy):
    inputs = there(decode_lstm.make(shape, dtype))
    noise = decode_lstm.gumbel(shape).cuda() if noisy else None
    for _ in range(2):  # the second time from the same graph
        tokens = ops.decode_lstm(*inputs, noise)
        assert tokens.dtype == torch.int64 and tokens.shape == (shape[1], shape[0])
        decode_lstm.assert_best(tokens, noise, inputs)
        inputs[7] = inputs[7].flip(0)


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize(
    "shape, dtype", [*small(decode_bytenet.SHAPES), *paper(DECODE_BYTENET)], ids=str
)
def test_decode_bytenet(shape, dtype, noisy):
    inputs = there(decode_bytenet.make(shape, dtype))
    noise = decode_bytenet.gumbel(shape).cuda() if noisy else None
    for carry in (True, False):
        tokens = ops.decode_bytenet(*inputs, noise, carry)
        decode_bytenet.assert_best(tokens, noise, inputs, carry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_lstm_ends(dtype):
    """Up to its first end_id a sequence is as without; after it, pads."""
    shape = (70, 9, 4, 33, 4)
    inputs, noise = there(decode_lstm.make(shape, dtype)), decode_lstm.gumbel(shape).cuda()
    inputs[6] /= 4
    free = ops.decode_lstm(*inputs, noise).tolist()
    tokens = ops.decode_lstm(*inputs, noise, end_id=2, pad_id=1)
    for got, want in zip(tokens.tolist(), free, strict=True):
        length = want.index(2) + 1 if 2 in want else len(want)
        assert got == want[:length] + [1] * (len(want) - length)
    inputs[7][2] = 1e4
    tokens = ops.decode_lstm(*inputs, end_id=2, pad_id=1)
    assert tokens.tolist() == [[2] + [1] * 69] * 9


def test_decode_ties_and_nan():
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, 1, 3, 3], [-0.0, 0, -1, -2], [1, nan, inf, nan], [-inf] * 4, [-3, -2, -9, -2]]
    noise = torch.tensor(rows, device="cuda").unsqueeze(1)
    inputs = there(decode_lstm.make((len(rows), 1, 2, 3, 4)))
    inputs[6].zero_()
    inputs[7].zero_()
    assert ops.decode_lstm(*inputs, noise).tolist() == [[2, 0, 1, 0, 1]]
    inputs = there(decode_bytenet.make((len(rows), 1, 2, 3, 4, 2)))
    inputs[5].zero_()
    inputs[6].zero_()
    assert ops.decode_bytenet(*inputs, noise).tolist() == [[2, 0, 1, 0, 1]]


def test_float64_and_large_sizes_run_as_the_reference():
    inputs = there(lstm.make((3, 2, 5), torch.float64))
    for got, want in zip(lstm.both(*inputs), lstm.both_reference(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    inputs = there(lstm.make((2, 2, 2050)))
    assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    inputs = there(decode_lstm.make((4, 2, 3, 5, 7), torch.float64))
    assert torch.equal(ops.decode_lstm(*inputs), decode_lstm_reference(*inputs))
    inputs = there(decode_bytenet.make((4, 2, 3, 5, 7, 2), torch.float64))
    assert torch.equal(ops.decode_bytenet(*inputs), decode_bytenet_reference(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype):
    def strided(fn):
        return lambda *inputs: fn(*(torch.stack([t, t.neg()], -1)[..., 0] for t in inputs))

    inputs = there(lstm.make((4, 3, 17), dtype))
    assert_accurate(strided(lstm.both), lstm.both_reference, *inputs)
    inputs = there(decode_lstm.make((9, 4, 48, 17, 15), dtype))
    assert torch.equal(strided(ops.decode_lstm)(*inputs), ops.decode_lstm(*inputs))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_sequence(value):
    inputs = there(lstm.make((4, 3, 17)))
    inputs[0][1, 2, 5] = value
    assert_accurate(lstm.both, lstm.both_reference, *inputs)
    h, c_n = ops.layer_norm_lstm(*inputs)
    assert h[1:, 2].isnan().all() and c_n[2].isnan().all() and h[:, :2].isfinite().all()


def test_tensors_elsewhere_are_named():
    inputs = there(lstm.make())
    inputs[4] = inputs[4].cpu()
    with pytest.raises(RuntimeError, match="h0 must be on the device of x"):
        ops.layer_norm_lstm(*inputs)
    inputs = there(decode_lstm.make())
    inputs[8] = inputs[8].cpu()
    with pytest.raises(RuntimeError, match="h0 must be on the device of features"):
        ops.decode_lstm(*inputs)


def test_opcheck():
    inputs = there(lstm.make(grad=True))
    torch.library.opcheck(lstm.OP, (*inputs, 1e-4, True))
    with torch.no_grad():
        h, c_n, *saved = lstm.OP(*inputs, 1e-4, True)
        arguments = torch.randn_like(h), torch.randn_like(c_n), *inputs[1:], h, *saved
        torch.library.opcheck(lstm.BACKWARD, arguments)
    inputs, noise = there(decode_lstm.make()), decode_lstm.gumbel((6, 3, 4, 5, 7)).cuda()
    torch.library.opcheck(torch.ops.fastvae.decode_lstm, (*inputs, noise, 1e-4, 2, 0))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    """The second mode records graphs of its own around ours, in memory of its own."""
    compiled = torch.compile(ops.layer_norm_lstm, fullgraph=True, mode=mode)
    inputs = there(lstm.make((6, 3, 17)))

    def copied(*tensors):
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(t.clone() for t in compiled(*tensors))

    for _ in range(2):
        fn = gradients(copied), gradients(layer_norm_lstm_reference)
        assert_accurate(*fn, *inputs)
        with torch.no_grad():
            assert_accurate(copied, layer_norm_lstm_reference, *inputs)


def test_parameters_need_no_gradient():
    inputs = [t.requires_grad_() for t in there(decode_lstm.make())]
    for _ in range(2):
        assert not ops.decode_lstm(*inputs).requires_grad


@pytest.mark.parametrize("wrong", [-1, 4])
def test_symbol_out_of_range_gives_nan(wrong):
    x, weight, bias, tokens = there(linear.make())
    want = ops.linear(x, weight, bias, tokens)
    tokens[3] = wrong
    got = ops.linear(x, weight, bias, tokens)
    assert got[3].isnan().all() and torch.equal(got[4:], want[4:])
    torch.ops.fastvae.linear_backward(torch.ones_like(got), x, weight, tokens)
    torch.cuda.synchronize()
    assert F.linear(x, weight[:, :5]).isfinite().all()
