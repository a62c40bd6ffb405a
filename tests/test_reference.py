"""fastvae's models against the reference models: state, training, evaluation, generation."""

from functools import partial

import pytest
import torch

from fastvae import nn as layers
from fastvae import reference as reference_modules
from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.testing import assert_accurate, gradients

V, L, Z, B = 11, 16, 5, 6
SIZES = {
    "latent_size": Z,
    "encoder_channels": (8, 12),
    "feature_channels": 7,
    "hidden_size": 17,
    "conv_channels": 9,
}
HYBRIDS = {
    "lstm": {},
    "lstm-no-auxiliary": {"aux_weight": 0.0},
    "lstm-masked": {"mask_pad": True, "pad_id": 3},
    "lstm-dropout": {"word_dropout": 0.5},
    "lstm-mask_history": {"word_dropout": 1.0},
    "bytenet": {"decoder": "bytenet"},
    "bytenet-no-carry": {"decoder": "bytenet", "carry": False, "aux_weight": 0.5},
    "bytenet-one-layer": {"decoder": "bytenet", "conv_layers": 1, "aux_weight": 0.0},
    "bytenet-masked": {"decoder": "bytenet", "mask_pad": True, "pad_id": 0},
    "bytenet-mask_history": {"decoder": "bytenet", "word_dropout": 1.0},
    "none": {"decoder": "none"},
    "none-masked": {"decoder": "none", "mask_pad": True, "pad_id": 1},
}
BASELINES = {
    "baseline": {},
    "baseline-masked": {"mask_pad": True, "pad_id": 3, "word_dropout": 0.2},
    "baseline-mask_history": {"word_dropout": 1.0},
}
MODELS = [*HYBRIDS, *BASELINES]
POSTERIOR = "encoder.linear.weight", "posterior_linear.weight"  # of a hybrid, of a baseline


def pair(name, **more):
    """Constructors of our model and its reference model, each dtype -> module."""
    if name in HYBRIDS:
        arguments = SIZES | HYBRIDS[name] | more
        classes = HybridVAE, reference_modules.HybridVAE
    else:
        arguments = {"latent_size": Z, "hidden_size": 17} | BASELINES[name] | more
        classes = LSTMVAE, reference_modules.LSTMVAE
    return [lambda dtype, c=c: c(V, L, dtype=dtype, **arguments) for c in classes]


def lively_state(make):
    """A state with weights large enough that texts vary, and statistics unlike a new model's.

    Those of the posterior stay small: the KL is exponential in them, and so would be its rounding.
    """
    state = make(torch.float32).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor), alpha=0.8 if tensor.dim() > 1 else 0.3)
            if name in POSTERIOR:
                tensor.mul_(0.1)
    return state


def build(make, state, dtype, training=False):
    model = make(dtype).train(training)
    model.load_state_dict(state)
    return model


def batches(steps):
    tokens = torch.randint(V, (steps, B, L))
    return tokens, torch.rand(steps, B, L) < 0.5, torch.randn(steps, B, Z)


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_are_the_same(name):
    ours, reference_model = (make(torch.float32).state_dict() for make in pair(name))
    assert list(ours) == list(reference_model)
    for key, tensor in ours.items():
        assert (
            tensor.shape == reference_model[key].shape
            and tensor.dtype == reference_model[key].dtype
        ), key


def test_parameter_counts():
    for hybrid, baseline in (
        (HybridVAE, LSTMVAE),
        (reference_modules.HybridVAE, reference_modules.LSTMVAE),
    ):
        sizes = [
            sum(p.numel() for p in model(259, 128, device="meta").parameters())
            for model in (hybrid, baseline)
        ]
        assert sizes == [11_099_574, 10_765_459]


@pytest.mark.parametrize("name", MODELS)
def test_reference_model_start_as_the_paper_says(name):
    """U(-0.1, 0.1) for weights and biases; gains 1 and biases 0 in norms."""
    for key, tensor in pair(name)[1](torch.float32).named_parameters():
        if "norm" in key:
            assert (tensor == float(key.endswith("weight"))).all(), key
        else:
            assert tensor.abs().max() <= 0.1 and tensor.unique().numel() == tensor.numel(), key


def training(make, state, tokens, drop_mask, free_bits=0.0):
    """noise [steps, B, Z] -> the terms of every step, Adam between them, in the noise's dtype.

    Adam's eps is large, or it would amplify rounding: its first step divides each gradient by
    itself, and a gradient near 0 has no correct digits.
    """

    def run(noise):
        model = build(make, state, noise.dtype, training=True)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
        terms = []
        for step in range(len(noise)):
            output = model(
                tokens[step],
                0.1 * (step + 1),
                free_bits=free_bits,
                eps=noise[step],
                drop_mask=drop_mask[step],
            )
            adam.zero_grad()
            output.loss.backward()
            adam.step()
            terms.append([term.detach() for term in output])
        return tuple(map(torch.stack, zip(*terms, strict=True)))

    return run


