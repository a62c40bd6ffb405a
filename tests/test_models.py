"""Behavior of the models; equality with the plain reference models is in test_reference."""

import contextlib
import copy
import itertools
import json
import math
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import fastvae
from fastvae.distributed import AcrossProcesses
from fastvae.models import text_vae
from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.models.text_vae import constructor_arguments
from fastvae.nn import set_process_group

NAMES = ["lstm", "bytenet", "none", "lstm_vae"]
RECURRENT = ["lstm", "bytenet", "lstm_vae"]
V, L, Z, PAD, END = 11, 8, 3, 0, 2


def make(name, vocab_size=V, length=L, **arguments):
    """A small model whose parameters and running statistics are far from their first values."""
    if name == "lstm_vae":
        sizes = {"hidden_size": 6}
        model = LSTMVAE(
            vocab_size, length, latent_size=Z, **{"word_dropout": 0.0, **sizes, **arguments}
        )
    else:
        sizes = {"encoder_channels": (4, 5), "feature_channels": 4, "hidden_size": 6}
        sizes |= {"conv_layers": 2, "conv_channels": 4}
        model = HybridVAE(vocab_size, length, latent_size=Z, decoder=name, **{**sizes, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.7)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model


def batch(count=4):
    """tokens, and the keyword arguments that make a step repeatable."""
    drop_mask = torch.rand(count, L) < 0.3
    return torch.randint(V, (count, L)), {"eps": torch.randn(count, Z), "drop_mask": drop_mask}


@pytest.mark.parametrize(
    ("make_model", "expected"),
    [
        (lambda: HybridVAE(259, 128), 11_099_574),
        (lambda: LSTMVAE(259, 128), 10_765_459),
    ],
    ids=["hybrid", "lstm_vae"],
)
def test_parameter_count_of_the_paper(make_model, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in make_model().parameters()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_likelihood_sums_to_one(name):
    """Σ p(x | z) over every sequence: start, causality and the softmax are right."""
    model = make(name, vocab_size=3, length=4).double().eval()
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))
    z = torch.randn(1, Z, dtype=torch.float64).expand(len(tokens), -1)
    total = model.log_likelihood(tokens, z).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total))


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_its_terms(name):
    model = make(name, **({} if name == "lstm_vae" else {"aux_weight": 0.3})).double().eval()
    tokens, step = batch()
    step["drop_mask"][:] = False
    mean, logvar = model.posterior(tokens)
    output = model(tokens, 0.25, **step)
    z = mean + (logvar / 2).exp() * step["eps"]
    kl = 0.5 * (mean**2 + logvar.exp() - logvar - 1).mean(0)
    torch.testing.assert_close(output.kl_per_dimension, kl)
    torch.testing.assert_close(output.kl, kl.sum())
    torch.testing.assert_close(output.reconstruction, -model.log_likelihood(tokens, z).mean())
    auxiliary = torch.zeros((), dtype=torch.float64)
    if name in ("lstm", "bytenet"):
        logits = model.head(model.deconvolution(z)).log_softmax(-1)  # [L, B, V]
        auxiliary = -logits.gather(-1, tokens.T.unsqueeze(-1)).sum() / len(tokens)
    torch.testing.assert_close(output.auxiliary, auxiliary)
    loss = output.reconstruction + 0.25 * output.kl + 0.3 * output.auxiliary
    torch.testing.assert_close(output.loss, loss)


def test_free_bits_count_in_the_loss_only():
    model = make("none").double().eval()
    tokens, step = batch()
    plain = model(tokens, 0.5, **step)
    bits = plain.kl_per_dimension.median().item()
    output = model(tokens, 0.5, free_bits=bits, **step)
    torch.testing.assert_close(output.kl, plain.kl)
    extra = (bits - plain.kl_per_dimension).clamp(min=0).sum()
    assert extra > 0
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * extra)


@pytest.mark.parametrize("name", NAMES)
def test_weight_may_be_a_tensor(name):
    model = make(name).eval()
    tokens, step = batch()
    weight = torch.tensor(0.25)
    torch.testing.assert_close(model(tokens, weight, **step), model(tokens, 0.25, **step))


