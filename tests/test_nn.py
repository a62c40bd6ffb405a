"""Modules against plain PyTorch, and their statistics over several processes."""

import copy
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import fastvae
from fastvae.models.hybrid import HybridVAE
from fastvae.nn import (
    BatchNorm,
    ConvEncoder,
    DeconvDecoder,
    HighwayConv,
    HighwayConvStack,
    LayerNormLSTM,
    set_process_group,
)
from fastvae.testing import assert_accurate, gradients

DTYPES = [torch.float32, torch.bfloat16]
MODULES = {
    "lstm": (partial(LayerNormLSTM, 5, 6), (3, 2, 5)),
    "highway": (partial(HighwayConvStack, 4, 2), (3, 2, 4)),
    "deconvolution": (partial(DeconvDecoder, 5, 8, (6, 7), 3), (2, 5)),
}


def parameters(module, dtype=torch.float32):
    """Names, and values drawn so that norms do something too."""
    named = dict(module.named_parameters())
    return list(named), [torch.randn(p.shape, dtype=dtype) for p in named.values()]


def lstm_plain(x, tokens, h, c, w_ih, w_hh, bias, gain, shift):
    inputs = F.one_hot(tokens, w_ih.shape[1] - x.shape[-1]).to(x.dtype)
    outputs = []
    for x_t in torch.cat([x, inputs], -1):
        a = F.linear(x_t, w_ih, bias) + F.linear(h, w_hh)
        i, f, g, o = F.layer_norm(a, a.shape[-1:], gain, shift, 1e-4).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_lstm_looks_symbols_up(dtype, dense, backward):
    T, B, V, H = 4, 3, 5, 6
    module = LayerNormLSTM(dense + V, H)
    names, values = parameters(module, dtype)

    def fn(x, tokens, h, c, *weights):
        x = x if dense else None
        named = dict(zip(names, weights, strict=True))
        y, (h_n, c_n) = functional_call(module, named, (x, (h, c)), {"tokens": tokens})
        return y, h_n, c_n

    x, state = torch.randn(T, B, dense, dtype=dtype), torch.randn(2, B, H, dtype=dtype).unbind()
    tokens = torch.randint(V, (T, B))
    wrap = gradients if backward else lambda fn: fn
    assert_accurate(wrap(fn), wrap(lstm_plain), x, tokens, *state, *values)


def test_lstm_state_starts_at_zero():
    module, x = LayerNormLSTM(3, 4), torch.randn(5, 2, 3)
    zeros = torch.zeros(2, 4)
    assert torch.equal(module(x)[0], module(x, (zeros, zeros))[0])


def test_lstm_goes_on_from_its_state():
    module, x = LayerNormLSTM(3, 4).double(), torch.randn(6, 2, 3, dtype=torch.float64)
    whole, (h_n, c_n) = module(x)
    first, state = module(x[:4])
    second, (h, c) = module(x[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close((h, c), (h_n, c_n))


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5)], ids=str)
def test_batch_norm_is_torchs(shape):
    ours, theirs = BatchNorm(4), nn.BatchNorm1d(4, eps=1e-4, momentum=0.1)
    x = torch.randn(shape)
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def highway_plain(carry, running, x, weight, bias, gain, shift):
    a = F.conv1d(F.pad(x.permute(1, 2, 0), (1, 0)), weight, bias)
    if running is None:
        a = F.batch_norm(a, None, None, gain, shift, True, 0.1, 1e-4)
    else:
        a = F.batch_norm(a, *(t.to(a.dtype) for t in running), gain, shift, False, 0.1, 1e-4)
    i, f, g = a.permute(2, 0, 1).chunk(3, -1)
    y = i.sigmoid() * g.tanh()
    return y + f.sigmoid() * x if carry else y


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_highway_conv(carry, training, backward):
    C = 4
    module = HighwayConv(C, carry=carry).train(training)
    running = None
    if not training:
        running = module.norm.running_mean.normal_(), module.norm.running_var.uniform_(0.5, 2)
    names, values = parameters(module)

    def fn(x, *weights):
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    wrap = gradients if backward else lambda fn: fn
    plain = partial(highway_plain, carry, running)
    assert_accurate(wrap(fn), wrap(plain), torch.randn(5, 3, C), *values)


