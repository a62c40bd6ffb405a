"""The persistent kernels on a GPU, behind the public ops: one launch for a whole sequence.

Each test must have been served by one. Those that could end the process's use of the GPU are last.
"""

from collections import Counter
from functools import partial

import pytest
import test_decode_bytenet as bytenet
import test_decode_lstm as decode
import test_layer_norm_lstm as lstm
import torch

from fastvae import nn, ops
from fastvae.ops.decode_bytenet import decode_bytenet_reference
from fastvae.ops.decode_lstm import decode_lstm_reference
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference
from fastvae.testing import assert_accurate, gradients

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fastvae.kernels import persistent

if not all(map(persistent.built, persistent.DTYPES)):
    pytest.skip("csrc/cuda was not built", allow_module_level=True)

SHORT, DECODED = [torch.bfloat16, torch.float16], [torch.float32, torch.bfloat16]
LSTM = [(128, 32, 1000), (60, 128, 1000), (48, 64, 500), (4, 300, 1000)]
DECODE_LSTM = [(128, 1, 200, 1000, 259), (128, 16, 200, 1000, 259), (40, 128, 200, 1000, 259)]
DECODE_LSTM += [(20, 300, 200, 1000, 259), (60, 128, 200, 500, 51), (60, 9, 200, 1024, 512)]
DECODE_BYTENET = [(56, B, 200, 256, 51, N) for N in (10, 3) for B in (1, 128)]
LAUNCHES = 10_000


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Persistent kernels serve every op that has one; counts how often each did."""
    counts = Counter()

    def counting(name, run):
        def counted(*inputs, **options):
            outputs = run(*inputs, **options)
            counts[name] += 1
            return outputs

        return counted

    for name in persistent.DTYPES:
        monkeypatch.setattr(persistent, name, counting(name, getattr(persistent, name)))
    with persistent.serve():
        yield counts
    torch.cuda.synchronize()
    assert counts, "no persistent kernel ran"


def there(tensors):
    return [t if t is None else t.cuda() for t in tensors]


CARD = persistent.machine(torch.device("cuda", 0))


def fitting(shapes, dtypes, plan):
    """Shapes with dtypes, skipped where plan(shape, bytes of a number) finds no room for them."""
    return [
        pytest.param(
            shape,
            dtype,
            marks=pytest.mark.skipif(
                plan(shape, dtype.itemsize) is None, reason="this GPU has too little shared memory"
            ),
        )
        for shape in shapes
        for dtype in dtypes
    ]


def lstm_plan(shape, itemsize):
    _, B, H = shape
    return persistent.plan_lstm(H, B, itemsize, CARD)


def decode_lstm_plan(shape, itemsize):
    _, B, _, H, V = shape
    return persistent.plan_lstm(H, B, itemsize, CARD, V)


def decode_bytenet_plan(shape, itemsize):
    _, B, _, C, V, N = shape
    return persistent.plan_bytenet(C, N, V, B, itemsize, CARD)


def assert_equal_where_clear(tokens, want, logits, inputs):
    """Tokens [B, T] are `want` up to the first choice that rounding may make: by the accuracy rule.

    logits(*inputs) [T, B, V] are those that `want` was chosen from.
    """
    gold, plain = logits(*[t.double() for t in inputs]), logits(*inputs)
    ulp = torch.finfo(plain.dtype).eps * gold.abs().max()
    allowed = 2 * (plain.double() - gold).abs().max() + ulp
    best = gold.topk(min(2, gold.shape[-1])).values
    unclear = (best[..., 0] - best[..., -1] <= 2 * allowed).T.cumsum(1) > 0
    assert torch.equal(tokens.masked_fill(unclear, -1), want.masked_fill(unclear, -1))


@pytest.mark.parametrize("shape, dtype", fitting([*lstm.SHAPES, *LSTM], SHORT, lstm_plan), ids=str)
def test_layer_norm_lstm(served, shape, dtype):
    inputs = there(lstm.make(shape, dtype))
    assert_accurate(ops.layer_norm_lstm, layer_norm_lstm_reference, *inputs)
    forward = served["layer_norm_lstm"]
    assert_accurate(gradients(ops.layer_norm_lstm), gradients(layer_norm_lstm_reference), *inputs)
    assert served["layer_norm_lstm"] > forward > 0


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize(
    "shape, dtype",
    fitting([*decode.SHAPES, *DECODE_LSTM], DECODED, decode_lstm_plan),
    ids=str,
)
def test_decode_lstm(served, shape, dtype, noisy):
    inputs = there(decode.make(shape, dtype))
    noise = decode.gumbel(shape).cuda() if noisy else None
    tokens = ops.decode_lstm(*inputs, noise)
    assert served["decode_lstm"] == 1
    decode.assert_best(tokens, noise, inputs)
    if dtype == torch.float32:
        want = decode_lstm_reference(*inputs, noise)
        logits = partial(decode.teacher_forced, want, noise)
        assert_equal_where_clear(tokens, want, logits, inputs)


@pytest.mark.parametrize("carry", [True, False], ids=["carry", "no-carry"])
@pytest.mark.parametrize(
    "shape, dtype",
    fitting([*bytenet.SHAPES, *DECODE_BYTENET], DECODED, decode_bytenet_plan),
    ids=str,
)
def test_decode_bytenet(served, shape, dtype, carry):
    inputs = there(bytenet.make(shape, dtype))
    noise = bytenet.gumbel(shape).cuda() if carry else None
    tokens = ops.decode_bytenet(*inputs, noise, carry)
    assert served["decode_bytenet"] == 1
    bytenet.assert_best(tokens, noise, inputs, carry)
    if dtype == torch.float32:
        want = decode_bytenet_reference(*inputs, noise, carry)
        logits = partial(bytenet.teacher_forced, want, noise, carry=carry)
        assert_equal_where_clear(tokens, want, logits, inputs)


DECODERS = [(ops.decode_lstm, decode, ()), (ops.decode_bytenet, bytenet, (2,))]


@pytest.mark.parametrize("dtype", DECODED, ids=str)
@pytest.mark.parametrize("op, make, layers", DECODERS, ids=["decode_lstm", "decode_bytenet"])
def test_ends(op, make, layers, dtype):
    """Up to its first end_id a sequence is as without; after it, pads; a launch ends with them."""
    shape = (70, 20, 4, 33, 4, *layers)
    inputs, noise = there(make.make(shape, dtype)), make.gumbel(shape).cuda()
    free = op(*inputs, noise).tolist()
    tokens = op(*inputs, noise, end_id=2, pad_id=1).tolist()
    lengths = [row.index(2) + 1 if 2 in row else 70 for row in free]
    assert len(set(lengths)) > 2
    for got, want, length in zip(tokens, free, lengths, strict=True):
        assert got == want[:length] + [1] * (70 - length)
    noise[:2, :, 2], noise[2:, :, 2] = -1e4, 1e4
    noise[4:] = float("nan")  # never read: all have ended
    tokens = op(*inputs, noise, end_id=2, pad_id=1)
    assert (tokens[:, 2] == 2).all() and (tokens[:, :2] != 2).all() and (tokens[:, 3:] == 1).all()


def test_ties_and_nan(served):
    """As torch.argmax: NaN before all, the first of the largest."""
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, 1, 3, 3], [-0.0, 0, -1, -2], [1, nan, inf, nan], [-inf] * 4, [-3, -2, -9, -2]]
    noise = torch.tensor(rows, device="cuda").unsqueeze(1)
    for dtype in DECODED:
        inputs = there(decode.make((len(rows), 1, 2, 33, 4), dtype))
        inputs[6].zero_()
        inputs[7].zero_()
        assert ops.decode_lstm(*inputs, noise).tolist() == [[2, 0, 1, 0, 1]]
        inputs = there(bytenet.make((len(rows), 1, 2, 17, 4, 2), dtype))
        inputs[5].zero_()
        inputs[6].zero_()
        assert ops.decode_bytenet(*inputs, noise).tolist() == [[2, 0, 1, 0, 1]]
    assert served["decode_lstm"] == served["decode_bytenet"] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_sequence(value):
    """And a NaN of all ones, which looks like a word that has not come, is no reason to wait."""
    inputs = there(lstm.make((4, 3, 17), torch.bfloat16))
    inputs[0][1, 2, 5] = value
    inputs[4].view(torch.int16)[1] = -1
    h, c_n = ops.layer_norm_lstm(*inputs)
    assert h[1:, 2].isnan().all() and c_n[2].isnan().all() and h[:, 1].isnan().all()
    assert h[0, 2].isfinite().all() and h[:, 0].isfinite().all() and c_n[0].isfinite().all()
    inputs = there(bytenet.make((3, 2, 4, 9, 5, 2)))
    want = ops.decode_bytenet(*inputs)
    inputs[0][0, 1] = value
    assert torch.equal(ops.decode_bytenet(*inputs)[0], want[0])


def test_strides():
    def strided(tensors):
        return [torch.stack([t, t.neg()], -1)[..., 0] for t in tensors]

    inputs = there(lstm.make((4, 3, 17), torch.float16))
    results = ops.layer_norm_lstm(*strided(inputs)), ops.layer_norm_lstm(*inputs)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    for op, make, layers in DECODERS:
        inputs = there(make.make((9, 4, 48, 17, 15, *layers)))
        assert torch.equal(op(*strided(inputs)), op(*inputs))


def test_autocast(served):
    """A module's parameters in float32 meet the kernel in 16 bits."""
    for dtype in SHORT:
        module = nn.LayerNormLSTM(7, 96, device="cuda")
        with torch.autocast("cuda", dtype):
            y, _ = module(torch.randn(12, 5, 7, device="cuda"))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())
    assert served["layer_norm_lstm"] == 2


