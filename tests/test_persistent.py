"""The persistent kernels of csrc/cuda, run on the host by tests/simulator.

The sources are those that nvcc compiles, launchers included. A launch runs as fibers whose order is
drawn at random, and so is when a word that blocks exchange arrives.
"""

import json
from pathlib import Path

import pytest
import test_decode_bytenet as bytenet
import test_decode_lstm as decode
import test_layer_norm_lstm as lstm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvae.ops.decode_bytenet import decode_bytenet_reference
from fastvae.ops.decode_lstm import decode_lstm_reference
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_loop
from fastvae.testing import assert_accurate

persistent = pytest.importorskip("fastvae.kernels.persistent")
Plan, NetPlan = persistent.Plan, persistent.NetPlan
products = pytest.importorskip("fastvae.kernels.products")
ROOT = Path(__file__).parents[1]
THREADS = 64
ORDERS = range(10)  # each way that words travel, with two draws of the threads' order
SHORT = [torch.bfloat16, torch.float16]
COLUMNS = [(torch.float32, 1), (torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 16)]
# (T, B, H), groups, units: one block; several; a last one with little; groups; slices; all of them;
# more words of a slice than threads; more rows than sums in registers; a last one that publishes
# more words than it has cells
LSTM = [((1, 1, 1), 1, 4), ((4, 3, 7), 1, 4), ((2, 2, 49), 1, 16), ((3, 5, 16), 2, 8)]
LSTM += [((3, 19, 20), 1, 8), ((4, 11, 26), 3, 12), ((3, 9, 73), 1, 20), ((3, 3, 49), 1, 52)]
LSTM += [((3, 2, 17), 1, 4)]
# (T, B, D, H, V), groups, units; blocks without a token too
DECODE_LSTM = [((1, 1, 1, 1, 1), 1, 4), ((5, 2, 3, 15, 17), 1, 4), ((4, 5, 13, 17, 3), 2, 8)]
DECODE_LSTM += [((4, 11, 0, 26, 51), 1, 8), ((3, 2, 3, 17, 5), 1, 4)]
# (T, B, D, C, V, N), groups, units, classifier_blocks
DECODE_BYTENET = [((1, 1, 1, 1, 1, 1), 1, 4, 1), ((5, 2, 4, 15, 17, 2), 1, 8, 2)]
DECODE_BYTENET += [((4, 5, 0, 24, 51, 2), 1, 12, 4), ((3, 11, 13, 17, 15, 3), 2, 8, 3)]
DECODE_BYTENET += [((3, 9, 2, 73, 5, 1), 1, 20, 1), ((3, 2, 3, 17, 5, 1), 1, 4, 1)]


