"""Generation: greedy and tempered tokens, ends and pads, interpolation; modes stay."""

import itertools
import math

import pytest
import torch
from test_models import END, NAMES, PAD, RECURRENT, L, V, Z, make

from fastvae import reference


@pytest.mark.parametrize("word_dropout", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("name", RECURRENT)
def test_greedy_symbols_are_the_likeliest(name, weights, word_dropout):
    model = make(name, word_dropout=word_dropout).double().eval()
    z = torch.randn(50, Z, dtype=torch.float64)
    tokens = model.generate(z, quantization=weights)
    assert torch.equal(model.logits(tokens, z, quantization=weights).argmax(-1).T, tokens)


def test_logits_rejects_unknown_weights():
    tokens, z = torch.zeros(2, L, dtype=torch.int64), torch.zeros(2, Z)
    for call in (
        lambda m, w: m.logits(tokens, z, quantization=w),
        lambda m, w: m.generate(z, quantization=w),
    ):
        with pytest.raises(ValueError, match="got 'int4'"):
            call(make("lstm"), "int4")
        with pytest.raises(ValueError, match='quantization="int8" needs a decoder'):
            call(make("none"), "int8")


@pytest.mark.parametrize("word_dropout", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", RECURRENT)
def test_greedy_is_step_by_step_argmax(name, word_dropout):
    model = make(name, word_dropout=word_dropout).double().eval()
    model.decoder.classifier.weight.data *= 4
    z = 4 * torch.randn(5, Z, dtype=torch.float64)
    features, state = model._expand(z)
    tokens = torch.zeros(5, L, dtype=torch.int64)
    nothing = torch.zeros(5, L, dtype=torch.bool)
    for t in range(L):
        logits = model.decoder(features, model._previous(tokens, nothing), state)
        tokens[:, t] = logits[t].argmax(-1)
    assert torch.equal(model.generate(z), tokens)
    assert tokens.unique().numel() > 1


def test_bytenet_without_carry_generates_as_the_reference():
    model = make("bytenet", carry=False).double().eval()
    plain = reference.HybridVAE(**model.config).double().eval()
    plain.load_state_dict(model.state_dict())
    z = 4 * torch.randn(20, Z, dtype=torch.float64)
    tokens = model.generate(z)
    assert torch.equal(tokens, plain.generate(z))
    carrying = make("bytenet").double().eval()
    carrying.load_state_dict(model.state_dict())
    assert not torch.equal(tokens, carrying.generate(z))


@pytest.mark.parametrize("name", NAMES)
def test_mode_neither_matters_nor_changes(name):
    model, z = make(name, pad_id=PAD, end_id=END), torch.randn(4, Z)
    expected = model.eval().generate(z)
    model.train()
    frozen = next(iter(model.children())).eval()
    modes = {key: module.training for key, module in model.named_modules()}
    buffers = [b.clone() for b in model.buffers()]
    tokens = model.generate(z)
    assert torch.equal(tokens, expected) and not tokens.requires_grad
    assert modes == {key: module.training for key, module in model.named_modules()}
    assert not frozen.training and model.training
    assert all(map(torch.equal, buffers, model.buffers()))


def test_mode_survives_an_exception():
    model = make("lstm")
    del model.decoder.classifier
    with pytest.raises(AttributeError, match="classifier"):
        model.generate(torch.randn(2, Z))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_pads_follow_the_end(name):
    model, z = make(name, pad_id=PAD, end_id=END), torch.randn(3, Z)
    classifier = model.head if name == "none" else model.decoder.classifier
    classifier.bias.data[END] += 1000
    expected = torch.tensor([[END] + [PAD] * (L - 1)]).expand(3, -1)
    assert torch.equal(model.generate(z), expected)
    assert torch.equal(model.generate(z, temperature=1.0), expected)
    classifier.bias.data[END] -= 1000
    free = make(name)
    free.load_state_dict(model.state_dict())
    tokens, endless = model.generate(z.repeat(20, 1), temperature=3.0), free.generate(z)
    assert torch.equal(endless[:, 0], model.generate(z)[:, 0])
    ends = (tokens == END).cumsum(1).cumsum(1)  # 1 at the first end, more after it
    assert (ends == 1).any() and (tokens[ends > 1] == PAD).all()


@pytest.mark.parametrize("name", NAMES)
def test_temperature_samples_the_softmax(name):
    """Frequencies of whole sequences against their probabilities, tempered by hand for T = 1."""
    model = make(name, vocab_size=3, length=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    z = torch.randn(1, Z).expand(4000, -1)
    tokens = model.generate(z, temperature=1.0, generator=torch.Generator().manual_seed(3))
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    probability = model.log_likelihood(every, z[: len(every)]).exp()
    counts = (tokens.unsqueeze(1) == every).all(-1).sum(0)
    expected = 4000 * probability
    chi_square = ((counts - expected).square() / expected).sum().item()
    degrees = len(every) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_temperatures_at_their_limits():
    """Greedy at the least, and noise alone at the largest."""
    model, z = make("lstm").eval(), torch.randn(64, Z)
    assert torch.equal(model.generate(z, temperature=0), model.generate(z))
    hot = model.generate(z, temperature=1e37, generator=torch.Generator().manual_seed(1))
    shares = hot.flatten().bincount(minlength=V) / hot.numel()
    assert (shares - 1 / V).abs().max() < 5 * math.sqrt(1 / V / hot.numel())


def test_temperature_sharpens():
    model = make("none", vocab_size=3, length=4).eval()
    z = torch.randn(1, Z)
    logits = model.head(model.deconvolution(z))[:, 0] / 0.5
    tokens = model.generate(z.expand(4000, -1), temperature=0.5)
    share = torch.stack([(tokens == v).float().mean(0) for v in range(3)], -1)
    p = logits.softmax(-1)
    assert ((share - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_sampling_repeats_with_its_generator(name):
    model = make(name)
    first, second = (
        model.sample(5, temperature=0.8, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert first.shape == (5, L) and first.dtype == torch.int64
    assert torch.equal(first, second)
    assert not torch.equal(first, model.sample(5, temperature=0.8))
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(5, Z, generator=generator)
    assert torch.equal(first, model.generate(z, temperature=0.8, generator=generator))


def test_interpolation_includes_its_ends():
    model = make("lstm")
    z = torch.randn(2, Z)
    tokens = model.interpolate(*z, steps=5)
    middle = model.generate(z.mean(0, keepdim=True))
    assert tokens.shape == (5, L) and model.interpolate(*z).shape == (7, L)
    assert torch.equal(tokens[[0, 4]], model.generate(z))
    assert torch.equal(tokens[2:3], middle)


def test_one_op_call_generates():
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(str(op))
            return op(*args, **(kwargs or {}))

    with Record():
        make("lstm").generate(torch.randn(2, Z))
    assert calls.count("fastvae.decode_lstm.default") == 1