def test_highway_conv_keeps_torchs_running_statistics():
    module, norm = HighwayConv(4).double(), nn.BatchNorm1d(12, eps=1e-4).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for _ in range(3):
        module(x)
        norm(F.conv1d(F.pad(x.permute(1, 2, 0), (1, 0)), module.weight, module.bias))
    torch.testing.assert_close(module.norm.state_dict(), norm.state_dict())


def norm_of_torch(norm):
    """A batch norm of torch's with the settings, weights and statistics of one of ours."""
    other = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum)
    other.track_running_stats = norm.track_running_stats
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        if getattr(norm, name) is None:
            setattr(other, name, None)
    other.load_state_dict(norm.state_dict())
    return other.double().train(norm.training)


def without_statistics(norm):
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def without_weights(norm):
    norm.affine, norm.weight, norm.bias = False, None, None


NORMS = {  # what a user may do to a norm, of a layer in training mode or not
    "frozen": (True, lambda norm: norm.eval()),
    "alone in training mode": (False, lambda norm: norm.train()),
    "mean of all batches": (True, lambda norm: setattr(norm, "momentum", None)),
    "faster": (True, lambda norm: setattr(norm, "momentum", 0.5)),
    "without statistics": (True, without_statistics),
    "without statistics, evaluated": (False, without_statistics),
    "statistics kept as they are": (True, lambda norm: setattr(norm, "track_running_stats", False)),
    "without weights": (True, without_weights),
    "without a weight alone": (True, lambda norm: setattr(norm, "weight", None)),
    "without a bias alone": (False, lambda norm: setattr(norm, "bias", None)),
    "called without weights": (True, lambda norm: setattr(norm, "affine", False)),
    "batches not counted": (True, lambda norm: setattr(norm, "num_batches_tracked", None)),
    "without weights, evaluated": (False, without_weights),
}


@pytest.mark.parametrize("case", NORMS)
def test_the_norm_of_a_highway_conv_is_torchs(case):
    training, change = NORMS[case]
    module = HighwayConv(4, carry=False).double()
    module.norm.running_mean.normal_(), module.norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(module.norm.weight), nn.init.normal_(module.norm.bias)
    change(module.train(training).norm)
    norm = norm_of_torch(module.norm)
    for _ in range(3):
        x = torch.randn(5, 3, 4, dtype=torch.float64)
        a = norm(F.conv1d(F.pad(x.permute(1, 2, 0), (1, 0)), module.weight, module.bias))
        i, _, g = a.permute(2, 0, 1).chunk(3, -1)
        torch.testing.assert_close(module(x), i.sigmoid() * g.tanh())
    assert module.norm.state_dict().keys() == norm.state_dict().keys()
    torch.testing.assert_close(module.norm.state_dict(), norm.state_dict())


def test_a_process_that_evaluates_alone_waits_for_no_other(group, monkeypatch):
    module = HighwayConv(4)
    without_statistics(module.norm)
    alone = copy.deepcopy(module).eval()
    fastvae.nn.set_process_group(module, group)
    monkeypatch.delattr(torch.distributed, "all_reduce")
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(module.eval()(x), alone(x))