def in_every_order(simulator, run):
    """The outputs of run(), which no order may change by a bit."""
    outputs = []
    for seed in ORDERS:
        simulator.set_seed(seed)
        outputs.append(run())
    for other in outputs[1:]:
        for got, want in zip(other, outputs[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    return outputs[0]


@pytest.mark.parametrize("dtype, columns", [(SHORT[0], 8), (SHORT[1], 16), (SHORT[0], 32)], ids=str)
@pytest.mark.parametrize("shape, groups, units", LSTM, ids=str)
def test_layer_norm_lstm(simulator, shape, groups, units, dtype, columns):
    plan = Plan(groups, units, columns, THREADS)

    def op(*inputs):
        return persistent.layer_norm_lstm(*inputs, 1e-4, True, plan=plan)

    inputs = lstm.make(shape, dtype)
    assert_accurate(op, lambda *t: layer_norm_lstm_loop(*t, 1e-4, True), *inputs)
    saving = in_every_order(simulator, lambda: op(*inputs))
    plain = persistent.layer_norm_lstm(*inputs, 1e-4, False, plan=plan)
    assert torch.equal(plain[0], saving[0]) and torch.equal(plain[1], saving[1])
    assert [t.numel() for t in plain[2:]] == [0, 0, 0]


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("dtype, columns", COLUMNS, ids=str)
@pytest.mark.parametrize("shape, groups, units", DECODE_LSTM, ids=str)
def test_decode_lstm(simulator, shape, groups, units, dtype, columns, noisy):
    inputs, noise = decode.make(shape, dtype), decode.gumbel(shape) if noisy else None
    plan = Plan(groups, units, columns, THREADS)
    run = lambda: [persistent.decode_lstm(*inputs, noise, 1e-4, None, None, plan)]  # noqa: E731
    (tokens,) = in_every_order(simulator, run)
    decode.assert_best(tokens, noise, inputs)
    tables = persistent.lstm_tables(*(inputs[n] for n in (1, 2, 3)))  # once, kept by the caller
    _, *tables = products.parted(products.joined([inputs[3], *tables]), [inputs[3], *tables])
    rest = noise, 1e-4, None, None, plan, persistent.Tables(*tables)
    assert torch.equal(tokens, persistent.decode_lstm(*inputs, *rest))
    if dtype == torch.float32:
        assert torch.equal(tokens, decode_lstm_reference(*inputs, noise))


@pytest.mark.parametrize("threads", [32, 96, 256])
@pytest.mark.parametrize("dtype, columns", [(torch.bfloat16, 8), (torch.float32, 8)], ids=str)
def test_any_number_of_warps(simulator, threads, dtype, columns):
    """One, whose sums nobody adds to; an odd number; as many as a launch has by default.

    The depth is enough for most of them, and for one to take more than it loads at once.
    """
    H, plan = 135, Plan(1, 72, columns, threads)
    if dtype in persistent.DTYPES["layer_norm_lstm"]:
        inputs = lstm.make((2, 3, H), dtype)
        op = lambda *t: persistent.layer_norm_lstm(*t, 1e-4, True, plan=plan)  # noqa: E731
        assert_accurate(op, lambda *t: layer_norm_lstm_loop(*t, 1e-4, True), *inputs)
    shape = (3, 3, 3, H, 19)
    inputs, noise = decode.make(shape, dtype), decode.gumbel(shape)
    tokens = persistent.decode_lstm(*inputs, noise, 1e-4, None, None, plan)
    decode.assert_best(tokens, noise, inputs)
    inputs = bytenet.make((*shape, 1), dtype)
    net = NetPlan(1, 72, 2, columns, threads)
    tokens = persistent.decode_bytenet(*inputs, noise, True, None, None, net)
    bytenet.assert_best(tokens, noise, inputs)


@pytest.mark.parametrize(
    "B, groups", [(10, 1), (3, 1), (19, 2)], ids=["owners", "direct", "groups"]
)
def test_more_steps_than_the_ring_has_buffers(simulator, B, groups):
    """More than twice as many, so that each is emptied and used again, twice."""
    T, H, plan = 37, 12, Plan(groups, 4, 8, THREADS)
    inputs = lstm.make((T, B, H), torch.bfloat16)
    op = lambda *t: persistent.layer_norm_lstm(*t, 1e-4, True, plan=plan)  # noqa: E731
    assert_accurate(op, lambda *t: layer_norm_lstm_loop(*t, 1e-4, True), *inputs)
    in_every_order(simulator, lambda: op(*inputs))
    inputs = decode.make((T, B, 2, H, 7))
    run = lambda: [persistent.decode_lstm(*inputs, None, 1e-4, None, None, plan)]  # noqa: E731
    assert torch.equal(in_every_order(simulator, run)[0], decode_lstm_reference(*inputs, None))


def test_decode_lstm_of_tokens_that_cancel_the_state(simulator):
    """What a token adds to the squares is then a hundred times what is left of them.

    Some channels of h are 1 at every step; W h is made of these, and the embeddings take it away.
    """
    H = 24
    inputs = decode.make((16, 24, 3, H, 33))
    _, _, embeddings, weight_hh, gain, bias, classifier, _, h0, c0 = inputs
    fixed, state = torch.arange(H) < 8, 16 * torch.randn(4 * H).sign()
    weight_hh[:] = fixed * state[:, None] / 8
    embeddings -= state
    gain.view(4, H)[:, fixed], bias.view(4, H)[:, fixed], classifier[:, fixed] = 0, 20, 0
    h0[:, fixed], c0[:, fixed] = 1, 20
    inputs = [t.bfloat16() for t in inputs]
    plan = Plan(1, 8, 8, THREADS)
    tokens = persistent.decode_lstm(*inputs, None, 1e-4, None, None, plan)
    decode.assert_best(tokens, None, inputs)


def test_decode_lstm_of_tokens_that_cancel_everything(simulator):
    """No variance is left, or by rounding less than none: the norm's bias alone decides."""
    for _ in range(8):
        inputs = decode.make((2, 2, 3, 8, 9))
        inputs[0][:], inputs[1][:] = torch.randint(-50, 50, (3,)), torch.randint(-50, 50, (32, 3))
        inputs[2][:] = -(inputs[0][0, 0] @ inputs[1].T)
        inputs[3].zero_()
        inputs[7][0] -= 100  # what NaN would choose
        assert torch.equal(lstm_tokens(inputs), decode_lstm_reference(*inputs))


@pytest.mark.parametrize("carry", [True, False], ids=["carry", "no-carry"])
@pytest.mark.parametrize("dtype, columns", COLUMNS, ids=str)
@pytest.mark.parametrize("shape, groups, units, classifier_blocks", DECODE_BYTENET, ids=str)
def test_decode_bytenet(simulator, shape, groups, units, classifier_blocks, dtype, columns, carry):
    inputs, noise = bytenet.make(shape, dtype), bytenet.gumbel(shape) if carry else None
    plan = NetPlan(groups, units, classifier_blocks, columns, THREADS)
    run = lambda: [persistent.decode_bytenet(*inputs, noise, carry, None, None, plan)]  # noqa: E731
    (tokens,) = in_every_order(simulator, run)
    bytenet.assert_best(tokens, noise, inputs, carry)
    if dtype == torch.float32:
        assert torch.equal(tokens, decode_bytenet_reference(*inputs, noise, carry))


def lstm_tokens(inputs, noise=None, end_id=None, pad_id=None):
    return persistent.decode_lstm(*inputs, noise, 1e-4, end_id, pad_id, Plan(1, 8, 8, THREADS))


def bytenet_tokens(inputs, noise=None, end_id=None, pad_id=None):
    plan = NetPlan(1, 8, 2, 8, THREADS)
    return persistent.decode_bytenet(*inputs, noise, True, end_id, pad_id, plan)


def bytenet_tokens_of_many_words(inputs, noise=None, end_id=None, pad_id=None):
    """A thread takes words of the next slice while others have yet to see that one has stopped."""
    plan = NetPlan(1, 20, 1, 8, THREADS)
    return persistent.decode_bytenet(*inputs, noise, True, end_id, pad_id, plan)


ENDING = [(lstm_tokens, decode), (bytenet_tokens, bytenet), (bytenet_tokens_of_many_words, bytenet)]


@pytest.mark.parametrize("tokens_of, make", ENDING)
def test_ends(simulator, tokens_of, make):
    """Up to its first end_id a sequence is as without; after it, pads; a launch ends with them."""
    shape = (9, 20, 4, 33, 4, *[2][: make is bytenet])
    inputs, noise = make.make(shape), make.gumbel(shape)
    free = tokens_of(inputs, noise).tolist()
    (tokens,) = in_every_order(simulator, lambda: [tokens_of(inputs, noise, 2, 1)])
    lengths = [row.index(2) + 1 if 2 in row else 9 for row in free]
    assert len(set(lengths)) > 2
    for got, want, length in zip(tokens.tolist(), free, lengths, strict=True):
        assert got == want[:length] + [1] * (9 - length)
    noise[2:, :, 2] = 1e4
    noise[:2, :, 2] = -1e4
    noise[4:] = float("nan")  # never read: all have ended
    tokens = tokens_of(inputs, noise, 2, 1)
    assert (tokens[:, 2] == 2).all() and (tokens[:, :2] != 2).all() and (tokens[:, 3:] == 1).all()


@pytest.mark.parametrize("tokens_of, make", ENDING)
def test_the_last_sequence_continues_alone(simulator, tokens_of, make):
    """Beyond a slice of sequences and a chunk of steps, after all others have ended."""
    T, B = 40, 17
    inputs, noise = (f((T, B, 2, 33, 4, *[2][: make is bytenet])) for f in (make.make, make.gumbel))
    noise[0, :, 2] = noise[:, -1, 2] = -1e4
    noise[1, :-1, 2] = 1e4
    want = tokens_of(inputs, noise)
    want[:-1, 2:] = 1
    assert torch.equal(tokens_of(inputs, noise, 2, 1), want)
    assert (want[:-1, 1] == 2).all() and (want[-1] != 2).all() and len(want[-1].unique()) > 1


def test_ties_and_nan(simulator):
    """As torch.argmax: NaN before all, the first of the largest."""
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, 1, 3, 3], [-0.0, 0, -1, -2], [1, nan, inf, nan], [-inf] * 4, [-3, -2, -9, -2]]
    rows += [[0, nan, nan, 1], [0, 3, 3, 0], [nan, 0, 0, nan], [nan] * 4, [inf, 0, inf, inf]]
    noise = torch.tensor(rows).unsqueeze(1)
    inputs = decode.make((len(rows), 1, 2, 33, 4))
    inputs[6].zero_()
    inputs[7].zero_()
    assert lstm_tokens(inputs, noise).tolist() == [[2, 0, 1, 0, 1, 1, 1, 0, 0, 0]]
    inputs = bytenet.make((len(rows), 1, 2, 17, 4, 2))
    inputs[5].zero_()
    inputs[6].zero_()
    assert bytenet_tokens(inputs, noise).tolist() == [[2, 0, 1, 0, 1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_sequence(simulator, value):
    """And a NaN of all ones, which looks like a word that has not come, is no reason to wait."""
    inputs = lstm.make((4, 3, 17), torch.bfloat16)
    inputs[0][1, 2, 5] = value
    inputs[4].view(torch.int16)[1] = -1
    plan = Plan(1, 8, 8, THREADS)
    h, c_n, *_ = persistent.layer_norm_lstm(*inputs, 1e-4, False, plan=plan)
    assert h[1:, 2].isnan().all() and c_n[2].isnan().all() and h[:, 1].isnan().all()
    assert h[0, 2].isfinite().all() and h[:, 0].isfinite().all() and c_n[0].isfinite().all()
    overflowing, want = decode.overflowing()
    assert lstm_tokens(overflowing).tolist() == want
    candidates = bytenet.make((3, 2, 4, 9, 5, 2))
    want = bytenet_tokens(candidates)
    candidates[0][0, 1] = value
    assert torch.equal(bytenet_tokens(candidates)[0], want[0])


@pytest.mark.parametrize("dtype, columns", COLUMNS, ids=str)
def test_nan_of_a_weight_stays_in_its_row(simulator, dtype, columns):
    """It begins the row after one of an odd length."""
    inputs, nets = decode.make((2, 3, 4, 9, 5), dtype), bytenet.make((2, 3, 4, 9, 5, 1), dtype)
    inputs[6][3, 0] = nets[5][3, 0] = float("nan")
    plan, net = Plan(1, 12, columns, THREADS), NetPlan(1, 12, 1, columns, THREADS)
    assert (persistent.decode_lstm(*inputs, None, 1e-4, None, None, plan) == 3).all()
    assert (persistent.decode_bytenet(*nets, None, True, None, None, net) == 3).all()


def test_nan_of_all_ones_is_no_reason_to_wait(simulator):
    """Nor in float32, in a state and in a logit, which are published as they are."""
    inputs, noise = decode.make((3, 2, 4, 9, 5)), decode.gumbel((3, 2, 4, 9, 5))
    want = lstm_tokens(inputs, noise)
    noise.view(torch.int32)[0, 1, 3] = -1
    assert lstm_tokens(inputs, noise)[1, 0] == 3
    inputs[8].view(torch.int32)[1] = -1
    tokens = lstm_tokens(inputs, noise)
    assert torch.equal(tokens[0], want[0]) and not tokens[1, 1:].any()
    inputs, noise = bytenet.make((3, 2, 4, 9, 5, 2)), bytenet.gumbel((3, 2, 4, 9, 5, 2))
    noise.view(torch.int32)[0, 1, 3] = -1
    assert bytenet_tokens(inputs, noise)[1, 0] == 3
    inputs[0].view(torch.int32)[1, 1] = -1
    assert not bytenet_tokens(inputs, noise)[1, 1:].any()


@pytest.mark.parametrize("size", [1e19, 1e20, 1e30])
def test_a_variance_that_overflows_is_nan(simulator, size):
    """As on a CPU, where the sum overflows and where each square does: zeros look like numbers."""
    inputs = lstm.make((2, 3, 17), torch.bfloat16)
    inputs[0] *= size
    plan = Plan(1, 8, 8, THREADS)
    h, c_n, *_ = persistent.layer_norm_lstm(*inputs, 1e-4, False, plan=plan)
    assert h.isnan().all() and c_n.isnan().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_batches_of_a_launch(simulator, monkeypatch, groups):
    """The last may have fewer sequences than the plan has groups."""
    plan = Plan(groups, 8, 8, THREADS)
    inputs, candidates = lstm.make((3, 7, 9), torch.bfloat16), decode.make((4, 7, 3, 9, 7))
    nets, noise = bytenet.make((4, 7, 3, 9, 7, 2)), decode.gumbel((4, 7, 3, 9, 7))
    outputs = []
    for batch in (8, 3):
        monkeypatch.setattr(persistent, "BATCH", batch)
        net = NetPlan(groups, 8, 2, 8, THREADS)
        tokens = persistent.decode_lstm(*candidates, noise, 1e-4, None, None, plan)
        others = persistent.decode_bytenet(*nets, noise, True, None, None, net)
        states = persistent.layer_norm_lstm(*inputs, 1e-4, True, plan=plan)
        plain = persistent.layer_norm_lstm(*inputs, 1e-4, False, plan=plan)
        outputs.append((tokens, others, *states, *plain))
    assert all(map(torch.equal, *outputs))


def launches(dtype=torch.bfloat16):
    """Each op: its name, its arguments as they are launched, and the names of its tensors."""
    inputs, plan = lstm.make((2, 3, 8), dtype), Plan(1, 8, 8, 32)
    names = "x weight_hh norm_weight norm_bias h0 c0"
    yield "layer_norm_lstm", (*inputs, 1e-4, True, *plan), names.split()
    d, weight, rows, weight_hh, gain, bias, classifier, logit_bias, h0, c0 = decode.make(
        (2, 3, 2, 8, 5), dtype
    )
    tables = persistent.lstm_tables(weight, rows, weight_hh)
    cross, start = torch.randn(2, 3, 5), torch.randn(3)
    tensors = d @ weight.T, cross, start, rows, tables.means, weight_hh, gain, bias, classifier
    tensors = *tensors, logit_bias, tables.by_state, h0, c0, decode.gumbel((2, 3, 2, 8, 5))
    names = "projected projected_cross start_cross token_embeddings row_means weight_hh norm_weight"
    names += " norm_bias classifier_weight classifier_bias cross_weight h0 c0 noise"
    yield "decode_lstm", (*tensors, 1e-4, 2, 1, *plan), names.split()
    d, weight, rows, conv_weight, conv_bias, classifier, logit_bias = bytenet.make(
        (2, 3, 2, 8, 5, 2), dtype
    )
    taps = conv_weight.permute(0, 3, 1, 2).contiguous()
    tensors = d @ weight.T, rows, taps, conv_bias, classifier, logit_bias
    tensors = *tensors, decode.gumbel((2, 3, 2, 8, 5))
    names = "projected token_embeddings conv_weight conv_bias classifier_weight classifier_bias"
    arguments = *tensors, True, 2, 1, *NetPlan(1, 8, 2, 8, 32)
    yield "decode_bytenet", arguments, [*names.split(), "noise"]


def launched(op, arguments):
    found = getattr(torch.ops.fastvae, f"{op}_persistent")(*arguments)
    return found if isinstance(found, tuple) else (found,)


def test_every_tensor_is_checked(simulator):
    """Its shape, its dtype, and that it is there."""
    for op, arguments, names in launches():
        launched(op, arguments)
        for n, name in enumerate(names):
            t = arguments[n]
            for wrong in (t[..., :-1], t.unsqueeze(0), t.double(), t.to(torch.complex64)):
                # What sets a size for others is not blamed for its length itself.
                shape = wrong.shape != t.shape and name not in ("noise", "start_cross")
                blamed = r"\w+" if shape or n == 0 else name
                with pytest.raises(RuntimeError, match=rf"^({blamed} must have|no persistent)"):
                    launched(op, (*arguments[:n], wrong, *arguments[n + 1 :]))


def test_tensors_of_any_strides_and_places(simulator):
    """Such as begin at an odd address, where nothing can be read four numbers at a time."""
    for op, arguments, names in launches():
        want = launched(op, arguments)
        strided, moved = list(arguments), list(arguments)
        for n, _ in enumerate(names):
            t = arguments[n]
            strided[n] = torch.stack([t, -t], -1)[..., 0]
            moved[n] = torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t)
            for one in (strided, moved):
                alone = *arguments[:n], one[n], *arguments[n + 1 :]
                assert all(map(torch.equal, launched(op, alone), want))
        assert all(map(torch.equal, launched(op, strided), want))
        assert all(map(torch.equal, launched(op, moved), want))


PLANS = {  # of decode_bytenet and of decode_lstm: the argument, what it is, what is said
    "decode_bytenet": [
        ("classifier_blocks", 0, "classifier_blocks must be from 1 to 32 .*, got 0"),
        ("classifier_blocks", 6, "classifier_blocks must be .* leave each block a token, got 6"),
        ("classifier_blocks", 33, "classifier_blocks must be from 1 to 32 .*, got 33"),
        ("columns", 12, "columns must be 8, 16 or 32"),
        ("threads", 288, "threads must be a multiple of 32 up to 256, got 288"),
        ("units", 0, "units must be a positive multiple of 4 up to 11, got 0"),
        ("end_id", 5, "end_id must be from 0 to 4, got 5"),
        ("pad_id", -1, "pad_id must be 0 or more where end_id is given, got -1"),
    ],
    "decode_lstm": [
        ("columns", 32, "columns must be at most 16 to decode, got 32"),
        ("threads", 0, "threads must be a multiple of 32 up to 256, got 0"),
        ("groups", 0, "groups must be positive, got 0"),
        ("end_id", 5, "end_id must be from 0 to 4, got 5"),
        ("pad_id", None, "pad_id must be 0 or more where end_id is given, got None"),
    ],
}


@pytest.mark.parametrize("op", PLANS)
def test_wrong_plans_are_named(simulator, op):
    (arguments,) = (given for name, given, _ in launches() if name == op)
    schema = getattr(torch.ops.fastvae, f"{op}_persistent").default._schema.arguments
    for name, value, message in PLANS[op]:
        n = [argument.name for argument in schema].index(name)
        with pytest.raises(RuntimeError, match=rf"^{message}"):
            launched(op, (*arguments[:n], value, *arguments[n + 1 :]))


def test_a_step_of_more_blocks_than_a_group_has(simulator):
    inputs = lstm.make((1, 1, 161 * 4), torch.bfloat16)
    with pytest.raises(RuntimeError, match="units must be larger: 161 blocks would share a step"):
        persistent.layer_norm_lstm(*inputs, 1e-4, False, plan=Plan(1, 4, 8, 32))


WRONG = {
    "x must have shape": lambda t: t.update(x=t["x"][..., 1:]),
    "weight_hh must have shape": lambda t: t.update(weight_hh=t["weight_hh"][1:]),
    "h0 must have the dtype of x": lambda t: t.update(h0=t["h0"].float()),
    "units must be a positive multiple of 4 up to 11, got 6": lambda t: t.update(units=6),
    "units must be a positive multiple of 4 up to 11, got 12": lambda t: t.update(units=12),
    "groups must be positive, got 0": lambda t: t.update(groups=0),
    "threads must be a multiple of 32": lambda t: t.update(threads=48),
    "columns must be 8, 16 or 32": lambda t: t.update(columns=12),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(simulator, message):
    names = "x", "weight_hh", "norm_weight", "norm_bias", "h0", "c0"
    arguments = dict(zip(names, lstm.make((2, 3, 8), torch.bfloat16), strict=True))
    arguments |= {"eps": 1e-4, "save": False, "groups": 1, "units": 4, "columns": 8, "threads": 32}
    WRONG[message](arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastvae.layer_norm_lstm_persistent(**arguments)


TAKES = {
    "layer_norm_lstm": lambda dtype: persistent.layer_norm_lstm(
        *lstm.make((2, 3, 8), dtype), 1e-4, False, plan=Plan(1, 8, 8, THREADS)
    ),
    "decode_lstm": lambda dtype: persistent.decode_lstm(
        *decode.make((2, 3, 2, 8, 5), dtype), None, 1e-4, None, None, Plan(1, 8, 8, THREADS)
    ),
    "decode_bytenet": lambda dtype: persistent.decode_bytenet(
        *bytenet.make((2, 3, 2, 8, 5, 1), dtype),
        *(None, True, None, None, NetPlan(1, 8, 1, 8, THREADS)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT], ids=str)
@pytest.mark.parametrize("op", TAKES)
def test_the_table_of_dtypes_is_what_the_kernels_take(simulator, op, dtype):
    if dtype in persistent.DTYPES[op]:
        TAKES[op](dtype)
    else:
        with pytest.raises(RuntimeError, match="no persistent kernel has this dtype"):
            TAKES[op](dtype)


HANGS = "the launch hangs: every thread waits for another"
FAULTS = ["", HANGS, "a word was published twice", HANGS, "a kernel wrote past its shared memory"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_simulator_finds_faults(simulator, which, seed):
    simulator.set_seed(seed)
    assert simulator.run_fault(which).decode() == FAULTS[which]


def test_simulator_delays_what_no_fence_orders(simulator):
    """The place of a word may be read as it was before, in some order, unless there is a fence."""
    said = {which: set() for which in (5, 6)}
    for seed in ORDERS:
        simulator.set_seed(seed)
        for which in said:
            said[which].add(simulator.run_fault(which).decode())
    assert said == {5: {"", "a word is still there that was emptied"}, 6: {""}}


@settings(max_examples=25, deadline=None)
@given(
    H=st.integers(1, 40),
    B=st.integers(1, 12),
    V=st.integers(1, 40),
    itemsize=st.sampled_from([2, 4]),
    processors=st.integers(1, 9),
)
def test_plans_fit_what_is_launched(simulator, H, B, V, itemsize, processors):
    """The bytes that a plan counts on are those that its launch asks for, and it has the blocks."""
    machine = persistent.Machine(processors, 166_912)  # as an A100's, enough for each of these
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    plan = persistent.plan_lstm(H, B, itemsize, machine, V)._replace(threads=THREADS)
    group_size, group_batch = -(-H // plan.units), -(-B // plan.groups)
    assert group_size * plan.groups <= processors
    tokens = persistent.decode_lstm(
        *decode.make((1, B, 2, H, V), dtype), None, 1e-4, None, None, plan
    )
    assert tokens.shape == (B, 1)
    shared = persistent.lstm_shared(plan, V, H, group_batch, itemsize)
    assert simulator.shared_memory_of_last_launch() == shared <= machine.shared
    net = persistent.plan_bytenet(H, 2, V, B, itemsize, machine)
    assert (net is None) == (processors < 3)
    if net:
        net = net._replace(threads=THREADS)
        inputs = bytenet.make((1, B, 2, H, V, 2), dtype)
        persistent.decode_bytenet(*inputs, None, True, None, None, net)
        group_size, group_batch = -(-H // net.units), -(-B // net.groups)
        assert (2 * group_size + net.classifier_blocks) * net.groups <= processors
        rest = H, net.columns, group_batch, itemsize, THREADS // 32
        blocks = persistent.net_blocks(net.units, -(-V // net.classifier_blocks), *rest)
        assert simulator.shared_memory_of_last_launch() == max(b.shared for b in blocks)


H100, A100 = persistent.Machine(132, 232_448), persistent.Machine(108, 166_912)


@pytest.mark.parametrize("machine", [H100, A100], ids=["132", "108"])
@pytest.mark.parametrize("B", [1, 7, 32, 128, 1024])
def test_plans_at_the_papers_sizes(machine, B):
    for H, V in ((1000, 259), (500, 51), (1000, 0), (1024, 512)):
        plan = persistent.plan_lstm(H, B, 2, machine, V)
        if plan is None:
            assert machine is A100 and V and (B > 7 or V == 512)
            continue
        group_size, group_batch = -(-H // plan.units), -(-min(B, persistent.BATCH) // plan.groups)
        assert group_size * plan.groups <= machine.processors
        assert persistent.lstm_shared(plan, V, H, group_batch, 2) <= machine.shared
    assert persistent.plan_bytenet(256, 10, 51, min(B, 64), 2, machine)


def test_every_group_of_a_plan_has_a_sequence():
    for B in range(1, persistent.BATCH + 1):
        for plan in (
            persistent.plan_lstm(16, B, 2, H100, 51),
            persistent.plan_lstm(1000, B, 2, H100, 259),
            persistent.plan_bytenet(16, 1, 51, B, 2, H100),
            persistent.plan_bytenet(256, 10, 51, B, 2, H100),
        ):
            assert -(-B // plan.groups) * (plan.groups - 1) < B


def test_shapes_that_are_not_for_these_kernels():
    assert persistent.plan_lstm(1025, 1, 2, H100) is None
    assert persistent.plan_lstm(500, 1, 2, H100, 513) is None
    assert persistent.plan_lstm(500, 1, 8, H100) is None
    assert persistent.plan_lstm(1000, 1, 4, A100, 259) is None  # 16 MB of weights
    assert persistent.plan_bytenet(256, 0, 51, 1, 2, H100) is None
    assert persistent.plan_bytenet(513, 2, 51, 1, 2, H100) is None
    assert persistent.plan_bytenet(256, 200, 51, 1, 2, H100) is None


def test_plans_decline_what_takes_longer_than_triton():
    """By the prediction, if not where everything is served."""
    for B in (1, 16, 32, 128):
        assert persistent.plan_lstm(1000, B, 2, H100, 259, persistent.rival("decode_lstm", 2, B))
    slow = 1000, 128, 4, H100, 259
    assert persistent.plan_lstm(*slow)
    assert persistent.plan_lstm(*slow, persistent.rival("decode_lstm", 4, 128)) is None
    with persistent.serve(["decode_lstm"]):
        assert persistent.plan_lstm(*slow, persistent.rival("decode_lstm", 4, 128))
    for layers in (3, 10):
        below = persistent.rival("decode_bytenet", 2, 128, layers)
        assert persistent.plan_bytenet(256, layers, 51, 128, 2, H100, below)
    slow = 384, 4, 51, 128, 4, H100  # 16 slices of 15 us beside 5 kernels of 18 us
    assert persistent.plan_bytenet(*slow)
    assert persistent.plan_bytenet(*slow, persistent.rival("decode_bytenet", 4, 128, 4)) is None


@pytest.mark.parametrize(
    ("op", "layers"), [("layer_norm_lstm", 0), ("decode_lstm", 0), ("decode_bytenet", 10)]
)
def test_a_plan_has_to_beat_what_triton_was_measured_to_take(op, layers):
    """The fit is above no measured time by more than a tenth, and halves for two launches."""
    rows = json.loads((ROOT / "benchmarks/results/h100-sweep.json").read_text())["rows"]
    rows = [row for row in rows if row["op"] == op and row["plan"] == "Triton"]
    assert len(rows) >= 4
    for row in rows:
        itemsize = getattr(torch, row["dtype"]).itemsize
        assert persistent.rival(op, itemsize, row["B"], layers) < 1.1 * row["us a step"]
    one, two = (persistent.rival(op, 2, B, layers) for B in (128, 256))
    assert one / 2 < two < 0.85 * one


def test_limits_are_those_measured():
    """On the H100 of benchmarks/results, of one of its multiprocessors."""
    results = ROOT / "benchmarks/results"
    measured = json.loads((results / "h100-limits.json").read_text())
    rows, one = {(r["what"], r["setting"]): r for r in measured["rows"]}, measured["SMs"] / 1e3
    limits = persistent.Limits()
    exchange = rows["all-gather", "256 B, 132 blocks x 256 threads"]["microseconds"]
    l2 = rows["reading memory", "8 MB over and over"]["gigabytes per second"] / one
    shared = (
        rows["reading shared memory", "132 blocks x 1024 threads"]["gigabytes per second"] / one
    )
    assert limits.exchange == pytest.approx(exchange, 0.01)
    assert limits.l2 == pytest.approx(l2, 0.01) and limits.shared == pytest.approx(shared, 0.01)


SWEEPS = sorted((ROOT / "benchmarks/results").glob("*sweep*.json"))


@pytest.mark.parametrize(
    "op, itemsize", [(o, i) for o, s in persistent.SERVING.items() for i in s.most]
)
def test_serves_where_results_on_a_gpu_are_better(op, itemsize):
    """On every GPU that was measured, up to the most sequences, a launch after the other."""
    dtype, most = {2: "bfloat16", 4: "float32"}[itemsize], persistent.SERVING[op].most[itemsize]
    assert SWEEPS
    for sweep in SWEEPS:
        saved = json.loads(sweep.read_text())
        machine = persistent.Machine(**saved["machine"])
        rows = [row for row in saved["rows"] if (row["op"], row["dtype"]) == (op, dtype)]
        assert rows and all("us a step" in row for row in rows)
        for B in {row["B"] for row in rows if row["B"] <= most}:
            times = {str(row["plan"]): row["us a step"] for row in rows if row["B"] == B}
            below = persistent.rival(op, itemsize, min(B, most), layers=10)
            plan = persistent.plan_bytenet(256, 10, 51, B, itemsize, machine, below)
            launches = most // persistent.BATCH if B == persistent.BATCH else 1
            assert launches * times[str(plan._asdict())] < times["Triton"]


def test_serves_nothing_where_it_was_not_built():
    for op, dtypes in persistent.DTYPES.items():
        for dtype in dtypes:
            assert persistent.serving(op, torch.zeros(1, dtype=dtype), 1, 256) is None


@pytest.mark.parametrize(
    "sequences, size, dtype, want",
    [
        (256, 256, torch.bfloat16, True),
        (257, 256, torch.bfloat16, False),
        (128, 256, torch.float32, True),
        (129, 256, torch.float32, False),
        (1, 255, torch.bfloat16, False),
        (1, 256, torch.float16, False),
    ],
)
def test_serves_what_was_measured_and_in_tests_every_size(sequences, size, dtype, want):
    case = "decode_bytenet", dtype, sequences, size
    assert persistent.serves(*case) == want
    with persistent.serve():
        assert persistent.serves(*case) == (dtype in persistent.DTYPES["decode_bytenet"])
        assert persistent.serves("decode_lstm", torch.bfloat16, 300, 1)
    with persistent.serve(["decode_lstm"]):
        assert not persistent.serves(*case)
    assert persistent.serves(*case) == want and "decode_lstm" not in persistent.SERVING
