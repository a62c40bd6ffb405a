"""decode_lstm: whole sequences of tokens, on every path, against its reference."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from fastvae import testing
from fastvae.ops.decode_lstm import decode_lstm, decode_lstm_reference
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference

NAMES = ("features", "feature_weight", "token_embeddings", "weight_hh", "norm_weight", "norm_bias")
NAMES += ("classifier_weight", "classifier_bias", "h0", "c0")
DTYPES = [torch.float32, torch.bfloat16]
# (T, B, D, H, V): ones, primes, lanes and their neighbors
SHAPES = [(1, 1, 1, 1, 1), (5, 1, 3, 7, 2), (1, 7, 5, 3, 11), (7, 3, 4, 15, 17), (6, 2, 0, 16, 16)]
SHAPES += [(5, 5, 13, 17, 15), (4, 3, 47, 47, 31), (9, 4, 48, 48, 51), (3, 13, 49, 49, 33)]
PAPER = pytest.param((12, 32, 200, 1000, 259), marks=pytest.mark.slow)


def make(shape=(6, 3, 4, 5, 7), dtype=torch.float32):
    T, B, D, H, V = shape
    tensors = (
        torch.randn(T, B, D),
        torch.randn(4 * H, D) / max(D, 1) ** 0.5,
        torch.randn(V + 1, 4 * H),
        torch.randn(4 * H, H) / H**0.5,
        1 + 0.1 * torch.randn(4 * H),
        0.1 * torch.randn(4 * H),
        2 * torch.randn(V, H),
        0.1 * torch.randn(V),
        torch.randn(B, H).tanh(),
        torch.randn(B, H),
    )
    return [t.to(dtype) for t in tensors]


def gumbel(shape, dtype=torch.float32):
    T, B, _, _, V = shape
    return -torch.empty(T, B, V, dtype=dtype).exponential_().log()


def teacher_forced(tokens, noise, *inputs):
    """The logits [T, B, V] at every step, given what came before it, as one sequence."""
    features, feature_weight, rows, weight_hh, gain, shift, weight, bias, h0, c0 = inputs
    start = torch.full_like(tokens[:, :1], len(rows) - 1)
    x = F.linear(features, feature_weight) + rows[torch.cat([start, tokens[:, :-1]], 1).T]
    h, _ = layer_norm_lstm_reference(x, weight_hh, gain, shift, h0, c0)
    logits = F.linear(h, weight, bias)
    return logits if noise is None else logits + noise


def assert_best(tokens, noise, inputs):
    testing.assert_best(tokens, lambda *t: teacher_forced(tokens, noise, *t), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("shape", [*SHAPES, PAPER], ids=str)
def test_forward(shape, noisy, dtype):
    inputs, noise = make(shape, dtype), gumbel(shape) if noisy else None
    tokens = decode_lstm(*inputs, noise)
    assert tokens.dtype == torch.int64 and tokens.shape == (shape[1], shape[0])
    assert_best(tokens, noise, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 21])
def test_long_sums_at_every_isa(isa, B, dtype):
    inputs = make((3, B, 5, 530, 33), dtype)
    assert_best(decode_lstm(*inputs), None, inputs)


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype, noisy):
    inputs, noise = make(shape, dtype), gumbel(shape, dtype) if noisy else None
    tokens = decode_lstm(*inputs, noise)
    assert torch.equal(tokens, decode_lstm_reference(*inputs, noise))


@pytest.fixture
def kernels(monkeypatch):
    """The GPU's, on the GPU if there is one, else in the interpreter; chunks of two steps."""
    kernels = pytest.importorskip("fastvae.kernels.decode_lstm")
    monkeypatch.setattr("fastvae.kernels.decode.STEPS", 2)
    return kernels


def triton_decode(kernels, inputs, noise, end_id=None, pad_id=None):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [t if t is None else t.to(device) for t in (*inputs, noise)]
    return kernels.decode_lstm(*tensors, 1e-4, end_id, pad_id).cpu()


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (5, 3, 4, 5, 7), (3, 2, 0, 17, 16)], ids=str)
def test_triton(kernels, shape, noisy):
    inputs, noise = make(shape), gumbel(shape) if noisy else None
    assert_best(triton_decode(kernels, inputs, noise), noise, inputs)


