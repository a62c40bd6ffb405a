"""decode_lstm_pack and decode_bytenet_pack: packed weights decode as the plain ones, integers as
their reference, and nothing else is read as packed weights."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import test_decode_bytenet
import test_decode_lstm
import torch

from fastvae import _C, ops
from fastvae.ops.decode_bytenet import bytenet_step, decode_bytenet_reference
from fastvae.ops.decode_lstm import decode_lstm_reference, lstm_step, teacher_forced
from fastvae.ops.int8 import int8_linear, round_rows
from fastvae.testing import assert_best

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# (T, B, D, H or C, V): ones, primes, lanes and their neighbors, more than a tile's rows
SHAPES = [(1, 1, 1, 1, 1), (5, 1, 3, 7, 2), (1, 7, 5, 3, 11), (6, 2, 0, 16, 16), (7, 3, 4, 15, 17)]
SHAPES += [(5, 5, 13, 17, 15), (3, 13, 49, 49, 33), (4, 9, 48, 48, 51), (3, 1, 20, 129, 97)]


def lstm_logits(tokens, *inputs):
    features, feature_weight, rows, *weights, h0, c0 = inputs
    step = lstm_step(feature_weight, *weights, h0, c0, 1e-4, int8=True)
    return teacher_forced(step, features, rows, before(tokens, rows))


def bytenet_logits(tokens, *inputs):
    features, feature_weight, rows, *weights = inputs
    step = bytenet_step(feature_weight, *weights, True, int8=True)
    return teacher_forced(step, features, rows, before(tokens, rows))


def before(tokens, rows):
    return torch.cat([torch.full_like(tokens[:, :1], len(rows) - 1), tokens[:, :-1]], 1).T


OPS = {
    "lstm": SimpleNamespace(
        make=test_decode_lstm.make,
        decode=ops.decode_lstm,
        pack=lambda i, **how: ops.decode_lstm_pack(i[1], i[3], i[6], i[2], **how),
        reference=decode_lstm_reference,
        logits=lstm_logits,
        weights=("feature_weight", "weight_hh", "classifier_weight"),
        op=torch.ops.fastvae.decode_lstm_pack,
        paper=(12, 32, 200, 1000, 259),
    ),
    "bytenet": SimpleNamespace(
        make=lambda shape, *dtype: test_decode_bytenet.make((*shape, 3), *dtype),
        decode=ops.decode_bytenet,
        pack=lambda i, **how: ops.decode_bytenet_pack(i[1], i[3], i[5], **how),
        reference=decode_bytenet_reference,
        logits=bytenet_logits,
        weights=("feature_weight", "conv_weight", "classifier_weight"),
        op=torch.ops.fastvae.decode_bytenet_pack,
        paper=(14, 32, 200, 256, 51),
    ),
}
SMALL = (6, 3, 4, 5, 7)


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_is_the_same(op, isa, shape, dtype):
    inputs = op.make(shape, dtype)
    assert torch.equal(op.decode(*inputs, packed=op.pack(inputs)), op.decode(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_equals_the_reference(op, isa, shape, dtype):
    inputs = op.make(shape, dtype)
    packed = op.pack(inputs, int8=True)
    noise = -torch.empty(shape[0], shape[1], shape[4]).exponential_().log().to(torch.float64)
    for how in ({}, {"noise": noise.to(dtype if dtype == torch.float64 else torch.float32)}):
        tokens = op.decode(*inputs, **how, packed=packed, int8=True)
        assert torch.equal(tokens, op.reference(*inputs, **how, packed=packed, int8=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
@pytest.mark.parametrize("where", ["features", "weight"])
def test_int8_rounds_halves_to_even(isa, where, half, dtype):
    """A row with 127 has the scale 1; the embedding takes away what is right, and no more."""
    row, ones = torch.tensor([127.0, half]), torch.tensor([0.0, 127.0])
    if where == "features":
        features, weight = row, torch.stack([ones, torch.tensor([1.0, 0.0])])
    else:
        features, weight = ones, torch.stack([row, ones])
    taken = torch.tensor([-127.0 * round(half), 0])
    inputs = [features.view(1, 1, 2), weight, taken.expand(4, 2), torch.zeros(0, 3, 1, 2)]
    inputs += [torch.zeros(0, 3), torch.tensor([[0.0], [1], [-1]]), torch.tensor([0.5, 0, 0])]
    inputs = [t.to(dtype) for t in inputs]
    assert ops.decode_bytenet(*inputs, int8=True).item() == 0
    assert decode_bytenet_reference(*inputs, int8=True).item() == 0


def test_int8_long_sums(isa):
    """More than 2^24, the first integer that float32 lacks."""
    op = OPS["lstm"]
    inputs = op.make((2, 2, 3, 1100, 5), torch.float64)
    for n in (3, 6, 8):
        inputs[n].abs_().clamp_min_(0.5 * inputs[n].max())
    packed = op.pack(inputs, int8=True)
    assert torch.equal(
        op.decode(*inputs, packed=packed, int8=True),
        op.reference(*inputs, packed=packed, int8=True),
    )


@pytest.mark.slow
def test_int8_of_the_paper(op):
    inputs = op.make(op.paper)
    tokens = op.decode(*inputs, packed=op.pack(inputs, int8=True), int8=True)
    assert_best(tokens, lambda *t: op.logits(tokens, *t), *inputs)


@pytest.mark.parametrize("B", [1, 2, 4, 9])
def test_int8_thread_counts(op, B, threads):
    inputs = op.make((5, B, 13, 90, 31), torch.float64)
    packed = op.pack(inputs, int8=True)
    tokens = op.decode(*inputs, packed=packed, int8=True)
    assert torch.equal(tokens, op.reference(*inputs, packed=packed, int8=True))


def test_int8_differs(op):
    """Where noise makes many choices close, rounding turns some."""
    inputs, noise = op.make((20, 20, 4, 17, 7)), 3 * torch.randn(20, 20, 7)
    tokens = op.decode(*inputs, noise, packed=op.pack(inputs, int8=True), int8=True)
    assert not torch.equal(tokens, op.decode(*inputs, noise))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-42, 3e38])
@pytest.mark.parametrize("n", range(7))
def test_int8_odd_values(op, n, value):
    """As in the reference; one bad sequence harms no other."""
    if op is OPS["lstm"] and value == 3e38:
        value = 1e18  # its square is a float32
    inputs = op.make((5, 3, 4, 17, 7))
    tokens = op.decode(*inputs, packed=op.pack(inputs, int8=True), int8=True)
    inputs[n].view(-1)[4 if n == 0 else 1] = value
    packed = op.pack(inputs, int8=True)
    got = op.decode(*inputs, packed=packed, int8=True)
    assert torch.equal(got, op.reference(*inputs, packed=packed, int8=True))
    if n == 0:
        assert torch.equal(got[[0, 2]], tokens[[0, 2]])


def test_int8_of_a_variance_that_overflows():
    op, (inputs, want) = OPS["lstm"], test_decode_lstm.overflowing()
    packed = op.pack(inputs, int8=True)
    assert op.decode(*inputs, packed=packed, int8=True).tolist() == want


@pytest.mark.parametrize("value", [float("nan"), 50.0, -50.0])
@pytest.mark.parametrize("n", [8, 9])
def test_int8_odd_states(n, value):
    op = OPS["lstm"]
    inputs = op.make((5, 3, 4, 17, 7), torch.float64)
    inputs[n][1] = value
    packed = op.pack(inputs, int8=True)
    assert torch.equal(
        op.decode(*inputs, packed=packed, int8=True),
        op.reference(*inputs, packed=packed, int8=True),
    )


def test_zero_weights(op):
    inputs = op.make(SMALL)
    for t in inputs[1:]:
        t.zero_()
    inputs[-1 if op is OPS["bytenet"] else 7][3] = 1
    for int8 in (False, True):
        tokens = op.decode(*inputs, packed=op.pack(inputs, int8=int8), int8=int8)
        assert torch.equal(tokens, torch.full((3, 6), 3))


def test_strides(op):
    inputs = op.make((6, 3, 8, 17, 7))
    strided = [torch.stack([t, t.neg()], -1)[..., 0] for t in inputs]
    strided[1] = inputs[1].T.contiguous().T
    for int8 in (False, True):
        packed = op.pack(strided, int8=int8)
        assert torch.equal(packed, op.pack(inputs, int8=int8))
        assert torch.equal(
            op.decode(*strided, packed=packed, int8=int8),
            op.decode(*inputs, packed=packed, int8=int8),
        )


@pytest.mark.parametrize("int8", [False, True])
def test_end_id(op, int8):
    inputs = op.make((9, 5, 4, 17, 4))
    packed = op.pack(inputs, int8=int8)
    free = op.decode(*inputs, packed=packed, int8=int8)
    ended = op.decode(*inputs, packed=packed, int8=int8, end_id=2, pad_id=1)
    for got, want in zip(ended.tolist(), free.tolist(), strict=True):
        length = want.index(2) + 1 if 2 in want else len(want)
        assert got == want[:length] + [1] * (len(want) - length)


def wrong(packed):
    magic, other_type = packed.clone(), packed.view(torch.int8)
    magic[2] += 1
    yield from (magic, other_type, packed[:-1], packed[:40], packed[:0], packed.new_zeros(5000))
    yield from (torch.cat([packed, packed]), torch.stack([packed, packed], -1)[:, 0], packed[64:])
    yield torch.cat([packed.view(2, -1)] * 2, 1)[:, : len(packed) // 2]  # right up to the half


@pytest.mark.parametrize("int8", [False, True])
def test_rejects_what_is_not_packed(op, int8):
    inputs = op.make((3, 2, 4, 9, 5))
    packed = op.pack(inputs, int8=int8)
    for tensor in wrong(packed):
        with pytest.raises(RuntimeError, match=r"packed (was made|must be)"):
            op.decode(*inputs, packed=tensor, int8=int8)
    with pytest.raises(RuntimeError, match="packed was made of other weights, with another int8"):
        op.decode(*inputs, packed=packed, int8=not int8)


@pytest.mark.parametrize("int8", [False, True])
def test_rejects_other_weights(op, int8):
    inputs = op.make((3, 2, 4, 9, 5))
    for shape in ((3, 2, 5, 9, 5), (3, 2, 4, 8, 5), (3, 2, 4, 9, 6)):
        packed = op.pack(op.make(shape), int8=int8)
        with pytest.raises(RuntimeError, match="packed was made of other weights"):
            op.decode(*inputs, packed=packed, int8=int8)
    with pytest.raises(RuntimeError, match="packed was made of other weights"):
        op.decode(
            *inputs, packed=op.pack(op.make((3, 2, 4, 9, 5), torch.bfloat16), int8=int8), int8=int8
        )
    other = next(o for o in OPS.values() if o is not op)
    with pytest.raises(RuntimeError, match="packed was made of other weights"):
        op.decode(*inputs, packed=other.pack(other.make((3, 2, 4, 9, 5)), int8=int8), int8=int8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("size", [(9, 5), (48, 48)], ids=str)  # whole panels of 12, 24 and 48
def test_rejects_another_capability(op, isa, size, int8):
    others = [other for other in _C.cpu_capabilities() if other != isa]
    if not others:
        pytest.skip("this machine has one isa")
    inputs = op.make((3, 2, 4, *size))
    packed = op.pack(inputs, int8=int8)
    for other in others:
        _C.set_cpu_capability(other)
        with pytest.raises(RuntimeError, match="at another CPU capability: pack again"):
            op.decode(*inputs, packed=packed, int8=int8)


@pytest.mark.parametrize("n", range(3))
def test_pack_rejects_wrong_weights(op, n):
    inputs = op.make((3, 2, 4, 9, 5))
    weights = [inputs[1], inputs[3], inputs[6 if op is OPS["lstm"] else 5]]
    for bad, message in (
        (weights[n][:, :-1] if n else weights[n][:-1], "must have"),
        (weights[n].unsqueeze(0), "must have shape"),
        (weights[n].double(), r"must have the dtype of \w+"),
    ):
        named = op.weights[1] if bad.dtype == torch.float64 and n == 1 else op.weights[n]
        with pytest.raises(RuntimeError, match=message if n == 1 else rf"\b{named} {message}"):
            op.op(*weights[:n], bad, *weights[n + 1 :])


def test_pack_rejects_wrong_embeddings():
    inputs = test_decode_lstm.make((3, 2, 4, 9, 5))
    weights, rows = (inputs[1], inputs[3], inputs[6]), inputs[2]
    for bad in (rows[:-1], rows[:, :-1], rows.double(), rows.flatten()):
        with pytest.raises(RuntimeError, match=r"token_embeddings must have"):
            ops.decode_lstm_pack(*weights, bad)
    plain = ops.decode_lstm_pack(*weights)
    assert torch.equal(ops.decode_lstm_pack(*weights, rows), plain)  # on a CPU nothing of them


@pytest.mark.parametrize("int8", [False, True])
def test_opcheck(op, int8):
    inputs = op.make(SMALL)
    weights = inputs[1], inputs[3], inputs[6 if op is OPS["lstm"] else 5]
    torch.library.opcheck(op.op, weights, {"int8": int8})
    if op is OPS["lstm"]:
        torch.library.opcheck(op.op, (*weights, inputs[2], int8))
    decode = op.op._qualified_op_name.removesuffix("_pack").split("::")[1]
    last = (None, 1e-4, None, None) if op is OPS["lstm"] else (None, True, None, None)
    torch.library.opcheck(
        getattr(torch.ops.fastvae, decode), (*inputs, *last, op.pack(inputs, int8=int8), int8)
    )


def test_compile(op):
    inputs = op.make(SMALL)
    compiled = torch.compile(
        lambda *t: op.decode(*t, packed=op.pack(t, int8=True), int8=True) + 0, fullgraph=True
    )
    want = op.decode(*inputs, packed=op.pack(inputs, int8=True), int8=True)
    assert torch.equal(compiled(*inputs), want)


@pytest.mark.parametrize("int8", [False, True])
def test_reference_serves_devices_without_a_kernel(op, int8):
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    inputs = op.make(SMALL, torch.float64)
    weights = inputs[1], inputs[3], inputs[6 if op is OPS["lstm"] else 5]
    packed = op.op.default.redispatch(key, *weights, int8=int8)
    want = op.decode(*inputs, packed=op.pack(inputs, int8=int8), int8=int8)
    assert torch.equal(op.reference(*inputs, packed=packed, int8=int8), want)


def test_python_threads(op):
    cases = [op.make((5, n, 4, 17, 7)) for n in range(1, 9)]
    packs = [op.pack(case, int8=n % 2 == 0) for n, case in enumerate(cases)]

    def decode(n):
        return op.decode(*cases[n % 8], packed=packs[n % 8], int8=n % 2 == 0)

    want = [decode(n) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(decode, range(32)))
    assert all(torch.equal(t, want[n % 8]) for n, t in enumerate(got))


def test_round_rows():
    q, scale = round_rows(torch.tensor([[127.0, -127, 0.5, 1.5, -2.5, 0.4], [0, 0, 0, 0, 0, 0]]))
    assert q.tolist() == [[127, -127, 0, 2, -2, 0], [0] * 6]
    assert scale[0] == 1 and q.dtype == torch.float64
    q, scale = round_rows(torch.tensor([[3.0, -0.5], [torch.nan, 1.0]]), 1 / 127)
    assert q.tolist() == [[127, -64], [0, 127]] and scale[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_linear_is_near(dtype):
    """Each of K products is off by at most half a step of both its factors."""
    x, weight = torch.randn(50, 33, dtype=dtype), torch.randn(20, 33, dtype=dtype)
    off = int8_linear(weight)(x).double() - x.double() @ weight.double().T
    steps = x.double().abs().amax(1, keepdim=True) / 254, weight.double().abs().amax(1) / 254
    bound = steps[0] * weight.double().abs().sum(1) + steps[1] * x.double().abs().sum(1, True)
    assert (off.abs() <= bound + 33 * steps[0] * steps[1]).all()


def test_rows_too_wide_for_exact_int8_products_are_refused():
    def inputs(width):
        torch.manual_seed(0)
        features = torch.full((1, 1, width), 127.0)
        feature_weight = torch.zeros(8, width)
        feature_weight[1] = 127.0  # every product is the largest there is
        rows, conv_weight, conv_bias = (
            torch.zeros(3, 8),
            torch.zeros(0, 12, 4, 2),
            torch.zeros(0, 12),
        )
        return (
            features,
            feature_weight,
            rows,
            conv_weight,
            conv_bias,
            torch.eye(4)[:2],
            torch.zeros(2),
        )

    widest = 132_104  # times 127 * 128 is the last below 2**31
    exact = ops.decode_bytenet(*inputs(widest), int8=True)
    assert exact.item() == ops.decode_bytenet(*inputs(widest)).item() == 1
    with pytest.raises(
        RuntimeError, match="feature_weight has rows of 132105, more than the 132104"
    ):
        ops.decode_bytenet(*inputs(widest + 1), int8=True)
    with pytest.raises(RuntimeError, match="use int8=False"):
        ops.decode_bytenet_pack(*(inputs(widest + 1)[i] for i in (1, 3, 5)), int8=True)
    weights = torch.zeros(16, widest + 1), torch.zeros(16, 4), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="use int8=False"):
        ops.decode_lstm_pack(*weights, int8=True)
    features, state = torch.zeros(1, 1, widest + 1), torch.zeros(1, 4)
    rest = torch.zeros(3, 16), weights[1], *torch.zeros(2, 16), weights[2], torch.zeros(2)
    with pytest.raises(RuntimeError, match="feature_weight has rows of 132105"):
        ops.decode_lstm(features, weights[0], *rest, state, state, int8=True)
