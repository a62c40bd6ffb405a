"""All that is measured of a model on one corpus: the bound and its terms, latents, likelihood."""

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
    batch_size: int = 64,
    seed: int = 0,
    track: Callable[[Iterable, str, int], Iterable] = lambda values, description, total: values,
) -> dict[str, Any]:
    """The keys of `metrics.evaluate` on the fixed pass, or its first `limit` texts, and more.

    mutual_information and importance_weighted_nll are of the first texts; their numbers stand
    beside them, and 0 leaves either out. `track(values, description, total)` may show progress.
    """
    count = min(len(corpus), limit or len(corpus))
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
    return result