@pytest.mark.parametrize("name", NAMES)
def test_masked_pads_do_not_count(name):
    model = make(name, pad_id=PAD).double().eval()
    masked = make(name, pad_id=PAD, mask_pad=True).double().eval()
    masked.load_state_dict(model.state_dict())
    z = torch.randn(2, Z, dtype=torch.float64)
    tokens = torch.randint(1, V, (2, L))
    torch.testing.assert_close(masked.log_likelihood(tokens, z), model.log_likelihood(tokens, z))
    tokens[0, 5:] = PAD
    features, state = model._expand(z)
    if name == "none":
        logits = model.head(features)
    else:
        previous = torch.cat([torch.full((1, 2), V), tokens.T[:-1]])
        logits = model.decoder(features, previous, state)
    nats = logits.log_softmax(-1).gather(-1, tokens.T.unsqueeze(-1)).squeeze(-1)  # [L, B]
    expected = torch.stack([nats[:5, 0].sum(), nats[:, 1].sum()])
    torch.testing.assert_close(masked.log_likelihood(tokens, z), expected)
    if name in ("lstm", "bytenet"):
        auxiliary = [m(tokens, eps=z).auxiliary for m in (masked, model)]
        assert auxiliary[0] < auxiliary[1]


def lines(*lengths):
    """Sequences of these lengths, then pads; the longest has a pad in its middle too."""
    tokens = torch.randint(1, V, (len(lengths), L))
    tokens[torch.arange(L) >= torch.tensor(lengths).unsqueeze(1)] = PAD
    tokens[lengths.index(max(lengths)), 2] = PAD
    return tokens


def padded(monkeypatch):
    """Compute pads too, as on a GPU."""
    monkeypatch.setattr(text_vae, "readable", lambda tokens: False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_pads_left_out_change_nothing(name, training, monkeypatch):
    """Loss, gradients and masks drawn are those of the padded batch, in its order."""
    arguments = {"pad_id": PAD, "mask_pad": True, "word_dropout": 0.4}
    model = make(name, **arguments).double().train(training)
    tokens, eps = lines(3, 8, 0, 5, 8, 1), torch.randn(6, Z, dtype=torch.float64)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        output = model(tokens, 0.5, eps=eps)
        grads = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        results.append(
            (*output, *grads, model.log_likelihood(tokens, eps), *model.posterior(tokens))
        )
        model.load_state_dict(model.state_dict())
        padded(monkeypatch)
    torch.testing.assert_close(*results)
    assert results[0][-3][2] == 0 and (results[0][-3][[0, 1, 3, 4, 5]] < 0).all()


@pytest.mark.parametrize("name", ["lstm", "none", "lstm_vae"])
def test_pads_are_not_computed(name):
    """The classifier and the head get the rows of tokens only; ByteNet's batch norms need all."""
    model = make(name, pad_id=PAD, mask_pad=True)
    rows = []
    for layer in (model.head, model.decoder and model.decoder.classifier):
        if layer is not None:
            layer.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1]))
    model(lines(3, 8, 0, 5))
    assert rows == [(3 + 8 + 0 + 5,)] * len(rows) and rows
    rows.clear()
    model.pad_id, model.mask_pad = None, False
    model(lines(3, 8, 0, 5))
    assert rows == [(L, 4)] * len(rows) and rows


@pytest.mark.parametrize("name", NAMES)
def test_pads_alone(name):
    """A batch without tokens costs nothing, and every parameter gets its gradient."""
    model = make(name, pad_id=PAD, mask_pad=True)
    output = model(torch.full((3, L), PAD), 0.0, eps=torch.zeros(3, Z))
    output.loss.backward()
    assert output.reconstruction == output.auxiliary == 0
    assert all(p.grad is not None for p in model.parameters())


def test_encoder_reads_the_last_token():
    """With masked pads the posterior is that of the tokens, however many pads follow."""
    model = make("lstm_vae", pad_id=PAD, mask_pad=True).double()
    long = make("lstm_vae", pad_id=PAD, mask_pad=True, length=2 * L).double()
    long.load_state_dict(model.state_dict())
    tokens = lines(3, 8, 0, 5)
    more = torch.cat([tokens, torch.full_like(tokens, PAD)], 1)
    torch.testing.assert_close(long.posterior(more), model.posterior(tokens))
    y, _ = model.encoder(None, tokens=tokens.T)
    want = model.posterior_linear(torch.stack([y[2, 0], y[7, 1], 0 * y[0, 2], y[4, 3]]))
    torch.testing.assert_close(model.posterior(tokens), want.chunk(2, -1))