@pytest.mark.parametrize("name", MODELS)
def test_ten_training_steps(name):
    ours, reference_model = pair(name)
    state = reference_model(torch.float32).state_dict()
    tokens, drop_mask, noise = batches(10)
    fn, reference = (training(make, state, tokens, drop_mask) for make in (ours, reference_model))
    assert_accurate(fn, reference, noise)


@pytest.mark.parametrize("name, free_bits", [("lstm", 0.03), ("baseline", 0.005)])
def test_ten_training_steps_with_free_bits(name, free_bits):
    ours, reference_model = pair(name)
    state = reference_model(torch.float32).state_dict()
    tokens, drop_mask, noise = batches(10)
    fn, reference = (
        training(make, state, tokens, drop_mask, free_bits) for make in (ours, reference_model)
    )
    assert_accurate(fn, reference, noise)
    below = reference(noise)[-1] < free_bits
    assert below.any() and not below.all()


def lines(name, steps):
    """Batches of sequences of all lengths, none and whole ones too, with pads in some's middle."""
    tokens, drop_mask, noise = batches(steps)
    lengths = torch.randint(1, L, (steps, B, 1))
    lengths[:, 1], lengths[:, 4] = 0, L
    pads = torch.arange(L) >= lengths
    return tokens.masked_fill(pads, (HYBRIDS | BASELINES)[name]["pad_id"]), drop_mask, noise


MASKED = [name for name in MODELS if name.endswith("-masked")]
KINDS = [*((name, batches) for name in MODELS), *((name, partial(lines, name)) for name in MASKED)]
NAMES_OF_KINDS = [*MODELS, *(f"{name}-lines" for name in MASKED)]


@pytest.mark.parametrize("name, batches", KINDS, ids=NAMES_OF_KINDS)
def test_gradients_and_statistics_of_one_step(name, batches):
    """Every tensor in units of its largest value, and all of them as one, over several batches.

    Biases before a batch norm are left out: there is only rounding in their gradient.
    """
    ours, reference_model = pair(name)
    state = lively_state(reference_model)
    tokens, drop_mask, noise = batches(4)
    lost = ("convs.", "decoder.input.", "stack.layers.")

    def step(make, noise, n):
        model = build(make, state, noise.dtype, training=True)
        model(tokens[n], eps=noise[n], drop_mask=drop_mask[n]).loss.backward()
        results = {key: buffer.to(noise.dtype) for key, buffer in model.named_buffers()}
        for key, parameter in model.named_parameters():
            bias = key.endswith("bias") and "norm" not in key
            if parameter.grad is not None and not (bias and any(part in key for part in lost)):
                results[key + ".grad"] = parameter.grad
        return results

    sizes = [
        {key: float(tensor.abs().max()) or 1.0 for key, tensor in gold.items()}
        for gold in (step(reference_model, noise.double(), n) for n in range(len(noise)))
    ]

    def relative(make):
        def run(noise):
            scaled = []
            for n, largest in enumerate(sizes):
                results = step(make, noise, n)
                assert list(results) == list(largest)
                scaled += [(results[key] / size).flatten() for key, size in largest.items()]
            return torch.cat(scaled)

        return run

    assert_accurate(relative(ours), relative(reference_model), noise)


@pytest.mark.parametrize("name", MASKED)
def test_likelihood_of_lines(name):
    ours, reference_model = pair(name)
    state = lively_state(reference_model)
    tokens, _, noise = lines(name, 8)

    def likelihood(make):
        def run(noise):
            model, results = build(make, state, noise.dtype), []
            for batch, drawn in zip(tokens, noise, strict=True):
                terms = model(batch, eps=drawn)
                results.append((model.log_likelihood(batch, drawn), *terms[1:4:2]))
                assert results[-1][0][1] == 0  # no tokens, nothing to say
            return tuple(map(torch.stack, zip(*results, strict=True)))

        return run

    with torch.no_grad():
        assert_accurate(likelihood(ours), likelihood(reference_model), noise)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name):
    """Running statistics, no random dropping: forward, posterior and likelihood.

    The posterior's weight is an input too: one value of it would be one chance of rounding.
    """
    ours, reference_model = pair(name)
    state = lively_state(reference_model)
    tokens, _, noise = batches(8)
    posterior = next(key for key in POSTERIOR if key in state)

    def evaluate(make):
        def run(noise, weight):
            model, results = build(make, state | {posterior: weight}, noise.dtype), []
            for batch, drawn in zip(tokens, noise, strict=True):
                terms = *model(batch, 0.7, eps=drawn), *model.posterior(batch)
                results.append((*terms, model.log_likelihood(batch, drawn)))
            assert all(map(torch.equal, model.buffers(), map(state.get, buffers)))
            return tuple(map(torch.stack, zip(*results, strict=True)))

        buffers = [key for key, _ in make(torch.float32).named_buffers()]
        return run

    with torch.no_grad():
        assert_accurate(evaluate(ours), evaluate(reference_model), noise, state[posterior])


