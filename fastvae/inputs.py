"""What the commands read: models, files, texts on standard input."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastvae.checkpoint import load
from fastvae.models.vae import TextVAE
from fastvae.presets import CHARACTERS, TWEETS, open_corpus
from fastvae.terminal import console, one_line
from fastvae.text import Corpus, Vocabulary, normalise_tweet


def load_model(
    folder: Path, *, best: bool = False, device: str | None = None
) -> tuple[TextVAE, Vocabulary]:
    """A folder's model in eval mode on its device, and its vocabulary. ValueError without one."""
    model, vocabulary = load(folder, best=best)
    if vocabulary is None:
        raise ValueError(f"{folder} holds no vocabulary.json, so its symbols cannot be read")
    return model.to(find_device(device)), vocabulary


def find_device(name: str | None) -> torch.device:
    """The device of this name, by default a GPU if there is one. ValueError if it does not work."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device {name} cannot be used here: {one_line(error)}") from error
    return device


def open_for(model: TextVAE, vocabulary: Vocabulary, path: Path) -> Corpus:
    """A file, read as the model's training text was."""
    text = CHARACTERS if vocabulary.end_id is None else TWEETS
    return open_corpus(path, model.length, vocabulary, text=text)


def token_batches(
    model: TextVAE, vocabulary: Vocabulary, data: Path | None, limit: int | None, batch_size: int
) -> tuple[int, Iterator[Tensor]]:
    """How many texts a file or standard input has, and their tokens [<= batch_size, L]."""
    if data is not None:
        corpus = open_for(model, vocabulary, data)
        return min(len(corpus), limit or len(corpus)), corpus.batches(batch_size, limit)
    texts = _read_texts(vocabulary)[:limit]
    return len(texts), iter(encode_texts(model, vocabulary, texts).split(batch_size))


def encode_texts(model: TextVAE, vocabulary: Vocabulary, texts: Iterable[str]) -> Tensor:
    """Tokens [N, L] of texts as the model read its own: tweets normalised, windows cut to L."""
    whole_lines = vocabulary.end_id is not None
    rows = (normalise_tweet(text) if whole_lines else text[: model.length] for text in texts)
    return torch.tensor([vocabulary.encode_sample(row, model.length) for row in rows], device="cpu")


@torch.no_grad()
def posterior(model: TextVAE, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] anywhere -> mean and log-variance [B, Z] on the model's device."""
    return model.posterior(tokens.to(next(model.parameters()).device))


def _read_texts(vocabulary: Vocabulary) -> list[str]:
    """Standard input's lines that are not empty."""
    if sys.stdin.isatty():
        console(stderr=True).print("Type texts, one a line, then Ctrl-D.")
    # A model of bytes reads any; one of characters has none for what is not UTF-8.
    errors = "surrogateescape" if vocabulary.unit == "byte" else "strict"
    try:
        text = sys.stdin.buffer.read().decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 at byte {error.start}") from error
    texts = [line for line in text.split("\n") if line]
    if not texts:
        raise ValueError("standard input holds no text: pipe one in, or name a file with --data")
    return texts
