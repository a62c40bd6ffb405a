"""A corpus of lines drawn from a small grammar whose entropy per line is known exactly.

No two derivations give the same line, and the nine choices of a derivation are independent, so that
H = −Σ_slots Σ_choices p ln p. On fresh lines, no model's bound is below it on average.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastvae.text.corpus import Corpus
from fastvae.text.grammar import ALPHABET, FACTORS, WEIGHTS, parse, render
from fastvae.text.reading import LINES, Reading
from fastvae.text.vocabulary import CharVocabulary

LONGEST = 47  # characters of the longest line

# One entry per unit of weight: a uniform draw from it has exactly the slot's probabilities.
_DRAWS = [[i for i, w in enumerate(weights) for _ in range(w)] for weights in WEIGHTS.values()]
_CODES = math.prod(
    map(len, _DRAWS)
)  # 2^28: a power of two, so that `randint` is uniform to the bit


class SyntheticCorpus(Corpus):
    """English-like lines, padded to L: `batch` draws fresh ones, `batches` passes a fixed set.

    Pads follow from the line, so the entropy of a sample is that of its line.

    Args:
        length: L; at least 47, the longest line.
        seed: seed of the fixed set.
        samples: number of lines in the fixed set.

    Raises:
        ValueError: `length` is too short for the longest line, or `samples` is below 1.
    """

    reading = Reading(LINES)
    name = "the synthetic corpus"

    def __init__(self, length: int = 48, seed: int = 0, *, samples: int = 1024):
        if length < LONGEST:
            raise ValueError(
                f"length must be at least {LONGEST} for the longest line, got {length}"
            )
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.vocabulary = CharVocabulary(ALPHABET)
        self.length = length
        self._fixed = _codes(samples, torch.Generator().manual_seed(seed))

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:
        """Values of each global factor of a line, by name: topic, tense, form, number."""
        return dict(FACTORS)

    @property
    def entropy(self) -> float:
        """Exact entropy of a line, nats."""
        return sum(
            -w / sum(weights) * math.log(w / sum(weights))
            for weights in WEIGHTS.values()
            for w in weights
        )

    def log_probability(self, line: str) -> float:
        """Line -> ln p(line), found by parsing; −inf if the grammar does not generate the line."""
        choices = parse(line)
        if choices is None:
            return -math.inf
        return sum(
            math.log(weights[choice] / sum(weights))
            for weights, choice in zip(WEIGHTS.values(), choices, strict=True)
        )

    def describe(self, line: str) -> dict[str, str] | None:
        """Line -> its global factors by name, or None if the grammar does not generate the line."""
        choices = parse(line)
        if choices is None:
            return None
        return {
            name: values[i] for (name, values), i in zip(FACTORS.items(), choices, strict=False)
        }

    def lines(self, count: int, generator: torch.Generator) -> list[str]:
        """Draw fresh lines, without pads.

        Args:
            count: number of lines.
            generator: random source, on the CPU.

        Returns:
            the lines, `count` strings.
        """
        return [_line(code) for code in _codes(count, generator).tolist()]

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        return self._encode(_codes(count, generator))

    def __len__(self) -> int:
        return len(self._fixed)

    def _samples(self, index: Tensor) -> Tensor:
        return self._encode(self._fixed[index])

    def _encode(self, codes: Tensor) -> Tensor:
        """Codes [n] -> tokens [n, L] int64."""
        lines = [_line(code) for code in codes.tolist()]
        sizes = np.array([len(line) for line in lines])[:, None]
        ids = np.full((len(lines), self.length), self.vocabulary.pad_id)
        ids[np.arange(self.length) < sizes] = self.vocabulary.encode_array("".join(lines))
        return torch.from_numpy(ids)


def _codes(count: int, generator: torch.Generator) -> Tensor:
    """Uniform codes below 2^28, [count] int64."""
    return torch.randint(_CODES, (count,), generator=generator, device="cpu")


def _line(code: int) -> str:
    """Code below 2^28 -> line."""
    choices = []
    for draws in _DRAWS:
        code, draw = divmod(code, len(draws))
        choices.append(draws[draw])
    return render(choices)