@pytest.mark.parametrize("name", MODELS)
def test_log_likelihood_is_the_reconstruction(name):
    """With z = mean, the bound's first term and the mean of log p(x | z) are one number."""
    ours, reference_model = pair(name)
    state, (tokens, _, _) = lively_state(reference_model), batches(1)
    for make in (ours, reference_model):
        model = build(make, state, torch.float64)
        output = model(tokens[0], eps=torch.zeros(B, Z, dtype=torch.float64))
        mean, _ = model.posterior(tokens[0])
        likelihood = model.log_likelihood(tokens[0], mean).mean()
        torch.testing.assert_close(-likelihood, output.reconstruction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generation(name, dtype):
    """Greedy and with equal seeds at a temperature; training mode changes nothing and stays."""
    makers = pair(name, pad_id=0, end_id=4)
    state, z, results = lively_state(makers[1]), 2 * torch.randn(40, Z, dtype=dtype), []
    for make in makers:
        model = build(make, state, dtype, training=True)
        greedy = model.generate(z)
        assert torch.equal(greedy, model.eval().generate(z)) and not model.training
        model.train()
        seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
        warm = model.generate(z, temperature=0.8, generator=seeded[0])
        drawn = model.sample(30, temperature=1.3, generator=seeded[1])
        between = model.interpolate(z[0], z[1], steps=5)
        assert torch.equal(between[[0, -1]], greedy[:2]) and model.training
        results.append((greedy, warm, drawn, between))
    for ours, reference_model in zip(*results, strict=True):
        assert torch.equal(ours, reference_model)
        if len(reference_model) > 5:
            assert len(reference_model.unique(dim=0)) > 5
    warm = results[0][1].tolist()
    assert any(4 in row and row.index(4) < L - 1 for row in warm)
    assert all(set(row[row.index(4) + 1 :]) <= {0} for row in warm if 4 in row)


@pytest.mark.parametrize("name", MODELS)
def test_generation_without_end(name):
    ours, reference_model = pair(name)
    state, z = lively_state(reference_model), torch.randn(40, Z)
    tokens = build(ours, state, torch.float32).generate(z)
    assert torch.equal(tokens, build(reference_model, state, torch.float32).generate(z))


@pytest.mark.parametrize("with_state", [False, True])
def test_layer_norm_lstm(with_state):
    def layer(module):
        def run(x, h0, c0, *parameters):
            lstm = module.LayerNormLSTM(5, 7, eps=1e-3)
            state = dict(zip(dict(lstm.named_parameters()), parameters, strict=True))
            arguments = (x, (h0, c0)) if with_state else (x,)
            y, (h_n, c_n) = torch.func.functional_call(lstm, state, arguments)
            return y, h_n, c_n

        return run

    parameters = [torch.randn(p.shape) for p in reference_modules.LayerNormLSTM(5, 7).parameters()]
    inputs = (torch.randn(6, 3, 5), torch.randn(3, 7), torch.randn(3, 7), *parameters)
    assert_accurate(layer(layers), layer(reference_modules), *inputs)
    assert_accurate(gradients(layer(layers)), gradients(layer(reference_modules)), *inputs)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_highway_conv_stack(training, carry):
    state = reference_modules.HighwayConvStack(9, 3, carry=carry).state_dict()
    for key, tensor in state.items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if "norm" in key else tensor.normal_(0, 0.3)

    def stack(module):
        def run(x):
            model = module.HighwayConvStack(9, 3, carry=carry, dtype=x.dtype).train(training)
            model.load_state_dict(state)
            return model(x)

        return run

    x = torch.randn(12, 16, 9)
    assert_accurate(stack(layers), stack(reference_modules), x)
    assert_accurate(gradients(stack(layers)), gradients(stack(reference_modules)), x)
