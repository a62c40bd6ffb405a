"""Vocabularies, corpora, tweet normalization, and a synthetic corpus of known entropy."""

from fastvae.text.corpus import Corpus, LineCorpus, WindowCorpus
from fastvae.text.reading import Reading
from fastvae.text.synthetic import SyntheticCorpus
from fastvae.text.tweets import normalize_tweet
from fastvae.text.vocabulary import ByteVocabulary, CharVocabulary, Vocabulary

__all__ = [
    "ByteVocabulary",
    "CharVocabulary",
    "Corpus",
    "LineCorpus",
    "Reading",
    "SyntheticCorpus",
    "Vocabulary",
    "WindowCorpus",
    "normalize_tweet",
]
