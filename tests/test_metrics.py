"""Metrics against hand-computed and closed-form cases."""

import math

import pytest
import torch
from torch import nn

from fastvae import metrics
from fastvae.evaluation import measure
from fastvae.models.hybrid import HybridVAE


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x = a z + N(0, s²) per position: the posterior and p(x) are known exactly.

    A token is the value of x. `stretch` widens the posterior that it claims: 1 is the true one.
    """

    def __init__(self, a: float, s: float, stretch: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.s, self.stretch = s, stretch

    def posterior(self, tokens):
        variance = 1 / (1 + self.gain**2 / self.s**2)
        mean = variance * self.gain / self.s**2 * tokens
        return mean, torch.full_like(mean, (variance * self.stretch).log().item())

    def log_likelihood(self, tokens, z):
        assert not self.training
        return torch.distributions.Normal(self.gain * z, self.s).log_prob(tokens).sum(1)

    def negative_log_marginal(self, tokens):
        deviation = math.sqrt(self.gain.item() ** 2 + self.s**2)
        return -torch.distributions.Normal(0.0, deviation).log_prob(tokens.double()).sum(1)


TOKENS = torch.tensor([[0, 1, -2], [3, 0, 1], [2, 2, 2], [-1, 0, 0], [5, -4, 1]])


def test_bits_per_character():
    # Two bits for each of eight characters.
    assert metrics.bits_per_character(16 * math.log(2), 8) == pytest.approx(2)


def test_importance_weights_are_exact_under_the_true_posterior():
    model = LinearGaussian(a=1.5, s=0.7)
    nll = metrics.importance_weighted_nll(model, TOKENS, 1)
    torch.testing.assert_close(nll, model.negative_log_marginal(TOKENS))
    assert nll.dtype == torch.float64 and model.training


def test_importance_weights_converge_from_above():
    model = LinearGaussian(a=1.5, s=0.7, stretch=1.5)
    truth = model.negative_log_marginal(TOKENS)

    def estimates(samples, repeats):
        copies = TOKENS.repeat(repeats, 1)
        return metrics.importance_weighted_nll(model, copies, samples).view(repeats, len(TOKENS))

    loose, tight = estimates(1, 2000), estimates(500, 200)
    # One sample gives the bound: above the truth by KL(q ‖ p(z | x)), here 3/2 (1.5 − 1 − ln 1.5).
    gap = 1.5 * (0.5 - math.log(1.5))
    error = loose.std(0) / math.sqrt(len(loose))
    assert ((loose.mean(0) - truth - gap).abs() < 5 * error).all()
    # Five hundred leave about Var(w) / 1000 of it.
    error = tight.std(0) / math.sqrt(len(tight))
    assert ((tight.mean(0) - truth).abs() < 5 * error + 1e-3).all()


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_importance_weights_do_not_depend_on_the_chunk(chunk):
    model = LinearGaussian(a=1.5, s=0.7, stretch=2.0)
    results = [
        metrics.importance_weighted_nll(model, TOKENS, 9, torch.Generator().manual_seed(1), chunk=c)
        for c in (1000, chunk)
    ]
    torch.testing.assert_close(*results)


def test_importance_weights_survive_improbable_texts():
    model = LinearGaussian(a=1.5, s=0.01)  # densities far below what float64 can hold
    nll = metrics.importance_weighted_nll(model, TOKENS * 100, 3)
    torch.testing.assert_close(nll, model.negative_log_marginal(TOKENS * 100))


def test_importance_weights_need_a_sample():
    with pytest.raises(ValueError, match="samples"):
        metrics.importance_weighted_nll(LinearGaussian(1.0, 1.0), TOKENS, 0)


def test_mutual_information_of_equal_posteriors_is_zero():
    mean, logvar = torch.full((50, 3), 0.7), torch.full((50, 3), -1.0)
    assert metrics.mutual_information(mean, logvar) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_mutual_information_of_posteriors_far_apart_is_log_n(chunk):
    mean = torch.arange(50).view(50, 1).repeat(1, 3) * 100.0
    logvar = torch.zeros(50, 3)
    found = metrics.mutual_information(mean, logvar, chunk=chunk)
    assert found == pytest.approx(math.log(50))


@pytest.mark.parametrize(
    ("scale", "logvar"), [(1, -30), (1, -40), (1, -80), (1e8, 0), (100, -20), (1e3, -60)]
)
def test_mutual_information_of_narrow_posteriors_is_log_n(scale, logvar):
    """And never above, wherever they are."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 8, generator=generator, dtype=torch.float64) * scale
    logvar = torch.full_like(mean, logvar)
    found = metrics.mutual_information(mean, logvar, generator=generator, chunk=50)
    assert found == pytest.approx(math.log(64), rel=1e-12) and found <= math.log(64) + 1e-12