SMALL = (5, 3, 4, 5, 7)


def pack(kernels, inputs):
    """On the device of `triton_decode`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = (inputs[n].to(device) for n in (1, 3, 6, 2))
    return kernels.decode_lstm_pack(*weights)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), SMALL, (3, 2, 0, 17, 16)], ids=str)
@pytest.mark.parametrize("tables", [False, True], ids=["stacked", "tables"])
def test_triton_packed(kernels, shape, tables, monkeypatch):
    inputs, noise = make(shape), gumbel(shape)
    if tables:
        machine = kernels.persistent.Machine(132, 232_448)
        monkeypatch.setattr(kernels.persistent, "serving", lambda *_: machine)
    packed = pack(kernels, inputs)
    monkeypatch.undo()
    monkeypatch.setattr("fastvae.kernels.decode.STEPS", 2)
    # The packed weights are what is read: after these the weights of the call may be anything.
    others = list(inputs)
    others[3], others[6] = torch.full_like(inputs[3], torch.nan), torch.full_like(inputs[6], 9.0)
    device = packed.device
    tensors = [t.to(device) for t in (*others, noise)]
    tokens = kernels.decode_lstm(*tensors, 1e-4, None, None, packed).cpu()
    assert torch.equal(tokens, triton_decode(kernels, inputs, noise))
    *_, D, H, V = shape
    found = kernels._unpack(packed, D, H, V, inputs[0].to(device))
    assert len(found) == (7 if tables else 1)
    if tables:
        again = kernels.persistent.lstm_tables(*(inputs[n].to(device) for n in (1, 2, 3)))
        assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True))
        monkeypatch.setattr(kernels.persistent, "serving", lambda *_: machine)
        alone = kernels.decode_lstm_pack(*(inputs[n].to(device) for n in (1, 3, 6)))
        assert len(kernels._unpack(alone, D, H, V, inputs[0].to(device))) == 1


def test_triton_packed_is_checked(kernels):
    inputs = make(SMALL)
    packed = pack(kernels, inputs)
    tensors = [t.to(packed.device) for t in inputs]
    for bad, message in (
        (packed[:-16], "packed must have .* bytes, got .*: pack these weights"),
        (packed.float(), "packed must be what the op's pack function returns"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.decode_lstm(*tensors, None, 1e-4, None, None, bad)
    nothing = kernels.decode_lstm_pack(*(tensors[n] for n in (1, 3, 6)), int8=True)
    assert not len(nothing)
    found = kernels.decode_lstm(*tensors, None, 1e-4, None, None, nothing, True).cpu()
    expected = decode_lstm_reference(*inputs, None, 1e-4, None, None, int8=True)
    assert torch.equal(found, expected)


def test_triton_end_id(kernels):
    shape = (7, 6, 2, 3, 4)
    inputs, noise = make(shape), gumbel(shape)
    inputs[6] /= 4
    tokens = triton_decode(kernels, inputs, noise, 2, 1)
    assert torch.equal(tokens, decode_lstm_reference(*inputs, noise, 1e-4, 2, 1))
    assert len({row.index(2) for row in tokens.tolist() if 2 in row}) > 1
    inputs[7][2] = 1e6
    inputs[0][2:] = float("nan")  # never read: all end in the first chunk, of two steps
    assert triton_decode(kernels, inputs, None, 2, 1).tolist() == [[2] + [1] * 6] * 6


def test_triton_choice(kernels):
    """Ties go to the first, −0 equals 0, NaN is largest, and minus infinity can be chosen."""
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, 1, 3, 3], [-0.0, 0, -1, -2], [1, nan, inf, nan], [-inf] * 4, [-3, -2, -9, -2]]
    rows += [[0, nan, nan, 1], [0, 3, 3, 0], [nan, 0, 0, nan], [nan] * 4, [inf, 0, inf, inf]]
    inputs = make((len(rows), 1, 2, 3, 4))
    inputs[6].zero_()
    inputs[7].zero_()
    inputs[7] -= 0.0
    noise = torch.tensor(rows).unsqueeze(1)
    assert triton_decode(kernels, inputs, noise).tolist() == [[2, 0, 1, 0, 1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("name", [*NAMES, "noise"])
def test_triton_rejects_wrong_shape(kernels, name):
    inputs = [*make(), gumbel((6, 3, 4, 5, 7))]
    n = [*NAMES, "noise"].index(name)
    wrong = {"features": inputs[0][0], "token_embeddings": inputs[2][0]}
    wrong["classifier_weight"] = inputs[6][:, :-1]
    inputs[n] = wrong.get(name, inputs[n][:-1])
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        kernels.decode_lstm(*inputs, 1e-4, None, None)


@pytest.mark.parametrize("dtype, largest", [(torch.float64, 9), (torch.float32, 6)], ids=str)
@pytest.mark.parametrize("H, V", [(5, 7), (7, 5)])
def test_triton_leaves_what_it_cannot_hold_to_pytorch(kernels, H, V, dtype, largest, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST", largest)
    monkeypatch.setattr(kernels, "step_kernel", None)
    shape = (5, 3, 4, H, V)
    inputs, noise = make(shape, dtype), gumbel(shape, dtype)
    assert not pack(kernels, inputs).numel()
    tokens = triton_decode(kernels, inputs, noise, 2, 1)
    assert torch.equal(tokens, decode_lstm_reference(*inputs, noise, 1e-4, 2, 1))


def test_triton_chunks():
    """Alike, no longer than asked for, and of few steps where the batch is large."""
    steps = pytest.importorskip("fastvae.kernels.decode").chunk_steps
    for T in (1, 31, 32, 33, 60, 128, 1000):
        count = steps(T, 1, 4000)
        assert count <= 32 and -(-T // count) == -(-T // 32)
    assert steps(128, 1024, 4000) == 16 and steps(9, 1 << 20, 400) == 1


def test_the_rule_can_fail():
    inputs = make()
    tokens = decode_lstm(*inputs)
    tokens[1, 2] = (tokens[1, 2] + 1) % 7
    with pytest.raises(AssertionError):
        assert_best(tokens, None, inputs)


def test_tokens_depend_on_everything():
    """Another value of any input changes what comes out: none is ignored."""
    shape = (20, 8, 4, 5, 7)
    tokens = decode_lstm(*make(shape), gumbel(shape))
    for n in range(len(NAMES)):
        torch.manual_seed(0)
        inputs, noise = make(shape), gumbel(shape)
        inputs[n] = 3 * inputs[n].flip(0)
        assert not torch.equal(decode_lstm(*inputs, noise), tokens), NAMES[n]


def test_noise_decides():
    shape = (6, 3, 4, 5, 7)
    wanted = torch.randint(7, (3, 6))
    noise = 1e6 * F.one_hot(wanted.T, 7).float()
    assert torch.equal(decode_lstm(*make(shape), noise), wanted)


def test_gumbel_noise_samples_from_the_softmax():
    """Logits the same at every step: token counts are multinomial, within five deviations."""
    T, B, V = 50, 400, 5
    inputs = make((T, B, 1, 2, V))
    inputs[6].zero_()
    share = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    inputs[7].copy_(share.log())
    counts = decode_lstm(*inputs, gumbel((T, B, 1, 2, V))).flatten().bincount(minlength=V)
    deviation = (T * B * share * (1 - share)).sqrt()
    assert ((counts - T * B * share).abs() < 5 * deviation).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_first(dtype):
    inputs = make(dtype=dtype)
    inputs[6].zero_()
    inputs[7].copy_(torch.tensor([0.0, 1, 3, 3, 2, 3, 0]))
    assert torch.equal(decode_lstm(*inputs), torch.full((3, 6), 2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [5, 64])
def test_end_id(hidden, dtype):
    """Up to its first end_id a sequence is as without; after it, pads."""
    shape = (15, 6, 4, hidden, 4)
    inputs = make(shape, dtype)
    inputs[6] /= 4  # so that noise decides, and lengths differ
    noise = gumbel(shape, torch.promote_types(dtype, torch.float32))
    free = decode_lstm(*inputs, noise)
    tokens = decode_lstm(*inputs, noise, end_id=2, pad_id=1)
    lengths = []
    for got, want in zip(tokens.tolist(), free.tolist(), strict=True):
        length = want.index(2) + 1 if 2 in want else len(want)
        assert got == want[:length] + [1] * (len(want) - length)
        lengths.append(length)
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("B, hidden", [(1, 160), (3, 5), (13, 49)])
def test_all_end_at_once(threads, B, hidden):
    """Work stops at the first token: features after it, NaN, are never read."""
    inputs = make((7, B, 4, hidden, 6))
    inputs[7][4] = 1e6
    inputs[0][1:] = float("nan")
    tokens = decode_lstm(*inputs, end_id=4, pad_id=0)
    assert tokens.tolist() == [[4, 0, 0, 0, 0, 0, 0]] * B


def test_pad_may_be_end():
    inputs = make((4, 2, 3, 5, 6))
    inputs[7][4] = 1e6
    assert torch.equal(decode_lstm(*inputs, end_id=4, pad_id=4), torch.full((2, 4), 4))


def test_opcheck():
    inputs, shape = make(), (6, 3, 4, 5, 7)
    for noise, end_id, pad_id in ((None, None, None), (gumbel(shape), 2, 0)):
        args = (*inputs, noise, 1e-4, end_id, pad_id)
        torch.library.opcheck(torch.ops.fastvae.decode_lstm, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype):
    shape = (9, 4, 48, 17, 15)
    inputs, noise = make(shape, dtype), gumbel(shape)
    want = decode_lstm(*inputs, noise)
    strided = [torch.stack([t, t.neg()], -1)[..., 0] for t in (*inputs, noise)]
    assert not strided[0].is_contiguous()
    assert torch.equal(decode_lstm(*strided), want)
    batch_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (*inputs[:4], noise)]
    assert torch.equal(decode_lstm(*batch_first[:4], *inputs[4:], batch_first[4]), want)


def test_expanded():
    inputs = make((6, 3, 4, 5, 7))
    for n in (0, 8, 9):
        inputs[n] = inputs[n][..., :1, :].expand_as(inputs[n])
    tokens = decode_lstm(*inputs)
    assert torch.equal(tokens, tokens[:1].expand_as(tokens))
    assert torch.equal(tokens, decode_lstm(*(t.contiguous() for t in inputs)))


@pytest.mark.parametrize("name", [*NAMES, "noise"])
def test_rejects_wrong_shape(name):
    inputs = [*make(), gumbel((6, 3, 4, 5, 7))]
    n = [*NAMES, "noise"].index(name)
    wrong = {"features": inputs[0][0], "token_embeddings": inputs[2][0]}
    wrong["classifier_weight"] = inputs[6][:, :-1]
    inputs[n] = wrong.get(name, inputs[n][:-1])
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        decode_lstm(*inputs)


@pytest.mark.parametrize("name", NAMES[1:])
def test_rejects_wrong_dtype(name):
    inputs = make()
    n = NAMES.index(name)
    inputs[n] = inputs[n].double()
    with pytest.raises(RuntimeError, match=rf"\b{name} must have the dtype of \w+"):
        decode_lstm(*inputs)


def test_noise_is_float32():
    shape = (6, 3, 4, 5, 7)
    with pytest.raises(RuntimeError, match="noise must have"):
        decode_lstm(*make(shape, torch.bfloat16), gumbel(shape).bfloat16())
    with pytest.raises(RuntimeError, match="noise must have"):
        decode_lstm(*make(shape, torch.float64), gumbel(shape))


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
def test_reference_serves_devices_without_a_kernel(noisy):
    shape, key = (6, 3, 4, 5, 7), torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    inputs, noise = make(shape), gumbel(shape) if noisy else None
    op = torch.ops.fastvae.decode_lstm.default
    assert_best(op.redispatch(key, *inputs, noise, 1e-4, None, None), noise, inputs)


@pytest.mark.parametrize(
    "value, place", [(float("nan"), -1), (float("inf"), 4), (-float("inf"), -1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_values(name, value, place):
    """As in the reference, where NaN counts as largest; one bad sequence harms no other."""
    inputs = make((5, 3, 4, 17, 7))
    tokens = decode_lstm(*inputs)
    n = NAMES.index(name)
    inputs[n].view(-1)[place] = value
    got = decode_lstm(*inputs)
    assert torch.equal(got, decode_lstm_reference(*inputs))
    if name in ("features", "h0", "c0"):
        bad = 2 if place == -1 else int(name == "features")
        healthy = [b for b in range(3) if b != bad]
        assert torch.equal(got[healthy], tokens[healthy])


def overflowing():
    """Inputs of a second sequence whose variance overflows at the second step, and their tokens.

    Those of NaN are 0; any number gives 3.
    """
    inputs = make((4, 3, 4, 17, 5))
    inputs[0][1:, 1] *= 1e25
    inputs[7][3] = 100
    return inputs, [[3, 3, 3, 3], [3, 0, 0, 0], [3, 3, 3, 3]]


def test_a_variance_that_overflows_is_nan(threads):
    """Zeros would look like numbers; in the reference it is for torch.layer_norm to say."""
    inputs, want = overflowing()
    assert decode_lstm(*inputs).tolist() == want


def test_triton_of_a_variance_that_overflows(kernels):
    inputs, want = overflowing()
    assert triton_decode(kernels, inputs, None).tolist() == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, offset", [(1e4, 0), (1, 1e4)])
@pytest.mark.parametrize("name", ["features", "token_embeddings", "classifier_weight"])
def test_magnitudes(name, scale, offset, dtype):
    inputs = make((6, 3, 4, 17, 7), dtype)
    inputs[NAMES.index(name)].mul_(scale).add_(offset)
    assert_best(decode_lstm(*inputs), None, inputs)


def test_constant_rows():
    """No variance in the norm: its bias alone decides, the same at every place."""
    inputs = make((4, 3, 2, 16, 5))
    for n in (0, 2, 3, 8, 9):
        inputs[n].zero_()
    tokens = decode_lstm(*inputs)
    assert torch.equal(tokens, tokens[:1].expand_as(tokens))
    assert_best(tokens, None, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_never_written(dtype):
    inputs = [*make(dtype=dtype), gumbel((6, 3, 4, 5, 7))]
    before = [(t.clone(), t._version) for t in inputs]
    decode_lstm(*inputs, end_id=2, pad_id=0)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version


def test_parameters_need_no_gradient():
    inputs = [t.requires_grad_() for t in make()]
    assert not decode_lstm(*inputs).requires_grad


def test_compile():
    shape = (6, 3, 4, 5, 7)
    inputs, noise = make(shape), gumbel(shape)
    compiled = torch.compile(lambda *t: decode_lstm(*t, end_id=2, pad_id=0) + 0, fullgraph=True)
    assert torch.equal(compiled(*inputs, noise), decode_lstm(*inputs, noise, end_id=2, pad_id=0))


def test_python_threads():
    """Calls at once, each with a team of its own, choose what they choose alone."""
    cases = [make((5, n, 4, 64, 17)) for n in range(3, 11)]
    alone = [decode_lstm(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: decode_lstm(*case), cases * 8))
    assert all(map(torch.equal, results, alone * 8))
    for case, tokens in zip(cases, alone, strict=True):
        assert_best(tokens, None, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 13, 13, 49, 31), (1, 1, 13, 160, 31)], ids=str)
def test_thread_counts(threads, shape, dtype):
    inputs = make(shape, dtype)
    assert_best(decode_lstm(*inputs), None, inputs)