@pytest.mark.parametrize("name", NAMES)
def test_masked_pads_compile_and_export(name):
    model = make(name, pad_id=PAD, mask_pad=True).eval()
    tokens, (_, step) = lines(3, 8, 0, 5), batch()
    want = model(tokens, 0.5, **step)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, 0.5, **step), want)
    other = lines(1, 2, 6, 0)  # sizes do not depend on the tokens
    exported = torch.export.export(model, (tokens, 0.5), step).module()
    torch.testing.assert_close(
        tuple(exported(other, 0.5, **step)), tuple(model(other, 0.5, **step))
    )


@pytest.mark.parametrize("name", RECURRENT)
def test_dropped_hides_one_symbol_of_one_sequence(name):
    model = make(name).double().eval()
    tokens, step = batch()
    features, state = model._expand(step["eps"].double())

    def logits(tokens, drop_mask):
        return model.decoder(features, model._previous(tokens, drop_mask), state)

    nothing = torch.zeros(4, L, dtype=torch.bool)
    before = logits(tokens, nothing)
    start = nothing.clone()
    start[:, 0] = True
    assert torch.equal(logits(tokens, start), before)
    one = nothing.clone()
    one[1, 3] = True
    changed = (logits(tokens, one) != before).any(-1)  # [L, B]
    assert changed[3, 1] and not changed[:3].any() and not changed[:, [0, 2, 3]].any()
    other = tokens.clone()
    other[1, 2] = (other[1, 2] + 1) % V
    assert torch.equal(logits(other, one), logits(tokens, one))


