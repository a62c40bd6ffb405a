"""What a latent costs: reconstruction of lines against bits per character and quality of samples.

    for nats in 4 8 16; do fastvae train --data names.txt --kl-nats $nats --out dial-$nats; done
    python examples/frontier.py --data names.txt 'dial=dial-4,dial-8,dial-16' --out frontier.png

Each argument is a name and runs, whose points are joined. The quality of samples is the negative
log-likelihood under a character 5-gram model of the training lines, as a ratio to that of the
held-out lines: 1 is like them.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

import fastvae
from fastvae.evaluation import measure
from fastvae.models.text_vae import TextVAE
from fastvae.plots import pyplot
from fastvae.presets import read_corpus
from fastvae.text import Corpus, Vocabulary
from fastvae.text.reading import VALID, load_reading

START, END = "\x02", "\x03"


class NGram:
    """A character n-gram model with Witten-Bell smoothing (Witten and Bell 1991).

        p(c | h) = (count(h c) + types(h) p(c | shorter h)) / (count(h) + types(h))

    Args:
        texts: what it is estimated from.
        order: n.
    """

    def __init__(self, texts: Iterable[str], order: int = 5) -> None:
        self.order = order
        self.counts: list[Counter[str]] = [Counter() for _ in range(order)]
        for text in texts:
            padded = START * (order - 1) + text + END
            for n in range(order):
                self.counts[n].update(padded[i - n : i + 1] for i in range(order - 1, len(padded)))
        self.totals: list[Counter[str]] = [Counter() for _ in range(order)]
        self.types: list[Counter[str]] = [Counter() for _ in range(order)]
        for n, counts in enumerate(self.counts):
            for gram, count in counts.items():
                self.totals[n][gram[:-1]] += count
                self.types[n][gram[:-1]] += 1
        self.uniform = 1 / (len(self.counts[0]) + 1)  # one for all characters that did not occur

    def nats(self, text: str) -> float:
        """Text -> its negative log-likelihood, the end included."""
        padded, total = START * (self.order - 1) + text + END, 0.0
        for i in range(self.order - 1, len(padded)):
            probability = self.uniform
            for n in range(self.order):
                history = padded[i - n : i]
                if not self.totals[n][history]:
                    break
                new = self.types[n][history]
                seen = self.counts[n][history + padded[i]]
                probability = (seen + new * probability) / (self.totals[n][history] + new)
            total -= math.log(probability)
        return total

    def mean_nats(self, texts: list[str]) -> float:
        """Texts -> mean negative log-likelihood."""
        return math.fsum(map(self.nats, texts)) / len(texts)


def read(corpus: Corpus, limit: int | None = None) -> list[str]:
    """A corpus's texts."""
    vocabulary = corpus.vocabulary
    return [text for rows in corpus.batches(1024, limit) for text in vocabulary.batch_decode(rows)]


def open_run(run: Path, data: Path, valid: Path | None) -> tuple[TextVAE, Corpus, Corpus]:
    """A run, its training file and a file of held-out texts -> model, training and held-out texts.

    Without a file the held-out texts are those that `train` left out of its file.
    """
    model, vocabulary = fastvae.load(run)
    reading = load_reading(run)
    if reading is None or (valid is None and reading.part is None):
        raise SystemExit(f"{run} held out nothing: name a file with --valid")
    held_out = replace(reading, part=None if valid else VALID)
    train = read_corpus(data, model.length, reading, vocabulary)
    return model, train, read_corpus(valid or data, model.length, held_out, vocabulary)


def sample_texts(
    model: TextVAE, vocabulary: Vocabulary, count: int, temperature: float, seed: int
) -> list[str]:
    """Texts decoded from samples of the prior."""
    generator, samples = torch.Generator().manual_seed(seed), []
    while len(samples) < count:
        rows = min(1024, count - len(samples))
        tokens = model.sample(rows, temperature=temperature, generator=generator)
        samples += vocabulary.batch_decode(tokens)
    return samples


def judge(run: Path, data: Path, valid: Path | None, count: int, seed: int) -> dict[str, float]:
    """A run and its files, as in `open_run` -> what the frontier shows."""
    model, train, other = open_run(run, data, valid)
    samples = sample_texts(model, train.vocabulary, count, 1.0, seed)
    texts = read(train)
    ngram, known = NGram(texts), set(texts)
    found = measure(model, other, limit=4096, nll_texts=0, mi_texts=0)
    names = "bpc", "kl", "exact_reconstruction", "shuffled_reconstruction"
    return {
        **{name: found[name] for name in names},
        "sample_nats": ngram.mean_nats(samples),
        "held_out_nats": ngram.mean_nats(read(other, 4096)),
        "training_share": sum(text in known for text in samples) / count,
    }


def draw(points: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Points by name -> a picture: both axes of quality against reconstruction."""
    figure, panels = pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, rows in points.items():
        rows = sorted(rows, key=lambda row: row["exact_reconstruction"])
        share = [100 * row["exact_reconstruction"] for row in rows]
        panels[0].plot(share, [row["bpc"] for row in rows], "o-", label=name)
        ratio = [row["sample_nats"] / row["held_out_nats"] for row in rows]
        panels[1].plot(share, ratio, "o-", label=name)
    panels[0].set_ylabel("bits per token of the bound")
    panels[1].set_ylabel("5-gram nats of samples / of held-out lines")
    for panel in panels:
        panel.set_xlabel("held-out lines returned exactly, %")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Judge runs, print a line of JSON each, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,RUN...")
    parser.add_argument("--data", type=Path, required=True, help="file that the runs trained on")
    parser.add_argument("--valid", type=Path, help="file of held-out lines")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("-n", type=int, default=4096, help="samples from the prior")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    points: dict[str, list[dict[str, float]]] = {}
    for group in options.runs:
        name, _, runs = group.partition("=")
        for run in map(Path, runs.split(",")):
            row = judge(run, options.data, options.valid, options.n, options.seed)
            print(json.dumps({"name": name, "run": str(run), **row}), flush=True)
            points.setdefault(name, []).append(row)
    draw(points, options.out)


if __name__ == "__main__":
    main()
