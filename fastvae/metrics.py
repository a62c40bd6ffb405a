"""Evaluation metrics: bits per character, use of the latent, likelihood, diversity of texts.

bits per character = (reconstruction + KL) / (characters · ln 2)
active unit: Var_x E[z | x] ≥ 0.01                      Burda et al. 2016, arXiv:1509.00519
I(x; z) = E_x KL(q(z | x) ‖ q(z)),   q(z) = 1/N Σₙ q(z | xₙ)    Hoffman & Johnson 2016
−log p(x) ≤ −E log 1/K Σₖ p(x | zₖ) p(zₖ) / q(zₖ | x)           Burda et al. 2016
distinct-n = distinct n-grams / n-grams                 Li et al. 2016, arXiv:1510.03055
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastvae.models.text_vae import evaluating
from fastvae.nn import upcast
from fastvae.objective import gaussian_kl, reconstruction_nats

ACTIVE_VARIANCE = 0.01
_NOTHING = "there is nothing to evaluate: the data give no sample of the model's length"


def bits_per_character(nats_per_sample: float, characters_per_sample: float) -> float:
    """Nats per sample -> bits per character; bits per byte for texts in bytes.

    Args:
        nats_per_sample: a bound or one of its terms, nats.
        characters_per_sample: number of characters (or bytes) that it covers.

    Returns:
        nats_per_sample / (characters_per_sample · ln 2).

    Raises:
        ValueError: there is no character.
    """
    if not characters_per_sample:
        raise ValueError("there are no characters to measure: every token is a pad")
    return nats_per_sample / (characters_per_sample * math.log(2))


def evaluate(
    model: nn.Module, batches: Iterable[Tensor], *, kl_weight: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """Batches of tokens [B, L] -> the bound and its terms, means over all samples, nats per sample.

    Runs in eval mode with one z per sample. Restores the model's mode and does not use torch's
    global generators.

    Args:
        model: a `HybridVAE` or `LSTMVAE`.
        batches: tokens [B, L] int64 each, on any device.
        kl_weight: weight of the KL in `loss`.
        seed: seed of the latent noise, which does not depend on the size of the batches.

    Returns:
        loss, reconstruction, kl, auxiliary: means, nats per sample.
        bound: reconstruction + kl.
        bpc: the bound, bits per character.
        active_units: number of latent dimensions in use; see the function `active_units`.
        samples: number of samples.

    Raises:
        ValueError: there is no sample.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    sums, means, count, characters = torch.zeros(4, dtype=torch.float64, device="cpu"), [], 0, 0
    with torch.no_grad(), evaluating(model):
        for tokens in batches:
            if not len(tokens):
                continue
            tokens = tokens.to(parameter.device)
            out = model(tokens, kl_weight, eps=_row_noise(model, tokens, generator).to(parameter))
            terms = (out.loss, out.reconstruction, out.kl, out.auxiliary)
            sums += torch.stack(terms).cpu().double() * len(tokens)
            means.append(model.posterior(tokens)[0].float().cpu())
            count += len(tokens)
            characters += count_characters(model, tokens)
    if not count:
        raise ValueError(_NOTHING)
    loss, reconstruction, kl, auxiliary = (sums / count).tolist()
    return {
        "loss": loss,
        "reconstruction": reconstruction,
        "kl": kl,
        "auxiliary": auxiliary,
        "bound": reconstruction + kl,
        "bpc": bits_per_character(reconstruction + kl, characters / count),
        "active_units": active_units(torch.cat(means)),
        "samples": count,
    }


@torch.no_grad()
def terms_per_text(model: nn.Module, tokens: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] -> reconstruction [B] with one z each and closed-form KL [B], nats, float64.

    Their means are those of `evaluate` on the same texts; the values of single texts give standard
    errors of differences.

    Args:
        model: a `HybridVAE` or `LSTMVAE`.
        tokens: [B, L] int64, on any device.
        seed: seed of the latent noise.

    Returns:
        reconstruction and KL of each text, [B] each, on the CPU.

    Raises:
        ValueError: there is no text.
    """
    _check_any(tokens)
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    tokens = tokens.to(parameter.device)
    with evaluating(model):
        mean, logvar = map(upcast, model.posterior(tokens))
        z = mean + (logvar / 2).exp() * _row_noise(model, tokens, generator).to(mean)
        nats = -model.log_likelihood(tokens, z)
    return nats.cpu().double(), gaussian_kl(mean, logvar).sum(1).cpu().double()


@torch.no_grad()
def int8_loss(model: nn.Module, batches: Iterable[Tensor], *, seed: int = 0) -> dict[str, float]:
    """Batches of tokens [B, L] -> the loss in accuracy from `quantization="int8"`.

    Args:
        model: a model with a decoder.
        batches: tokens [B, L] int64 each, on any device.
        seed: seed of the latent noise.

    Returns:
        bpc_loss: increase of the bound, bits per character.
        token_agreement: top-1 agreement, teacher-forced, without pads; NaN for texts of pads alone.
        greedy_agreement: fraction of equal tokens in greedy sequences from the same z, without
            positions that are pads in both; one difference leads to others. NaN where all are.
        texts: number of texts.

    Raises:
        ValueError: the model has no decoder, or there is no batch.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter, pad = next(model.parameters()), -1 if model.pad_id is None else model.pad_id
    nats, agreed, equal, count, characters = 0.0, [], [], 0, 0
    with evaluating(model):
        for tokens in batches:
            if not len(tokens):
                continue
            tokens = tokens.to(parameter.device)
            mean, logvar = model.posterior(tokens)
            z = mean + (logvar / 2).exp() * _row_noise(model, tokens, generator).to(parameter)
            logits = [model.logits(tokens, z, quantization=w) for w in (None, "int8")]
            written = [model.generate(z, quantization=w) for w in (None, "int8")]
            ignored = pad if model.mask_pad else None
            full, rounded = (reconstruction_nats(y.double(), tokens.T, ignored) for y in logits)
            nats += (rounded - full).sum().item()
            likeliest = [y.argmax(-1).T for y in logits]
            agreed.append((likeliest[0] == likeliest[1])[tokens != pad])
            equal.append((written[0] == written[1])[(written[0] != pad) | (written[1] != pad)])
            count += len(tokens)
            characters += count_characters(model, tokens)
    if not count:
        raise ValueError(_NOTHING)
    return {
        "bpc_loss": bits_per_character(nats, characters),
        "token_agreement": torch.cat(agreed).double().mean().item(),
        "greedy_agreement": torch.cat(equal).double().mean().item(),
        "texts": count,
    }