@pytest.mark.parametrize("name", RECURRENT)
def test_history_is_hidden_altogether_at_one(name):
    """At p = 1 positions are independent given z, so likelihoods of recombined halves balance."""
    model = make(name, word_dropout=1.0).double().eval()
    z = torch.randn(1, Z, dtype=torch.float64).expand(4, -1)
    (a, b), (c, d) = torch.randint(V, (2, 2, L // 2))
    tokens = torch.stack([torch.cat(pair) for pair in ((a, b), (c, d), (a, d), (c, b))])
    ab, cd, ad, cb = model.log_likelihood(tokens, z)
    torch.testing.assert_close(ab + cd, ad + cb)
    sighted = make(name, word_dropout=0.5).double().eval()
    sighted.load_state_dict(model.state_dict())
    everything = torch.ones(4, L, dtype=torch.bool)
    eps = torch.randn(4, Z, dtype=torch.float64)
    hidden = sighted(tokens, eps=eps, drop_mask=everything)
    torch.testing.assert_close(hidden, model(tokens, eps=eps))


def test_training_drops_at_its_rate():
    model = make("lstm", word_dropout=0.3, length=64)
    tokens = torch.randint(V, (256, 64))
    previous = model._previous(tokens, None)
    assert (previous[0] == V).all()
    assert ((previous[1:] == V + 1) | (previous[1:] == tokens.T[:-1])).all()
    count = previous[1:].numel()
    drop_mask = (previous[1:] == V + 1).sum().item()
    assert abs(drop_mask - 0.3 * count) < 5 * math.sqrt(0.3 * 0.7 * count)
    evaluated = model.eval()._previous(tokens, None)
    assert torch.equal(evaluated[1:], tokens.T[:-1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, L - 1, dtype=torch.int64), rf"shape \[B, {L}\].*\[2, {L - 1}\]"),
        (torch.zeros(L, dtype=torch.int64), "shape"),
        (torch.zeros(2, L, dtype=torch.int32), "int64.*int32"),
        (torch.full((2, L), V), f"id {V}; this model's ids are 0 to {V - 1}"),
        (torch.full((2, L), -1), "id -1"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "posterior", "log_likelihood"])
def test_bad_tokens(tokens, message, method):
    model = make("lstm")
    arguments = (torch.randn(2, Z),) if method == "log_likelihood" else ()
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(tokens, *arguments)


def test_tokens_checked_by_the_caller():
    model, (tokens, step) = make("none"), batch()
    want = model(tokens, **step).loss
    assert torch.equal(model(tokens, **step, validate=False).loss, want)
    with pytest.raises(ValueError, match="shape"):
        model(tokens[0], validate=False)
    tokens[1, 2] = V
    model.check_tokens(tokens, ids=False)
    with pytest.raises(ValueError, match=f"id {V}"):
        model.check_tokens(tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(torch.randn(Z)), rf"z must have shape \[B, {Z}\]"),
        (lambda m: m.generate(torch.randn(2, Z + 1)), "z must have shape"),
        (lambda m: m.generate(torch.randn(2, Z), temperature=-1.0), "temperature"),
        (lambda m: m.generate(torch.randn(2, Z), temperature=math.nan), "temperature"),
        (lambda m: m.generate(torch.randn(2, Z), temperature=1.1e37), "temperature must be 0 to"),
        (lambda m: m.log_likelihood(torch.zeros(2, L).long(), torch.randn(3, Z)), r"\[2, 3\]"),
        (lambda m: m.interpolate(torch.randn(Z), torch.randn(2, Z)), "z0 and z1"),
        (
            lambda m: m(torch.zeros(2, L).long(), torch.ones(2)),
            r"^kl_weight must be one number, got shape \[2\]$",
        ),
        (
            lambda m: m(torch.zeros(2, L).long(), free_bits=-1),
            "^free_bits must be 0 or more, got -1",
        ),
        (lambda m: m(torch.zeros(2, L).long(), free_bits=math.nan), "^free_bits must be 0 or more"),
        (
            lambda m: m.interpolate(*torch.randn(2, Z), steps=1),
            "steps must be a whole number from 2 on, got 1",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(make("lstm"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 10}, "length 10 is not divisible by 4.*take 8 or 12"),
        ({"length": 3}, "take 4,"),
        ({"encoder_channels": ()}, "encoder_channels"),
        ({"encoder_channels": 16}, "^encoder_channels must be several sizes, got 16$"),
        ({"mask_pad": "no"}, "^mask_pad must be True or False, got 'no'$"),
        ({"carry": 1}, "^carry must be True or False, got 1$"),
        ({"encoder_channels": (4, 0)}, "encoder_channels"),
        ({"decoder": "gru"}, "'lstm', 'bytenet' or 'none', got 'gru'"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"latent_size": 0}, "latent_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"conv_layers": 0}, "conv_layers"),
        ({"word_dropout": 1.5}, "word_dropout"),
        ({"aux_weight": -0.1}, "aux_weight"),
        ({"aux_weight": math.nan}, "aux_weight must be 0 or more, and finite, got nan"),
        ({"aux_weight": math.inf}, "aux_weight must be 0 or more, and finite, got inf"),
        ({"word_dropout": math.nan}, "word_dropout"),
        ({"encoder_channels": (1 << 60, 8)}, "encoder_channels must be from 1 to 16,777,216"),
        ({"hidden_size": 10**20}, "hidden_size must be from 1 to 16,777,216"),
        ({"conv_layers": 1025}, "conv_layers must be from 1 to 1,024"),
        ({"pad_id": V}, f"pad_id must be between 0 and {V - 1}"),
        ({"pad_id": -1}, f"pad_id must be between 0 and {V - 1}, got -1"),
        ({"pad_id": 0, "end_id": V}, f"end_id must be between 0 and {V - 1}, got {V}"),
        ({"length": 0}, "length must be from 1 to 16,777,216, got 0"),
        ({"feature_channels": 0}, "feature_channels must be from 1"),
        ({"conv_channels": 0}, "conv_channels must be from 1"),
        ({"hidden_size": (1 << 24) + 1}, "hidden_size must be from 1 to 16,777,216"),
        ({"word_dropout": -0.01}, "word_dropout must be between 0 and 1, got -0.01"),
        ({"pad_id": 1.5}, "pad_id must be a whole number or None, got 1.5"),
        ({"latent_size": 2.5}, "latent_size must be a whole number, got 2.5"),
        ({"hidden_size": True}, "hidden_size must be a whole number, got True"),
        ({"encoder_channels": (8.0, 8)}, r"encoder_channels must be a whole number, got 8\.0"),
        ({"end_id": 2}, "end_id requires pad_id"),
        ({"mask_pad": True}, "mask_pad requires pad_id"),
        ({"aux_weight": 10**400}, "aux_weight must be 0 or more, and finite, got 1"),
        ({"mask_pad": True, "pad_id": 2, "end_id": 2}, "pad_id and end_id are both 2: give pads"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"vocab_size": V, "length": L, "encoder_channels": (4, 5), **arguments}
    with pytest.raises(ValueError, match=message):
        HybridVAE(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"vocab_size": 1, "latent_size": 1, "hidden_size": 1, "feature_channels": 1},
        {"encoder_channels": (1,), "length": 2},
        {"hidden_size": 1 << 24},
        {"decoder": "bytenet", "conv_layers": 1, "conv_channels": 1},
        {"decoder": "bytenet", "conv_layers": 1024, "conv_channels": 1},
        {"word_dropout": 0.0, "aux_weight": 0.0},
        {"word_dropout": 1.0},
        {"pad_id": V - 1, "end_id": 0},
        {"pad_id": 0, "end_id": V - 1, "mask_pad": True},
    ],
    ids=str,
)
def test_arguments_at_their_limits(arguments):
    given = {"vocab_size": V, "length": L, "encoder_channels": (4, 5), **arguments}
    config = HybridVAE(**given, device="meta").config
    assert {name: config[name] for name in given} == given


