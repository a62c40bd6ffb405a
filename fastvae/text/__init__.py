"""Vocabularies, corpora, tweet normalization, and a synthetic corpus of known entropy."""

from fastvae.text.corpus import Corpus, LineCorpus, WindowCorpus
from fastvae.text.reading import Reading
from fastvae.text.survey import Survey, survey
from fastvae.text.synthetic import SyntheticCorpus
from fastvae.text.tweets import normalize_tweet
from fastvae.text.vocabulary import (
    ByteVocabulary,
    CharVocabulary,
    OutOfVocabularyError,
    TokenVocabulary,
    Vocabulary,
)

__all__ = [
    "ByteVocabulary",
    "CharVocabulary",
    "Corpus",
    "LineCorpus",
    "OutOfVocabularyError",
    "Reading",
    "Survey",
    "SyntheticCorpus",
    "TokenVocabulary",
    "Vocabulary",
    "WindowCorpus",
    "normalize_tweet",
    "survey",
]