def test_mutual_information_of_two_overlapping_posteriors():
    # The mixture of N(−1, 1) and N(1, 1): I = H(z) − H(z | x), its entropy by quadrature.
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    normal = torch.distributions.Normal
    density = (normal(-1.0, 1.0).log_prob(grid).exp() + normal(1.0, 1.0).log_prob(grid).exp()) / 2
    entropy = -torch.trapezoid(density * density.log(), grid)
    expected = (entropy - normal(0.0, 1.0).entropy()).item()

    mean = torch.tensor([-1.0, 1.0]).repeat(500).view(-1, 1)  # copies leave the mixture as it is
    generator = torch.Generator().manual_seed(0)
    found = [
        metrics.mutual_information(mean, torch.zeros_like(mean), generator=generator)
        for _ in range(10)
    ]
    found = torch.tensor(found)
    assert (found.mean() - expected).abs() < 5 * found.std() / math.sqrt(len(found))


def test_active_units():
    # Biased variances 1/64, 1/256 and 0 about any mean.
    signs = torch.tensor([[1.0], [-1.0]]).repeat(10, 1)
    mean = torch.cat([5 + signs / 8, -3 + signs / 16, torch.ones(20, 1)], 1)
    assert metrics.active_units(mean) == 1


def test_variety():
    texts = ["a b a b", "a b", "c", "a b"]
    # Bigrams: ab ba ab, ab, none, ab: five, two of them distinct. Unigrams: nine, three distinct.
    assert metrics.distinct_n(texts, 2) == pytest.approx(2 / 5)
    assert metrics.distinct_n(texts, 1) == pytest.approx(3 / 9)
    assert metrics.distinct_n(texts, 5) == 0
    assert metrics.distinct_n(["abab", "ba"], 2, unit="character") == pytest.approx(2 / 4)
    assert metrics.unique_share(texts) == pytest.approx(3 / 4)
    assert metrics.most_common_share(texts) == pytest.approx(2 / 4)
    assert metrics.variety(texts) == pytest.approx({
        "distinct_1": 3 / 9, "distinct_2": 2 / 5, "distinct_3": 1.0,
        "unique_share": 3 / 4, "most_common_share": 2 / 4,
    })  # fmt: skip
    with pytest.raises(ValueError, match="unit"):
        metrics.distinct_n(texts, 1, unit="letter")
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        metrics.distinct_n(texts, 0)
    for share in (metrics.unique_share, metrics.most_common_share):
        with pytest.raises(ValueError, match="there are no texts to measure"):
            share([])
    with pytest.raises(ValueError, match="there are no texts to measure"):
        metrics.mutual_information(torch.zeros(0, 2), torch.zeros(0, 2))


def small(**arguments):
    sizes = {"latent_size": 3, "encoder_channels": (6, 7), "feature_channels": 5, "hidden_size": 6}
    return HybridVAE(11, 8, **sizes, **{"pad_id": 10, **arguments})


def test_evaluate_is_the_mean_over_samples():
    model, tokens = small(dtype=torch.float64), torch.randint(11, (7, 8))
    model.encoder.linear.weight.data *= 100  # units become active
    found = metrics.evaluate(model, tokens.split(3), kl_weight=0.3, seed=4)

    generator = torch.Generator().manual_seed(4)
    noise = torch.stack([torch.randn(3, generator=generator) for _ in tokens])
    model.eval()
    with torch.no_grad():
        out = model(tokens, 0.3, eps=noise)
    for name in ("loss", "reconstruction", "kl", "auxiliary"):
        assert found[name] == pytest.approx(getattr(out, name).item())
    bound = (out.reconstruction + out.kl).item()
    assert found["bound"] == pytest.approx(bound)
    assert found["bpc"] == pytest.approx(bound / (8 * math.log(2)))
    assert found["samples"] == 7
    assert found["active_units"] == metrics.active_units(model.encode(tokens)) > 0


def test_evaluate_counts_the_characters_that_the_loss_counts():
    tokens = torch.randint(10, (4, 8))
    tokens[:, 5:] = 10
    found = metrics.evaluate(small(mask_pad=True), [tokens])
    assert found["bpc"] == pytest.approx(found["bound"] / (5 * math.log(2)))


def test_evaluate_leaves_no_trace():
    model = small()
    model.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first = metrics.evaluate(model, [torch.ones(4, 8, dtype=torch.int64)])
    assert first == metrics.evaluate(model, [torch.ones(4, 8, dtype=torch.int64)])
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_evaluate_needs_data():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        metrics.evaluate(small(), [])