@pytest.mark.parametrize("name", ["bytenet", "lstm_vae"])
def test_config_builds_the_model_again(name):
    model = make(name, pad_id=PAD, word_dropout=0.25, mask_pad=True)
    config = json.loads(json.dumps(model.config))
    again = type(model)(**config)
    assert again.config == model.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert constructor_arguments({"self": 1, "device": 2, "a": 3}) == {"a": 3}


@pytest.mark.parametrize("name", RECURRENT)
def test_compiles_whole(name):
    model = make(name)
    tokens, step = batch()
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, plain = (m(tokens, torch.tensor(0.5), **step) for m in (compiled, expected))
    torch.testing.assert_close(output, plain)
    output.loss.backward()
    plain.loss.backward()
    for (key, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_compiled_weight_does_not_compile_again():
    model = make("none")
    tokens, step = batch()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = [compiled(tokens, torch.tensor(w), **step).loss.item() for w in (0.0, 0.5, 1.0)]
    assert counter.frame_count == 1 and losses == sorted(set(losses))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_exports(name, training):
    model = make(name).train(training)
    tokens, step = batch()
    exported = torch.export.export(copy.deepcopy(model), (tokens, 0.5), step).module()
    torch.testing.assert_close(
        tuple(exported(tokens, 0.5, **step)), tuple(model(tokens, 0.5, **step))
    )


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    model = make(name, pad_id=PAD, end_id=END)
    tokens, step = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens, 0.5, **step)
        greedy, sampled = model.generate(step["eps"]), model.sample(2, temperature=1.0)
    output.loss.backward()
    assert {t.dtype for t in output} == {torch.float32}
    assert greedy.shape == (4, L) and sampled.shape == (2, L)
    for key, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), key
    again = model(tokens, 0.5, **step)
    torch.testing.assert_close(again.loss, output.loss, rtol=2**-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    model = make(name, pad_id=PAD, end_id=END).bfloat16()
    tokens, step = batch()
    model(tokens, 0.5, **step).loss.backward()
    assert all(p.grad.isfinite().all() and p.dtype == torch.bfloat16 for p in model.parameters())
    for temperature in (0.0, 1.0):
        assert model.generate(step["eps"], temperature=temperature).shape == (4, L)
    assert model.sample(2).shape == (2, L)


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_is_apart(name):
    model = make(name)
    tokens, step = batch()
    reference_model = copy.deepcopy(model)
    torch.testing.assert_close(reference_model(tokens, **step), model(tokens, **step))
    with torch.no_grad():
        for p in reference_model.parameters():
            p.zero_()
    assert all(p.any() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_reset_parameters_and_repr(name):
    model = make(name)
    model.reset_parameters()
    assert all(p.abs().max() <= 1 for p in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert all((m.running_mean == 0).all() and (m.weight == 1).all() for m in norms)
    assert repr(model).startswith(f"{type(model).__name__}(\n  {V}, {L}, latent_size={Z}")


@pytest.mark.parametrize("name", NAMES)
def test_data_parallel_waits_for_nothing(name, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = make(name, **({} if name == "lstm_vae" else {"aux_weight": 0.0}))
        plain = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        tokens, step = batch()
        for _ in range(2):  # the second step fails if the first left a parameter without gradient
            parallel(tokens, **step).loss.backward()
            plain(tokens, **step).loss.backward()
        for (key, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad, q[1].grad, msg=lambda m, key=key: f"{key}: {m}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_copies_share_the_process_group(name, tmp_path):
    """Pickled models have none: a process that reads them has other groups."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        group, model = torch.distributed.group.WORLD, make(name)
        set_process_group(model, group)
        averaged = torch.optim.swa_utils.AveragedModel(model).module
        read = pickle.loads(pickle.dumps(model))
        for copied, expected in ((copy.deepcopy(model), group), (averaged, group), (read, None)):
            groups = [m.process_group for m in copied.modules() if isinstance(m, AcrossProcesses)]
            assert groups and all(found is expected for found in groups)
            tokens, step = batch()
            torch.testing.assert_close(copied(tokens, **step).loss, model(tokens, **step).loss)
        assert make(name).process_group is None
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_share_nothing_are_told(monkeypatch):
    """While they train, unless a group was given."""
    model, (tokens, step) = make("lstm"), batch()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for world, mode, group, told in (
        (2, True, None, 1), (1, True, None, 0), (2, False, None, 0), (2, False, "a group", 0)
    ):  # fmt: skip
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda world=world: world)
        model.train(mode).process_group = group
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(tokens, **step)
        said = [w for w in caught if "call fastvae.nn.set_process_group" in str(w.message)]
        assert len(said) == told and all(w.filename.endswith("module.py") for w in said)


def tiny(decoder: str = "lstm", **arguments):
    sizes = {"latent_size": 4, "encoder_channels": (8, 8), "feature_channels": 8}
    sizes |= {"hidden_size": 16, "conv_layers": 2, "conv_channels": 8}
    return fastvae.HybridVAE(20, 16, decoder=decoder, **{**sizes, **arguments}).eval()


@pytest.mark.parametrize("decoder", ["lstm", "bytenet", "none"])
def test_empty_batch(decoder):
    model = tiny(decoder)
    tokens, z = torch.zeros(0, 16, dtype=torch.int64), torch.zeros(0, 4)
    assert model.posterior(tokens)[0].shape == (0, 4)
    assert model.log_likelihood(tokens, z).shape == (0,)
    assert model.generate(z).shape == model.sample(0).shape == (0, 16)
    assert model.sample(0, temperature=1.0).shape == (0, 16)
    assert model.logits(tokens, z).shape == (16, 0, 20)
    model.log_likelihood(tokens, z.requires_grad_()).sum().backward()
    assert z.grad.shape == (0, 4)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(grad.any() for grad in gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_loss_of_an_empty_batch_is_refused(name, training):
    """PyTorch's mean of nothing would be NaN, and so would every parameter after a step."""
    model = make(name).train(training)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        model(torch.zeros(0, L, dtype=torch.int64))
    assert str(error.value) == (
        f"a loss is a mean over sequences, got tokens of shape [0, {L}]: leave out empty batches"
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_leaves_the_running_statistics(name):
    model = make(name).train()
    before = copy.deepcopy(model.state_dict())
    tokens, z = torch.zeros(0, L, dtype=torch.int64), torch.zeros(0, Z)
    for call in (lambda: model.posterior(tokens), lambda: model.log_likelihood(tokens, z)):
        with contextlib.suppress(ValueError, RuntimeError):
            call()
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, before[key]), key


def test_numpy_scalars_are_sizes(tmp_path):
    sizes = {"latent_size": np.int64(4), "encoder_channels": np.array([8, 8])}
    sizes |= {"hidden_size": np.int32(16), "aux_weight": np.float32(0.5)}
    model = fastvae.HybridVAE(np.int64(20), np.int16(16), pad_id=np.int64(0), **sizes)
    assert model.sample(np.int64(3)).shape == (3, 16)
    assert type(model.config["vocab_size"]) is type(model.config["pad_id"]) is int
    model.save_pretrained(tmp_path)
    assert fastvae.load(tmp_path)[0].config["aux_weight"] == 0.5


@pytest.mark.parametrize("part", ["decoder.classifier.bias", "encoder.linear.weight"])
def test_devices_are_not_mixed(part):
    model = tiny()
    module, _, name = part.rpartition(".")
    value = model.get_parameter(part)
    setattr(model.get_submodule(module), name, torch.nn.Parameter(value.to("meta")))
    with pytest.raises(
        RuntimeError, match=r"must be on the device of \w+, (cpu, got meta|meta, got cpu)$"
    ):
        model(torch.zeros(2, 16, dtype=torch.int64))


@pytest.mark.parametrize(
    "name", ["forward", "posterior", "encode", "log_likelihood", "logits", "generate"]
)
def test_trace_is_one_clear_line(name):
    model, tokens = tiny().requires_grad_(False), torch.zeros(2, 16, dtype=torch.int64)
    given = {"generate": (torch.zeros(2, 4),), "log_likelihood": (tokens, torch.zeros(2, 4))}
    given["logits"] = given["log_likelihood"]
    with pytest.raises(
        RuntimeError, match=r"^torch\.jit\.trace does not work here: use torch\.export"
    ):
        torch.jit.trace(lambda *x: getattr(model, name)(*x), given.get(name, (tokens,)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_latent_vectors_are_real_numbers(dtype):
    with pytest.raises(ValueError, match=f"^z must have a floating-point dtype, got {dtype}$"):
        tiny().generate(torch.zeros(2, 4, dtype=dtype))


class Ids(torch.Tensor):
    """A kind of tensor that a data library may give."""


@pytest.mark.parametrize("kind", ["subclass", "parameter"])
@pytest.mark.parametrize("name", ["forward", "logits", "posterior"])
def test_ids_of_every_kind_of_tensor_are_checked(name, kind):
    tokens, model = torch.zeros(2, 16, dtype=torch.int64), tiny()
    tokens[1, 2] = 20
    z = (torch.zeros(2, 4),) if name == "logits" else ()
    tokens = tokens.as_subclass(Ids) if kind == "subclass" else nn.Parameter(tokens, False)
    with pytest.raises(ValueError, match=r"tokens hold the id 20; this model's ids are 0 to 19"):
        getattr(model, name)(tokens, *z)


def test_ids_of_fake_tensors_are_not_looked_at():
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = tiny()(torch.zeros(2, 16, dtype=torch.int64))
    assert out.loss.shape == () and isinstance(out.loss, FakeTensor)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_made_where_and_as_asked(name):
    model = make(name, device="meta", dtype=torch.float64)
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize(
    "module",
    [
        tiny(),
        LSTMVAE(V, L, latent_size=2, hidden_size=4),
        fastvae.nn.LayerNormLSTM(2, 3),
        fastvae.nn.HighwayConvStack(2, 1),
        fastvae.nn.HighwayConv(2),
        fastvae.nn.ConvEncoder(V, L, 2, (4,)),
        fastvae.nn.Linear(2, 3),
        fastvae.nn.BatchNorm(3),
        nn.Sequential(nn.Linear(2, 2), fastvae.nn.LayerNormLSTM(2, 3)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_script_is_one_clear_line(module):
    with pytest.raises(RuntimeError) as error:
        torch.jit.script(module)
    assert str(error.value) == (
        "torch.jit.script does not work here: use torch.export or torch.compile"
    )


@pytest.mark.parametrize("count", [-1, 2.5, True, "3", None, torch.tensor(2.0)], ids=str)
def test_what_is_no_number_of_sequences(count):
    model, z = tiny(), torch.zeros(4)
    with pytest.raises(ValueError, match=r"^count must be a whole number from 0 on, got "):
        model.sample(count)
    with pytest.raises(ValueError, match=r"^steps must be a whole number from 2 on, got "):
        model.interpolate(z, z, count)


@pytest.mark.parametrize("decoder", ["lstm", "bytenet", "none"])
def test_more_sequences_than_memory_holds(decoder, monkeypatch):
    sixteen_gb = {"SC_PHYS_PAGES": 1 << 22, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(os, "sysconf", sixteen_gb.__getitem__)
    model, z = tiny(decoder=decoder), torch.zeros(4)
    for count in (10**9, 10**18, 10**30):
        for name, call in (
            ("count", lambda n: model.sample(n)),
            ("steps", lambda n: model.interpolate(z, z, n)),
        ):
            with pytest.raises(
                ValueError, match=rf"^the sequences of {name}={count} and what"
            ) as e:
                call(count)
            assert str(e.value).endswith("this machine has 17 GB of memory: choose smaller sizes")
    # 16 positions of 20 tokens in float32 are 1,280 bytes for each sequence more.
    wide = 8_000_000
    assert 16 * (8 + 4 * 8) * wide < 1.7e10 < 1280 * wide * 2
    with pytest.raises(ValueError, match="the sequences of count=16000000"):
        model.sample(2 * wide, temperature=1.0)


def test_default_device(tmp_path):
    corpus = fastvae.text.WindowCorpus("the cat sat\n" * 40, 16)
    V = corpus.vocabulary
    torch.manual_seed(0)
    sizes = {"latent_size": 4, "encoder_channels": (8, 8), "hidden_size": 16}
    model = fastvae.HybridVAE(V.size, 16, **sizes)
    before = next(corpus.batches(3))
    torch.set_default_device("meta")
    try:
        assert torch.equal(next(corpus.batches(3)), before)
        config = fastvae.TrainingConfig(steps=2, batch_size=4)
        fastvae.train(model, corpus, config, tmp_path, validation=corpus)
        loaded, _ = fastvae.load(tmp_path)
        masked = fastvae.HybridVAE(V.size, 16, pad_id=0, mask_pad=True, device="cpu", **sizes)
        assert masked(before).loss.isfinite()
    finally:
        torch.set_default_device(None)
    z = torch.randn(2, 4)
    assert torch.equal(loaded.generate(z), model.eval().generate(z))


@pytest.mark.parametrize("what", ["generate", "log_likelihood"])
def test_export_with_a_dynamic_batch(what):
    class Call(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens, z):
            return (
                self.model.generate(z)
                if what == "generate"
                else self.model.log_likelihood(tokens, z)
            )

    model = tiny()
    tokens, z = torch.randint(20, (3, 16)), torch.randn(3, 4)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Call(model), (tokens, z), dynamic_shapes=({0: batch}, {0: batch})
    ).module()
    tokens, z = torch.randint(20, (7, 16)), torch.randn(7, 4)
    torch.testing.assert_close(program(tokens, z), Call(model)(tokens, z))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3, 2, dtype=torch.bool), torch.ones(1, L, dtype=torch.bool), torch.ones(3, L)],
    ids=["short", "one row", "float"],
)
def test_drop_masks_are_not_broadcast(mask):
    model = HybridVAE(V, L, latent_size=2, encoder_channels=(4,), hidden_size=4)
    with pytest.raises(ValueError, match=rf"drop_mask must be bool of shape \[3, {L}\], got"):
        model(torch.zeros(3, L, dtype=torch.int64), drop_mask=mask)


def test_gradients_of_each_text():
    """vmap over texts, by torch.func."""
    model = HybridVAE(V, L, latent_size=2, encoder_channels=(4,), hidden_size=4).eval()
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    tokens, eps = torch.randint(V, (3, L)), torch.randn(3, 2)

    def loss(parameters, row, noise):
        inputs = row.unsqueeze(0), {"eps": noise.unsqueeze(0)}
        return torch.func.functional_call(model, parameters, inputs[0], inputs[1]).loss

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, tokens, eps)
    for n in range(3):
        want = torch.func.grad(loss)(parameters, tokens[n], eps[n])
        for name in want:
            torch.testing.assert_close(each[name][n], want[name], rtol=1e-4, atol=1e-6)