def test_what_a_highway_conv_cannot_do_with_its_norm():
    module = HighwayConv(4)
    without_statistics(module.norm)
    with pytest.raises(ValueError, match="without running statistics cannot be folded"):
        module.folded()
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module).eval()
    for call in (module.folded, lambda: module(torch.zeros(2, 3, 4))):
        with pytest.raises(
            TypeError, match=r"must be a fastvae\.nn\.BatchNorm, got SyncBatchNorm; "
        ):
            call()


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    where = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("decoder", ["lstm", "bytenet", "none"])
@pytest.mark.parametrize("grouped", [False, True])
def test_update_bn(decoder, grouped, group):
    """Of torch's weight averaging: the mean of all batches, whatever the statistics were before."""
    sizes = {"latent_size": 4, "encoder_channels": (8, 12), "feature_channels": 10}
    model = HybridVAE(11, 8, decoder=decoder, conv_channels=16, conv_layers=2, **sizes)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, fastvae.nn.BatchNorm)}
    batches, seen = [torch.randint(0, 11, (6, 8)) for _ in range(3)], []
    alone = copy.deepcopy(model.train())
    fastvae.nn.set_process_group(model, group if grouped else None)
    for norm in alone.modules():
        if isinstance(norm, fastvae.nn.BatchNorm):
            norm.momentum = 1.0  # what it keeps is the batch's
    for tokens in batches:
        alone(tokens)
        seen.append({n: alone.get_submodule(n).running_mean.clone() for n in norms})
    torch.optim.swa_utils.update_bn(batches, model)
    first = [name for name in norms if not name.startswith(("decoder", "head"))][:2]
    for name in first:  # those that no draw of latent vectors reaches
        wanted = torch.stack([found[name] for found in seen]).mean(0)
        torch.testing.assert_close(norms[name].running_mean, wanted)
    assert len(first) == 2 and all(norm.num_batches_tracked == 3 for norm in norms.values())
    assert all(norm.momentum == 0.1 for norm in norms.values())


def test_one_value_has_no_statistics():
    with pytest.raises(ValueError, match="more than 1 value"):
        HighwayConv(4)(torch.randn(1, 1, 4))
    assert HighwayConv(4)(torch.randn(2, 1, 4)).isfinite().all()  # two have


def test_highway_stack_sees_layers_plus_one_symbols():
    stack = HighwayConvStack(4, 3).eval()
    x = torch.randn(9, 1, 4)
    changed = x.clone()
    changed[2] += 1
    differs = (stack(x) != stack(changed)).flatten(1).any(1)
    assert differs.tolist() == [False] * 2 + [True] * 4 + [False] * 3


def test_encoder_looks_its_first_convolution_up():
    V, L, channels = 5, 8, (4, 6)
    module = ConvEncoder(V, L, 3, channels)
    tokens = torch.randint(V, (3, L))

    def fn(weight, bias):
        named = {"convs.0.weight": weight, "convs.0.bias": bias}
        return torch.cat(functional_call(module, named, (tokens,)), -1)

    def plain(weight, bias):
        copy = [p.to(weight.dtype) for p in module.parameters()]
        second, second_bias, gain, shift, gain2, shift2, linear, linear_bias = copy[2:]
        x = F.one_hot(tokens, V).mT.to(weight.dtype)
        x = F.conv1d(x, weight, bias, stride=2, padding=1)
        x = F.batch_norm(x, None, None, gain, shift, True, 0.1, 1e-4).relu()
        x = F.conv1d(x, second, second_bias, stride=2, padding=1)
        x = F.batch_norm(x, None, None, gain2, shift2, True, 0.1, 1e-4).relu()
        return F.linear(x.flatten(1), linear, linear_bias)

    values = torch.randn(4, V, 3), torch.randn(4)
    assert_accurate(fn, plain, *values)
    # A bias before a batch norm has no gradient but noise, so only the weight's is compared.
    by_weight = [lambda w, f=f: f(w, values[1].to(w.dtype)) for f in (fn, plain)]
    assert_accurate(*map(gradients, by_weight), values[0])


def test_deconvolution_is_torchs_time_major():
    module = DeconvDecoder(5, 8, (6, 7), 3).double().eval()
    z = torch.randn(2, 5, dtype=torch.float64)
    x = F.linear(z, module.linear.weight, module.linear.bias).relu().view(2, 7, 2)
    for conv, norm in zip(module.convs, module.norms, strict=True):
        x = F.conv_transpose1d(x, conv.weight, conv.bias, stride=2, padding=1, output_padding=1)
        x = (x / (1 + norm.eps) ** 0.5).relu()
    assert module(z).shape == (8, 2, 3)
    torch.testing.assert_close(module(z), x.permute(2, 0, 1))


