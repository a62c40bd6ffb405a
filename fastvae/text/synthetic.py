"""A corpus of lines drawn from a small grammar whose entropy per line is known exactly.

No two derivations give the same line, and a derivation's nine choices are independent, so that
H = -Σ_slots Σ_choices p ln p. No model's bound on fresh lines can fall below it on average.
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
    """Endless English-like lines, padded to L: `batch` draws fresh ones, `batches` a fixed set.

    Pads follow from the line, so the entropy of a sample is that of its line.

    Args:
        length: L.
        seed: of the fixed set.
        samples: of the fixed set.

    Raises:
        ValueError: a line might not fit the length.
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
        """What each global factor of a line can be: topic, tense, form, number."""
        return dict(FACTORS)

    @property
    def entropy(self) -> float:
        """Exact entropy of a line, in nats."""
        return sum(
            -w / sum(weights) * math.log(w / sum(weights))
            for weights in WEIGHTS.values()
            for w in weights
        )

    def log_probability(self, line: str) -> float:
        """ln p(line), found by parsing it; -inf if the grammar does not give the line."""
        choices = parse(line)
        if choices is None:
            return -math.inf
        return sum(
            math.log(weights[choice] / sum(weights))
            for weights, choice in zip(WEIGHTS.values(), choices, strict=True)
        )

    def describe(self, line: str) -> dict[str, str] | None:
        """The line's global factors by name, or None if the grammar does not give the line."""
        choices = parse(line)
        if choices is None:
            return None
        return {
            name: values[i] for (name, values), i in zip(FACTORS.items(), choices, strict=False)
        }

    def lines(self, count: int, generator: torch.Generator) -> list[str]:
        """Fresh lines, without pads.

        Args:
            count: how many.
            generator: on the CPU.
        """
        return [_line(code) for code in _codes(count, generator).tolist()]

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        return self._encode(_codes(count, generator))

    def __len__(self) -> int:
        return len(self._fixed)

    def _samples(self, index: Tensor) -> Tensor:
        return self._encode(self._fixed[index])

    def _encode(self, codes: Tensor) -> Tensor:
        lines = [_line(code) for code in codes.tolist()]
        sizes = np.array([len(line) for line in lines])[:, None]
        ids = np.full((len(lines), self.length), self.vocabulary.pad_id)
        ids[np.arange(self.length) < sizes] = self.vocabulary.encode_array("".join(lines))
        return torch.from_numpy(ids)


def _codes(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(_CODES, (count,), generator=generator, device="cpu")


def _line(code: int) -> str:
    """The line that a number below 2^28 stands for."""
    choices = []
    for draws in _DRAWS:
        code, draw = divmod(code, len(draws))
        choices.append(draws[draw])
    return render(choices)