@pytest.mark.parametrize("mask_pad", [False, True])
def test_int8_loss_is_what_other_likelihoods_cost(mask_pad):
    model = small(decoder="lstm", dtype=torch.float64, mask_pad=mask_pad).eval()
    with torch.no_grad():
        model.decoder.classifier.weight.mul_(30)
        model.deconvolution.linear.weight.mul_(50)  # so that texts differ
    tokens = torch.randint(11, (40, 8))
    found = metrics.int8_loss(model, tokens.split(16), seed=2)

    generator = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randn(3, generator=generator) for _ in tokens])
    with torch.no_grad():
        mean, logvar = model.posterior(tokens)
        z = mean + noise * (logvar / 2).exp()
        full, rounded = (
            model.logits(tokens, z, quantization=w).transpose(0, 1) for w in (None, "int8")
        )
        kept = tokens != 10
        counted = kept if mask_pad else torch.ones_like(kept)
        log_p, log_q = (
            y.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for y in (full, rounded)
        )
        torch.testing.assert_close((log_p * counted).sum(1), model.log_likelihood(tokens, z))
    loss = (log_p - log_q)[counted].mean().item()
    assert found["bpc_loss"] == pytest.approx(loss / math.log(2))
    agree = (full.argmax(-1) == rounded.argmax(-1))[kept].double().mean().item()
    assert found["token_agreement"] == pytest.approx(agree) and agree < 1
    written, other = (model.generate(z, quantization=w) for w in (None, "int8"))
    assert ((written == 10) != (other == 10)).any()
    equal = (written == other)[(written != 10) | (other != 10)].double().mean().item()
    assert found["greedy_agreement"] == pytest.approx(equal) and 0 < equal < 1
    assert found["texts"] == 40


def test_int8_loss_of_weights_that_say_nothing():
    model = small()
    with torch.no_grad():
        model.decoder.classifier.weight.zero_()
    found = metrics.int8_loss(model, [torch.randint(11, (4, 8))])
    assert found == {"bpc_loss": 0, "token_agreement": 1, "greedy_agreement": 1, "texts": 4}


def test_batches_without_texts_count_nothing():
    model, tokens = small(), torch.randint(11, (4, 8))
    found = metrics.int8_loss(model, [tokens[:0], tokens, tokens[:0]])
    assert found == metrics.int8_loss(model, [tokens])
    with pytest.raises(ValueError, match="there are no texts to measure"):
        metrics.terms_per_text(model, tokens[:0])


def test_int8_loss_needs_data_and_a_decoder():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        metrics.int8_loss(small(), [])
    with pytest.raises(ValueError, match="needs a decoder"):
        metrics.int8_loss(small(decoder="none"), [torch.zeros(1, 8, dtype=torch.int64)])


def test_active_units_at_the_threshold():
    """A biased variance of 0.01: 0.1² with two posteriors."""
    means = torch.tensor([[0.09, 0.11, 5.0, 0.0], [-0.09, -0.11, 5.0, 0.0]])
    assert metrics.active_units(means) == 1


class Copier(torch.nn.Module):
    """Its latents are the texts; it generates them again, but 6 for 7, and no pads after an 8."""

    pad_id = 9

    def encode(self, tokens):
        return tokens.double()

    def generate(self, z):
        tokens = z.long()
        tokens[(tokens[:, :1] == 8) & (tokens == self.pad_id)] = 0
        return tokens.masked_fill(tokens == 7, 6)


def test_reconstruction_accuracy_by_hand():
    texts = [[1, 2, 9, 9], [1, 2, 9, 9], [3, 7, 9, 9], [3, 6, 9, 9], [8, 5, 4, 9]]
    batches = torch.tensor(texts).split([1, 4])
    assert metrics.reconstruction_accuracy(Copier(), batches) == {
        "exact_reconstruction": 3 / 5,
        "shuffled_reconstruction": 2 / 5,  # the second and fourth, from the latent before
        "token_accuracy": 10 / 11,
        "texts": 5,
    }
    with pytest.raises(ValueError, match="two texts or more"):
        metrics.reconstruction_accuracy(Copier(), batches[:1])
    assert metrics.reconstruction_accuracy(Copier(), [batches[1][:2]])["texts"] == 2