@pytest.mark.parametrize("name", [*MODULES, "encoder"])
def test_initialization(name):
    make = MODULES[name][0] if name in MODULES else partial(ConvEncoder, 5, 8, 3, (4, 6))
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(9)
    module.reset_parameters()
    for key, p in module.named_parameters():
        last = key.rpartition(".")[2]
        if "norm" in key:
            assert (p == (1 if last.endswith("weight") else 0)).all(), key
        else:
            assert p.abs().max() <= 0.1 and p.unique().numel() == p.numel(), key


@pytest.mark.parametrize("name", MODULES)
def test_parameters_are_made_where_and_as_asked(name):
    module = MODULES[name][0](device="meta", dtype=torch.float64)
    made = {(p.device.type, p.dtype) for p in module.parameters()}
    assert made == {("meta", torch.float64)}


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name):
    make, shape = MODULES[name]
    module = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(torch.randn(shape))
        y = y[0] if isinstance(y, tuple) else y
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    for key, p in module.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", MODULES)
def test_autocast_leaves_float64(name):
    """As torch's own layers: a double is asked for by name."""
    make, shape = MODULES[name]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, other = module(x), torch.nn.Linear(3, 2).double()(x.flatten()[:3])
    y = y[0] if isinstance(y, tuple) else y
    assert y.dtype == other.dtype == torch.float64 and y.isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_export(name):
    make, shape = MODULES[name]
    module, x = make().eval(), torch.randn(shape)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))


def test_repr_says_the_sizes():
    assert "3, 4, eps=0.0001" in repr(LayerNormLSTM(3, 4))
    assert "4, carry=False" in repr(HighwayConvStack(4, 2, carry=False))


# Several processes: this file is also the program that each of them runs.


def small_model():
    torch.manual_seed(1)
    return HybridVAE(
        7,
        8,
        latent_size=3,
        encoder_channels=(4, 5),
        feature_channels=4,
        decoder="bytenet",
        conv_channels=3,
        conv_layers=2,
        dtype=torch.float64,
    )


def global_batch():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(7, (4, 8), generator=generator)
    noise = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    x = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)
    return tokens, noise, x


def step(model, tokens, noise):
    output = model(tokens, 0.7, free_bits=0.02, eps=noise)
    output.loss.backward()
    return output


