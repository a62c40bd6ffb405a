"""decode_bytenet: whole sequences of tokens, on every path, against its reference."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from fastvae import testing
from fastvae.ops.decode_bytenet import decode_bytenet, decode_bytenet_reference
from fastvae.ops.highway_conv import highway_conv_reference

NAMES = ("features", "feature_weight", "token_embeddings", "conv_weight", "conv_bias")
NAMES += ("classifier_weight", "classifier_bias")
DTYPES = [torch.float32, torch.bfloat16]
# (T, B, D, C, V, N): ones, primes, lanes and their neighbors
SHAPES = [(1, 1, 1, 1, 1, 1), (5, 1, 3, 7, 2, 2), (1, 7, 5, 3, 11, 3), (7, 3, 4, 15, 17, 1)]
SHAPES += [(6, 2, 0, 16, 16, 4), (5, 5, 13, 17, 15, 2), (4, 3, 47, 47, 31, 3)]
SHAPES += [(9, 4, 48, 48, 51, 2), (3, 13, 49, 49, 33, 1)]
PAPER = pytest.param((14, 32, 200, 256, 51, 10), marks=pytest.mark.slow)


def make(shape=(6, 3, 4, 5, 7, 2), dtype=torch.float32):
    T, B, D, C, V, N = shape
    tensors = (
        torch.randn(T, B, D),
        torch.randn(2 * C, D) / max(D, 1) ** 0.5,
        torch.randn(V + 1, 2 * C),
        torch.randn(N, 3 * C, C, 2) / C**0.5,
        torch.randn(N, 3 * C),
        2 * torch.randn(V, C),
        0.1 * torch.randn(V),
    )
    return [t.to(dtype) for t in tensors]


def gumbel(shape, dtype=torch.float32):
    T, B, _, _, V, _ = shape
    return -torch.empty(T, B, V, dtype=dtype).exponential_().log()


def teacher_forced(tokens, noise, *inputs, carry=True):
    """The logits [T, B, V] at every step, given what came before it, as one sequence."""
    features, feature_weight, rows, conv_weight, conv_bias, weight, bias = inputs
    start = torch.full_like(tokens[:, :1], len(rows) - 1)
    a = F.linear(features, feature_weight) + rows[torch.cat([start, tokens[:, :-1]], 1).T]
    p, q = a.chunk(2, -1)
    x = p.tanh() * q.sigmoid()
    for w, b in zip(conv_weight, conv_bias, strict=True):
        x = highway_conv_reference(x, w, b, carry)
    logits = F.linear(x, weight, bias)
    return logits if noise is None else logits + noise


def assert_best(tokens, noise, inputs, carry=True):
    testing.assert_best(tokens, lambda *t: teacher_forced(tokens, noise, *t, carry=carry), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("carry", [True, False], ids=["carry", "no-carry"])
@pytest.mark.parametrize("shape", [*SHAPES, PAPER], ids=str)
def test_forward(shape, carry, noisy, dtype):
    inputs, noise = make(shape, dtype), gumbel(shape) if noisy else None
    tokens = decode_bytenet(*inputs, noise, carry)
    assert tokens.dtype == torch.int64 and tokens.shape == (shape[1], shape[0])
    assert_best(tokens, noise, inputs, carry)


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("carry", [True, False], ids=["carry", "no-carry"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype, carry, noisy):
    inputs, noise = make(shape, dtype), gumbel(shape, dtype) if noisy else None
    tokens = decode_bytenet(*inputs, noise, carry)
    assert torch.equal(tokens, decode_bytenet_reference(*inputs, noise, carry))


def test_the_rule_can_fail():
    inputs = make()
    tokens = decode_bytenet(*inputs)
    tokens[1, 2] = (tokens[1, 2] + 1) % 7
    with pytest.raises(AssertionError):
        assert_best(tokens, None, inputs)


def test_tokens_depend_on_everything():
    """Another value of any input changes what comes out: none is ignored."""
    shape = (20, 8, 4, 5, 7, 2)
    tokens = decode_bytenet(*make(shape), gumbel(shape))
    for n in range(len(NAMES)):
        torch.manual_seed(0)
        inputs, noise = make(shape), gumbel(shape)
        inputs[n] = 3 * inputs[n].flip(0)
        assert not torch.equal(decode_bytenet(*inputs, noise), tokens), NAMES[n]
    torch.manual_seed(0)
    inputs, noise = make(shape), gumbel(shape)
    assert torch.equal(decode_bytenet(*inputs, noise), tokens)
    assert not torch.equal(decode_bytenet(*inputs, noise, carry=False), tokens)


def test_noise_decides():
    shape = (6, 3, 4, 5, 7, 2)
    wanted = torch.randint(7, (3, 6))
    noise = 1e6 * F.one_hot(wanted.T, 7).float()
    assert torch.equal(decode_bytenet(*make(shape), noise), wanted)


def test_gumbel_noise_samples_from_the_softmax():
    """Logits the same at every step: token counts are multinomial, within five deviations."""
    T, B, V = 50, 400, 5
    inputs = make((T, B, 1, 2, V, 1))
    inputs[5].zero_()
    share = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    inputs[6].copy_(share.log())
    counts = decode_bytenet(*inputs, gumbel((T, B, 1, 2, V, 1))).flatten().bincount(minlength=V)
    deviation = (T * B * share * (1 - share)).sqrt()
    assert ((counts - T * B * share).abs() < 5 * deviation).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_first(dtype):
    inputs = make(dtype=dtype)
    inputs[5].zero_()
    inputs[6].copy_(torch.tensor([0.0, 1, 3, 3, 2, 3, 0]))
    assert torch.equal(decode_bytenet(*inputs), torch.full((3, 6), 2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [5, 64])
def test_end_id(hidden, dtype):
    """Up to its first end_id a sequence is as without; after it, pads."""
    shape = (15, 6, 4, hidden, 4, 2)
    inputs = make(shape, dtype)
    inputs[5] /= 4  # so that noise decides, and lengths differ
    noise = gumbel(shape, torch.promote_types(dtype, torch.float32))
    free = decode_bytenet(*inputs, noise)
    tokens = decode_bytenet(*inputs, noise, end_id=2, pad_id=1)
    lengths = []
    for got, want in zip(tokens.tolist(), free.tolist(), strict=True):
        length = want.index(2) + 1 if 2 in want else len(want)
        assert got == want[:length] + [1] * (len(want) - length)
        lengths.append(length)
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("B, hidden", [(1, 160), (3, 5), (13, 49)])
def test_all_end_at_once(threads, B, hidden):
    """Work stops at the first token: features after it, NaN, are never read."""
    inputs = make((7, B, 4, hidden, 6, 2))
    inputs[6][4] = 1e6
    inputs[0][1:] = float("nan")
    tokens = decode_bytenet(*inputs, end_id=4, pad_id=0)
    assert tokens.tolist() == [[4, 0, 0, 0, 0, 0, 0]] * B


def test_pad_may_be_end():
    inputs = make((4, 2, 3, 5, 6, 2))
    inputs[6][4] = 1e6
    assert torch.equal(decode_bytenet(*inputs, end_id=4, pad_id=4), torch.full((2, 4), 4))


def test_opcheck():
    inputs, shape = make(), (6, 3, 4, 5, 7, 2)
    for noise, end_id, pad_id in ((None, None, None), (gumbel(shape), 2, 0)):
        args = (*inputs, noise, True, end_id, pad_id)
        torch.library.opcheck(torch.ops.fastvae.decode_bytenet, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous(dtype):
    shape = (9, 4, 48, 17, 15, 2)
    inputs, noise = make(shape, dtype), gumbel(shape)
    want = decode_bytenet(*inputs, noise)
    strided = [torch.stack([t, t.neg()], -1)[..., 0] for t in (*inputs, noise)]
    assert not strided[0].is_contiguous()
    assert torch.equal(decode_bytenet(*strided), want)
    batch_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (*inputs[:4], noise)]
    assert torch.equal(decode_bytenet(*batch_first[:4], *inputs[4:], batch_first[4]), want)


def test_expanded():
    inputs = make((6, 3, 4, 5, 7, 2))
    inputs[0] = inputs[0][:, :1].expand_as(inputs[0])
    inputs[4] = inputs[4][:1].expand_as(inputs[4])
    tokens = decode_bytenet(*inputs)
    assert torch.equal(tokens, tokens[:1].expand_as(tokens))
    assert torch.equal(tokens, decode_bytenet(*(t.contiguous() for t in inputs)))


@pytest.mark.parametrize("name", [*NAMES, "noise"])
def test_rejects_wrong_shape(name):
    inputs = [*make(), gumbel((6, 3, 4, 5, 7, 2))]
    n = [*NAMES, "noise"].index(name)
    wrong = {"features": inputs[0][0], "token_embeddings": inputs[2][0]}
    wrong |= {"conv_weight": inputs[3][..., :1], "classifier_weight": inputs[5][0]}
    wrong["conv_bias"] = inputs[4][:, :-1]
    inputs[n] = wrong.get(name, inputs[n][:-1])
    with pytest.raises(RuntimeError, match=rf"\b{name} must have"):
        decode_bytenet(*inputs)


@pytest.mark.parametrize("name", NAMES[1:])
def test_rejects_wrong_dtype(name):
    inputs = make()
    n = NAMES.index(name)
    inputs[n] = inputs[n].double()
    with pytest.raises(RuntimeError, match=rf"\b{name} must have the dtype of \w+"):
        decode_bytenet(*inputs)


def test_noise_is_float32():
    shape = (6, 3, 4, 5, 7, 2)
    with pytest.raises(RuntimeError, match="noise must have"):
        decode_bytenet(*make(shape, torch.bfloat16), gumbel(shape).bfloat16())
    with pytest.raises(RuntimeError, match="noise must have"):
        decode_bytenet(*make(shape, torch.float64), gumbel(shape))


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
def test_reference_serves_devices_without_a_kernel(noisy):
    shape, key = (6, 3, 4, 5, 7, 2), torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    inputs, noise = make(shape), gumbel(shape) if noisy else None
    op = torch.ops.fastvae.decode_bytenet.default
    assert_best(op.redispatch(key, *inputs, noise, True, None, None), noise, inputs)


@pytest.mark.parametrize(
    "value, place", [(float("nan"), -1), (float("inf"), 4), (-float("inf"), -1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_values(name, value, place):
    """As in the reference, where NaN counts as largest; one bad sequence harms no other."""
    inputs = make((5, 3, 4, 17, 7, 2))
    tokens = decode_bytenet(*inputs)
    n = NAMES.index(name)
    inputs[n].view(-1)[place] = value
    got = decode_bytenet(*inputs)
    assert torch.equal(got, decode_bytenet_reference(*inputs))
    if name == "features":
        bad = 2 if place == -1 else 1
        healthy = [b for b in range(3) if b != bad]
        assert torch.equal(got[healthy], tokens[healthy])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, offset", [(1e4, 0), (1, 1e4)])
@pytest.mark.parametrize("name", ["features", "token_embeddings", "classifier_weight"])
def test_magnitudes(name, scale, offset, dtype):
    inputs = make((6, 3, 4, 17, 7, 2), dtype)
    inputs[NAMES.index(name)].mul_(scale).add_(offset)
    assert_best(decode_bytenet(*inputs), None, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_never_written(dtype):
    inputs = [*make(dtype=dtype), gumbel((6, 3, 4, 5, 7, 2))]
    before = [(t.clone(), t._version) for t in inputs]
    decode_bytenet(*inputs, end_id=2, pad_id=0)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version


def test_parameters_need_no_gradient():
    inputs = [t.requires_grad_() for t in make()]
    assert not decode_bytenet(*inputs).requires_grad


def test_compile():
    shape = (6, 3, 4, 5, 7, 2)
    inputs, noise = make(shape), gumbel(shape)
    compiled = torch.compile(lambda *t: decode_bytenet(*t, end_id=2, pad_id=0) + 0, fullgraph=True)
    assert torch.equal(compiled(*inputs, noise), decode_bytenet(*inputs, noise, end_id=2, pad_id=0))


def test_python_threads():
    """Calls at once, each with a team of its own, choose what they choose alone."""
    cases = [make((5, n, 4, 64, 17, 2)) for n in range(3, 11)]
    alone = [decode_bytenet(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: decode_bytenet(*case), cases * 8))
    assert all(map(torch.equal, results, alone * 8))
    for case, tokens in zip(cases, alone, strict=True):
        assert_best(tokens, None, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 13, 13, 49, 31, 2), (1, 1, 13, 160, 31, 2)], ids=str)
def test_thread_counts(threads, shape, dtype):
    inputs = make(shape, dtype)
    assert_best(decode_bytenet(*inputs), None, inputs)