class Texts:
    """A corpus of these tokens [N, L]."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def batches(self, size, count):
        return self.tokens[:count].split(size)


def test_each_measure_has_its_own_texts():
    model, tokens = small(dtype=torch.float64), torch.randint(10, (12, 8))
    sizes = {"limit": 9, "mi_texts": 5, "nll_texts": 3, "nll_samples": 2, "reconstruct_texts": 4}
    found = measure(model, Texts(tokens), **sizes, batch_size=2, seed=7)

    generator = torch.Generator().manual_seed(7)
    model.eval()
    with torch.no_grad():
        posterior = model.posterior(tokens[:5])
    information = metrics.mutual_information(*posterior, generator=generator)
    likelihood = metrics.importance_weighted_nll(model, tokens[:3], 2, generator)
    expected = {
        **metrics.evaluate(model, [tokens[:9]], seed=7),
        **{"mutual_information": information, "mutual_information_texts": 5},
        **{"importance_weighted_nll": likelihood.mean().item(), "importance_weighted_nll_texts": 3},
        "importance_weighted_nll_samples": 2,
        **metrics.reconstruction_accuracy(model, [tokens[:4]]),
    }
    expected["reconstruction_texts"] = expected.pop("texts")
    assert found == pytest.approx(expected)


def test_measures_of_no_texts_are_left_out():
    texts = Texts(torch.randint(10, (4, 8)))
    none = {"mi_texts": 0, "nll_texts": 0, "reconstruct_texts": 1}
    plain = measure(small(), texts, **none)
    assert plain.keys() == metrics.evaluate(small(), [texts.tokens]).keys()
    assert measure(small(), texts, **none, limit=3)["samples"] == 3
    with pytest.raises(ValueError, match="nothing to evaluate"):
        measure(small(), texts, **none, limit=0)
    for name, result in (
        ("mi_texts", "mutual_information_texts"),
        ("nll_texts", "importance_weighted_nll_texts"),
    ):
        assert measure(small(), texts, **{**none, name: 1})[result] == 1
    assert measure(small(), texts, **none | {"reconstruct_texts": 2})["reconstruction_texts"] == 2


def test_progress_of_each_measure_is_in_its_batches():
    told = []

    def track(values, description, total):
        values = list(values)
        told.append((description, total, len(values)))
        return values

    sizes = {"nll_texts": 17, "nll_samples": 1, "reconstruct_texts": 9}
    measure(small(), Texts(torch.randint(10, (21, 8))), **sizes, batch_size=4, track=track)
    assert told == [
        ("bound", 6, 6), ("importance-weighted NLL", 3, 3), ("greedy reconstruction", 3, 3)
    ]  # fmt: skip


def test_texts_of_each_measure_by_default():
    found = measure(small(), Texts(torch.randint(10, (4097, 8))))
    names = ("mutual_information_texts", "reconstruction_texts", "importance_weighted_nll_texts")
    assert [found[name] for name in names] == [4096, 1000, 64]
    assert (found["samples"], found["importance_weighted_nll_samples"]) == (4097, 64)
    few = measure(small(), Texts(torch.randint(10, (21, 8))), nll_samples=1)
    assert [few[name] for name in names] == [21, 21, 21]


def test_the_loss_counts_the_whole_kl_by_default():
    found = metrics.evaluate(small(aux_weight=0.5), [torch.randint(10, (6, 8))])
    terms = found["reconstruction"] + found["kl"] + 0.5 * found["auxiliary"]
    assert found["loss"] == pytest.approx(terms) and found["kl"] > 1e-3


PADS = torch.full((2, 8), 5)


@pytest.mark.parametrize(
    "metric",
    [
        lambda model: metrics.evaluate(model, [PADS]),
        lambda model: metrics.evaluate(model, [PADS[:0]]),
        lambda model: metrics.reconstruction_accuracy(model, [PADS]),
        lambda model: metrics.importance_weighted_nll(model, PADS[:0], 2),
        lambda model: metrics.int8_loss(model, [PADS]),
    ],
)
def test_nothing_but_pads_or_no_text_is_refused(metric):
    model = HybridVAE(
        6,
        8,
        latent_size=2,
        encoder_channels=(4,),
        feature_channels=4,
        hidden_size=4,
        pad_id=5,
        mask_pad=True,
    )
    with pytest.raises(ValueError, match=r"there (is nothing|are no characters)"):
        metric(model)


def test_empty_batches_count_for_nothing():
    torch.manual_seed(0)
    model = HybridVAE(
        6, 8, latent_size=2, encoder_channels=(4,), feature_channels=4, hidden_size=4, pad_id=5
    )
    text = torch.arange(16).view(2, 8) % 5
    assert metrics.evaluate(model, [text[:0], text]) == metrics.evaluate(model, [text])


def test_noise_of_another_batch_is_refused():
    model = HybridVAE(
        6, 8, latent_size=2, encoder_channels=(4,), feature_channels=4, hidden_size=4, pad_id=5
    )
    with pytest.raises(ValueError, match=r"eps must have shape \(2, 2\), got \(1, 2\)"):
        model(PADS, eps=torch.zeros(1, 2))