def norm_step(norm, x):
    """Batch norm of a part x of the global batch, with a loss that no symmetry makes vanish."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * x.detach().square()).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()]


def worker(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    tokens, noise, x = global_batch()
    model = small_model()
    set_process_group(model, torch.distributed.group.WORLD)
    mine = slice(2 * rank, 2 * rank + 2)
    parallel = nn.parallel.DistributedDataParallel(model)
    output = step(parallel, tokens[mine], noise[mine])
    norm = BatchNorm(4, dtype=torch.float64)
    set_process_group(norm, torch.distributed.group.WORLD)
    uneven = norm_step(norm, x[:3] if rank == 0 else x[3:])
    result = {
        "loss": output.loss.detach(),
        "gradients": [p.grad for p in model.parameters()],
        "buffers": list(model.buffers()),
        "uneven": uneven,
    }
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    command = [sys.executable, __file__]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))

    tokens, noise, x = global_batch()
    model = small_model()
    output = step(model, tokens, noise)
    assert (output.kl_per_dimension < 0.02).any() and (output.kl_per_dimension > 0.02).any()
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, output.loss.detach())
    for result in (first, second):
        torch.testing.assert_close(result["gradients"], [p.grad for p in model.parameters()])
        torch.testing.assert_close(result["buffers"], list(model.buffers()))

    y, dx, dweight, dbias, *buffers = norm_step(BatchNorm(4, dtype=torch.float64), x)
    (y0, dx0, dw0, db0, *buffers0), (y1, dx1, dw1, db1, *buffers1) = (
        result["uneven"] for result in (first, second)
    )
    torch.testing.assert_close(torch.cat([y0, y1]), y)
    torch.testing.assert_close(torch.cat([dx0, dx1]), dx)
    torch.testing.assert_close((dw0 + dw1, db0 + db1), (dweight, dbias))
    torch.testing.assert_close(buffers0, buffers)
    torch.testing.assert_close(buffers1, buffers)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])


LSTM_ARGUMENTS = {
    "num_layers": (2, "stack layers in a torch.nn.ModuleList"),
    "bias": (False, "set layer.bias to zeros"),
    "dropout": (0.1, "put a torch.nn.Dropout between"),
    "bidirectional": (True, "run a second layer on x.flip"),
    "proj_size": (3, "put a torch.nn.Linear behind"),
}


@pytest.mark.parametrize("name", LSTM_ARGUMENTS)
def test_other_arguments_of_lstm(name):
    value, advice = LSTM_ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"^{name} must be .*{advice}"):
        fastvae.nn.LayerNormLSTM(3, 4, **{name: value})


def test_lstm_batch_first():
    torch.manual_seed(0)
    first, plain = (fastvae.nn.LayerNormLSTM(3, 4, batch_first=b) for b in (True, False))
    first.load_state_dict(plain.state_dict())
    x, state = torch.randn(5, 2, 3), (torch.randn(2, 4), torch.randn(2, 4))
    y, (h, c) = plain(x, state)
    y_first, (h_first, c_first) = first(x.transpose(0, 1), state)
    assert torch.equal(y_first, y.transpose(0, 1))
    assert torch.equal(h_first, h) and torch.equal(c_first, c)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (torch.zeros(5, 3),),
            r"\[T, B, I\], got \[5, 3\]: for one sequence give x.unsqueeze\(1\)",
        ),
        (
            (torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))),
            r"^h0 must have shape \[B, H\] = \[2, 4\], got \[1, 2, 4\]: give h0.squeeze\(0\)",
        ),
        (
            (torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 3)]),),
            r"PackedSequence: pad it with torch.nn.utils.rnn.pad_packed_sequence.*lengths=$",
        ),
        ((torch.zeros(0, 2, 3),), "at least one step"),
        ((None,), "x or tokens must be given"),
        ((torch.zeros(2, 2, 3), (torch.zeros(2, 4),) * 3), r"state must be a pair \(h0, c0\)"),
        ((torch.zeros(2, 2, 3), (torch.zeros(2, 4),)), r"state must be a pair \(h0, c0\)"),
        ((torch.zeros(2, 2, 3), torch.zeros(2, 2, 4)), r"state must be a pair \(h0, c0\)"),
        ((torch.zeros(2, 2, 3), (torch.zeros(2, 4), None)), r"state must be a pair \(h0, c0\)"),
    ],
)
def test_lstm_inputs_in_the_callers_terms(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastvae.nn.LayerNormLSTM(3, 4)(*arguments)


@pytest.mark.parametrize(
    ("x", "tokens", "lengths", "message"),
    [
        (None, (2, 3, 1), None, r"^tokens must have shape \[T, B\], got \[2, 3, 1\]$"),
        (None, (2, 3, 1), [1, 2, 0], r"^tokens must have shape \[T, B\], got \[2, 3, 1\]$"),
        (None, (2,), None, r"^tokens must have shape \[T, B\], got \[2\]$"),
        ((2, 3, 2), (1, 3), None, r"^tokens must have shape \[2, 3\] beside x, got \[1, 3\]$"),
        ((2, 3, 2), (1, 3), [1, 2, 0], r"^tokens must have shape \[2, 3\] beside x"),
    ],
)
def test_lstm_refuses_tokens(x, tokens, lengths, message):
    x, tokens = x and torch.zeros(x), torch.zeros(tokens, dtype=torch.int64)
    lengths = lengths and torch.tensor(lengths)
    with pytest.raises(ValueError, match=message):
        LayerNormLSTM(3, 4)(x, tokens=tokens, lengths=lengths)


@pytest.mark.parametrize("dense", [False, True])
def test_lstm_ignores_tokens_after_the_end(dense):
    module, lengths = LayerNormLSTM(4, 3), torch.tensor([2, 0, 3])
    tokens, x = torch.tensor([[1, -100, 0], [0, 1, 1], [9, 7, 1]]), None
    if dense:
        x = torch.randn(3, 3, 2)
    real = torch.arange(3).unsqueeze(1) < lengths
    want = module(x, tokens=tokens.where(real, 1), lengths=lengths)
    got = module(x, tokens=tokens, lengths=lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="9"):
        module(x, tokens=tokens, lengths=torch.tensor([3, 0, 3]))


def each_alone(module, x, state, lengths):
    """Each sequence by itself, as long as it is -> y [T, B, H], (h_n, c_n) [B, H]."""
    outputs, states = [], []
    for b, steps in enumerate(lengths.tolist()):
        last = tuple(t[b : b + 1] for t in state)
        y = x.new_zeros(0, 1, module.hidden_size)
        if steps:
            y, last = module(x[:steps, b : b + 1], last)
        outputs.append(F.pad(y, (0, 0, 0, 0, 0, len(x) - steps)))
        states.append(last)
    return torch.cat(outputs, 1), tuple(map(torch.cat, zip(*states, strict=True)))


def test_lstm_with_lengths():
    """Outputs, last states and gradients are those of each sequence alone."""
    module = LayerNormLSTM(3, 4).double()
    lengths = torch.tensor([2, 5, 0, 3])
    inputs = torch.randn(6, 4, 3), torch.randn(4, 4), torch.randn(4, 4)
    inputs = [t.double().requires_grad_() for t in inputs]
    x, *state = inputs
    results = []
    for y, (h, c) in (module(x, state, lengths=lengths), each_alone(module, x, state, lengths)):
        loss = y.square().sum() + h.sin().sum() + c.cos().sum()
        grads = torch.autograd.grad(loss, [*inputs, *module.parameters()])
        results.append((y, h, c, *grads))
    torch.testing.assert_close(*results)
    first = LayerNormLSTM(3, 4, batch_first=True).double()
    first.load_state_dict(module.state_dict())
    y, last = first(x.transpose(0, 1), state, lengths=lengths)
    torch.testing.assert_close((y.transpose(0, 1), *last), results[0][:3])


@pytest.mark.parametrize("what", ["dense", "tokens", "both"])
def test_lstm_takes_packed_rows(what):
    """Those of torch.nn.utils.rnn: the same results for the steps that there are."""
    module = LayerNormLSTM(5, 4, batch_first=what == "tokens").double()
    lengths = torch.tensor([5, 3, 3, 1])
    x = torch.randn(5, 4, 5 if what == "dense" else 2, dtype=torch.float64)
    x, tokens = None if what == "tokens" else x, torch.randint(3, (5, 4))
    tokens = None if what == "dense" else tokens

    def packed(t, first=False):
        return None if t is None else pack_padded_sequence(t, lengths, batch_first=first).data

    if module.batch_first:
        y, last = module(None, tokens=tokens.T, lengths=lengths)
        y = packed(y, True)
    else:
        y, last = module(x, tokens=tokens, lengths=lengths)
        y = packed(y)
    y_packed, last_packed = module(packed(x), tokens=packed(tokens), lengths=lengths)
    torch.testing.assert_close((y_packed, *last_packed), (y, *last))
    state = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    nothing = module(
        None if x is None else x[0, :0],
        state,
        tokens=None if tokens is None else tokens[0, :0],
        lengths=torch.zeros(4, dtype=torch.int64),
    )
    assert nothing[0].shape == (0, 4) and all(map(torch.equal, nothing[1], state))


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([5, 1], r"^lengths must be a tensor \[B\]$"),
        (torch.tensor(3), r"^lengths must be a tensor \[B\]$"),
        (torch.tensor([5, 6]), "^lengths must be from 0 to 5, got 6$"),
        (torch.tensor([5]), r"^lengths must have shape \[B\] = \[2\], got \[1\]$"),
        (torch.tensor([5, 1, 1]), r"^lengths must have shape \[B\] = \[2\], got \[3\]$"),
        (torch.tensor([5.0, 1.0]), "^lengths must have dtype int64, got float32$"),
    ],
)
def test_lstm_refuses_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        LayerNormLSTM(3, 4)(torch.zeros(5, 2, 3), lengths=lengths)


def test_lstm_with_lengths_compiles_exports_and_casts():
    module, x, lengths = LayerNormLSTM(3, 4), torch.randn(5, 2, 3), torch.tensor([2, 4])
    want = module(x, lengths=lengths)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, lengths=lengths), want)
    exported = torch.export.export(module, (x,), {"lengths": lengths}).module()
    torch.testing.assert_close(
        exported(x, lengths=torch.tensor([5, 0])), module(x, lengths=torch.tensor([5, 0]))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h, c) = module(x, lengths=lengths)
    assert {t.dtype for t in (y, h, c)} == {torch.bfloat16} and not y[2:, 0].any()


@pytest.mark.parametrize("kind", ["encoder", "deconvolution"])
def test_hooks_of_norms_see_what_norms_give(kind):
    """Before the ReLU, forward and backward."""
    model = fastvae.HybridVAE(11, 8, latent_size=3, encoder_channels=(4, 4), hidden_size=5)
    norm, seen = getattr(model, kind).norms[0], []
    norm.register_forward_hook(lambda module, x, y: seen.append(y))
    norm.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0]))
    model(torch.randint(11, (6, 8))).loss.backward()
    assert len(seen) == 2 and seen[0].min() < 0 and seen[1].shape == seen[0].shape


def test_hooks_of_all_convolutions_are_called():
    model = fastvae.HybridVAE(11, 8, latent_size=3, encoder_channels=(4, 4), hidden_size=5)
    seen = []
    for conv in (*model.encoder.convs, *model.deconvolution.convs):
        conv.register_forward_hook(lambda module, x, y: seen.append(module))
        conv.register_full_backward_hook(lambda module, dx, dy: seen.append(module))
    model(torch.randint(11, (6, 8))).loss.backward()
    forward = [*model.encoder.convs, *model.deconvolution.convs]
    assert seen == [*forward, *reversed(forward)]
    tokens = torch.randint(11, (2, 8))
    before = model.eval().encode(tokens)
    model.encoder.convs[0].register_forward_hook(lambda module, x, y: y * 0)
    assert not torch.equal(model.encode(tokens), before)


def test_a_strided_convolution_looks_up_one_hot_inputs():
    conv = fastvae.nn.StridedConv(5, 3).double()
    tokens = torch.randint(5, (6, 2))
    dense = F.one_hot(tokens, 5).double()
    torch.testing.assert_close(conv(None, tokens), conv(dense), rtol=1e-12, atol=1e-12)
    for x, t in ((None, None), (dense, tokens)):
        with pytest.raises(ValueError, match="either x or tokens must be given"):
            conv(x, t)
    for wrong in (tokens[:3], tokens[0]):
        with pytest.raises(ValueError, match=r"^tokens must have shape \[2T, B\], got \["):
            conv(None, wrong)
    for unknown in (-1, 5, 6):
        with pytest.raises(IndexError, match="out of range"):
            conv(None, tokens.masked_fill(tokens == tokens[1, 1], unknown))


def test_a_stack_of_fewer_than_no_layers():
    with pytest.raises(ValueError, match="layers must be 0 or more, got -1"):
        fastvae.nn.HighwayConvStack(4, -1)
    x = torch.randn(3, 2, 4)
    none = fastvae.nn.HighwayConvStack(4, 0)
    assert torch.equal(none(x), x)
    assert [t.shape for t in none.folded()] == [(0, 12, 4, 2), (0, 12)]


@pytest.mark.parametrize("eps", [-1e-4, float("nan"), float("inf")])
def test_lstm_of_a_wrong_eps(eps):
    with pytest.raises(ValueError, match="eps must be 0 or more, and finite, got"):
        LayerNormLSTM(3, 4, eps=eps)
    assert LayerNormLSTM(3, 4, eps=0.0).eps == 0


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "channels"])
def test_layers_of_no_size(name, size):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number from 1 on, got {size}$"):
        if name == "channels":
            HighwayConv(size)
        else:
            LayerNormLSTM(**{"input_size": 1, "hidden_size": 1, name: size})
    with pytest.raises(ValueError, match=r"^channels must be a whole number from 1 on, got 0$"):
        fastvae.nn.HighwayConvStack(0, 2)
    assert LayerNormLSTM(1, 1)(torch.zeros(2, 1, 1))[0].shape == (2, 1, 1)


def test_lstm_of_a_batch_first_that_is_no_answer():
    with pytest.raises(ValueError, match=r"^batch_first must be True or False, got 'no'$"):
        LayerNormLSTM(1, 1, batch_first="no")


@pytest.mark.parametrize("dense", [True, False])
def test_linear_without_a_bias(dense):
    ours, plain = fastvae.nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)
    plain.load_state_dict(ours.state_dict())
    x, tokens = torch.randn(4, 3), torch.randint(0, 2, (4,))
    wanted = torch.cat([x, F.one_hot(tokens, 2)], 1)
    found = ours(wanted) if dense else ours(x, tokens)
    torch.testing.assert_close(found, plain(wanted))
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), ours.weight),
        torch.autograd.grad(plain(wanted).sum(), plain.weight),
    )


def test_empty_batch_computes():
    lstm = fastvae.nn.LayerNormLSTM(3, 4)
    y, (h, c) = lstm(torch.zeros(5, 0, 3))
    assert (y.shape, h.shape, c.shape) == ((5, 0, 4), (0, 4), (0, 4))
    y.sum().backward()
    assert not lstm.weight_hh.grad.any() and not lstm.weight_ih.grad.any()
    assert fastvae.nn.HighwayConvStack(4, 2).eval()(torch.zeros(5, 0, 4)).shape == (5, 0, 4)


def test_half_on_a_cpu_is_one_clear_line():
    with pytest.raises(
        RuntimeError, match=r"^linear takes float32, bfloat16 or float64 on a CPU, got float16"
    ):
        fastvae.nn.LayerNormLSTM(3, 4).half()(torch.zeros(2, 2, 3).half())


def test_a_step_is_recorded_on_a_gpu_alone():
    with pytest.raises(ValueError, match=r"^a step is recorded on a CUDA device, not on cpu$"):
        fastvae.RecordedStep(lambda: None, "cpu")


def test_lstm_with_lengths_looks_at_nothing_after_a_sequences_end():
    """Not even in the gradients: not-a-number there does not spread."""
    torch.manual_seed(0)
    module, lengths = LayerNormLSTM(5, 7), torch.tensor([4, 2])
    x, gradients = torch.randn(4, 2, 5), []
    for filler in (0.0, math.nan):
        x[2:, 1] = filler
        y, (_, c) = module(x, lengths=lengths)
        gradients.append(torch.autograd.grad(y.sum() + c.sum(), [*module.parameters()]))
    for with_zeros, with_nan in zip(*gradients, strict=True):
        assert torch.equal(with_zeros, with_nan)


def test_lstm_on_the_meta_device():
    module = LayerNormLSTM(5, 7, device="meta")
    y, (h, _) = module(torch.empty(3, 2, 5, device="meta"))
    assert (y.shape, h.shape, y.device.type) == ((3, 2, 7), (2, 7), "meta")