def lstm_case(T=20, B=10, H=96):
    return ops.layer_norm_lstm, there(lstm.make((T, B, H), torch.bfloat16)), [1]


def decode_case(T=20, B=10, H=96, V=51):
    return ops.decode_lstm, there(decode.make((T, B, 8, H, V))), [3, 6]


def bytenet_case(T=20, B=10, C=64, V=51):
    return ops.decode_bytenet, there(bytenet.make((T, B, 8, C, V, 3))), [3, 5]


CASES = [lstm_case, decode_case, bytenet_case]
NAMES = ["layer_norm_lstm", "decode_lstm", "decode_bytenet"]


def outputs(op, inputs):
    """Copies of what the op returns, as a list."""
    result = op(*inputs)
    return [t.clone() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_changed_weights(case):
    """Nothing of them is kept from call to call."""
    op, inputs, weights = case()
    before = outputs(op, inputs)
    for n in weights:
        kept = inputs[n].clone()
        inputs[n].copy_(kept.flip(0))
        assert not torch.equal(outputs(op, inputs)[0], before[0])
        inputs[n].copy_(kept)
        assert all(map(torch.equal, outputs(op, inputs), before))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_graph(case):
    """Captured once and replayed with other inputs: as launched with them."""
    op, inputs, _ = case()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        result = op(*inputs)
    captured = result if isinstance(result, tuple) else (result,)
    for _ in range(3):
        for t in inputs:
            t.copy_(t[torch.randperm(len(t), device="cuda")])
        graph.replay()
        assert all(map(torch.equal, captured, outputs(op, inputs)))
    for _ in range(100):
        graph.replay()
    assert all(map(torch.equal, captured, outputs(op, inputs)))


def test_two_streams(served):
    """Launches that do not fit the GPU together run one after the other."""
    cases = [lstm_case(60, 64, 500), decode_case(60, 64, 500)]
    want = [outputs(op, inputs) for op, inputs, _ in cases]
    streams, results = [torch.cuda.Stream() for _ in cases], [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for (op, inputs, _), stream, result in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(outputs(op, inputs))
    torch.cuda.synchronize()
    for alone, result in zip(want, results, strict=True):
        for got in result:
            assert all(map(torch.equal, got, alone))
    assert served["layer_norm_lstm"] == served["decode_lstm"] == 51


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_many_launches(served, case):
    op, inputs, _ = case(T=4, B=3)
    want = outputs(op, inputs)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(LAUNCHES):
        for got, expected in zip(outputs(op, inputs), want, strict=True):
            wrong += (got != expected).sum()
    assert wrong.item() == 0 and max(served.values()) == LAUNCHES + 1


def too_many_blocks():
    """Each op with a plan of more than any GPU can run at once."""
    plan, net = persistent.Plan(16, 4, 8), persistent.NetPlan(16, 4, 1, 8)
    x = there(lstm.make((2, 16, 640), torch.bfloat16))
    yield lambda: persistent.layer_norm_lstm(*x, 1e-4, False, plan=plan)
    d = there(decode.make((2, 16, 0, 640, 5)))
    yield lambda: persistent.decode_lstm(*d, None, 1e-4, None, None, plan)
    n = there(bytenet.make((2, 16, 0, 512, 5, 2)))
    yield lambda: persistent.decode_bytenet(*n, None, True, None, None, net)


def test_plans_that_do_not_fit_are_clear_errors():
    """After them the process can go on."""
    op, inputs, _ = decode_case()
    want = op(*inputs)
    for run in too_many_blocks():
        with pytest.raises(RuntimeError, match=r"the plan has \d+ blocks, but only \d+ can run"):
            run()
        assert torch.equal(op(*inputs), want)
    x = there(lstm.make((2, 1, 1024), torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"the plan needs \d+ bytes of shared memory a block"):
        persistent.layer_norm_lstm(*x, 1e-4, False, plan=persistent.Plan(1, 1024, 8))
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert torch.equal(op(*inputs), want)