def count_characters(model: nn.Module, tokens: Tensor) -> int:
    """Tokens [B, L] -> number of tokens in the model's loss: all, or those that it does not mask.

    Args:
        model: a `HybridVAE` or `LSTMVAE`; with `mask_pad=True` its loss leaves pads out.
        tokens: [B, L] int64.

    Returns:
        the number of tokens.
    """
    return int((tokens != model.pad_id).sum()) if model.mask_pad else tokens.numel()


def _row_noise(model: nn.Module, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """tokens [B, L] -> standard normal noise [B, Z], drawn by row, whatever the batch size."""
    rows = [torch.randn(model.latent_size, generator=generator, device="cpu") for _ in tokens]
    return torch.stack(rows)


@torch.no_grad()
def reconstruction_accuracy(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Batches of tokens [B, L] -> how well greedy generation restores texts from posterior means.

    The control generates from the posterior mean of another text. Its score
    measures what the decoder knows without the latent.

    Args:
        model: a `HybridVAE` or `LSTMVAE`.
        batches: tokens [B, L] int64 each, on any device.

    Returns:
        exact_reconstruction: fraction of texts with every token equal, pads included.
        shuffled_reconstruction: the same, from the posterior mean of the text before.
        token_accuracy: fraction of equal tokens, without pads.
        texts: number of texts.

    Raises:
        ValueError: there are fewer than two texts.
    """
    tokens = [t.cpu() for t in batches]
    means = [model.encode(t) for t in tokens]
    if sum(map(len, tokens)) < 2:
        raise ValueError("reconstruction needs two texts or more, got fewer")
    sizes, means = [len(t) for t in tokens], torch.cat(means)
    right, shuffled, equal, count = 0, 0, 0, 0
    for text, z, other in zip(
        tokens, means.split(sizes), means.roll(1, 0).split(sizes), strict=True
    ):
        found = model.generate(z).cpu()
        kept = torch.ones_like(text, dtype=torch.bool)
        if model.pad_id is not None:
            kept = text != model.pad_id
        right += (found == text).all(1).sum().item()
        shuffled += (model.generate(other).cpu() == text).all(1).sum().item()
        equal += ((found == text) & kept).sum().item()
        count += kept.sum().item()
    texts = len(means)
    if not count:
        raise ValueError(_NOTHING)
    return {
        "exact_reconstruction": right / texts,
        "shuffled_reconstruction": shuffled / texts,
        "token_accuracy": equal / count,
        "texts": texts,
    }


def active_units(mean: Tensor) -> int:
    """Posterior means [N, Z] -> number of dimensions whose (biased) variance is at least 0.01.

    Burda et al. 2016, arXiv:1509.00519.
    """
    return int((mean.double().var(0, correction=0) >= ACTIVE_VARIANCE).sum())


def mutual_information(
    mean: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None, chunk: int = 1024
) -> float:
    """Posterior mean, logvar [N, Z] -> I(x; z), nats, under their mixture, from one z each.

        I(x; z) = E_x KL(q(z | x) ‖ q(z)),   q(z) = 1/N Σₙ q(z | xₙ)

    Its upper limit is log N. Computed on the CPU in float64. Hoffman & Johnson 2016.

    Args:
        mean: posterior means, [N, Z].
        logvar: posterior log-variances, [N, Z].
        generator: random source of z, on the CPU; None is torch's global one.
        chunk: rows of the [N, N] matrix of densities held in memory at a time.

    Returns:
        the estimate, nats.

    Raises:
        ValueError: there are no texts.
    """
    _check_any(mean)
    mean, logvar = mean.detach().cpu().double(), logvar.detach().cpu().double()
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device="cpu")
    z = mean + (logvar / 2).exp() * noise
    precision, constant = (-logvar).exp(), logvar.sum(1)
    total = 0.0
    for first in range(0, len(z), chunk):
        rows = z[first : first + chunk]
        # log q(z | x) without its constant, which cancels. By dimension: squares of differences,
        # for expanded ones would cancel where posteriors are narrow or far from zero.
        squares = constant.repeat(len(rows), 1)
        for own, of_all, scale in zip(rows.T, mean.T, precision.T, strict=True):
            difference = own[:, None] - of_all
            squares.addcmul_(difference.square_(), scale.expand_as(difference))
        density = -squares / 2
        total += (density.diagonal(first) - density.logsumexp(1)).sum().item()
    return total / len(z) + math.log(len(z))


def importance_weighted_nll(
    model: nn.Module,
    tokens: Tensor,
    samples: int,
    generator: torch.Generator | None = None,
    chunk: int = 256,
) -> Tensor:
    """Tokens [B, L] -> estimates of an upper bound on −log p(x), nats, [B] float64.

        −log p(x) ≤ −E log 1/K Σₖ p(x | zₖ) p(zₖ) / q(zₖ | x)

    The bound becomes tighter with the number K of samples. Burda et al. 2016, arXiv:1509.00519.

    Args:
        model: a `HybridVAE` or `LSTMVAE`.
        tokens: [B, L] int64, on any device.
        samples: K, latent vectors per text; at least 1.
        generator: random source of the latent vectors, on the CPU; None is torch's global one.
        chunk: pairs of text and latent vector per forward pass; the draws do not depend on it.

    Returns:
        the estimates, [B] float64, on the CPU.

    Raises:
        ValueError: `samples` is below 1, or there are no tokens.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    B = len(tokens)
    if not B:
        raise ValueError(_NOTHING)
    parameter = next(model.parameters())
    tokens = tokens.to(parameter.device)
    total = torch.full((B,), -math.inf, dtype=torch.float64, device="cpu")
    with torch.no_grad(), evaluating(model):
        mean, logvar = model.posterior(tokens)
        scale = (logvar / 2).exp()
        for start in range(0, samples, max(1, chunk // B)):
            K = min(max(1, chunk // B), samples - start)
            # One draw for each k: the result does not depend on the chunk.
            noise = torch.stack(
                [torch.randn(mean.shape, generator=generator, device="cpu") for _ in range(K)]
            )
            noise = noise.to(mean)
            z = (mean + scale * noise).flatten(0, 1)
            pairs = zip(tokens.repeat(K, 1).split(chunk), z.to(parameter).split(chunk), strict=True)
            likelihood = torch.cat([model.log_likelihood(x, z) for x, z in pairs]).view(K, B)
            likelihood, z, noise = likelihood.cpu().double(), z.cpu().double(), noise.cpu().double()
            prior = _log_normal(z, torch.zeros_like(z)).view(K, B)
            weights = likelihood + prior - _log_normal(noise, logvar.cpu().double())
            total = torch.logaddexp(total, weights.logsumexp(0))
    return math.log(samples) - total


def distinct_n(texts: Sequence[str], n: int, *, unit: str = "word") -> float:
    """Fraction of distinct n-grams among all n-grams of the texts; 0 if there are none.

    Li et al. 2016, arXiv:1510.03055.

    Args:
        texts: n-grams do not cross their ends.
        n: words or characters per n-gram.
        unit: "word" (separated by white space) or "character".

    Returns:
        a fraction from 0 to 1.

    Raises:
        ValueError: the unit is unknown, or n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if unit not in ("word", "character"):
        raise ValueError(f'unit must be "word" or "character", got {unit!r}')
    parts = [text.split() if unit == "word" else text for text in texts]
    grams = [tuple(p[i : i + n]) for p in parts for i in range(len(p) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def unique_share(texts: Sequence[str]) -> float:
    """Number of different texts / number of texts. Raises ValueError where there are none."""
    _check_any(texts)
    return len(set(texts)) / len(texts)


def most_common_share(texts: Sequence[str]) -> float:
    """Share of the texts that are equal to the most frequent. ValueError where there are none."""
    _check_any(texts)
    return Counter(texts).most_common(1)[0][1] / len(texts)


def variety(texts: Sequence[str]) -> dict[str, float]:
    """Texts -> distinct_1, distinct_2, distinct_3 (of words), unique_share, most_common_share.

    All depend on the number of texts: compare sets of the same size.
    """
    found = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    shares = {"unique_share": unique_share(texts), "most_common_share": most_common_share(texts)}
    return {**found, **shares}


def _check_any(texts: Sequence) -> None:
    """Raise ValueError where there are no texts."""
    if not len(texts):
        raise ValueError("there are no texts to measure")


def _log_normal(noise: Tensor, logvar: Tensor) -> Tensor:
    """noise, logvar [..., Z] -> log density of mean + exp(logvar/2) · noise, up to a constant."""
    return -(noise.square() + logvar).sum(-1) / 2
