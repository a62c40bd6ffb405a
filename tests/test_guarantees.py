"""What a trained model cannot fake: its bound on lines whose entropy is known exactly.

No bound on −log p(x) averages below the entropy; the paired difference to each line's own
−log p(x) leaves out the spread of the lines.
"""

import math
from itertools import pairwise

import pytest
import torch

from fastvae import metrics
from fastvae.models.hybrid import HybridVAE
from fastvae.objective import gaussian_kl
from fastvae.text import SyntheticCorpus
from fastvae.training import TrainingConfig, train

LENGTH, FRESH = 48, 2048
SIZES = {
    "latent_size": 16,
    "encoder_channels": (32, 64),
    "feature_channels": 32,
    "hidden_size": 96,
}

pytestmark = pytest.mark.slow


def trained(folder, steps, **changes):
    """A small hybrid trained for half a minute on endless lines, on one thread."""
    corpus = SyntheticCorpus(LENGTH)
    words = corpus.vocabulary
    torch.manual_seed(0)
    model = HybridVAE(
        words.size, LENGTH, pad_id=words.pad_id, **{**SIZES, **changes.pop("sizes", {})}
    )
    settings = {
        "steps": steps, "batch_size": 32, "learning_rate": 6e-3, "lr_decay": 0.5,
        "lr_decay_start": steps * 13 // 20, "lr_decay_every": steps // 12,
        "eval_every": 0, "sample_every": 0, "checkpoint_every": steps,
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one gains little here and waits for busy neighbors
    try:
        train(model, corpus, TrainingConfig(**settings, **changes), folder)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), 1400, kl_floor=0.05, kl_end=300)


@pytest.fixture(scope="module")
def fresh():
    """Fresh lines: tokens [N, L] and −ln p of each line [N]."""
    corpus = SyntheticCorpus(LENGTH)
    tokens = corpus.batch(FRESH, torch.Generator().manual_seed(99))
    lines = [corpus.vocabulary.decode(row) for row in tokens.tolist()]
    return tokens, -torch.tensor([corpus.log_probability(line) for line in lines]).double()


def mean_and_error(values):
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def test_the_bound_comes_near_the_entropy_and_never_below(model, fresh):
    tokens, information = fresh
    reconstruction, kl = metrics.terms_per_text(model, tokens)
    excess, error = mean_and_error(reconstruction + kl - information)
    entropy = SyntheticCorpus(LENGTH).entropy
    assert excess > -3 * error
    assert excess < 0.15 * entropy
    assert kl.mean() > 1


def test_terms_of_texts_average_to_the_evaluation(model, fresh):
    tokens = fresh[0][:100]
    reconstruction, kl = metrics.terms_per_text(model, tokens, seed=5)
    found = metrics.evaluate(model, tokens.split(32), seed=5)
    assert reconstruction.mean().item() == pytest.approx(found["reconstruction"], rel=1e-5)
    assert kl.mean().item() == pytest.approx(found["kl"], rel=1e-5)


def test_more_samples_tighten_the_likelihood_and_it_stays_above_the_entropy(model, fresh):
    tokens, information = fresh[0][:128], fresh[1][:128]
    found = []
    for samples in (1, 4, 16, 64):
        generator = torch.Generator().manual_seed(samples)
        found.append(metrics.importance_weighted_nll(model, tokens, samples, generator))
    for loose, tight in pairwise(found):
        gain, error = mean_and_error(loose - tight)
        assert gain > -error
    whole, error = mean_and_error(found[0] - found[-1])
    assert whole > 3 * error
    for nll in found:
        excess, error = mean_and_error(nll - information)
        assert excess > -3 * error


def test_the_closed_form_of_the_kl_is_its_monte_carlo_estimate(model, fresh):
    tokens = fresh[0][:64]
    with torch.no_grad():
        mean, logvar = (t.double() for t in model.posterior(tokens))
    generator = torch.Generator().manual_seed(1)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    noise = torch.randn(1000, *mean.shape, generator=generator, dtype=mean.dtype)
    z = mean + (logvar / 2).exp() * noise
    ratios = (q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)).sum(-1)
    estimate, error = mean_and_error(ratios.mean(1))
    assert abs(estimate - gaussian_kl(mean, logvar).sum(1).mean().item()) < 4 * error
    assert estimate > 1


def test_an_autoencoder_reconstructs(tmp_path, fresh):
    free = trained(tmp_path, 1000, kl_target=0.0, sizes={"latent_size": 48})
    reconstruction, kl = metrics.terms_per_text(free, fresh[0])
    entropy = SyntheticCorpus(LENGTH).entropy
    # Without z nothing gets below the entropy.
    assert reconstruction.mean() < entropy / 3
    assert kl.mean() > entropy
