"""Evaluates a model on one corpus: the bound and its terms, use of the latent, likelihood."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastvae import metrics
from fastvae.models.text_vae import TextVAE, evaluating
from fastvae.text import Corpus


def measure(
    model: TextVAE,
    corpus: Corpus,
    *,
    limit: int | None = None,
    nll_texts: int = 64,
    nll_samples: int = 64,
    mi_texts: int = 4096,
    reconstruct_texts: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    track: Callable[[Iterable, str, int], Iterable] = lambda values, description, total: values,
) -> dict[str, Any]:
    """Evaluate a model on a corpus: `metrics.evaluate` and measures of the latents.

    Each measure uses the first texts of the corpus's fixed pass.

    Args:
        model: a `HybridVAE` or `LSTMVAE`.
        corpus: the data.
        limit: number of texts of the pass; None is all of them.
        nll_texts: texts whose importance-weighted NLL is measured; 0 leaves it out.
        nll_samples: latent vectors per text for the importance-weighted NLL.
        mi_texts: texts whose mutual information is measured; 0 leaves it out.
        reconstruct_texts: texts that are reconstructed greedily; below 2 leaves it out.
        batch_size: texts per forward pass.
        seed: seed of the latent noise.
        track: (values, description, total) -> the same values, to show progress.

    Returns:
        the results by name: those of `metrics.evaluate` and, where measured,
        mutual_information: nats; mutual_information_texts: number of texts.
        importance_weighted_nll: mean, nats per text; importance_weighted_nll_texts and
            importance_weighted_nll_samples: numbers of texts and of latent vectors per text.
        exact_reconstruction, shuffled_reconstruction, token_accuracy: see
            `metrics.reconstruction_accuracy`; reconstruction_texts: number of texts.

    Raises:
        ValueError: there is no sample.
    """
    count = len(corpus) if limit is None else min(limit, len(corpus))
    batches = track(corpus.batches(batch_size, count), "bound", -(-count // batch_size))
    result: dict[str, Any] = metrics.evaluate(model, batches, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if mi_texts:
        n = min(mi_texts, count)
        with evaluating(model):
            place = next(model.parameters()).device
            batches = (tokens.to(place) for tokens in corpus.batches(batch_size, n))
            with torch.no_grad():
                parts = [model.posterior(tokens) for tokens in batches]
        mean, logvar = map(torch.cat, zip(*parts, strict=True))
        result["mutual_information"] = metrics.mutual_information(mean, logvar, generator=generator)
        result["mutual_information_texts"] = n
    if nll_texts:
        n = min(nll_texts, count)
        parts = track(corpus.batches(8, n), "importance-weighted NLL", -(-n // 8))
        nll = torch.cat(
            [metrics.importance_weighted_nll(model, x, nll_samples, generator) for x in parts]
        )
        result["importance_weighted_nll"] = nll.mean().item()
        result["importance_weighted_nll_texts"] = n
        result["importance_weighted_nll_samples"] = nll_samples
    n = min(reconstruct_texts, count)
    if n > 1:
        batches = corpus.batches(batch_size, n)
        parts = track(batches, "greedy reconstruction", -(-n // batch_size))
        accuracy = metrics.reconstruction_accuracy(model, parts)
        result["reconstruction_texts"] = accuracy.pop("texts")
        result |= accuracy
    return result
